"""Every row of the objective table and every switch beside it: loss and gradient against the equations written out in float64.

The reference goes token by token in plain Python and differentiates by hand. What is measured goes the way of a run: rewards to advantages,
packing over data-parallel and context-parallel ranks, the loss of each micro-batch, one division. So each row is also shown not to depend
on how its tokens are put together.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_r1z.config import Algorithm, AlgorithmConfig
from megatron_r1z.objective import OBJECTIVES, clipped_losses, importance_sampled, make_loss, reinforce_losses
from megatron_r1z.packing import PackingRules, pack
from megatron_r1z.types import Sample

CONSTANT = 12
LOG_RATIOS = (-0.9, -0.4, -0.1, 0.05, 0.4, 0.9, 1.4)
"""With 0.04 more or less: on every side of every bound used here, and not so near to one that float32 could decide otherwise."""

# ---------------------------------------------------------------------------------------------------------- the table, written again


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def std(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum((value - mean(values)) ** 2 for value in values) / (len(values) - 1))


@dataclass(frozen=True)
class Row:
    """As in docs/algorithms.md: `advantage` of (reward, rewards of the group), `weight` of the length, `denominator` of the lengths."""

    advantage: Callable[[float, Sequence[float]], float]
    weight: Callable[[int], float]
    denominator: Callable[[Sequence[int]], float]
    has_ratio: bool = True


def minus_mean(reward: float, group: Sequence[float]) -> float:
    return reward - mean(group)


def over_std(reward: float, group: Sequence[float]) -> float:
    return (reward - mean(group)) / (std(group) + 1e-8)


def minus_others(reward: float, group: Sequence[float]) -> float:
    return reward - (math.fsum(group) - reward) / (len(group) - 1)


TABLE = {
    "drgrpo": Row(minus_mean, lambda _: 1, lambda lengths: len(lengths) * CONSTANT),
    "grpo": Row(over_std, lambda length: 1 / length, len),
    "grpo_remove_std_bias": Row(minus_mean, lambda length: 1 / length, len),
    "grpo_remove_len_bias": Row(over_std, lambda _: 1, lambda lengths: len(lengths) * CONSTANT),
    "rloo": Row(minus_others, lambda _: 1, lambda lengths: len(lengths) * CONSTANT),
    "token_mean": Row(minus_mean, lambda _: 1, sum),
    "reinforce": Row(minus_mean, lambda _: 1, lambda lengths: len(lengths) * CONSTANT, has_ratio=False),
}
SWITCHES: dict[str, dict[str, float]] = {
    "plain": {},
    "clip_higher": {"clip_low": 0.2, "clip_high": 0.28},
    "dual_clip": {"dual_clip": 3.0},
    "tis": {"tis_cap": 2.0},
    "all": {"clip_low": 0.3, "clip_high": 0.6, "dual_clip": 2.0, "tis_cap": 1.2},
}
CASES = [
    (name, switch)
    for name in TABLE
    for switch in (
        SWITCHES if name in ("drgrpo", "grpo_remove_len_bias") else ("plain", "tis") if name == "reinforce" else ("plain", "all")
    )
]


def token_term(row: Row, advantage: float, new: float, old: float, engine: float, switches: dict[str, float]) -> tuple[float, float]:
    """Loss of a token before w_i and D, and its derivative by the current log-prob."""
    ratio = math.exp(new - old)
    if not row.has_ratio:
        loss, slope = -advantage * new, -advantage
    elif advantage > 0 and ratio > 1 + switches.get("clip_high", 0.2):
        loss, slope = -advantage * (1 + switches.get("clip_high", 0.2)), 0.0
    elif advantage < 0 and ratio < 1 - switches.get("clip_low", 0.2):
        loss, slope = -advantage * (1 - switches.get("clip_low", 0.2)), 0.0
    elif advantage < 0 and ratio > switches.get("dual_clip", math.inf):
        loss, slope = -advantage * switches["dual_clip"], 0.0
    else:
        loss, slope = -advantage * ratio, -advantage * ratio
    importance = min(math.exp(old - engine), switches["tis_cap"]) if "tis_cap" in switches else 1.0
    return importance * loss, importance * slope


# ----------------------------------------------------------------------------------------------------------------------- random steps


@dataclass(frozen=True)
class Step:
    """Responses of some groups; every response token of the step is a token id of its own, by which log-probs are found."""

    rewards: list[list[float]]
    lengths: list[list[int]]
    new_V: Tensor
    old_V: Tensor
    engine_V: Tensor

    @property
    def flat_lengths(self) -> list[int]:
        return [length for group in self.lengths for length in group]

    def samples(self, name: str) -> list[Sample]:
        samples, first = [], 0
        for number, (rewards, lengths) in enumerate(zip(self.rewards, self.lengths, strict=True)):
            for index, (advantage, length) in enumerate(zip(OBJECTIVES[name].advantages(rewards), lengths, strict=True)):
                tokens, engine = range(first, first + length), self.engine_V[first : first + length]
                samples.append(Sample(f"{number}/{index}", (0, 0, *tokens), 2, advantage, 1.0, tuple(engine.tolist()), 0))
                first += length
        return samples


def draw_step(seed: int) -> Step:
    """Float32 values kept in float64. One group is all equal."""
    draw = random.Random(seed)
    size = draw.randint(2, 4)
    rewards = [[draw.choice((0.0, 0.25, 1.0, draw.uniform(-2, 2))) for _ in range(size)] for _ in range(draw.randint(1, 3))]
    rewards.append([draw.choice((0.0, 1.0))] * size)
    lengths = [[draw.randint(1, CONSTANT) for _ in group] for group in rewards]
    total = sum(map(sum, lengths))

    def shifts() -> Tensor:
        return torch.tensor([draw.choice(LOG_RATIOS) + draw.uniform(-0.04, 0.04) for _ in range(total)], dtype=torch.float64)

    engine = torch.tensor([-draw.uniform(0.5, 6) for _ in range(total)], dtype=torch.float64)
    old = engine + shifts()
    new, old, engine = ((values).float().double() for values in (old + shifts(), old, engine))
    return Step(rewards, lengths, new, old, engine)


def expected(name: str, step: Step, switches: dict[str, float]) -> tuple[float, Tensor]:
    """Loss of the step and its gradient by every current log-prob."""
    row = TABLE[name]
    denominator = row.denominator(step.flat_lengths)
    loss, gradient, place = 0.0, torch.zeros_like(step.new_V), 0
    for rewards, lengths in zip(step.rewards, step.lengths, strict=True):
        for reward, length in zip(rewards, lengths, strict=True):
            for _ in range(length):
                values = [float(values_V[place]) for values_V in (step.new_V, step.old_V, step.engine_V)]
                term, slope = token_term(row, row.advantage(reward, rewards), *values, switches)
                loss += row.weight(length) * term / denominator
                gradient[place] = row.weight(length) * slope / denominator
                place += 1
    return loss, gradient


def measured(name: str, step: Step, switches: dict[str, float], rules: PackingRules) -> tuple[float, Tensor]:
    """The same by way of packing, micro-batch by micro-batch on every rank."""
    config = AlgorithmConfig(name=name, iterations=1, **switches)  # type: ignore[arg-type]
    loss, objective, samples = make_loss(config), OBJECTIVES[name], step.samples(name)
    new_V = step.new_V.float().requires_grad_()
    total, denominator = 0.0, 0
    for data_rank in range(rules.data_parallel_size):
        for context_rank in range(rules.context_parallel_size):
            batch = pack(
                samples,
                rules,
                data_rank,
                context_rank,
                token_weight=objective.token_weight,
                denominator=objective.denominator(step.flat_lengths, CONSTANT),
            )
            for item in batch.micro_batches:
                terms = loss(new_V[item.targets_R], step.old_V.float()[item.targets_R], item)
                terms.losses_R.sum().backward()
                total += terms.losses_R.double().sum().item()
                denominator += item.denominator
    assert new_V.grad is not None
    return total / denominator, new_V.grad.double() / denominator


RULES = st.builds(
    PackingRules,
    data_parallel_size=st.integers(1, 3),
    micro_batch_tokens=st.sampled_from([16, 40, 4096]),
    context_parallel_size=st.integers(1, 2),
    pad_sequences=st.booleans(),
)


@pytest.mark.parametrize(("name", "switch"), CASES)
@settings(max_examples=12)
@given(seed=st.integers(0, 10_000), rules=RULES)
def test_loss_and_gradient_are_those_of_the_equation_however_the_step_is_packed(
    name: str, switch: str, seed: int, rules: PackingRules
) -> None:
    step = draw_step(seed)
    (loss, gradient), (found, found_gradient) = (
        expected(name, step, SWITCHES[switch]),
        measured(name, step, SWITCHES[switch], rules),
    )
    assert found == pytest.approx(loss, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(found_gradient, gradient, rtol=2e-5, atol=1e-8)


def test_the_table_has_every_row_of_the_package_and_all_can_be_chosen() -> None:
    assert set(TABLE) == set(OBJECTIVES) == set(get_args(Algorithm))


def test_random_steps_lie_on_every_side_of_every_bound() -> None:
    """Otherwise the switches would not be seen."""
    terms = []
    for seed in range(20):
        step = draw_step(seed)
        samples = step.samples("drgrpo")
        advantages = torch.tensor([value for sample in samples for value in sample.advantages])
        plain = clipped_losses(step.new_V, step.old_V, advantages, torch.ones(()), 0.2, 0.28)
        terms.append((advantages, importance_sampled(plain, step.old_V, step.engine_V, 2.0)))
    ratio, advantage = torch.cat([item.ratio_R for _, item in terms]), torch.cat([advantages for advantages, _ in terms])
    for is_there in (
        (advantage > 0) & (ratio > 1.28),
        (advantage > 0) & (ratio < 0.8),
        (advantage < 0) & (ratio < 0.8),
        (advantage < 0) & (ratio > 3),
        (advantage < 0) & (ratio > 1.28) & (ratio < 3),
        advantage == 0,
        torch.cat([item.truncated_R for _, item in terms]),
    ):
        assert 0.02 < is_there.double().mean() < 0.6


# ------------------------------------------------------------------------------------------------------------------ what each is for


@pytest.mark.parametrize(("changed", "weight_like", "advantage_like"), [("std", "grpo", "drgrpo"), ("len", "drgrpo", "grpo")])
@given(
    rewards=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=8), lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8)
)
def test_each_ablation_takes_one_half_of_grpo_and_one_of_dr_grpo(
    changed: str, weight_like: str, advantage_like: str, rewards: list[float], lengths: list[int]
) -> None:
    row = OBJECTIVES[f"grpo_remove_{changed}_bias"]
    assert row.advantages(rewards) == OBJECTIVES[advantage_like].advantages(rewards)
    assert [row.token_weight(length) for length in lengths] == [OBJECTIVES[weight_like].token_weight(length) for length in lengths]
    assert row.denominator(lengths, CONSTANT) == OBJECTIVES[weight_like].denominator(lengths, CONSTANT)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [(5.0, -1.0, 3.0, 0.0), (2.9, -1.0, 2.9, 2.9), (5.0, 1.0, -1.2, 0.0), (0.5, -1.0, 0.8, 0.0), (0.5, 1.0, -0.5, -0.5)],
)
def test_the_dual_clip_bounds_the_loss_of_tokens_with_a_negative_advantage(
    ratio: float, advantage: float, loss: float, gradient: float
) -> None:
    logprobs = torch.tensor([ratio]).log().requires_grad_()
    terms = clipped_losses(logprobs, torch.zeros(1), torch.tensor([advantage]), torch.ones(1), 0.2, 0.2, 3.0)
    assert terms.losses_R.item() == pytest.approx(loss, abs=1e-6)
    assert torch.autograd.grad(terms.losses_R.sum(), logprobs)[0].item() == pytest.approx(gradient, abs=1e-6)
    assert terms.clipped_R.item() == (gradient == 0)


def test_importance_is_probability_of_the_old_policy_over_that_of_the_engine_up_to_the_cap() -> None:
    old, engine = torch.tensor([0.5, 0.3, 0.2]).log().requires_grad_(), torch.tensor([0.1, 0.2, 0.4]).log()
    plain = clipped_losses(old, old.detach(), torch.ones(3), torch.ones(3), 0.2, 0.2)
    assert plain.importance_R.tolist() == [1.0] * 3
    terms = importance_sampled(plain, old, engine, 2.0)
    assert terms.importance_R.tolist() == pytest.approx([2.0, 1.5, 0.5])
    assert terms.truncated_R.tolist() == [True, False, False]
    assert terms.losses_R.tolist() == pytest.approx([-2.0, -1.5, -0.5])
    assert torch.autograd.grad(terms.losses_R.sum(), old)[0].tolist() == pytest.approx([-2.0, -1.5, -0.5])  # the factor has no gradient


@given(seed=st.integers(0, 99))
def test_truncated_importance_sampling_without_a_cut_makes_the_engines_tokens_an_unbiased_sample_of_the_policy(seed: int) -> None:
    """Over a whole vocabulary the expectation is a sum: that of weighted gradients under the engine is the policy's gradient."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(20, generator=generator).requires_grad_()
    engine = torch.log_softmax(logits.detach() + 0.2 * torch.randn(20, generator=generator), -1)
    advantages = torch.randn(20, generator=generator)
    policy = torch.log_softmax(logits, -1)
    terms = importance_sampled(clipped_losses(policy, policy.detach(), advantages, torch.ones(20), 0.2, 0.2), policy, engine, 1e9)
    (found,) = torch.autograd.grad((engine.exp() * terms.losses_R).sum(), logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(-(policy.exp() * advantages).sum(), logits)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_reinforce_has_the_gradient_of_dr_grpo_at_ratio_one_and_keeps_it_where_dr_grpo_clips() -> None:
    def gradients(**options: Any) -> Tensor:
        step = draw_step(3)
        old_V = step.new_V if options.pop("ratio_one") else step.old_V
        return measured(
            step=Step(step.rewards, step.lengths, step.new_V, old_V, step.engine_V), switches={}, rules=PackingRules(1, 64), **options
        )[1]

    assert torch.equal(gradients(name="reinforce", ratio_one=True), gradients(name="drgrpo", ratio_one=True))
    assert torch.equal(gradients(name="reinforce", ratio_one=False), gradients(name="reinforce", ratio_one=True))
    clipped = (gradients(name="drgrpo", ratio_one=False) == 0) & (gradients(name="drgrpo", ratio_one=True) != 0)
    assert clipped.any()
    assert (gradients(name="reinforce", ratio_one=False)[clipped] != 0).all()


def test_the_terms_of_reinforce_are_weighted_and_tell_a_ratio_that_is_in_no_loss() -> None:
    logprobs = torch.tensor([0.5, 0.25]).log().requires_grad_()
    terms = reinforce_losses(logprobs, torch.tensor([0.25, 0.25]).log(), torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.25]))
    assert terms.losses_R.tolist() == pytest.approx([math.log(2), 0.25 * -math.log(4)])
    assert torch.autograd.grad(terms.losses_R.sum(), logprobs)[0].tolist() == [-1.0, 0.25]
    assert terms.ratio_R.tolist() == pytest.approx([2.0, 1.0])
    assert not terms.clipped_R.any()
