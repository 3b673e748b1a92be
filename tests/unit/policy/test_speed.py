"""Settings for speed change when something is done and no number: gloo has no streams, and does the same calls in the same order."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core")

NUM_RANKS = 2
CASES = ["gradients", "weights", "tied weights", "stages"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`results(case)`: what each rank left, with the settings off and on."""
    from tests.unit.conftest import _run_ranks

    folder, known = tmp_path_factory.mktemp("ranks"), {}

    def of(case: str) -> list[dict[str, Any]]:
        if case not in known:
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(os.environ, "TORCHDYNAMO_DISABLE", "1")  # a compiler is not what is tried
                _run_ranks(Path(__file__).with_name("speed_ranks.py"), NUM_RANKS, str(folder), case)
            known[case] = [torch.load(folder / f"{case}_rank_{rank}.pt") for rank in range(NUM_RANKS)]
        return known[case]

    return of


@pytest.mark.parametrize("case", CASES)
def test_overlap_changes_no_bit(results: Any, case: str) -> None:
    """Of weights and log-probs over two iterations of two steps with a reference model, whose weights come and go in between."""
    for rank in results(case):
        for on, off in zip(rank["on"]["weights"], rank["off"]["weights"], strict=True):
            assert [name for name in on if not torch.equal(on[name], off[name])] == []
        assert equal(rank["on"]["logprobs"], rank["off"]["logprobs"])
        assert rank["on"]["norms"] == pytest.approx(rank["off"]["norms"], rel=1e-6)


@pytest.mark.parametrize("case", ["gradients", "weights", "stages"])
def test_gradients_are_summed_before_the_backward_pass_ends(results: Any, case: str) -> None:
    """But in the first step, in which megatron-core learns which gradients come."""
    for rank in results(case):
        assert all(begun == 0 for begun, _ in rank["off"]["under way"])
        assert all(begun == parts > 1 for begun, parts in rank["on"]["under way"][1:])


def test_weights_that_are_still_to_be_fetched_are_there_when_they_are_read(results: Any) -> None:
    for rank in results("weights"):
        assert not equal(rank["on"]["behind a step"], list(rank["on"]["weights"][-1].values()))
        assert equal(rank["off"]["behind a step"], list(rank["off"]["weights"][-1].values()))


def test_a_fused_activation_changes_numbers_by_rounding_alone(results: Any) -> None:
    for rank in results("swiglu"):
        assert rank["on"]["norms"][0] == pytest.approx(rank["off"]["norms"][0], rel=1e-5)
        for on, off in zip(rank["on"]["logprobs"][:8], rank["off"]["logprobs"][:8], strict=True):
            torch.testing.assert_close(on, off, rtol=1e-5, atol=1e-5)


def equal(found: list[Tensor | None], wanted: list[Tensor | None]) -> bool:
    assert len(found) == len(wanted)
    pairs = zip(found, wanted, strict=True)
    return all(one is other is None or (one is not None and other is not None and torch.equal(one, other)) for one, other in pairs)
