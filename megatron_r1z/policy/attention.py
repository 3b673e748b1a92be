"""Which attention Transformer Engine takes for packed sequences on this GPU: one that keeps the scores cannot train at these lengths."""

from __future__ import annotations

from typing import Literal

import torch

from megatron_r1z.config import ParallelConfig
from megatron_r1z.errors import ConfigError
from megatron_r1z.layout.families import ModelShape

Attention = Literal["flash", "fused", "unfused", "none"]


def chosen_attention(shape: ModelShape, parallel: ParallelConfig, max_tokens: int) -> Attention:
    """What `DotProductAttention` of Transformer Engine 2.20 takes for bf16 sequences of `max_tokens` under these degrees.

    It asks flash-attn and cuDNN, whose answers depend on the GPU. `none`: nothing can compute it.
    """
    from transformer_engine.pytorch.attention.dot_product_attention.utils import AttentionParams, get_attention_backend

    tokens = parallel.micro_batch_tokens // parallel.context_parallel_size
    question = AttentionParams(
        qkv_type=torch.Tensor,
        qkv_dtype=torch.bfloat16,
        qkv_layout="thd_thd_thd",
        batch_size=max(1, parallel.micro_batch_tokens // max_tokens),
        num_heads=shape.num_heads // parallel.tensor_parallel_size,
        num_gqa_groups=max(1, shape.num_kv_heads // parallel.tensor_parallel_size),
        max_seqlen_q=max_tokens,
        max_seqlen_kv=max_tokens,
        num_tokens_q=tokens,
        num_tokens_kv=tokens,
        head_dim_qk=shape.head_dim,
        head_dim_v=shape.head_dim,
        attn_mask_type="padding_causal",
        context_parallel=parallel.context_parallel_size > 1,
        cp_size=parallel.context_parallel_size,
        is_training=True,
    )
    use_flash, _, use_fused, _, use_unfused, _ = get_attention_backend(question)
    if use_flash:
        return "flash"
    return "fused" if use_fused else "unfused" if use_unfused else "none"


def check_attention(found: Attention, parallel: ParallelConfig, max_tokens: int) -> None:
    """Refuse an attention that keeps scores: [sequences, heads, longest, longest] of every layer, which no plan has.

    Raises:
        ConfigError: with the lengths and what to install.
    """
    if found not in ("flash", "fused"):
        way = "none at all" if found == "none" else "its unfused one, which keeps the scores of every pair of tokens"
        raise ConfigError(
            f"for packed sequences of up to {max_tokens} tokens in bf16 Transformer Engine has {way} on this GPU, under "
            f"parallel.tensor_parallel_size {parallel.tensor_parallel_size} and parallel.context_parallel_size "
            f"{parallel.context_parallel_size}; install flash-attn (GPUs before Hopper need it), or see what it says with NVTE_DEBUG=1 "
            "NVTE_DEBUG_LEVEL=2."
        )
