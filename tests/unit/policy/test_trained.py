"""Weights and optimizer come back from a checkpoint, and the next step is the one that would have followed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core")

NUM_RANKS = 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, dict[str, Tensor]]]]:
    from tests.unit.conftest import _run_ranks

    folder = tmp_path_factory.mktemp("ranks")
    _run_ranks(Path(__file__).with_name("distributed_ranks.py"), NUM_RANKS, str(folder))
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(NUM_RANKS)]


@pytest.mark.parametrize("optimizer", ["distributed", "whole"])
def test_a_checkpoint_of_either_optimizer_holds_all_of_it(ranks: Any, optimizer: str) -> None:
    for found in (rank[optimizer] for rank in ranks):
        assert_equal(found["loaded"], found["saved"])
        assert_equal(found["gone on"], found["never stopped"])


@pytest.mark.parametrize("optimizer", ["distributed", "whole"])
def test_a_run_goes_on_with_another_learning_rate(ranks: Any, optimizer: str) -> None:
    """megatron-core 0.19 looks for the groups of a checkpoint by their learning rates, among others."""
    for found in (rank[optimizer] for rank in ranks):
        far, near = (distance(found[name], found["saved"]) for name in ("gone on", "slower"))
        assert near == pytest.approx(far / 10, rel=0.1)


@pytest.mark.parametrize("optimizer", ["distributed", "whole"])
def test_a_run_goes_on_with_more_padding_in_its_vocabulary(ranks: Any, optimizer: str) -> None:
    """Which depends on the layer spec and on the tensor-parallel size."""
    for found in (rank[optimizer] for rank in ranks):
        wider = {name: tensor[: found["saved"][name].shape[0]] for name, tensor in found["more padding"].items()}
        assert_equal(wider, found["never stopped"])


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []


def distance(found: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    return sum((found[name].float() - start[name].float()).abs().sum().item() for name in found)
