"""The model being trained: a Megatron-core GPT split by tensor and pipeline parallelism. The only home of Megatron and Transformer Engine."""
