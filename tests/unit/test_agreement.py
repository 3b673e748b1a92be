"""Ranks that differ are refused on every rank, with hosts and values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1z.agreement import Statement, _ranges, find_difference


def test_every_rank_says_what_differs(run_ranks: Callable[..., None], tmp_path: Path) -> None:
    run_ranks(Path(__file__).with_name("agreement_ranks.py"), 3, str(tmp_path))


@given(values=st.lists(st.sampled_from("ab"), min_size=1, max_size=6))
def test_a_difference_is_found_if_there_is_one(values: list[str]) -> None:
    found = find_difference([Statement(rank, f"h{rank // 2}", {"same": "x", "seed": value}) for rank, value in enumerate(values)])
    assert (found is None) == (len(set(values)) == 1)
    if found is not None:
        assert found.startswith("seed is not the same on all ranks: ")
        assert all(f"{value} on h" in found for value in set(values))


@pytest.mark.parametrize(("numbers", "text"), [([0], "0"), ([0, 1, 2], "0-2"), ([5, 3, 4, 9], "3-5, 9"), ([1, 3], "1, 3")])
def test_ranks_are_told_in_ranges(numbers: list[int], text: str) -> None:
    assert _ranges(numbers) == text
