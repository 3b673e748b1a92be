"""Sampling responses: the vLLM engine in the rank's own process. The only home of vLLM. `vllm_engine` is what a run imports."""
