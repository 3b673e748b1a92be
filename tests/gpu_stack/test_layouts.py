"""Policies by Transformer Engine's real spec have the parameters of `layout/blocks.py`: every configuration, and shapes beside them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_r1z.config import ParallelConfig, TrainConfig, load_config
from megatron_r1z.errors import R1ZError
from megatron_r1z.layout.known import find_shape
from megatron_r1z.rehearse.roles import policy_ranks

BESIDE = {
    "virtual stages": (
        "Llama-3.1-8B",
        {"num_ranks": 8, "tensor_parallel_size": 2, "pipeline_parallel_size": 2, "virtual_pipeline_size": 2},
        (0, 5),
    ),
    "uneven stages": ("Llama-3.2-3B", {"num_ranks": 4, "pipeline_parallel_size": 4, "pipeline_layers": (6, 8, 8, 6)}, (0, 1, 3)),
    "context parallel": ("Qwen2.5-7B", {"num_ranks": 8, "tensor_parallel_size": 2, "context_parallel_size": 2}, (0, 7)),
    "tied, split": ("Qwen2.5-1.5B", {"num_ranks": 8, "tensor_parallel_size": 2, "pipeline_parallel_size": 2}, (0, 7)),
    "tied, alone": ("Qwen2.5-1.5B", {"num_ranks": 1}, (0,)),
    "q and k norms": ("Qwen3-32B", {"num_ranks": 16, "tensor_parallel_size": 8, "pipeline_parallel_size": 2}, (0, 15)),
}


def of_configurations() -> dict[str, dict[str, Any]]:
    """A case for each role of every training configuration whose model is known by name; the same model in the same layout once."""
    cases: dict[str, dict[str, Any]] = {}
    for path in sorted(Path("configs").glob("*.yaml")):
        try:
            config = load_config(TrainConfig, path)
            find_shape(config.model.path)
        except R1ZError:
            continue  # of another command, or of a model that is made first
        parallel = dataclasses.asdict(config.parallel)
        for role, rank in policy_ranks(config.parallel.topology).items():
            cases[json.dumps([config.model.path, parallel, rank])] = {
                "name": f"{path.stem}, {role}", "model": config.model.path, "parallel": parallel, "rank": rank
            }  # fmt: skip
    return {case["name"]: case for case in cases.values()}


def beside() -> dict[str, dict[str, Any]]:
    cases = {}
    for name, (model, degrees, ranks) in BESIDE.items():
        parallel = dataclasses.asdict(ParallelConfig(**degrees, sequence_parallel=degrees.get("tensor_parallel_size", 1) > 1))
        for rank in ranks:
            cases[f"{name}, rank {rank}"] = {"name": f"{name}, rank {rank}", "model": model, "parallel": parallel, "rank": rank}
    cases["critic"] = {**cases["uneven stages, rank 3"], "name": "critic", "kind": "ValueModel"}
    for spec in ("te", "local"):
        cases[f"checkpoint, {spec}"] = {**cases["tied, split, rank 0"], "name": f"checkpoint, {spec}", "spec": spec, "keys": True}
    return cases


CASES = of_configurations() | beside()


@pytest.fixture(scope="session")
def results() -> dict[str, dict[str, Any]]:
    """All cases, in one process: what takes long is its imports."""
    worker = Path(__file__).with_name("layouts_worker.py")
    lines = "".join(json.dumps(case) + "\n" for case in CASES.values())
    child = subprocess.run([sys.executable, str(worker)], input=lines, capture_output=True, text=True, timeout=1800, check=False)
    assert child.returncode == 0, child.stderr[-3000:]
    found = [json.loads(line.removeprefix("case: ")) for line in child.stdout.splitlines() if line.startswith("case: ")]
    return {item["name"]: item for item in found}


def test_there_are_cases_of_configurations() -> None:
    assert len(of_configurations()) > 20


@pytest.mark.parametrize("name", [name for name in CASES if name != "critic"])
def test_the_live_model_is_the_layout(results: dict[str, dict[str, Any]], name: str) -> None:
    assert results[name]["wrong"] == []
    assert results[name]["count"] > 0
    assert results[name]["formats"] == ["torch.bfloat16"]


def test_the_critic_differs_by_its_head_alone(results: dict[str, dict[str, Any]]) -> None:
    assert results["critic"]["wrong"] == ["chunks.0.output_layer.weight"]


def test_a_checkpoint_has_the_same_tensors_whichever_spec_wrote_it(results: dict[str, dict[str, Any]]) -> None:
    """But for the padding of the vocabulary, of which megatron-core takes either: `allow_shape_mismatch` of embedding and output layer."""
    ours, theirs = (results[f"checkpoint, {spec}"]["keys"] for spec in ("local", "te"))
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} <= {"embedding.word_embeddings.weight", "output_layer.weight"}
