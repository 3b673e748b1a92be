"""Layers of the local spec: what megatron-core's own local layers cannot do on packed sequences under sequence parallelism.

With Transformer Engine none of this is used. Numerics follow transformers' Llama: normalisation and softmax in float32 inside the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megatron_r1z.packing import context_indices


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm whose weight takes part in the gradient sum of sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # read by finalize_model_grads

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


SHORT = 64
"""Sequences of at most so many tokens share a grid: longer ones take more time for filling than for a kernel call of their own (CPU)."""


class PackedAttention(torch.nn.Module):
    """Causal attention within each of the packed sequences, by torch's scaled dot product attention.

    One kernel call for each sequence, or, where all are short, a single one: then they are laid side by side in a [S, longest] grid, and
    causality keeps the filling at the end of a row out of every real position. Under context parallelism every rank gathers all keys and
    values and attends from the tokens that are its own, which is simple, and needs the memory of whole sequences.
    """

    def __init__(
        self, config: TransformerConfig, *_unused: Any, softmax_scale: float | None = None, pg_collection: Any = None, **_more: Any
    ) -> None:
        super().__init__()
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels or 0)
        self.context: dist.ProcessGroup | None = None if pg_collection is None else pg_collection.cp

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None = None, *, packed_seq_params: PackedSeqParams, **_unused: Any
    ) -> Tensor:
        """[T, heads, d], [T, kv heads, d], [T, kv heads, d] -> [T, heads * d]."""
        if self.context is not None and self.context.size() > 1:
            attended = self._over_context(query, key, value, packed_seq_params.cu_seqlens_q, self.context)
        elif packed_seq_params.max_seqlen_q <= SHORT:
            attended = self._in_a_grid((query, key, value), packed_seq_params)
        else:
            attended = self._one_by_one((query, key, value), packed_seq_params)
        return attended.reshape(query.shape[0], -1)

    def _one_by_one(self, packed_3THD: Sequence[Tensor], packed: PackedSeqParams) -> Tensor:
        lengths = packed.cu_seqlens_q.diff().tolist()
        sequences = zip(*(torch.split(tensor, lengths) for tensor in packed_3THD), strict=True)
        return torch.cat([self._attend([tensor[None].transpose(1, 2) for tensor in tensors])[0] for tensors in sequences])

    def _in_a_grid(self, packed_3THD: Sequence[Tensor], packed: PackedSeqParams) -> Tensor:
        grid = _grid(packed)
        sequence_T, offset_T, _ = grid
        return self._attend([_to_rows(tensor, grid) for tensor in packed_3THD])[sequence_T, offset_T]

    def _over_context(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens_S1: Tensor, group: dist.ProcessGroup) -> Tensor:
        """This rank's queries, sequence by sequence, against the keys and values of all ranks; the mask goes by true positions."""
        keys, values = _gather_sequences(torch.cat([key, value], dim=1), cu_seqlens_S1, group).chunk(2, dim=1)
        index_T = context_indices(cu_seqlens_S1, group.size(), group.rank())
        boundaries = cu_seqlens_S1.tolist()
        mine = [(end - start) // group.size() for start, end in pairwise(boundaries)]
        attended = []
        for (start, end), queries, index in zip(pairwise(boundaries), torch.split(query, mine), torch.split(index_T, mine), strict=True):
            tensors = [tensor[None].transpose(1, 2) for tensor in (queries, keys[start:end], values[start:end])]
            is_past = index[:, None] >= torch.arange(start, end, device=index.device)
            attended.append(self._attend(tensors, is_past)[0])
        return torch.cat(attended)

    def _attend(self, rows_3SHLD: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """Query, key and value [S, heads, length, d] -> [S, length, heads, d]; causal, or where `mask` [queries, keys] is true."""
        query, key, value = rows_3SHLD
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped
        ).transpose(1, 2)


def _gather_sequences(part_THD: Tensor, cu_seqlens_S1: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tokens of all context-parallel ranks in their true order; the backward pass adds up the ranks' gradients of each."""
    gathered: Tensor = gather_from_sequence_parallel_region(part_THD, group=group)
    order = torch.cat([context_indices(cu_seqlens_S1, group.size(), rank) for rank in range(group.size())])
    return gathered[order.argsort()]


Grid = tuple[Tensor, Tensor, int]
"""Sequence number and offset of each packed token, and the longest length."""


def _grid(packed: PackedSeqParams) -> Grid:
    boundaries = packed.cu_seqlens_q.long()
    lengths = boundaries.diff()
    sequence_T = torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths)
    offset_T = torch.arange(int(boundaries[-1]), device=lengths.device) - boundaries[:-1][sequence_T]
    return sequence_T, offset_T, packed.max_seqlen_q


def _to_rows(packed_THD: Tensor, grid: Grid) -> Tensor:
    """[T, heads, d] -> [S, heads, longest, d]."""
    sequence_T, offset_T, longest = grid
    rows = packed_THD.new_zeros(int(sequence_T[-1]) + 1, longest, *packed_THD.shape[1:])
    return rows.index_put((sequence_T, offset_T), packed_THD).transpose(1, 2)
