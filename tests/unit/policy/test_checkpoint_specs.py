"""Weights go from a checkpoint of one layer spec into a policy of the other; extra state is taken where there is some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

NUM_NORMS = 2 * 4 + 1  # of two layers, with a norm of q and of k, and the last one
NUM_LINEAR = 2 * 4


def test_a_checkpoint_of_either_spec_loads_into_the_other(run_ranks: Any, tmp_path: Path) -> None:
    run_ranks(Path(__file__).with_name("checkpoint_ranks.py"), 1, str(tmp_path))
    results = torch.load(tmp_path / "results.pt", weights_only=False)
    assert {name: is_loaded for name, (is_loaded, _) in results.items()} == {"local-te": True, "te-local": True, "te-te": True}
    taken = {name: [None if state is None else state.tolist() for state in states] for name, (_, states) in results.items()}
    assert taken["local-te"] == [None] * NUM_LINEAR  # what local linear layers have; local norms have none
    assert taken["te-local"] == []
    assert taken["te-te"] == [[0, 1, 2, 3, 4]] * (NUM_NORMS + NUM_LINEAR)
