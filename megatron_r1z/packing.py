"""Samples to micro-batches: balanced over data-parallel ranks, packed without padding, one denominator for the whole step.

Shapes: T packed tokens of a micro-batch, R response tokens in it, S sequences, N samples of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megatron_r1z.types import Sample


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes on one data-parallel rank.

    The hidden state at position `rows_R[j]` predicts the response token `targets_R[j]`.
    """

    token_ids_T: Tensor
    position_ids_T: Tensor
    cu_seqlens_S1: Tensor
    """int32, boundaries of the S sequences: 0, ..., T."""
    max_seqlen: int
    rows_R: Tensor
    targets_R: Tensor
    advantages_R: Tensor
    weights_R: Tensor
    engine_logprobs_R: Tensor
    denominator: int
    """Its part of the step's denominator D: the parts of all micro-batches and data-parallel ranks add up to D."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.token_ids_T.numel()


@dataclass(frozen=True)
class GlobalBatch:
    """One data-parallel rank's part of one optimizer step."""

    micro_batches: tuple[MicroBatch, ...]
    num_samples: int
    """N, over all ranks; samples without a gradient count although they are in no micro-batch."""
    denominator: int
    """D of `objective.py`, over all ranks."""


@dataclass(frozen=True)
class PackingRules:
    """How samples may be put together; the same on every rank."""

    data_parallel_size: int
    micro_batch_tokens: int
    tokens_multiple: int = 1
    """T is padded up to a multiple of this (tensor-parallel size under sequence parallelism)."""
    micro_batches_multiple: int = 1
    """Number of micro-batches is rounded up to a multiple of this (pipeline size under the interleaved schedule)."""
    equal_micro_batches: bool = False
    """Pad every micro-batch to the T of the rank's longest (pipeline stages exchange activations of one size)."""
    pad_sequences: bool = False
    """Pad every sequence to the longest of the step instead of packing."""


def pack(
    samples: Sequence[Sample],
    rules: PackingRules,
    data_rank: int,
    *,
    token_weight: Callable[[int], float],
    denominator: int,
    skip_zero_advantage: bool = True,
) -> GlobalBatch:
    """Make `data_rank`'s micro-batches of one optimizer step over `samples`.

    Every rank computes the whole assignment from the same samples, so nothing is communicated. Samples with advantage 0 have neither
    loss nor gradient under any objective of the table: they are left out of the forward pass, and stay in N and D.
    """
    trained = [sample for sample in samples if sample.advantage != 0.0 or not skip_zero_advantage]
    longest = max((len(sample.token_ids) for sample in trained), default=1)
    width = longest if rules.pad_sequences else 0
    ranks = _balance(trained, rules.data_parallel_size)
    bins = [_fill(rank_samples, rules.micro_batch_tokens, width) for rank_samples in ranks]
    most = max(1, *(len(rank_bins) for rank_bins in bins))
    count = -(-most // rules.micro_batches_multiple) * rules.micro_batches_multiple
    mine = bins[data_rank] + [[] for _ in range(count - len(bins[data_rank]))]
    totals = [_num_tokens(members, rules.tokens_multiple, width) for members in mine]
    if rules.equal_micro_batches:
        totals = [max(totals)] * count
    micro_batches = tuple(
        _make_micro_batch(members, total, width, longest, token_weight, denominator if data_rank == 0 and index == 0 else 0)
        for index, (members, total) in enumerate(zip(mine, totals, strict=True))
    )
    return GlobalBatch(micro_batches, len(samples), denominator)


def _balance(samples: Sequence[Sample], num_ranks: int) -> list[list[Sample]]:
    """Longest first, each to the rank with the fewest tokens so far."""
    ranks: list[list[Sample]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    for sample in sorted(samples, key=lambda sample: -len(sample.token_ids)):
        rank = load.index(min(load))
        ranks[rank].append(sample)
        load[rank] += len(sample.token_ids)
    return ranks


def _fill(samples: Sequence[Sample], budget: int, width: int) -> list[list[Sample]]:
    """First-fit decreasing into bins of `budget` tokens; a sample above the budget has a bin to itself."""
    bins: list[list[Sample]] = []
    room: list[int] = []
    for sample in samples:
        size = max(len(sample.token_ids), width)
        index = next((index for index, free in enumerate(room) if size <= free), None)
        if index is None:
            bins.append([sample])
            room.append(budget - size)
        else:
            bins[index].append(sample)
            room[index] -= size
    return bins


def _num_tokens(samples: Sequence[Sample], multiple: int, width: int) -> int:
    """T, at least one multiple: a micro-batch without samples holds padding only."""
    tokens = sum(max(len(sample.token_ids), width) for sample in samples)
    return max(-(-tokens // multiple), 1) * multiple


def _make_micro_batch(
    samples: Sequence[Sample], total: int, width: int, longest: int, token_weight: Callable[[int], float], denominator: int
) -> MicroBatch:
    tokens: list[int] = []
    positions: list[int] = []
    boundaries = [0]
    rows: list[int] = []
    targets: list[int] = []
    advantages: list[float] = []
    weights: list[float] = []
    engine: list[float] = []
    for sample in samples:
        length, padded = sample.response_length, max(len(sample.token_ids), width)
        first = len(tokens) + sample.prompt_length - 1
        rows.extend(range(first, first + length))
        targets.extend(sample.token_ids[sample.prompt_length :])
        advantages.extend([sample.advantage] * length)
        weights.extend([token_weight(length)] * length)
        engine.extend(sample.engine_logprobs or [0.0] * length)
        tokens.extend((*sample.token_ids, *[0] * (padded - len(sample.token_ids))))
        positions.extend(range(padded))
        boundaries.append(len(tokens))
    limit = max((end - start for start, end in pairwise(boundaries)), default=longest)
    while len(tokens) < total:  # sequences of padding, in no loss, none longer than a real one
        size = min(limit, total - len(tokens))
        tokens.extend([0] * size)
        positions.extend(range(size))
        boundaries.append(len(tokens))
    return MicroBatch(
        token_ids_T=torch.tensor(tokens, dtype=torch.int64),
        position_ids_T=torch.tensor(positions, dtype=torch.int64),
        cu_seqlens_S1=torch.tensor(boundaries, dtype=torch.int32),
        max_seqlen=max(end - start for start, end in pairwise(boundaries)),
        rows_R=torch.tensor(rows, dtype=torch.int64),
        targets_R=torch.tensor(targets, dtype=torch.int64),
        advantages_R=torch.tensor(advantages, dtype=torch.float32),
        weights_R=torch.tensor(weights, dtype=torch.float32),
        engine_logprobs_R=torch.tensor(engine, dtype=torch.float32),
        denominator=denominator,
    )
