"""Samples to micro-batches: balanced over data-parallel ranks, packed without padding, one denominator for the whole step.

Context-parallel ranks take their parts of the same sequences.

Shapes: T packed tokens of a micro-batch on one rank, R response tokens among them, S sequences, N samples of the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import torch
from torch import Tensor

from megatron_r1z.layout.families import ModelShape
from megatron_r1z.types import Sample

CLOSE = 0.005
"""Parts are levelled until the largest is above the mean by no more than this share of it."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes on one rank: under context parallelism its part of sequences that several ranks share.

    The hidden state at position `rows_R[j]` predicts the response token `targets_R[j]`; all fields `_R` have an entry for each.
    """

    token_ids_T: Tensor
    position_ids_T: Tensor
    """Within the sequence."""
    cu_seqlens_S1: Tensor
    """int32, boundaries of the S sequences, the parts of all context-parallel ranks together: 0, ..., cp * T."""
    max_seqlen: int
    """Of the sequences, all parts together."""
    rows_R: Tensor
    targets_R: Tensor
    advantages_R: Tensor
    weights_R: Tensor
    temperatures_R: Tensor
    engine_logprobs_R: Tensor
    values_R: Tensor
    """The critic's when the samples were made; 0 without a critic, as the returns."""
    returns_R: Tensor
    sequences_R: Tensor
    """Number of the sequence that the token is in."""
    sample_ids: tuple[str, ...]
    """Of the sequences that are samples, which come first; those behind them are padding."""
    denominator: int
    """Its part of the step's denominator D: the parts of all micro-batches, data-parallel and context-parallel ranks add up to D."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.token_ids_T.numel()


@dataclass(frozen=True)
class GlobalBatch:
    """One rank's part of one optimizer step."""

    micro_batches: tuple[MicroBatch, ...]
    num_samples: int
    """N, over all ranks; samples without a gradient count although they are in no micro-batch, unless their group was filtered out."""
    denominator: int
    """D of `objective.py`, over all ranks."""


@dataclass(frozen=True)
class SampleCost:
    """What a sample costs; only the proportions matter. The default is a dense model of hidden size 1024, its output layer left out.

    >>> SampleCost(token=12, pair=1).of(tokens=10, responses=4)
    220
    """

    token: int = 12 * 1024
    """Matrices of the layers, per token."""
    pair: int = 1
    """Attention, per pair of tokens of the sample."""
    response: int = 0
    """Output layer, per response token: no other row goes through it."""

    @classmethod
    def of_model(cls, shape: ModelShape) -> SampleCost:
        """Multiplications by a weight or between activations; a causal pair is one product with a key and a value of every head, halved."""
        queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        router, experts = shape.num_experts * shape.hidden_size, shape.experts_per_token or 1
        feed_forward = 3 * experts * shape.hidden_size * shape.ffn_size + router
        layer = shape.hidden_size * 2 * (queries + keys) + feed_forward
        return cls(shape.num_layers * layer, shape.num_layers * queries, shape.hidden_size * shape.vocab_size)

    def of(self, tokens: int, responses: int) -> int:
        """Cost of a sample of `tokens` tokens, `responses` of them in the response."""
        return tokens * self.token + tokens**2 * self.pair + responses * self.response


@dataclass(frozen=True)
class PackingRules:
    """How samples may be put together; the same on every rank."""

    data_parallel_size: int
    micro_batch_tokens: int
    """Budget of a micro-batch, the parts of all context-parallel ranks together."""
    context_parallel_size: int = 1
    tokens_multiple: int = 1
    """T is padded up to a multiple of this (tensor-parallel size under sequence parallelism)."""
    micro_batches_multiple: int = 1
    """Number of micro-batches is rounded up to a multiple of this (pipeline size under the interleaved schedule)."""
    equal_micro_batches: bool = False
    """Pad every micro-batch to the T of the rank's longest (pipeline stages exchange activations of one size)."""
    pad_sequences: bool = False
    """Pad every sequence to the longest of the step instead of packing."""
    cost: SampleCost = SampleCost()
    """What the data-parallel ranks are balanced by."""

    @property
    def sequence_multiple(self) -> int:
        """Every sequence is padded to a multiple of this, so that it can be cut for `context_indices`."""
        return 2 * self.context_parallel_size if self.context_parallel_size > 1 else 1

    @property
    def total_multiple(self) -> int:
        """The tokens of a micro-batch, the parts of all context-parallel ranks together, are a multiple of this."""
        return math.lcm(self.sequence_multiple, self.context_parallel_size * self.tokens_multiple)


def pack(
    samples: Sequence[Sample],
    rules: PackingRules,
    data_rank: int,
    context_rank: int,
    *,
    token_weight: Callable[[int], float],
    denominator: int,
    skip_zero_advantage: bool = True,
) -> GlobalBatch:
    """Make the micro-batches that one rank takes in an optimizer step over `samples`.

    Every rank computes the whole assignment from the same samples, so nothing is communicated: samples to data-parallel ranks of about
    equal cost, then each one's to the fewest micro-batches within the budget that serve all, of about equal T; context-parallel ranks
    share each micro-batch. Samples with advantage 0 have neither loss nor gradient under any objective of the table: they are left out of
    the forward pass, and stay in N and D. So are those without a response token, of which nothing is asked.
    """
    trained = [sample for sample in samples if sample.response_length and (sample.has_gradient or not skip_zero_advantage)]
    pad = _Padding.of(trained, rules)
    ranks = _split_samples(trained, rules, pad)
    sizes = [[min(pad.length(sample), rules.micro_batch_tokens) for sample in rank_samples] for rank_samples in ranks]
    most = max(1, *(_fewest_parts(rank_sizes, rules.micro_batch_tokens) for rank_sizes in sizes))
    count = _rounded(most, rules.micro_batches_multiple)
    parts = _fill(sizes[data_rank], rules.micro_batch_tokens, count)
    mine = [[ranks[data_rank][index] for index in part] for part in parts]
    totals = [pad.total(members) for members in mine]
    if rules.equal_micro_batches:
        totals = [max(totals)] * count
    micro_batches = tuple(
        _make_micro_batch(members, total, pad, token_weight, denominator if data_rank == 0 and index == 0 else 0)
        for index, (members, total) in enumerate(zip(mine, totals, strict=True))
    )
    if rules.context_parallel_size > 1:
        micro_batches = tuple(_context_part(batch, rules.context_parallel_size, context_rank) for batch in micro_batches)
    return GlobalBatch(micro_batches, sum(sample.is_counted for sample in samples), denominator)


@dataclass(frozen=True)
class _Padding:
    """How long sequences and micro-batches become."""

    width: int
    """No sequence is shorter; 0 under packing."""
    longest: int
    """The longest sequence of the step; at least one multiple."""
    multiple: int
    """Of every sequence."""
    total_multiple: int
    """Of a micro-batch."""

    @classmethod
    def of(cls, samples: Sequence[Sample], rules: PackingRules) -> _Padding:
        multiple = rules.sequence_multiple
        longest = _rounded(max((len(sample.token_ids) for sample in samples), default=1), multiple)
        return cls(longest if rules.pad_sequences else 0, longest, multiple, rules.total_multiple)

    def length(self, sample: Sample) -> int:
        return _rounded(max(len(sample.token_ids), self.width), self.multiple)

    def total(self, samples: Sequence[Sample]) -> int:
        """At least one multiple: a micro-batch without samples holds padding only."""
        return _rounded(max(sum(map(self.length, samples)), 1), self.total_multiple)


def _rounded(number: int, multiple: int) -> int:
    """Up to a multiple."""
    return -(-number // multiple) * multiple


def context_indices(cu_seqlens_S1: Tensor, size: int, rank: int) -> Tensor:
    """Which packed tokens one of `size` context-parallel ranks holds: int64, ascending.

    Each sequence is cut into 2 * size chunks, of which rank r has chunks r and 2 * size - 1 - r, so that causal attention costs all ranks
    the same. The cut is that of Transformer Engine (`thd_get_partitioned_indices`), and the one by which megatron-core hands out rotary
    positions (`rope_utils._get_thd_freqs_on_this_cp_rank`).

    >>> context_indices(torch.tensor([0, 8, 12]), 2, 0).tolist()
    [0, 1, 6, 7, 8, 11]
    """
    starts_S, lengths_S = cu_seqlens_S1[:-1].long(), cu_seqlens_S1.diff().long() // size
    sequence_T = torch.repeat_interleave(torch.arange(lengths_S.numel(), device=lengths_S.device), lengths_S)
    offset_T = torch.arange(sequence_T.numel(), device=lengths_S.device) - (starts_S // size)[sequence_T]
    chunk_T = lengths_S[sequence_T] // 2
    chunks_before_T = torch.where(offset_T < chunk_T, rank, 2 * (size - 1) - rank)
    return starts_S[sequence_T] + offset_T + chunk_T * chunks_before_T


def _context_part(batch: MicroBatch, size: int, rank: int) -> MicroBatch:
    """What one of `size` context-parallel ranks takes of a whole micro-batch."""
    index_T = context_indices(batch.cu_seqlens_S1, size, rank)
    place = torch.full((batch.num_tokens,), -1)
    place[index_T] = torch.arange(index_T.numel())
    is_here_R = place[batch.rows_R] >= 0
    of_responses = {item.name: getattr(batch, item.name)[is_here_R] for item in fields(batch) if item.name.endswith("_R")}
    return replace(
        batch,
        token_ids_T=batch.token_ids_T[index_T],
        position_ids_T=batch.position_ids_T[index_T],
        denominator=batch.denominator if rank == 0 else 0,
        **of_responses | {"rows_R": place[of_responses["rows_R"]]},
    )


def _split_samples(samples: Sequence[Sample], rules: PackingRules, pad: _Padding) -> list[list[Sample]]:
    """The samples of each data-parallel rank, about the same cost on all."""
    costs = [rules.cost.of(pad.length(sample), sample.response_length) for sample in samples]
    return [[samples[index] for index in part] for part in _split(costs, rules.data_parallel_size, sum(costs))]


def _fewest_parts(sizes: Sequence[int], budget: int) -> int:
    """Parts of at most `budget` that first-fit decreasing needs, or fewer where `_split` can. No size exceeds the budget."""
    enough = len(_first_fit(sizes, budget))
    fewer = range(max(-(-sum(sizes) // budget), 1), enough)
    return next((count for count in fewer if _fits(_split(sizes, count, budget), sizes, budget)), enough)


def _fill(sizes: Sequence[int], budget: int, count: int) -> list[list[int]]:
    """Indices of `sizes` in `count` parts of about equal totals, none above `budget`; `count` is at least `_fewest_parts`."""
    parts = _split(sizes, count, budget)
    if _fits(parts, sizes, budget):
        return parts
    parts = _first_fit(sizes, budget)
    return _level([*parts, *([] for _ in range(count - len(parts)))], sizes, budget)


def _fits(parts: Sequence[Sequence[int]], sizes: Sequence[int], budget: int) -> bool:
    return all(sum(sizes[index] for index in part) <= budget for part in parts)


def _first_fit(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of `sizes`, largest first, each in the first part of at most `budget` that has room."""
    parts: list[list[int]] = []
    room: list[int] = []
    for index in _largest_first(sizes):
        size = sizes[index]
        place = next((place for place, free in enumerate(room) if size <= free), None)
        if place is None:
            parts.append([index])
            room.append(budget - size)
        else:
            parts[place].append(index)
            room[place] -= size
    return parts


def _split(sizes: Sequence[int], count: int, limit: int) -> list[list[int]]:
    """Indices of `sizes` in `count` parts of about equal totals: largest first, each to the emptiest part, then `_level`."""
    parts: list[list[int]] = [[] for _ in range(count)]
    totals = [0] * count
    for index in _largest_first(sizes):
        emptiest = totals.index(min(totals))
        parts[emptiest].append(index)
        totals[emptiest] += sizes[index]
    return _level(parts, sizes, limit)


def _largest_first(sizes: Sequence[int]) -> list[int]:
    return sorted(range(len(sizes)), key=lambda index: -sizes[index])


def _level(parts: list[list[int]], sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Lower the largest total by exchanges until it is close to the mean and not above `limit`, or until no exchange lowers it.

    The fullest part gives a size and gets a smaller one or none, from the emptiest part that has a suitable one.
    """
    totals = [sum(sizes[index] for index in part) for part in parts]
    goal = min(limit, (1 + CLOSE) * sum(totals) / len(totals))
    while max(totals) > goal:
        full = totals.index(max(totals))
        others = sorted(range(len(parts)), key=lambda place: totals[place])
        found = ((_exchange(sizes, parts[full], parts[other], totals[full] - totals[other]), other) for other in others)
        best = next(((exchange, other) for exchange, other in found if exchange is not None), None)
        if best is None:
            break
        (moved, given, taken), other = best
        parts[full] = [*(index for index in parts[full] if index != given), *taken]
        parts[other] = [*(index for index in parts[other] if index not in taken), given]
        totals[full] -= moved
        totals[other] += moved
    return parts


def _exchange(sizes: Sequence[int], full: Sequence[int], other: Sequence[int], gap: int) -> tuple[int, int, tuple[int, ...]] | None:
    """The exchange that brings two parts, `gap` apart, closest together: what it moves, the index given and the one taken, if any."""
    moves = ((sizes[index], index, ()) for index in full)
    swaps = ((sizes[index] - sizes[taken], index, (taken,)) for index in full for taken in other)
    suitable = (item for item in (*moves, *swaps) if 0 < item[0] < gap)
    return min(suitable, key=lambda item: abs(2 * item[0] - gap), default=None)


def _make_micro_batch(
    samples: Sequence[Sample], total: int, pad: _Padding, token_weight: Callable[[int], float], denominator: int
) -> MicroBatch:
    """Whole sequences, `total` tokens."""
    tokens: list[int] = []
    positions: list[int] = []
    boundaries = [0]
    rows: list[int] = []
    targets: list[int] = []
    advantages: list[float] = []
    weights: list[float] = []
    temperatures: list[float] = []
    engine: list[float] = []
    values: list[float] = []
    returns: list[float] = []
    sequences: list[int] = []
    for number, sample in enumerate(samples):
        length, padded = sample.response_length, pad.length(sample)
        first = len(tokens) + sample.prompt_length - 1
        rows.extend(range(first, first + length))
        targets.extend(sample.token_ids[sample.prompt_length :])
        advantages.extend(sample.advantages)
        weights.extend([token_weight(length)] * length)
        temperatures.extend([sample.temperature] * length)
        engine.extend(sample.engine_logprobs or [0.0] * length)
        values.extend(sample.values or [0.0] * length)
        returns.extend(sample.returns if sample.values else [0.0] * length)
        sequences.extend([number] * length)
        tokens.extend((*sample.token_ids, *[0] * (padded - len(sample.token_ids))))
        positions.extend(range(padded))
        boundaries.append(len(tokens))
    limit = max((end - start for start, end in pairwise(boundaries)), default=pad.longest)
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
        temperatures_R=torch.tensor(temperatures, dtype=torch.float32),
        engine_logprobs_R=torch.tensor(engine, dtype=torch.float32),
        values_R=torch.tensor(values, dtype=torch.float32),
        returns_R=torch.tensor(returns, dtype=torch.float32),
        sequences_R=torch.tensor(sequences, dtype=torch.int64),
        sample_ids=tuple(sample.sample_id for sample in samples),
        denominator=denominator,
    )
