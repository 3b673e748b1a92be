"""Learning rates of Megatron's schedule as this package sets it up, against their formula."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("megatron.core")

from megatron_r1z.config import OptimizerConfig
from megatron_r1z.policy.optimizer import build_schedule

CONFIGS = st.builds(
    lambda schedule, warmup, more, floor: OptimizerConfig(
        lr=1e-3, min_lr=1e-3 * floor, schedule=schedule, warmup_steps=warmup, decay_steps=warmup + more
    ),
    st.sampled_from(["constant", "linear", "cosine"]),
    st.integers(0, 12),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.1]),
)


def make_schedule(config: OptimizerConfig) -> Any:
    optimizer = SimpleNamespace(param_groups=[{"lr": config.lr, "max_lr": config.lr, "min_lr": config.min_lr}])
    return build_schedule(optimizer, config)  # type: ignore[arg-type]


def rates(schedule: Any, count: int) -> list[float]:
    """With which so many steps are taken: a step is taken, then the schedule moves on."""
    found = []
    for _ in range(count):
        found.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.step(increment=1)
    return found


def rate(config: OptimizerConfig, step: int) -> float:
    """Of step number `step`, from 1."""
    assert config.decay_steps is not None
    if step <= config.warmup_steps:
        return config.lr * step / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    share = min((step - 1 - config.warmup_steps) / (config.decay_steps - config.warmup_steps), 1.0)
    left = 1 - share if config.schedule == "linear" else (1 + math.cos(math.pi * share)) / 2
    return config.min_lr + (config.lr - config.min_lr) * left


@given(config=CONFIGS)
def test_no_step_of_the_warm_up_has_learning_rate_0_and_the_one_after_it_has_all(config: OptimizerConfig) -> None:
    found = rates(make_schedule(config), 30)
    assert found == pytest.approx([rate(config, step) for step in range(1, 31)], rel=1e-9, abs=1e-15)
    assert min(found[: config.warmup_steps + 1]) > 0
    assert found[config.warmup_steps] == pytest.approx(config.lr)


@given(config=CONFIGS, taken=st.integers(0, 20))
def test_a_resumed_run_goes_on_with_the_same_learning_rates(config: OptimizerConfig, taken: int) -> None:
    first, second = make_schedule(config), make_schedule(config)
    rates(first, taken)
    second.load_state_dict(first.state_dict())
    assert rates(second, 10) == rates(first, 10)


def test_the_critic_warms_up_to_its_own_learning_rate() -> None:
    config = OptimizerConfig(lr=1e-6, critic_lr=1e-5, warmup_steps=3).of_critic
    assert rates(make_schedule(config), 5) == pytest.approx([2.5e-6, 5e-6, 7.5e-6, 1e-5, 1e-5])


def test_a_constant_learning_rate_does_not_look_at_decay_steps() -> None:
    assert rates(make_schedule(OptimizerConfig(lr=1e-3, warmup_steps=5, decay_steps=2)), 9)[5:] == [1e-3] * 4
