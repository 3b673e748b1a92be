"""Dr. GRPO (arXiv 2503.20783) on a Megatron-core policy, with rollouts by vLLM.

    prompts -> rollout (vLLM) -> grade -> advantages -> pack -> Megatron update -> reshard -> vLLM

Start reading at `loop.py`; what flows between the stages is in `types.py`.
"""

__version__ = "0.1.0"
