"""The model being trained: a Megatron-core GPT split by tensors and layers. The only home of Megatron and Transformer Engine.

`policy` and `critic` are what the loops use; README.md here says what stands behind them.
"""
