"""Engines of configurations: what vLLM makes of our arguments, its models beside the layout, and a refit through its own steps."""

from __future__ import annotations

import pytest

from megatron_r1z.config import TrainConfig, load_config
from megatron_r1z.cost.cache import cache_beside
from megatron_r1z.cost.cluster import GIB
from megatron_r1z.layout.known import find_shape
from megatron_r1z.rehearse.roles import Found
from megatron_r1z.speed import batched_tokens
from tests.gpu_stack.conftest import H100, Rehearsed

RUNS = {
    "llama 70b": ("llama3.1-70b-h100", 7),
    "llama 8b, fp8": ("llama3.1-8b-h100-fp8", 0),
    "qwen2 7b": ("qwen2.5-7b-h100", 1),
    "qwen3 8b, fp8": ("qwen3-8b-h100-fp8", 1),
    "qwen2 7b, cache from what is left": ("qwen2.5-7b-h100", 1, "rollout.kv_cache_bytes=auto"),
    "qwen2 7b, without": (
        "qwen2.5-7b-h100",
        0,
        *("rollout.enforce_eager=true", "rollout.enable_prefix_caching=false", "rollout.max_num_batched_tokens=4096"),
    ),
}


@pytest.fixture(params=RUNS, scope="session")
def case(request: pytest.FixtureRequest, rehearsed: Rehearsed) -> tuple[Found, TrainConfig]:
    name, rank, *overrides = RUNS[request.param]
    return rehearsed("engine_role", name, rank, *overrides), load_config(TrainConfig, f"configs/{name}.yaml", overrides)


def test_a_refit_finds_the_parameters_of_the_layout(case: tuple[Found, TrainConfig]) -> None:
    found, _ = case
    assert found.layout_differences == ()
    assert found.num_parameters > 0


def test_the_engine_starts_beside_a_policy(case: tuple[Found, TrainConfig]) -> None:
    """vLLM asks for a share of the device before it looks at the cache that it is given."""
    found, config = case
    assert found.figures["starts_beside_a_full_device"]
    asked = config.rollout.kv_cache_bytes
    if asked == "auto":
        asked = cache_beside(config, find_shape(config.model.path).shape, H100["memory_bytes"], 0)
        assert asked > 16 << 30  # which the file asks for
    assert found.figures["kv_cache_bytes"] == asked


def test_settings_for_speed_are_vllms(case: tuple[Found, TrainConfig]) -> None:
    found, config = case
    rollout = config.rollout
    assert ("FULL" in found.figures["cuda_graphs"]) == (rollout.enforce_eager == "auto")
    assert found.figures["prefix_caching"] == (rollout.enable_prefix_caching == "auto")
    assert found.figures["max_num_batched_tokens"] == batched_tokens(rollout, H100["memory_bytes"] / GIB)


def test_the_engine_is_of_the_configuration(case: tuple[Found, TrainConfig]) -> None:
    found, config = case
    is_fp8 = config.precision.engine == "fp8"
    assert ("Fp8Config" in found.figures["quantisation"]) == is_fp8
    assert ("float8_e4m3fn" in found.figures["formats"]) == is_fp8
    assert found.figures["executor"] == "external_launcher"
    assert found.figures["head"] == "float32"


def test_a_second_copy_is_kept_where_kernels_have_a_layout_of_their_own(case: tuple[Found, TrainConfig]) -> None:
    found, config = case
    weights, refit = (next(item for item in found.phases if item.name == name) for name in ("weights", "refit"))
    grown = refit.kept / weights.kept
    assert grown == pytest.approx(2.0, rel=0.2) if config.precision.engine == "fp8" else grown == pytest.approx(1.0, rel=0.01)
