"""The model being trained: a Megatron-core GPT split by tensors and layers. The only home of Megatron and Transformer Engine."""
