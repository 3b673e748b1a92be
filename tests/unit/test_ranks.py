"""Which ranks share a node, and that weights stay within it where they can."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("megatron.core")

import torch

from megatron_r1z import assemble, ranks
from megatron_r1z.config import EvaluateConfig, make_config
from megatron_r1z.layout.blocks import engine_layout, megatron_layout
from megatron_r1z.layout.families import ModelShape
from megatron_r1z.layout.plan import Edge, Plan
from megatron_r1z.layout.topology import Topology
from megatron_r1z.reshard.quantise import plans_by_format
from megatron_r1z.weights.export_plan import plan_shards, plan_waves
from tests.unit.weights.test_export_plan import SHAPE


def crossing(plan: Plan, per_node: int) -> int:
    return sum(copy.edge(per_node) is Edge.NETWORK for copies in plan.rounds for copy in copies)


@pytest.mark.parametrize("per_node", [2, 4])
def test_what_a_rank_lacks_comes_from_its_own_node(per_node: int) -> None:
    """Halves on pairs of ranks, to engines of one rank: the other half is next door."""
    shape: ModelShape = SHAPE
    source = megatron_layout(shape, Topology(8, tp=2), 1)

    def plans(ranks_per_node: int) -> list[Plan]:
        return [
            plan for _, plan in plans_by_format(source, engine_layout(shape, 8, 1), frozenset(), torch.float32, 1 << 20, ranks_per_node)
        ]

    assert sum(crossing(plan, per_node) for plan in plans(per_node)) == 0
    assert sum(crossing(plan, per_node) for plan in plans(8)) > 0
    shards = plan_shards(shape, 8, 4, 5000)
    assert sum(crossing(wave, per_node) for wave in plan_waves(source, shards, 4, 5000, per_node)) == 0
    assert sum(crossing(wave, per_node) for wave in plan_waves(source, shards, 4, 5000, 8)) > 0


def test_the_refit_of_a_run_goes_by_the_ranks_that_the_launcher_put_on_a_node(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(assemble, "plans_by_format", lambda *arguments: found.append(arguments[-1]) or [])
    monkeypatch.setattr(assemble, "Refit", lambda *_arguments: None)
    tree = {"model": {"path": "m"}, "evaluation": {"sets": [{"path": "q.jsonl"}]}, "logging": {"folder": "f"}}
    weights: Any = SimpleNamespace(shape=SHAPE, layout=megatron_layout(SHAPE, Topology(1), 1))
    for local, expected in ((None, 1), ("4", 4)):
        if local is None:
            monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        else:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        assert ranks.per_node() == expected
        policy: Any = SimpleNamespace(parameters=dict)
        assemble.make_refit(make_config(EvaluateConfig, tree), weights, policy, None, frozenset())  # type: ignore[arg-type]
    assert found == [1, 4]
