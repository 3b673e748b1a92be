"""Whole steps of configurations as one rank of many: layouts, memory beside `plan`, the way that Transformer Engine takes, what is said."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_r1z.config import SpeedConfig, TrainConfig, load_config
from megatron_r1z.cost.activations import BatchSize
from megatron_r1z.cost.formats import policy_format
from megatron_r1z.cost.policy_memory import PolicyMemory
from megatron_r1z.errors import UsageError
from megatron_r1z.layout.known import find_shape
from megatron_r1z.rehearse.roles import Found, make_task, rehearse
from megatron_r1z.rehearse.said import unexplained
from tests.gpu_stack.conftest import H100, Rehearsed

SLOW = [f"parallel.speed.{item.name}=false" for item in dataclasses.fields(SpeedConfig)]
RUNS = {
    "70b first": ("llama3.1-70b-h100", 0),
    "70b last": ("llama3.1-70b-h100", 63),
    "70b fp8": ("llama3.1-70b-h100-fp8", 0),
    "8b": ("qwen3-8b-h100", 0),
    "8b fp8": ("qwen3-8b-h100-fp8", 0),
    "7b without recompute": ("qwen2.5-7b-h100", 0, "parallel.recompute=none"),
    "70b, virtual stages": ("llama3.1-70b-h100", 0, "parallel.virtual_pipeline_size=2"),
    "7b, shared sequences": ("qwen2.5-7b-h100", 0, "parallel.context_parallel_size=2"),
    "8b tensorwise": ("qwen3-8b-h100-fp8", 0, "precision.fp8.recipe=tensorwise"),
    "8b delayed": ("qwen3-8b-h100-fp8", 0, "precision.fp8.recipe=delayed"),
    "8b mxfp8": ("qwen3-8b-b200-fp8", 0, "precision.fp8.recipe=mxfp8"),
    "7b recomputed": ("qwen2.5-7b-h100", 0, "parallel.recompute=full"),
    "7b, four layers on the host": ("qwen2.5-7b-h100", 0, "parallel.recompute=none", "parallel.offload_layers=4"),
    "7b without what is for speed": ("qwen2.5-7b-h100", 0, "parallel.recompute=none", *SLOW),
}


@pytest.fixture(params=RUNS, scope="session")
def found(request: pytest.FixtureRequest, rehearsed: Rehearsed) -> Found:
    return rehearsed("policy_role", *RUNS[request.param])


def phase(found: Found, name: str) -> tuple[int, int]:
    """Kept and most."""
    return next((item.kept, item.most) for item in found.phases if item.name == name)


def test_the_model_has_the_parameters_of_the_layout(found: Found) -> None:
    assert found.layout_differences == ()
    assert found.num_parameters > 0


def test_attention_takes_no_scores(found: Found) -> None:
    assert found.attention == ("fused",)
    assert found.kernels["fused_attn_fwd"] > 0


def test_memory_is_what_plan_says(found: Found, request: pytest.FixtureRequest) -> None:
    """Weights, gradients and optimizer within 1 %, what a step needs besides within 10 %, for the same micro-batches."""
    name, rank, *overrides = RUNS[request.node.callspec.params["found"]]
    config = load_config(TrainConfig, f"configs/{name}.yaml", overrides)
    batch = BatchSize(*(found.figures[key] for key in ("tokens", "responses", "micro_batches")))
    plan = PolicyMemory(find_shape(config.model.path).shape, config.parallel, config.optimizer, policy_format(config.precision), batch)
    stage = config.parallel.topology.coordinates(rank).pp_rank
    statics, (_, most) = phase(found, "update 1")[0], phase(found, "update 2")
    planned = plan.weights(stage) + plan.gradients(stage) + plan.optimizer_state(stage) + plan.placeholders
    assert planned == pytest.approx(statics, rel=0.01)
    assert plan.update(stage) == pytest.approx(most - statics, rel=0.1)


def test_the_state_for_a_checkpoint_is_made(found: Found) -> None:
    """Of the distributed optimizer the first of the ranks that share it has all."""
    if "state for a checkpoint" not in [item.name for item in found.phases]:
        pytest.skip("histories of recipe delayed are pickled, which tensors without numbers cannot be")
    is_first = found.rank == 0
    assert bool(found.figures["optimizer_entries"]) == is_first


def test_nothing_is_said_that_is_not_explained(found: Found) -> None:
    assert unexplained(found.warnings) == []


def test_fp8_travels_as_fp8(rehearsed: Rehearsed) -> None:
    """Ranks gather blocks under sequence parallelism; padding to fewer than 128 tokens a rank would make that bf16, and a warning."""
    found = rehearsed("policy_role", "llama3.1-70b-h100-fp8", 0)
    assert found.figures["tokens"] % (128 * 8) == 0
    assert found.kernels["swap_first_dims"] > 0
    assert not [text for text in found.warnings if "high precision" in text]


def test_a_critic_is_stepped_beside_the_policy(rehearsed: Rehearsed) -> None:
    """Under PPO: statics of both, and the fuller of their passes, as `plan` has them."""
    found = rehearsed("policy_role", "qwen2.5-7b-h100", 0, "algorithm.name=ppo")
    planned = {item.name: item for item in found.phases if item.planned is not None}
    assert list(planned) == ["log-probs", "update 2", "critic's update 2"]
    for item in planned.values():
        assert item.planned == pytest.approx(item.most, rel=0.03)
    assert unexplained(found.warnings) == []


def test_layers_on_the_host_take_less_of_the_device(rehearsed: Rehearsed) -> None:
    """Of a layer's activations, all but what Transformer Engine leaves where it is (docs/gpu.md)."""
    most = [
        phase(rehearsed("policy_role", "qwen2.5-7b-h100", 0, "parallel.recompute=none", *more), "update 2")[1]
        for more in ((), ("parallel.offload_layers=4",))
    ]
    assert most[0] - most[1] > 2 << 30


def test_settings_for_speed_are_on(rehearsed: Rehearsed) -> None:
    """Gradients are summed and weights fetched part by part, while layers run; the fused kernels are those that are called."""
    fast, slow = (rehearsed("policy_role", *RUNS[name]) for name in ("7b without recompute", "7b without what is for speed"))
    assert fast.kernels["swiglu_back"] > 0
    assert "swiglu_back" not in slow.kernels
    assert fast.figures["speed"] == {
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
        "no_sync": True,
        "fused_layers": 4 * 28,
        "parts": fast.figures["speed"]["parts"],
    }
    assert fast.figures["speed"]["parts"] > 10
    assert slow.figures["speed"] == {
        "overlap_grad_reduce": False,
        "overlap_param_gather": False,
        "no_sync": False,
        "fused_layers": 0,
        "parts": 1,
    }


def test_an_attention_that_keeps_scores_is_refused() -> None:
    """Which Transformer Engine takes where neither flash-attn nor cuDNN has one for packed sequences, as on GPUs before Hopper."""
    path, a100 = "configs/qwen2.5-7b-h100.yaml", {**H100, "gpu": "NVIDIA A100", "capability": (8, 0)}
    with pytest.raises(UsageError, match="in bf16 Transformer Engine has its unfused one, which keeps the scores"):
        rehearse("policy_role", make_task(load_config(TrainConfig, path), path, (), 0, **a100))
