"""Micro-batches: whatever the split, each response token is trained on once, next to the state that predicts it."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1z.layout.families import ModelShape, layer_tensors
from megatron_r1z.packing import GlobalBatch, MicroBatch, PackingRules, SampleCost, context_indices, pack
from megatron_r1z.types import Sample

DENOMINATOR = 321
QUESTIONS = Path(__file__).parents[2].parent / "shared" / "data" / "train"

DENSE = ModelShape("qwen2", 28, 1536, 12, 2, 128, 8960, 151936, True, True, False, 1e6, None, 1e-6, 32768)
MIXTURE = ModelShape("qwen3_moe", 4, 64, 8, 2, 16, 48, 311, False, False, True, 1e6, None, 1e-6, 4096, 16, 3)


def make_sample(index: int, prompt: int, response: int, advantage: float | tuple[float, ...]) -> Sample:
    """Token ids and log-probs that no other sample has; positive, so that padding is told apart."""
    first = 1000 * (index + 1)
    return Sample(
        sample_id=f"{index}/0",
        token_ids=tuple(range(first, first + prompt + response)),
        prompt_length=prompt,
        advantage=advantage,
        temperature=0.5 + index / 8,
        engine_logprobs=tuple(-(first + place) / 2**20 for place in range(response)),
        policy_version=0,
    )


@st.composite
def samples(draw: Any, max_size: int = 12) -> list[Sample]:
    """With an advantage for all tokens or one for each, 0 among them."""
    rows = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30), st.sampled_from([0.875, -0.125, 0.0, None])), max_size=max_size))
    return [
        make_sample(index, prompt, response, per_token(draw(st.integers(0, 99)), response) if advantage is None else advantage)
        for index, (prompt, response, advantage) in enumerate(rows)
    ]


def per_token(seed: int, count: int) -> tuple[float, ...]:
    """Nothing but zeros for every tenth seed."""
    draw = random.Random(seed)
    return tuple(draw.choice((0.0, 0.5, -1.5)) if seed % 10 else 0.0 for _ in range(count))


def advantages_of(row: Sample) -> list[float]:
    return list(row.advantage) if isinstance(row.advantage, tuple) else [row.advantage] * row.response_length


def is_trained(row: Sample) -> bool:
    return set(advantages_of(row)) != {0.0}


RULES = st.builds(
    PackingRules,
    data_parallel_size=st.integers(1, 4),
    micro_batch_tokens=st.integers(1, 100),
    context_parallel_size=st.integers(1, 3),
    tokens_multiple=st.integers(1, 5),
    micro_batches_multiple=st.integers(1, 3),
    equal_micro_batches=st.booleans(),
    pad_sequences=st.booleans(),
    cost=st.builds(SampleCost, token=st.integers(1, 9), pair=st.integers(0, 3), response=st.integers(0, 9)),
)


def weight(length: int) -> float:
    return 1.0 / (length + 1)


def pack_parts(rows: Sequence[Sample], rules: PackingRules, *, skip: bool = True) -> list[list[GlobalBatch]]:
    """The batch of every rank: for each data-parallel rank those of its context-parallel ranks."""
    return [
        [
            pack(rows, rules, data_rank, context_rank, token_weight=weight, denominator=DENOMINATOR, skip_zero_advantage=skip)
            for context_rank in range(rules.context_parallel_size)
        ]
        for data_rank in range(rules.data_parallel_size)
    ]


def pack_all(rows: Sequence[Sample], rules: PackingRules, *, skip: bool = True) -> list[GlobalBatch]:
    """The batch of every data-parallel rank, the parts of its context-parallel ranks put together."""
    return [joined(parts) for parts in pack_parts(rows, rules, skip=skip)]


def joined(parts: Sequence[GlobalBatch]) -> GlobalBatch:
    if len(parts) == 1:
        return parts[0]
    assert len({(part.num_samples, part.denominator, len(part.micro_batches)) for part in parts}) == 1
    together = zip(*(part.micro_batches for part in parts), strict=True)
    return replace(parts[0], micro_batches=tuple(join_micro_batches(items) for items in together))


def join_micro_batches(parts: Sequence[MicroBatch]) -> MicroBatch:
    """Whole sequences out of parts in which rank r has chunks r and 2 * cp - 1 - r of each."""
    whole_place = [[-1] * part.num_tokens for part in parts]
    for start, end in sequences(parts[0]):
        chunk = (end - start) // (2 * len(parts))
        for rank in range(len(parts)):
            first = start // len(parts)
            for half, number in enumerate((rank, 2 * len(parts) - 1 - rank)):
                begin = start + number * chunk
                whole_place[rank][first + half * chunk : first + (half + 1) * chunk] = range(begin, begin + chunk)
    places = torch.tensor([place for places in whole_place for place in places])
    rows = torch.cat([torch.tensor(whole_place[rank])[part.rows_R] for rank, part in enumerate(parts)])
    order = rows.argsort()

    def together(name: str) -> torch.Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    of_responses = ("targets_R", "advantages_R", "weights_R", "temperatures_R", "engine_logprobs_R", "sequences_R")
    assert sorted(places.tolist()) == list(range(len(places)))
    assert all(torch.equal(part.cu_seqlens_S1, parts[0].cu_seqlens_S1) for part in parts)
    assert len({(part.max_seqlen, part.sample_ids, part.num_tokens) for part in parts}) == 1
    return replace(
        parts[0],
        token_ids_T=together("token_ids_T")[places.argsort()],
        position_ids_T=together("position_ids_T")[places.argsort()],
        rows_R=rows[order],
        denominator=sum(part.denominator for part in parts),
        **{name: together(name)[order] for name in of_responses},
    )


def micro_batches(batches: Sequence[GlobalBatch]) -> list[MicroBatch]:
    return [item for batch in batches for item in batch.micro_batches]


def sequences(item: MicroBatch) -> list[tuple[int, int]]:
    return list(pairwise(item.cu_seqlens_S1.tolist()))


def rounded(length: int, rules: PackingRules) -> int:
    """A sequence's length as it is cut over context-parallel ranks."""
    multiple = 2 * rules.context_parallel_size if rules.context_parallel_size > 1 else 1
    return math.ceil(length / multiple) * multiple


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
            item.temperatures_R.tolist(),
            item.engine_logprobs_R.tolist(),
            strict=True,
        )
    )
    for item in micro_batches(pack_all(rows, rules, skip=skip)):
        for target, number in zip(item.targets_R.tolist(), item.sequences_R.tolist(), strict=True):
            assert item.sample_ids[number] == f"{target // 1000 - 1}/0"
    f32 = lambda value: torch.tensor(value, dtype=torch.float32).item()  # noqa: E731
    expected = Counter(
        (target, f32(advantage), f32(weight(row.response_length)), f32(row.temperature), f32(logprob))
        for row in rows
        if is_trained(row) or not skip
        for target, advantage, logprob in zip(row.token_ids[row.prompt_length :], advantages_of(row), row.engine_logprobs, strict=True)
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
def test_sizes_on_a_rank(rows: list[Sample], rules: PackingRules) -> None:
    """Context-parallel ranks have the same."""
    for parts in pack_parts(rows, rules):
        sizes = [[item.num_tokens for item in part.micro_batches] for part in parts]
        assert all(size > 0 and size % rules.tokens_multiple == 0 for size in sizes[0])
        assert sizes == [sizes[0]] * rules.context_parallel_size


@given(rows=samples(), rules=RULES)
def test_sizes_of_sequences(rows: list[Sample], rules: PackingRules) -> None:
    for batch in pack_all(rows, rules):
        sizes = [item.num_tokens for item in batch.micro_batches]
        if rules.equal_micro_batches:
            assert len(set(sizes)) == 1
        for item in batch.micro_batches:
            assert item.cu_seqlens_S1.dtype == torch.int32
            assert item.cu_seqlens_S1[0] == 0
            assert item.cu_seqlens_S1[-1] == item.num_tokens == item.position_ids_T.numel()
            assert (item.cu_seqlens_S1.diff() > 0).all()
            assert all(end - start == rounded(end - start, rules) for start, end in sequences(item))
            assert item.max_seqlen == item.cu_seqlens_S1.diff().max()


@given(rows=samples(), rules=RULES)
def test_the_budget_is_kept_unless_a_single_sample_exceeds_it(rows: list[Sample], rules: PackingRules) -> None:
    for item in micro_batches(pack_all(rows, rules)):
        real = [end - start for start, end in sequences(item) if not is_padding(item, start, end)]
        assert sum(real) <= rules.micro_batch_tokens or len(real) == 1


@given(rows=samples(), rules=RULES)
def test_padding_is_never_longer_than_what_is_real(rows: list[Sample], rules: PackingRules) -> None:
    """So that padding asks for no position and no work beyond what the samples need."""
    longest = rounded(max((len(row.token_ids) for row in rows if is_trained(row)), default=1), rules)
    multiple = math.lcm(rounded(1, rules), rules.context_parallel_size * rules.tokens_multiple)
    for item in micro_batches(pack_all(rows, rules)):
        lengths = {True: [0], False: [0]}
        for start, end in sequences(item):
            lengths[is_padding(item, start, end)].append(end - start)
        assert max(lengths[True]) <= (max(lengths[False]) or longest)
        if not rules.equal_micro_batches:
            assert sum(lengths[True]) < multiple or len(lengths[False]) == 1


@given(rows=samples(), rules=RULES)
def test_padded_sequences_have_the_width_of_the_longest_of_the_step(rows: list[Sample], rules: PackingRules) -> None:
    longest = rounded(max((len(row.token_ids) for row in rows if is_trained(row)), default=0), rules)
    for item in micro_batches(pack_all(rows, rules)):
        for start, end in sequences(item):
            if rules.pad_sequences and not is_padding(item, start, end):
                assert end - start == longest
            elif not is_padding(item, start, end):
                assert end - start == rounded(int(item.token_ids_T[start:end].count_nonzero()), rules)


@pytest.mark.parametrize("rows", [[], [make_sample(0, 3, 4, 0.0), make_sample(1, 2, 5, 0.0)]], ids=["no samples", "all zero"])
def test_a_step_without_gradient_still_has_a_micro_batch(rows: list[Sample]) -> None:
    for batch in pack_all(rows, PackingRules(data_parallel_size=2, micro_batch_tokens=64, tokens_multiple=4, micro_batches_multiple=2)):
        assert len(batch.micro_batches) == 2
        assert batch.num_samples == len(rows)
        assert all(item.num_tokens == 4 and item.rows_R.numel() == 0 for item in batch.micro_batches)


def test_an_advantage_per_token_is_one_for_each() -> None:
    row = make_sample(0, 2, 3, (0.5, 0.0, -1.0))
    (batch,) = pack_all([row], PackingRules(data_parallel_size=1, micro_batch_tokens=64))
    assert batch.micro_batches[0].advantages_R.tolist() == [0.5, 0.0, -1.0]
    with pytest.raises(ValueError, match="sample 0/0 has 2 advantages and 3 response tokens"):
        make_sample(0, 2, 3, (0.5, 0.0))


def test_a_sample_that_is_not_counted_has_no_gradient() -> None:
    assert not Sample("0/0", (1, 2), 1, 0.0, 1.0, (-0.1,), 0, is_counted=False).has_gradient
    with pytest.raises(ValueError, match="sample 0/0 has a gradient and must be counted"):
        Sample("0/0", (1, 2), 1, 0.5, 1.0, (-0.1,), 0, is_counted=False)


def test_samples_without_engine_logprobs_get_zeros() -> None:
    """Documents of pre-training come from no engine."""
    row = Sample("0", (5, 6, 7, 8), 1, 1.0, 1.0, (), 0)
    (batch,) = pack_all([row], PackingRules(data_parallel_size=1, micro_batch_tokens=64))
    assert batch.micro_batches[0].engine_logprobs_R.tolist() == [0.0] * 3


@given(rows=samples(), rules=RULES)
def test_packing_depends_on_nothing_but_its_arguments(rows: list[Sample], rules: PackingRules) -> None:
    for first, second in zip(micro_batches(pack_all(rows, rules)), micro_batches(pack_all(rows, rules)), strict=True):
        for name, value in vars(first).items():
            same = torch.equal(value, vars(second)[name]) if isinstance(value, torch.Tensor) else value == vars(second)[name]
            assert same, name


def test_old_logprobs_are_those_of_the_same_micro_batches() -> None:
    """The pass before the first step and the steps themselves work on one and the same packing."""
    MegatronPolicy = pytest.importorskip("megatron_r1z.policy.policy").MegatronPolicy
    rows = [make_sample(index, 3, 4 + index, 0.875) for index in range(9)]
    batches = pack_all(rows, PackingRules(data_parallel_size=2, micro_batch_tokens=20))
    policy = FakePolicy()
    for batch, train_batch in zip(batches, MegatronPolicy.with_logprobs(policy, batches), strict=True):
        assert [work.batch for work in train_batch.work()] == list(batch.micro_batches)
        assert all(work.old_logprobs_R is work.batch.engine_logprobs_R for work in train_batch.work())
        assert all(work.reference_logprobs_R is work.batch.temperatures_R for work in train_batch.work())
    (alone,) = MegatronPolicy.with_logprobs(policy, batches[:1])
    assert all(work.old_logprobs_R is None and work.reference_logprobs_R is work.batch.temperatures_R for work in alone.work())
    policy._loss = SimpleNamespace(has_kl=False)
    for train_batch in MegatronPolicy.with_logprobs(policy, batches):
        assert all(work.reference_logprobs_R is None for work in train_batch.work())


class FakePolicy:
    """What `with_logprobs` asks of a policy: as itself it answers with one field of the micro-batches, as the reference with another."""

    def __init__(self) -> None:
        self._loss = SimpleNamespace(has_kl=True)
        self._field = "engine_logprobs_R"

    def response_logprobs(self, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        return [getattr(item, self._field) for item in batches]

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        self._field = "temperatures_R"
        yield
        self._field = "engine_logprobs_R"


# -------------------------------------------------------------------------------------------------------------- context parallel


def test_the_cut_is_transformer_engine_s() -> None:
    """The example of its test `test_thd_get_partitioned_indices_matches_dual_chunk_expected_indices`, and one with unequal lengths."""
    equal = torch.tensor([0, 8, 16], dtype=torch.int32)
    assert context_indices(equal, 2, 0).tolist() == [0, 1, 6, 7, 8, 9, 14, 15]
    assert context_indices(equal, 2, 1).tolist() == [2, 3, 4, 5, 10, 11, 12, 13]
    assert context_indices(torch.tensor([0, 6, 18]), 3, 1).tolist() == [1, 4, 8, 9, 14, 15]


@given(chunks=st.lists(st.integers(1, 9), min_size=1, max_size=6), size=st.integers(1, 5))
def test_every_rank_has_as_many_tokens_and_as_many_causal_pairs(chunks: list[int], size: int) -> None:
    boundaries = torch.tensor([0, *(2 * size * chunk for chunk in chunks)]).cumsum(0)
    cuts = [context_indices(boundaries, size, rank) for rank in range(size)]
    assert sorted(torch.cat(cuts).tolist()) == list(range(int(boundaries[-1])))
    starts = torch.repeat_interleave(boundaries[:-1], boundaries.diff())
    assert len({(cut.numel(), int((cut - starts[cut]).sum())) for cut in cuts}) == 1
    assert all((cut.diff() > 0).all() for cut in cuts)


def test_a_response_is_cut_where_its_sequence_is() -> None:
    """3 tokens of prompt and 6 of response, padded to 12: chunks of 3 for two ranks."""
    row = make_sample(0, 3, 6, 0.875)
    ((first, second),) = pack_parts([row], PackingRules(1, 64, context_parallel_size=2))
    (first,), (second,) = first.micro_batches, second.micro_batches
    assert first.token_ids_T.tolist() == [1000, 1001, 1002, 0, 0, 0]
    assert first.position_ids_T.tolist() == [0, 1, 2, 9, 10, 11]
    assert (first.rows_R.tolist(), first.targets_R.tolist()) == ([2], [1003])
    assert second.token_ids_T.tolist() == list(range(1003, 1009))
    assert (second.rows_R.tolist(), second.targets_R.tolist()) == ([0, 1, 2, 3, 4], [1004, 1005, 1006, 1007, 1008])
    assert (first.denominator, second.denominator) == (DENOMINATOR, 0)
    assert first.cu_seqlens_S1.tolist() == second.cu_seqlens_S1.tolist() == [0, 12]


# ------------------------------------------------------------------------------------------------------------- cost and balance


def costs(batches: Sequence[GlobalBatch], cost: SampleCost) -> list[int]:
    """What each data-parallel rank's samples cost, found in its micro-batches."""
    return [sum(micro_batch_cost(item, cost) for item in batch.micro_batches) for batch in batches]


def micro_batch_cost(item: MicroBatch, cost: SampleCost) -> int:
    lengths = [end - start for start, end in sequences(item) if not is_padding(item, start, end)]
    return sum(cost.of(length, 0) for length in lengths) + cost.response * item.rows_R.numel()


@pytest.mark.parametrize("shape", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_cost_of_a_model_counts_the_weights_that_a_token_meets(shape: ModelShape) -> None:
    weights = 0
    for spec in layer_tensors(shape):
        used = shape.experts_per_token / shape.num_experts if ".experts." in spec.name else 1
        weights += round(spec.numel * used) if len(spec.shape) == 2 else 0
    cost = SampleCost.of_model(shape)
    assert cost.token == pytest.approx(shape.num_layers * weights, rel=1e-6)
    assert cost.response == shape.vocab_size * shape.hidden_size
    # Scores and sums of values are a product each with every earlier position, and those are half of all pairs.
    assert cost.pair == shape.num_layers * shape.num_heads * shape.head_dim * 2 // 2


@given(rows=samples(max_size=40), rules=RULES)
def test_no_two_ranks_differ_by_more_than_one_sample(rows: list[Sample], rules: PackingRules) -> None:
    batches = pack_all(rows, rules)
    longest = max((len(row.token_ids) for row in rows if is_trained(row)), default=0)
    width = longest if rules.pad_sequences else 0
    trained = [row for row in rows if is_trained(row)]
    dearest = max((rules.cost.of(rounded(max(len(row.token_ids), width), rules), row.response_length) for row in trained), default=0)
    loads = costs(batches, rules.cost)
    assert max(loads) - min(loads) <= dearest


@given(rows=samples(max_size=40), rules=RULES)
def test_no_more_micro_batches_than_first_fit_needs_on_some_rank(rows: list[Sample], rules: PackingRules) -> None:
    batches = pack_all(rows, rules)
    lengths = [
        [end - start for item in batch.micro_batches for start, end in sequences(item) if not is_padding(item, start, end)]
        for batch in batches
    ]
    most = max(1, *(first_fit_decreasing(of_rank, rules.micro_batch_tokens) for of_rank in lengths))
    multiple = rules.micro_batches_multiple
    assert len(batches[0].micro_batches) <= -(-most // multiple) * multiple


def first_fit_decreasing(lengths: Sequence[int], budget: int) -> int:
    """Number of bins."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = next((place for place, free in enumerate(room) if length <= free), len(room))
        if place == len(room):
            room.append(budget)
        room[place] -= length
    return len(room)


def longest_to_the_emptiest_rank(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    for length in sorted(lengths, reverse=True):
        min(ranks, key=sum).append(length)
    return ranks


# ------------------------------------------------------------------------------------------------ lengths as they are in training

Draw = Callable[[random.Random], int]


def few_shot(draw: random.Random) -> int:
    return draw.randint(60, 200)


def chat(draw: random.Random) -> int:
    return draw.randint(20, 60)


def short_answers(draw: random.Random) -> int:
    """Most of 10 to 60 tokens, cut at 128."""
    return min(max(int(draw.lognormvariate(3.33, 0.6)), 4), 128)


def one_in_five_cut_off(draw: random.Random) -> int:
    """About 250 tokens, and the budget of 1024 where the model does not stop."""
    return 1024 if draw.random() < 0.2 else min(int(draw.lognormvariate(5.5, 0.5)), 1024)


def long_reasoning(draw: random.Random) -> int:
    """About 700 tokens with a budget of 3000, as the paper's runs begin."""
    return 3000 if draw.random() < 0.15 else min(int(draw.lognormvariate(6.5, 0.5)), 3000)


def asdiv_questions() -> Draw:
    """Real questions at four characters a token, under a template of 30."""
    return real_questions("asdiv_2k.jsonl")


def math_questions() -> Draw:
    """Longer and more uneven: MATH, levels 3 to 5."""
    return real_questions("math_lvl3to5_8k.jsonl")


def real_questions(name: str) -> Draw:
    if not (QUESTIONS / name).is_file():
        pytest.skip(f"the question sets are not at {QUESTIONS}")
    lengths = [30 + len(json.loads(line)["problem"]) // 4 for line in (QUESTIONS / name).read_text(encoding="utf-8").splitlines()]
    return lambda draw: draw.choice(lengths)


WORKLOADS: dict[str, tuple[Callable[[], Draw], Draw]] = {
    "few-shot": (lambda: few_shot, short_answers),
    "chat": (lambda: chat, short_answers),
    "cut-off": (lambda: few_shot, one_in_five_cut_off),
    "long": (lambda: few_shot, long_reasoning),
    "asdiv": (asdiv_questions, short_answers),
    "math": (math_questions, long_reasoning),
}
"""Lengths of prompts and of responses; prompts are shared by groups of eight."""


def draw_workload(name: str, count: int, seed: int) -> list[Sample]:
    make_prompt, response = WORKLOADS[name]
    prompt, draw = make_prompt(), random.Random(seed)
    prompts = [prompt(draw) for _ in range(0, count, 8)]
    return [make_sample(index, prompts[index // 8], response(draw), draw.choice((0.875, -0.125))) for index in range(count)]


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("equal", [False, True], ids=["packed", "equal micro-batches"])
@pytest.mark.parametrize(("data_parallel_size", "samples_per_rank"), [(1, 32), (2, 32), (4, 32), (8, 32), (2, 128)])
def test_little_is_padding_and_ranks_wait_little(name: str, equal: bool, data_parallel_size: int, samples_per_rank: int) -> None:
    """From 32 samples a rank and a budget of three times the longest on. With fewer, a single sample is a larger share than that."""
    for seed in range(2):
        rows = draw_workload(name, samples_per_rank * data_parallel_size, seed)
        lengths = [len(row.token_ids) for row in rows]
        rules = PackingRules(
            data_parallel_size, 3 * max(lengths), tokens_multiple=2, equal_micro_batches=equal, cost=SampleCost.of_model(DENSE)
        )
        batches = pack_all(rows, rules)
        assert sum(lengths) / sum(item.num_tokens for item in micro_batches(batches)) >= 0.97  # measured: 0.99
        loads = costs(batches, rules.cost)
        assert max(loads) / (sum(loads) / data_parallel_size) < 1.05  # measured: 1.005
        before = longest_to_the_emptiest_rank(lengths, data_parallel_size)
        assert len(batches[0].micro_batches) <= max(first_fit_decreasing(of_rank, rules.micro_batch_tokens) for of_rank in before)


@pytest.mark.parametrize("multiple", [2, 4])
def test_rounding_up_the_number_of_micro_batches_makes_them_smaller_and_leaves_none_empty(multiple: int) -> None:
    """Under the interleaved schedule; the same padding in proportion."""
    rows = draw_workload("few-shot", 64, 0)
    for batch in pack_all(rows, PackingRules(2, 1024, micro_batches_multiple=multiple, equal_micro_batches=True)):
        assert all(item.rows_R.numel() for item in batch.micro_batches)
        real = sum(int(item.token_ids_T.bool().sum()) for item in batch.micro_batches)
        assert real / sum(item.num_tokens for item in batch.micro_batches) >= 0.97
