"""The figures of a step, against plain computations."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("megatron.core")

from megatron_r1z.packing import PackingRules, pack
from megatron_r1z.policy.step import non_finite_samples, tail_size
from megatron_r1z.types import Sample

NUM_RANKS = 3


@given(values=st.lists(st.integers(0, 50), min_size=1, max_size=3000))
def test_the_percentile_is_the_smallest_value_that_so_many_do_not_exceed(values: list[int]) -> None:
    enough = [value for value in set(values) if 1000 * sum(other <= value for other in values) >= 999 * len(values)]
    assert sorted(values)[-tail_size(len(values))] == min(enough)


@pytest.mark.parametrize(("num_tokens", "size"), [(0, 1), (1, 1), (999, 1), (1000, 2), (1999, 2), (5_000_000, 5001)])
def test_a_rank_sends_a_thousandth_of_the_tokens(num_tokens: int, size: int) -> None:
    assert tail_size(num_tokens) == size


def test_the_largest_values_of_all_ranks(run_ranks: Callable[..., None], tmp_path: Path) -> None:
    """Whichever rank has them: ranks with few values, with none, and with one that is no number."""
    generator = torch.Generator().manual_seed(0)
    cases = [([5003, 2, 0], 6), ([7, 9000, 4000], 14), ([0, 0, 1], 3), ([0, 0, 0], 1), ([40, 40, 40], 1)]
    parts = [[torch.rand(length, generator=generator) for length in lengths] for lengths, _ in cases]
    parts[-1][1][5] = torch.nan
    for rank in range(NUM_RANKS):
        torch.save([(part[rank], count) for part, (_, count) in zip(parts, cases, strict=True)], tmp_path / f"values_{rank}.pt")
    run_ranks(Path(__file__).with_name("figure_ranks.py"), NUM_RANKS, str(tmp_path))
    results = [torch.load(tmp_path / f"rank_{rank}.pt") for rank in range(NUM_RANKS)]
    for case, (part, (_, count)) in enumerate(zip(parts[:-1], cases[:-1], strict=True)):
        expected = torch.cat([*part, torch.zeros(count)]).sort(descending=True).values[:count]
        assert all(torch.equal(result[case], expected) for result in results)
    assert all(result[-1].isnan().all() for result in results)


@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8),
    data=st.data(),
    padded=st.booleans(),
    cp=st.integers(1, 3),
)
def test_the_samples_with_a_loss_that_is_not_finite_are_found(
    lengths: list[tuple[int, int]], data: st.DataObject, padded: bool, cp: int
) -> None:
    """By the context-parallel rank that holds such a token."""
    samples = [
        Sample(f"0/{index}", tuple(range(20 * index + 1, 20 * index + 1 + prompt + response)), prompt, 1.0, 1.0, (0.0,) * response, 0)
        for index, (prompt, response) in enumerate(lengths)
    ]
    bad = data.draw(st.sets(st.sampled_from(range(len(samples)))))
    rules = PackingRules(1, 40, cp, tokens_multiple=4, pad_sequences=padded)
    ranks = [pack(samples, rules, 0, rank, token_weight=lambda _length: 1.0, denominator=1) for rank in range(cp)]
    found = []
    for item in (item for batch in ranks for item in batch.micro_batches):
        losses = torch.ones(item.targets_R.numel())
        for index in bad:  # one token of each is enough
            first_tokens = (item.targets_R == samples[index].token_ids[samples[index].prompt_length]).nonzero()
            losses[first_tokens] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
        found += non_finite_samples(item, losses)
    assert sorted(found) == sorted(samples[index].sample_id for index in bad)
