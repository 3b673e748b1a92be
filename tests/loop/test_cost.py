"""The memory model of `megatron_r1z/cost/` against real policies and critics: weights, gradients, optimizer, and what a step needs besides.

Counted are live tensors, not the process's memory: what autograd has saved (`kept`), and everything that comes into being during forward
and backward pass (`peak`). The layers are those of a CPU, so the formulas are asked for them; what differs on a GPU is in `activations.py`.
`pytest tests/loop/test_cost.py -s` prints the ratios of docs/plan.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_r1z.config import OptimizerConfig, ParallelConfig
from megatron_r1z.cost.activations import BatchSize
from megatron_r1z.cost.critic import CriticMemory
from megatron_r1z.cost.formats import POLICY_FORMATS
from megatron_r1z.cost.policy_memory import PolicyMemory
from megatron_r1z.layout.families import load_shape

pytestmark = pytest.mark.slow

SHAPE = {
    **{"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32},
    **{"intermediate_size": 768, "vocab_size": 3001, "max_position_embeddings": 4096, "tie_word_embeddings": False},
}
FAMILIES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
}
TP2, PP2, SP = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}, {"sequence_parallel": True}
RESIDENT, PASSES = ("weights", "gradients", "optimizer"), ("kept", "peak")


@dataclass(frozen=True)
class Case:
    """One policy that is built."""

    name: str
    ranks: int
    family: str = "llama"
    precision: str = "bf16"
    parallel: tuple[tuple[str, Any], ...] = ()
    distributed: bool = False
    critic: bool = False


def case(
    name: str,
    ranks: int,
    family: str = "llama",
    precision: str = "bf16",
    *,
    distributed: bool = False,
    critic: bool = False,
    **parallel: Any,
) -> Case:
    return Case(name, ranks, family, precision, tuple(parallel.items()), distributed, critic)


CASES = (
    *(case(f"one rank, bf16, recompute {recompute}", 1, recompute=recompute) for recompute in ("none", "selective", "full")),
    case("one rank, fp32", 1, precision="fp32"),
    case("one rank, tied embeddings", 1, "qwen2"),
    case("one rank, norms of q and k", 1, "qwen3"),
    case("one rank, norms of q and k, fp32, recompute full", 1, "qwen3", "fp32", recompute="full"),
    case("TP2", 2, **TP2),
    case("TP2, norms of q and k", 2, "qwen3", **TP2),
    case("TP2 with SP", 2, **TP2, **SP),
    case("TP2 with SP, recompute full", 2, **TP2, **SP, recompute="full"),
    case("PP2, tied embeddings", 2, "qwen2", **PP2),
    case("PP2, uneven, recompute selective", 2, **PP2, pipeline_layers=(3, 1), recompute="selective"),
    case("PP2 with VPP2", 2, **PP2, virtual_pipeline_size=2),
    case("CP2, distributed optimizer", 2, context_parallel_size=2, distributed=True),
    case("DP2, distributed optimizer", 2, distributed=True),
    case("DP2, distributed optimizer, fp32", 2, precision="fp32", distributed=True),
    case("critic, one rank, bf16", 1, critic=True),
    case("critic, one rank, fp32, recompute full", 1, precision="fp32", critic=True, recompute="full"),
    case("critic, TP2 with SP, tied embeddings", 2, "qwen2", critic=True, **TP2, **SP),
    case("critic, PP2, tied embeddings, distributed optimizer", 2, "qwen2", distributed=True, critic=True, **PP2),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A `config.json` of each family."""
    folder = tmp_path_factory.mktemp("models")
    for family, fields in FAMILIES.items():
        (folder / family).mkdir()
        (folder / family / "config.json").write_text(json.dumps(SHAPE | {"model_type": family} | fields))
    return {family: str(folder / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def measured(
    models: dict[str, str], torchrun: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, int]]]:
    """A row of each rank by name of the case; all cases of a world size run in one start."""
    found = {}
    for ranks in sorted({item.ranks for item in CASES}):
        folder = tmp_path_factory.mktemp(f"ranks-{ranks}")
        cases = [item for item in CASES if item.ranks == ranks]
        (folder / "cases.json").write_text(json.dumps([as_task(item, models) for item in cases]))
        torchrun(ranks, Path(__file__).with_name("cost_worker.py"), folder)
        rows = [json.loads((folder / f"measured_{rank}.json").read_text()) for rank in range(ranks)]
        found |= {item.name: list(of_ranks) for item, of_ranks in zip(cases, zip(*rows, strict=True), strict=True)}
    return found


def as_task(item: Case, models: dict[str, str]) -> dict[str, Any]:
    parallel = {"micro_batch_tokens": 1024} | dict(item.parallel)
    return {
        "model": models[item.family],
        "parallel": parallel,
        "precision": item.precision,
        "distributed": item.distributed,
        "critic": item.critic,
        "samples": 4 * item.ranks * 2,
    }


def predicted(item: Case, model: str, rank: int, row: dict[str, int]) -> dict[str, int]:
    parallel = ParallelConfig(num_ranks=item.ranks, micro_batch_tokens=1024, **dict(item.parallel))
    memory = (CriticMemory if item.critic else PolicyMemory)(
        load_shape(model),
        parallel,
        OptimizerConfig(distributed=item.distributed),
        POLICY_FORMATS[item.precision],
        BatchSize(row["tokens"], row["responses"], row["micro_batches"]),
        spec="local",
    )
    stage = parallel.topology.coordinates(rank).pp_rank
    return {
        "weights": memory.weights(stage),
        "gradients": memory.gradients(stage),
        "optimizer": memory.optimizer_state(stage),
        "kept": memory.kept(stage),
        "peak": memory.update(stage),
    }


@pytest.mark.parametrize("item", CASES, ids=lambda item: item.name)
def test_the_model_against_live_tensors(item: Case, models: dict[str, str], measured: dict[str, list[dict[str, int]]]) -> None:
    for rank, row in enumerate(measured[item.name]):
        model = predicted(item, models[item.family], rank, row)
        ratios = {name: model[name] / row[name] for name in (*RESIDENT, *PASSES)}
        print(f"\n| {item.name} | {rank} | " + " | ".join(f"{ratio:.3f}" for ratio in ratios.values()) + " |", end="")
        assert {name: ratio for name, ratio in ratios.items() if name in RESIDENT and abs(ratio - 1) > 0.01} == {}
        assert {name: ratio for name, ratio in ratios.items() if name in PASSES and not 0.9 < ratio < 1.1} == {}
