"""The figures of an iteration are those of its tokens, however these are put into steps, micro-batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("megatron.core")

from megatron.core import parallel_state

from megatron_r1z.layout.topology import Topology
from megatron_r1z.policy.parallel import start_megatron
from megatron_r1z.record.metrics import critic_metrics, update_metrics
from megatron_r1z.types import Sample
from tests.unit.policy.step_ranks import ALGORITHM, VALUE_CLIP, Table, Told, stats_of

PER_STEP = {"loss", "grad_norm", "learning_rate", "skipped_steps"}
"""Means or sums over steps, not over tokens."""


@pytest.fixture(scope="module", autouse=True)
def megatron(one_rank: None) -> Iterator[None]:
    start_megatron(Topology(1), seed=0)
    yield
    parallel_state.destroy_model_parallel()


def make_case(lengths: Sequence[int], seed: int) -> tuple[list[Sample], Table]:
    """Samples of so many response tokens, with and without an advantage; those of length 0 have none."""
    generator = torch.Generator().manual_seed(seed)

    def some(length: int, scale: float) -> torch.Tensor:
        return torch.randn(length, generator=generator) * scale

    samples, table = [], {}
    for index, length in enumerate(lengths):
        old = -some(length, 1.0).abs()
        name = f"0/{index}"
        table[name] = Told(old + some(length, 0.3), old, old + some(length, 0.2), some(length, 1.0).abs(), some(length, 0.3))
        advantage = 0.0 if index % 3 == 2 else tuple(some(length, 1.0).tolist())
        values, engine = tuple(some(length, 0.3).tolist()), tuple((old + some(length, 0.1)).tolist())
        samples.append(Sample(name, (1, *range(2, 2 + length)), 1, advantage, 1.0, engine, 0, values=values))
    return samples, table


def figures_of_tokens(samples: Sequence[Sample], table: Table) -> dict[str, float]:
    """Of all tokens that are trained, in float64; nothing where there is none."""
    trained = [sample for sample in samples if sample.has_gradient]
    if not trained:
        return {"update/trained_tokens": 0.0}

    def all_of(pick: Callable[[Sample, Told], Any]) -> torch.Tensor:
        return torch.cat([torch.as_tensor(pick(sample, table[sample.sample_id])).double() for sample in trained])

    current, old, reference, entropy, values = (all_of(lambda _sample, told, at=at: astuple_of(told)[at]) for at in range(5))
    engine, advantages = all_of(lambda sample, _told: sample.engine_logprobs), all_of(lambda sample, _told: sample.advantages)
    old_values, returns = all_of(lambda sample, _told: sample.values), all_of(lambda sample, _told: sample.returns)
    ratio, importance, away = (current - old).exp(), (old - engine).exp(), (engine - old).abs()
    high, low, dual = (advantages > 0) & (ratio > 1.2), (advantages < 0) & (ratio < 0.8), (advantages < 0) & (ratio > 1.3)
    bounded = old_values + (values - old_values).clamp(-VALUE_CLIP, VALUE_CLIP)
    assert ALGORITHM.tis_cap is not None
    means = {
        "update/clip_fraction": high | low | dual,
        "update/clipped_high_share": high,
        "update/clipped_low_share": low,
        "update/dual_clipped_share": dual,
        "update/tis_weight_mean": importance.clamp(max=ALGORITHM.tis_cap),
        "update/tis_truncated_share": importance > ALGORITHM.tis_cap,
        "update/ratio_mean": ratio,
        "update/entropy_nats": entropy,
        "update/sampler_kl_nats": (current - engine).exp() - 1 - (current - engine),
        "update/reference_kl_nats": (reference - current).exp() - 1 - (reference - current),
        "update/mismatch_mean_nats": away,
        "critic/clip_fraction": (bounded - returns) ** 2 - (values - returns) ** 2 > 1e-6,
        "critic/value_mean": values,
        "critic/return_mean": returns,
    }
    spread = returns.var(correction=0)
    return {name: value.double().mean().item() for name, value in means.items()} | {
        "update/ratio_max": ratio.max().item(),
        "update/mismatch_max_nats": away.max().item(),
        "update/trained_tokens": float(away.numel()),
        "critic/explained_variance": 1 - ((returns - values).var(correction=0) / spread).item() if spread > 1e-9 else 0.0,
    }


def astuple_of(told: Told) -> tuple[torch.Tensor, ...]:
    return told.current, told.old, told.reference, told.entropy, told.values


def of_tokens(stats: Sequence[tuple[Any, Any]]) -> dict[str, float]:
    """The row of an iteration of these steps, without the figures that are not of tokens."""
    row = update_metrics([one for one, _ in stats]) | critic_metrics([other for _, other in stats])
    return {name: value for name, value in row.items() if name.partition("/")[2] not in PER_STEP}


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=20),
    steps=st.lists(st.integers(0, 3), min_size=20, max_size=20),
    seed=st.integers(0, 999),
)
def test_the_figures_of_an_iteration_are_those_of_its_tokens(lengths: list[int], steps: list[int], seed: int) -> None:
    """Steps of any size, some without a token that is trained, which count nothing."""
    samples, table = make_case(lengths, seed)
    parts = [[sample for sample, place in zip(samples, steps, strict=False) if place == number] for number in range(4)]
    found, expected = of_tokens([stats_of(part, table, 0, 1) for part in parts]), figures_of_tokens(samples, table)
    percentile = found.pop("update/mismatch_p999_nats", None)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    if percentile is not None:  # over fewer than 1000 tokens
        assert percentile == found["update/mismatch_max_nats"]


def test_the_percentile_of_an_iteration_is_one_that_so_many_of_its_tokens_do_not_exceed() -> None:
    samples, table = make_case([30] * 300, 5)
    away = torch.cat(
        [
            (torch.tensor(sample.engine_logprobs) - table[sample.sample_id].old).abs()
            for sample in samples
            if sample.has_gradient  # 6000 tokens
        ]
    )
    for size in (300, 150, 30):
        stats = [stats_of(samples[start : start + size], table, 0, 1) for start in range(0, 300, size)]
        bound = of_tokens(stats)["update/mismatch_p999_nats"]
        assert (away <= bound).double().mean() >= 0.999
        assert bound == pytest.approx(max(update.mismatch_p999 for update, _ in stats), abs=0)
    exact = of_tokens([stats_of(samples, table, 0, 1)])["update/mismatch_p999_nats"]
    assert (away < exact).double().mean() < 0.999, "no smaller one will do"


def test_the_figures_are_those_of_the_tokens_of_all_ranks(run_ranks: Callable[..., None], tmp_path: Path) -> None:
    """Three ranks; in the last step all but one have nothing to do."""
    samples, table = make_case([7, 0, 30, 12, 9, 25, 18, 3, 11, 30, 1, 22], 3)
    steps = [samples[:5], samples[5:10], samples[10:11]]
    torch.save((steps, {name: astuple(told) for name, told in table.items()}), tmp_path / "steps.pt")
    run_ranks(Path(__file__).with_name("step_ranks.py"), 3, str(tmp_path))
    stats = [torch.load(tmp_path / f"stats_{rank}.pt", weights_only=False) for rank in range(3)]
    assert stats[0] == stats[1] == stats[2]
    found = of_tokens(stats[0])
    found.pop("update/mismatch_p999_nats")
    assert found == pytest.approx(figures_of_tokens(samples[:11], table), rel=1e-4, abs=1e-5)


@given(reward=st.floats(0.01, 1), length=st.integers(1, 30))
def test_returns_that_are_equal_but_for_rounding_explain_nothing(reward: float, length: int) -> None:
    """A return is advantage plus value, which does not always give the reward back, and a variance is a difference."""
    values = tuple(0.013 * place for place in range(length))
    tokens = tuple(range(2, 2 + length))
    samples = [Sample("0/0", (1, *tokens), 1, tuple(reward - value for value in values), 1.0, (-1.0,) * length, 0, values=values)]
    zeros = torch.zeros(length)
    row = of_tokens([stats_of(samples, {"0/0": Told(zeros, zeros, zeros, zeros, torch.tensor(values))}, 0, 1)])
    assert row.get("critic/explained_variance", 0.0) == 0.0


def test_a_step_without_tokens_has_no_figures_of_tokens() -> None:
    row = of_tokens([stats_of([], {}, 0, 1)])
    assert row == {"update/trained_tokens": 0.0}
    assert not any(math.isnan(value) for value in row.values())
