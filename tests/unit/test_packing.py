"""Micro-batches: whatever the split, each response token is trained on once, next to the state that predicts it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1z.packing import GlobalBatch, MicroBatch, PackingRules, pack
from megatron_r1z.types import Sample

DENOMINATOR = 321


def make_sample(index: int, prompt: int, response: int, advantage: float) -> Sample:
    """Token ids and log-probs that no other sample has; positive, so that padding is told apart."""
    first = 1000 * (index + 1)
    return Sample(
        sample_id=f"{index}/0",
        token_ids=tuple(range(first, first + prompt + response)),
        prompt_length=prompt,
        advantage=advantage,
        engine_logprobs=tuple(-(first + place) / 2**20 for place in range(response)),
        policy_version=0,
    )


@st.composite
def samples(draw: Any, max_size: int = 12) -> list[Sample]:
    rows = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30), st.sampled_from([0.875, -0.125, 0.0])), max_size=max_size))
    return [make_sample(index, *row) for index, row in enumerate(rows)]


RULES = st.builds(
    PackingRules,
    data_parallel_size=st.integers(1, 4),
    micro_batch_tokens=st.integers(1, 100),
    tokens_multiple=st.integers(1, 5),
    micro_batches_multiple=st.integers(1, 3),
    equal_micro_batches=st.booleans(),
    pad_sequences=st.booleans(),
)


def weight(length: int) -> float:
    return 1.0 / (length + 1)


def pack_all(rows: Sequence[Sample], rules: PackingRules, *, skip: bool = True) -> list[GlobalBatch]:
    """The batch of every data-parallel rank."""
    return [
        pack(rows, rules, rank, token_weight=weight, denominator=DENOMINATOR, skip_zero_advantage=skip)
        for rank in range(rules.data_parallel_size)
    ]


def micro_batches(batches: Sequence[GlobalBatch]) -> list[MicroBatch]:
    return [item for batch in batches for item in batch.micro_batches]


def sequences(item: MicroBatch) -> list[tuple[int, int]]:
    return list(pairwise(item.cu_seqlens_S1.tolist()))


def is_padding(item: MicroBatch, start: int, end: int) -> bool:
    return not item.token_ids_T[start:end].any()


@given(rows=samples(), rules=RULES, skip=st.booleans())
def test_every_trained_token_is_there_once_with_what_belongs_to_it(rows: list[Sample], rules: PackingRules, skip: bool) -> None:
    found = Counter(
        entry
        for item in micro_batches(pack_all(rows, rules, skip=skip))
        for entry in zip(
            item.targets_R.tolist(),
            item.advantages_R.tolist(),
            item.weights_R.tolist(),
            item.engine_logprobs_R.tolist(),
            strict=True,
        )
    )
    f32 = lambda value: torch.tensor(value, dtype=torch.float32).item()  # noqa: E731
    expected = Counter(
        (target, f32(row.advantage), f32(weight(row.response_length)), f32(logprob))
        for row in rows
        if row.advantage != 0 or not skip
        for target, logprob in zip(row.token_ids[row.prompt_length :], row.engine_logprobs, strict=True)
    )
    assert found == expected


@given(rows=samples(), rules=RULES)
def test_a_row_is_the_position_before_its_target_in_a_sequence_that_is_the_sample(rows: list[Sample], rules: PackingRules) -> None:
    by_first_token = {row.token_ids[0]: row for row in rows}
    for item in micro_batches(pack_all(rows, rules)):
        of_row = dict(zip(item.rows_R.tolist(), item.targets_R.tolist(), strict=True))
        assert len(of_row) == item.rows_R.numel()
        for start, end in sequences(item):
            assert item.position_ids_T[start:end].tolist() == list(range(end - start))
            assert end - start <= item.max_seqlen
            targets = {place - start: of_row.pop(place) for place in range(start, end) if place in of_row}
            if is_padding(item, start, end):
                assert not targets
                continue
            row = by_first_token[int(item.token_ids_T[start])]
            padding = (0,) * (end - start - len(row.token_ids))
            assert tuple(item.token_ids_T[start:end].tolist()) == row.token_ids + padding
            assert targets == {place - 1: row.token_ids[place] for place in range(row.prompt_length, len(row.token_ids))}
        assert not of_row


@given(rows=samples(), rules=RULES)
def test_numbers_that_all_ranks_must_agree_on(rows: list[Sample], rules: PackingRules) -> None:
    batches = pack_all(rows, rules)
    counts = {len(batch.micro_batches) for batch in batches}
    assert len(counts) == 1
    assert counts.pop() % rules.micro_batches_multiple == 0
    assert {(batch.num_samples, batch.denominator) for batch in batches} == {(len(rows), DENOMINATOR)}
    assert sum(item.denominator for item in micro_batches(batches)) == DENOMINATOR


@given(rows=samples(), rules=RULES)
def test_sizes(rows: list[Sample], rules: PackingRules) -> None:
    for batch in pack_all(rows, rules):
        sizes = [item.num_tokens for item in batch.micro_batches]
        assert all(size > 0 and size % rules.tokens_multiple == 0 for size in sizes)
        if rules.equal_micro_batches:
            assert len(set(sizes)) == 1
        for item in batch.micro_batches:
            assert item.cu_seqlens_S1.dtype == torch.int32
            assert item.cu_seqlens_S1[0] == 0
            assert item.cu_seqlens_S1[-1] == item.num_tokens == item.position_ids_T.numel()
            assert (item.cu_seqlens_S1.diff() > 0).all()
            assert item.max_seqlen == item.cu_seqlens_S1.diff().max()


@given(rows=samples(), rules=RULES)
def test_the_budget_is_kept_unless_a_single_sample_exceeds_it(rows: list[Sample], rules: PackingRules) -> None:
    for item in micro_batches(pack_all(rows, rules)):
        real = [end - start for start, end in sequences(item) if not is_padding(item, start, end)]
        assert sum(real) <= rules.micro_batch_tokens or len(real) == 1


@given(rows=samples(), rules=RULES)
def test_padding_is_never_longer_than_what_is_real(rows: list[Sample], rules: PackingRules) -> None:
    """So that padding asks for no position and no work beyond what the samples need."""
    longest = max((len(row.token_ids) for row in rows if row.advantage != 0), default=1)
    for item in micro_batches(pack_all(rows, rules)):
        lengths = {True: [0], False: [0]}
        for start, end in sequences(item):
            lengths[is_padding(item, start, end)].append(end - start)
        assert max(lengths[True]) <= (max(lengths[False]) or longest)
        if not rules.equal_micro_batches:
            assert sum(lengths[True]) < rules.tokens_multiple or len(lengths[False]) == 1


@given(rows=samples(), rules=RULES)
def test_padded_sequences_have_the_width_of_the_longest_of_the_step(rows: list[Sample], rules: PackingRules) -> None:
    longest = max((len(row.token_ids) for row in rows if row.advantage != 0), default=0)
    for item in micro_batches(pack_all(rows, rules)):
        for start, end in sequences(item):
            if rules.pad_sequences and not is_padding(item, start, end):
                assert end - start == longest
            elif not is_padding(item, start, end):
                assert item.token_ids_T[start:end].all()


@given(rows=samples(max_size=40), ranks=st.integers(1, 4))
def test_ranks_get_about_the_same_number_of_tokens(rows: list[Sample], ranks: int) -> None:
    """Longest first, to the least loaded: no two ranks differ by more than one sample."""
    rules = PackingRules(data_parallel_size=ranks, micro_batch_tokens=100)
    loads = [int(sum(item.token_ids_T.bool().sum() for item in batch.micro_batches)) for batch in pack_all(rows, rules)]
    assert max(loads) - min(loads) <= max((len(row.token_ids) for row in rows), default=0)


@pytest.mark.parametrize("rows", [[], [make_sample(0, 3, 4, 0.0), make_sample(1, 2, 5, 0.0)]], ids=["no samples", "all zero"])
def test_a_step_without_gradient_still_has_a_micro_batch(rows: list[Sample]) -> None:
    for batch in pack_all(rows, PackingRules(data_parallel_size=2, micro_batch_tokens=64, tokens_multiple=4, micro_batches_multiple=2)):
        assert len(batch.micro_batches) == 2
        assert batch.num_samples == len(rows)
        assert all(item.num_tokens == 4 and item.rows_R.numel() == 0 for item in batch.micro_batches)


def test_samples_without_engine_logprobs_get_zeros() -> None:
    """Documents of pre-training come from no engine."""
    row = Sample("0", (5, 6, 7, 8), 1, 1.0, (), 0)
    (batch,) = pack_all([row], PackingRules(data_parallel_size=1, micro_batch_tokens=64))
    assert batch.micro_batches[0].engine_logprobs_R.tolist() == [0.0] * 3


@given(rows=samples(), rules=RULES)
def test_packing_depends_on_nothing_but_its_arguments(rows: list[Sample], rules: PackingRules) -> None:
    for first, second in zip(micro_batches(pack_all(rows, rules)), micro_batches(pack_all(rows, rules)), strict=True):
        assert all(torch.equal(torch.as_tensor(first.__dict__[name]), torch.as_tensor(second.__dict__[name])) for name in first.__dict__)
