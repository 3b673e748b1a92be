"""Every row of the objective table and every switch beside it: loss and gradient against the equations written out in float64.

The reference goes token by token in plain Python and differentiates by hand. What is measured goes the way of a run: rewards to advantages,
packing over data-parallel and context-parallel ranks, the loss of each micro-batch, one division. So each row is also shown not to depend
on how its tokens are put together.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_r1z.config import Algorithm, AlgorithmConfig
from megatron_r1z.objective import (
    AGGREGATIONS,
    OBJECTIVES,
    PolicyTokens,
    clipped_losses,
    clipped_value_losses,
    estimated,
    importance_sampled,
    kl_estimate,
    make_loss,
    reinforce_losses,
    token_rewards,
)
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
SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip_higher": {"clip_low": 0.2, "clip_high": 0.28},
    "dual_clip": {"dual_clip": 3.0},
    "tis": {"tis_cap": 2.0},
    **{f"kl_{estimator}": {"kl_coef": 0.3, "kl_estimator": estimator} for estimator in ("k1", "k2", "k3")},
    "entropy": {"entropy_coef": 0.2},
    "kl_entropy_tis": {"kl_coef": 0.3, "entropy_coef": 0.2, "tis_cap": 1.2},
    "all": {"clip_low": 0.3, "clip_high": 0.6, "dual_clip": 2.0, "tis_cap": 1.2, "kl_coef": 0.1, "entropy_coef": 0.05},
}
CASES = [
    (name, switch)
    for name in TABLE
    for switch in (
        SWITCHES
        if name in ("drgrpo", "grpo_remove_len_bias")
        else ("plain", "tis", "kl_entropy_tis")
        if name == "reinforce"
        else ("plain", "all")
    )
]


@dataclass(frozen=True)
class Token:
    """Log-probs and entropy of one token."""

    new: float
    old: float
    engine: float
    reference: float
    entropy: float


def kl_term(estimator: str, new: float, reference: float) -> tuple[float, float]:
    """Estimate of a token, and its derivative by the current log-prob."""
    if estimator == "k1":
        return new - reference, 1.0
    if estimator == "k2":
        return (new - reference) ** 2 / 2, new - reference
    return math.exp(reference - new) - 1 - (reference - new), 1 - math.exp(reference - new)


def token_term(row: Row, advantage: float, token: Token, switches: dict[str, Any]) -> tuple[float, float, float]:
    """Loss of a token before w_i and D, and its derivatives by the current log-prob and by the entropy."""
    loss, slope = policy_term(row, advantage, token.new, token.old, token.engine, switches)
    divergence, kl_slope = kl_term(switches.get("kl_estimator", "k3"), token.new, token.reference)
    kl_coef, entropy_coef = switches.get("kl_coef", 0.0), switches.get("entropy_coef", 0.0)
    return loss + kl_coef * divergence - entropy_coef * token.entropy, slope + kl_coef * kl_slope, -entropy_coef


def policy_term(row: Row, advantage: float, new: float, old: float, engine: float, switches: dict[str, Any]) -> tuple[float, float]:
    """What the advantage has to do with: loss and derivative by the current log-prob."""
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
    reference_V: Tensor
    entropy_V: Tensor

    @property
    def values(self) -> tuple[Tensor, ...]:
        """In the order of `Token`."""
        return self.new_V, self.old_V, self.engine_V, self.reference_V, self.entropy_V

    @property
    def flat_lengths(self) -> list[int]:
        return [length for group in self.lengths for length in group]

    def samples(self, name: str, *, has_further_terms: bool = False) -> list[Sample]:
        samples, first = [], 0
        for number, (rewards, lengths) in enumerate(zip(self.rewards, self.lengths, strict=True)):
            for index, (advantage, length) in enumerate(zip(OBJECTIVES[name].advantages(rewards), lengths, strict=True)):
                tokens, engine = range(first, first + length), self.engine_V[first : first + length]
                sample = Sample(f"{number}/{index}", (0, 0, *tokens), 2, advantage, 1.0, tuple(engine.tolist()), 0)
                samples.append(replace(sample, has_further_terms=has_further_terms))
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
    entropy = torch.tensor([draw.uniform(0.0, 3.0) for _ in range(total)], dtype=torch.float64)
    new, old, engine, reference, entropy = (values.float().double() for values in (old + shifts(), old, engine, old + shifts(), entropy))
    return Step(rewards, lengths, new, old, engine, reference, entropy)


def expected(name: str, step: Step, switches: dict[str, Any]) -> tuple[float, Tensor, Tensor]:
    """Loss of the step and its gradients by every current log-prob and every entropy."""
    row = TABLE[name]
    denominator = row.denominator(step.flat_lengths)
    loss, gradient, entropy_gradient, place = 0.0, torch.zeros_like(step.new_V), torch.zeros_like(step.new_V), 0
    for rewards, lengths in zip(step.rewards, step.lengths, strict=True):
        for reward, length in zip(rewards, lengths, strict=True):
            for _ in range(length):
                token = Token(*(float(values_V[place]) for values_V in step.values))
                term, slope, entropy_slope = token_term(row, row.advantage(reward, rewards), token, switches)
                loss += row.weight(length) * term / denominator
                gradient[place] = row.weight(length) * slope / denominator
                entropy_gradient[place] = row.weight(length) * entropy_slope / denominator
                place += 1
    return loss, gradient, entropy_gradient


def measured(name: str, step: Step, switches: dict[str, Any], rules: PackingRules) -> tuple[float, Tensor, Tensor]:
    """The same by way of packing, micro-batch by micro-batch on every rank."""
    config = AlgorithmConfig(name=name, iterations=1, **switches)  # type: ignore[arg-type]
    loss, objective, samples = make_loss(config), OBJECTIVES[name], step.samples(name, has_further_terms=config.has_further_terms)
    new_V, entropy_V = step.new_V.float().requires_grad_(), step.entropy_V.float().requires_grad_()
    new_V.grad, entropy_V.grad = torch.zeros_like(new_V), torch.zeros_like(entropy_V)
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
                reference_V = step.reference_V.float() if loss.has_kl else None
                fixed = (None if values_V is None else values_V.float()[item.targets_R] for values_V in (step.old_V, reference_V))
                terms = loss.terms(PolicyTokens(new_V[item.targets_R], entropy_V[item.targets_R], *fixed), item)
                terms.losses_R.sum().backward()
                total += terms.losses_R.double().sum().item()
                denominator += item.denominator
    return total / denominator, new_V.grad.double() / denominator, entropy_V.grad.double() / denominator


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
    loss, *gradients = expected(name, step, SWITCHES[switch])
    found, *found_gradients = measured(name, step, SWITCHES[switch], rules)
    assert found == pytest.approx(loss, rel=1e-4, abs=1e-5)
    for found_gradient, gradient in zip(found_gradients, gradients, strict=True):  # by log-probs, by entropies
        torch.testing.assert_close(found_gradient, gradient, rtol=2e-5, atol=1e-8)


def test_the_table_has_every_row_of_the_package_and_all_can_be_chosen() -> None:
    assert set(TABLE) == set(OBJECTIVES)
    assert {*TABLE, "ppo"} == set(AGGREGATIONS) == set(get_args(Algorithm))


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
        return measured(step=replace(step, old_V=old_V), switches={}, rules=PackingRules(1, 64), **options)[1]

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


@given(seed=st.integers(0, 99))
def test_what_the_kl_estimators_are_over_a_whole_distribution(seed: int) -> None:
    """Sums over the vocabulary stand for expectations under the policy, in float64 by way of float32's rounding of the estimates.

    k1 and k3 have the divergence as their mean. As loss terms k1 has no gradient on average, k2 that of KL(policy || reference) and k3 that
    of KL(reference || policy).
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(20, generator=generator, dtype=torch.float64).requires_grad_()
    reference = torch.log_softmax(logits.detach() + 0.3 * torch.randn(20, generator=generator, dtype=torch.float64), -1)
    policy = torch.log_softmax(logits, -1)
    probability = policy.detach().exp()
    reverse = (policy.exp() * (policy - reference)).sum()
    forward = (reference.exp() * (reference - policy)).sum()
    means = {name: (probability * kl_estimate(name, policy, reference)).sum() for name in ("k1", "k2", "k3")}  # type: ignore[arg-type]
    gradients = {name: torch.autograd.grad(mean_, logits, retain_graph=True)[0] for name, mean_ in means.items()}
    assert means["k1"].item() == pytest.approx(reverse.item(), abs=1e-6)
    assert means["k3"].item() == pytest.approx(reverse.item(), abs=1e-6)
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(gradients["k1"], torch.zeros_like(logits), **close)
    torch.testing.assert_close(gradients["k2"], torch.autograd.grad(reverse, logits, retain_graph=True)[0], **close)
    torch.testing.assert_close(gradients["k3"], torch.autograd.grad(forward, logits)[0], **close)
    assert gradients["k2"].abs().max() > 1e-3


def test_without_the_switches_a_loss_needs_neither_reference_nor_entropy() -> None:
    plain, both = (make_loss(AlgorithmConfig(iterations=1, **SWITCHES[name])) for name in ("plain", "kl_entropy_tis"))
    assert (plain.has_kl, plain.has_entropy, both.has_kl, both.has_entropy) == (False, False, True, True)
    assert not make_loss(AlgorithmConfig(iterations=1, kl_coef=0.1, kl_in="reward")).has_kl


# ------------------------------------------------------------------------------------------------------------------------- the critic

NUMBERS = st.floats(-3, 3)


@given(data=st.data(), length=st.integers(1, 12), decay=st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_estimated_advantages_are_the_sums_of_discounted_temporal_differences(data: st.DataObject, length: int, decay: float) -> None:
    """Eq. 16 of arXiv 1506.02438, written out; behind the last token there is nothing."""
    rewards, values = (data.draw(st.lists(NUMBERS, min_size=length, max_size=length)) for _ in range(2))
    behind = [*values[1:], 0.0]
    differences = [reward + after - value for reward, value, after in zip(rewards, values, behind, strict=True)]
    expected = [math.fsum(decay ** (later - place) * differences[later] for later in range(place, length)) for place in range(length)]
    assert estimated(rewards, values, decay) == pytest.approx(expected, abs=1e-12)
    if decay == 1:
        assert estimated(rewards, values, decay) == pytest.approx(
            [math.fsum(rewards[place:]) - values[place] for place in range(length)], abs=1e-12
        )


def test_a_reward_comes_with_the_last_token_and_each_token_pays_for_its_divergence() -> None:
    assert token_rewards(1.0, 3, 0.5, None) == [0.0, 0.0, 1.0]
    assert token_rewards(1.0, 3, 0.5, [0.2, -0.4, 0.6]) == pytest.approx([-0.1, 0.2, 0.7])
    assert token_rewards(1.0, 1, 0.5, [0.2]) == pytest.approx([0.9])


@pytest.mark.parametrize("divergences", [None, []])
def test_a_response_without_a_token_has_no_token_to_come_with(divergences: list[float] | None) -> None:
    assert token_rewards(1.0, 0, 0.5, divergences) == []


@given(value=NUMBERS, old=NUMBERS, aim=NUMBERS, weight=st.floats(0.1, 2))
def test_the_value_loss_is_the_larger_of_two_squares(value: float, old: float, aim: float, weight: float) -> None:
    """And has no gradient where that is the one of a value that was clipped."""
    bounded = min(max(value, old - 0.2), old + 0.2)
    plain, clipped = (value - aim) ** 2, (bounded - aim) ** 2
    values = torch.tensor([value], dtype=torch.float64).requires_grad_()
    others = (torch.tensor([number], dtype=torch.float64) for number in (old, aim, weight))
    losses, is_clipped = clipped_value_losses(values, *others, 0.2)
    assert losses.item() == pytest.approx(weight * max(plain, clipped) / 2, abs=1e-12)
    if abs(plain - clipped) > 1e-6:
        assert is_clipped.item() == (clipped > plain)
        expected = 0.0 if clipped > plain else weight * (value - aim)
        assert torch.autograd.grad(losses.sum(), values)[0].item() == pytest.approx(expected, abs=1e-12)
