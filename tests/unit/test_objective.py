"""The objectives against the worked numbers of arXiv 2503.20783 and OAT, and what must not change them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_r1z.objective import AGGREGATIONS, OBJECTIVES, clipped_losses, kl_terms, likelihood_losses
from megatron_r1z.types import are_equal

REWARDS = st.lists(st.floats(-10, 10, allow_subnormal=False), min_size=2, max_size=16)


def group(right: int, size: int = 8) -> list[float]:
    return [1.0] * right + [0.0] * (size - right)


@dataclass
class Row:
    """A response: its reward's advantage (or one per token), and the log-probs that move and those that do not."""

    advantage: float | Tensor
    logprobs: Tensor
    old_logprobs: Tensor


def make_rows(advantages: Sequence[float], lengths: Sequence[int], seed: int | None = None) -> list[Row]:
    """Ratio 1 without a seed, random ratios around 1 with one."""
    generator = torch.Generator().manual_seed(seed or 0)
    rows = []
    for advantage, length in zip(advantages, lengths, strict=True):
        old = -torch.rand(length, generator=generator, dtype=torch.float64)
        step = torch.zeros(length) if seed is None else 0.3 * torch.randn(length, generator=generator, dtype=torch.float64)
        rows.append(Row(advantage, (old + step).float().requires_grad_(), old.float()))
    return rows


def step_loss(name: str, rows: Sequence[Row], constant: int) -> tuple[float, list[Tensor]]:
    """Loss of one step over `rows` and the gradient of each row's log-probs."""
    objective, lengths = AGGREGATIONS[name], [row.logprobs.numel() for row in rows]
    terms = clipped_losses(
        torch.cat([row.logprobs for row in rows]),
        torch.cat([row.old_logprobs for row in rows]),
        torch.cat([torch.as_tensor(row.advantage).expand(length) for row, length in zip(rows, lengths, strict=True)]),
        torch.cat([torch.full((length,), objective.token_weight(length)) for length in lengths]),
        0.2,
        0.2,
    )
    loss = terms.losses_R.double().sum() / objective.denominator(lengths, constant)
    return loss.item(), list(torch.autograd.grad(loss, [row.logprobs for row in rows]))


# ---------------------------------------------------------------------------------------------------------------------- advantages


@pytest.mark.parametrize(
    ("name", "right", "advantage_right", "advantage_wrong"),
    [
        ("drgrpo", 1, 0.875, -0.125),
        ("drgrpo", 2, 0.75, -0.25),
        ("drgrpo", 3, 0.625, -0.375),
        ("drgrpo", 4, 0.5, -0.5),
        ("drgrpo", 7, 0.125, -0.875),
        ("grpo", 1, 2.47487, -0.35355),
        ("grpo", 2, 1.62019, -0.54006),
        ("grpo", 3, 1.20761, -0.72457),
        ("grpo", 4, 0.93541, -0.93541),
        ("grpo", 7, 0.35355, -2.47487),
    ],
)
def test_advantages_of_right_and_wrong_responses(name: str, right: int, advantage_right: float, advantage_wrong: float) -> None:
    found = OBJECTIVES[name].advantages(group(right))
    assert found == pytest.approx([advantage_right] * right + [advantage_wrong] * (8 - right), abs=6e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
@given(reward=st.floats(-10, 10), size=st.integers(2, 16))
def test_an_all_equal_group_gives_exact_zeros(name: str, reward: float, size: int) -> None:
    assert OBJECTIVES[name].advantages([reward] * size) == [0.0] * size


@pytest.mark.parametrize("name", OBJECTIVES)
@given(
    terms=st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.7, -0.5, 1.0]), min_size=1, max_size=6),
    scale=st.sampled_from([1e-3, 1.0, 1e3, 1e9]),
    orders=st.lists(st.randoms(use_true_random=False), min_size=2, max_size=8),
    single=st.booleans(),
)
def test_rewards_that_are_equal_but_for_rounding_have_no_advantage(
    name: str, terms: list[float], scale: float, orders: list[random.Random], single: bool
) -> None:
    """The same rewards added up in any order, in float64 or in float32, by themselves or with their opposites, which leaves 0."""
    rewards = []
    for order in orders:
        shuffled = order.sample([scale * term for term in terms], len(terms))
        total = torch.zeros((), dtype=torch.float32 if single else torch.float64)
        for term in shuffled:
            total += term
        rewards.append(float(total))
    assert are_equal(rewards)
    assert OBJECTIVES[name].advantages(rewards) == [0.0] * len(rewards)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_rewards_that_differ_have_advantages_whatever_their_size(name: str, scale: float) -> None:
    assert not are_equal([scale, scale * 1.0001])
    assert all(OBJECTIVES[name].advantages([scale, scale * 1.0001]))


def test_rewards_that_cancel_are_equal_where_they_leave_nothing() -> None:
    assert are_equal([0.1 + 0.2 - 0.3, 0.0, 0.3 - 0.1 - 0.2])
    assert are_equal([])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_single_response_has_no_baseline_and_no_advantage(name: str) -> None:
    assert OBJECTIVES[name].advantages([0.7]) == [0.0]
    assert OBJECTIVES[name].advantages([]) == []


@given(rewards=REWARDS.filter(lambda rewards: not are_equal(rewards)))
def test_rloo_is_the_centred_advantage_times_a_factor_and_leaves_one_out(rewards: list[float]) -> None:
    size = len(rewards)
    found = OBJECTIVES["rloo"].advantages(rewards)
    assert found == pytest.approx([value * size / (size - 1) for value in OBJECTIVES["drgrpo"].advantages(rewards)], abs=1e-12)
    others = [(sum(rewards) - reward) / (size - 1) for reward in rewards]
    assert found == pytest.approx([reward - other for reward, other in zip(rewards, others, strict=True)], abs=1e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
@given(rewards=REWARDS)
def test_advantages_add_up_to_zero_and_keep_the_order_of_the_rewards(name: str, rewards: list[float]) -> None:
    found = OBJECTIVES[name].advantages(rewards)
    assert sum(found) == pytest.approx(0, abs=1e-6)
    assert [value for _, value in sorted(zip(rewards, found, strict=True))] == sorted(found)


# ---------------------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize(
    ("name", "per_response", "loss"),
    [("drgrpo", [-0.15, 0.10, 0.025, 0.075], 0.0125), ("grpo", [-1.5, 0.5, 0.5, 0.5], 0.0)],
)
def test_loss_at_ratio_one(name: str, per_response: list[float], loss: float) -> None:
    rows = make_rows(OBJECTIVES[name].advantages([1.0, 0.0, 0.0, 0.0]), [2, 4, 1, 3])
    assert [step_loss(name, [row], 10)[0] for row in rows] == pytest.approx(per_response, abs=1e-6)
    assert step_loss(name, rows, 10)[0] == pytest.approx(loss, abs=1e-6)


@given(rewards=REWARDS, seed=st.integers(0, 99))
def test_grpo_is_zero_at_ratio_one_and_dr_grpo_only_at_equal_lengths(rewards: list[float], seed: int) -> None:
    lengths = torch.randint(1, 9, (len(rewards),), generator=torch.Generator().manual_seed(seed)).tolist()
    assert step_loss("grpo", make_rows(OBJECTIVES["grpo"].advantages(rewards), lengths), 10)[0] == pytest.approx(0, abs=1e-5)
    advantages = OBJECTIVES["drgrpo"].advantages(rewards)
    assert step_loss("drgrpo", make_rows(advantages, [5] * len(rewards)), 10)[0] == pytest.approx(0, abs=1e-5)
    expected = -sum(advantage * length for advantage, length in zip(advantages, lengths, strict=True)) / len(rewards) / 10
    assert step_loss("drgrpo", make_rows(advantages, lengths), 10)[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [(1.5, 1.0, -1.2, 0.0), (0.5, 1.0, -0.5, -0.5), (1.5, -1.0, 1.5, 1.5), (0.5, -1.0, 0.8, 0.0), (1.1, 1.0, -1.1, -1.1)],
)
def test_clipping(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    logprobs = torch.tensor([ratio]).log().requires_grad_()
    terms = clipped_losses(logprobs, torch.zeros(1), torch.tensor([advantage]), torch.ones(1), 0.2, 0.2)
    assert terms.losses_R.item() == pytest.approx(loss, abs=1e-6)
    assert torch.autograd.grad(terms.losses_R.sum(), logprobs)[0].item() == pytest.approx(gradient, abs=1e-6)
    assert terms.ratio_R.item() == pytest.approx(ratio)
    assert not terms.ratio_R.requires_grad
    assert terms.clipped_R.item() == (gradient == 0)


def test_the_two_clip_bounds_are_separate() -> None:
    logprobs = torch.tensor([1.5, 0.5]).log()
    terms = clipped_losses(logprobs, torch.zeros(2), torch.tensor([1.0, -1.0]), torch.ones(2), 0.1, 0.3)
    assert terms.losses_R.tolist() == pytest.approx([-1.3, 0.9])


def test_at_ratio_one_the_gradient_is_that_of_the_plain_policy_gradient_and_nothing_is_clipped() -> None:
    (row,) = make_rows([0.875], [6])
    terms = clipped_losses(row.logprobs, row.logprobs.detach(), torch.full((6,), 0.875), torch.ones(6), 0.2, 0.2)
    assert torch.equal(torch.autograd.grad(terms.losses_R.sum(), row.logprobs)[0], torch.full((6,), -0.875))
    assert not terms.clipped_R.any()


# --------------------------------------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize(("name", "factor"), [("drgrpo", 0.5), ("rloo", 0.5), ("grpo", 1.0), ("token_mean", 1.0)])
@given(seed=st.integers(1, 99))
def test_doubling_the_length_constant(name: str, factor: float, seed: int) -> None:
    rows = make_rows(OBJECTIVES[name].advantages(group(3)), [2, 4, 1, 3, 7, 5, 2, 6], seed)
    (loss, gradients), (loss_2C, gradients_2C) = step_loss(name, rows, 10), step_loss(name, rows, 20)
    assert loss_2C == pytest.approx(factor * loss, abs=1e-7)
    for gradient, other in zip(gradients, gradients_2C, strict=True):
        torch.testing.assert_close(other, factor * gradient)


@pytest.mark.parametrize("name", ["drgrpo", "grpo", "rloo"])
@given(seed=st.integers(1, 99))
def test_an_all_right_group_shrinks_the_weight_of_the_others_and_adds_no_gradient(name: str, seed: int) -> None:
    objective = OBJECTIVES[name]
    rows = make_rows(objective.advantages(group(3)), [2, 4, 1, 3, 7, 5, 2, 6], seed)
    right = make_rows(objective.advantages(group(8)), [3, 1, 4, 1, 5, 9, 2, 6], seed + 1)
    (loss, gradients), (loss_more, gradients_more) = step_loss(name, rows, 10), step_loss(name, rows + right, 10)
    shrink = len(rows) / (len(rows) + 8)
    assert loss_more == pytest.approx(loss * shrink, abs=1e-7)
    for gradient, other in zip(gradients, gradients_more, strict=False):
        torch.testing.assert_close(other, gradient * shrink)
    assert all(not gradient.any() for gradient in gradients_more[len(rows) :])


@pytest.mark.parametrize(("name", "factor"), [("drgrpo", 2.0), ("rloo", 2.0), ("grpo", 1.0)])
@given(seed=st.integers(1, 99), length=st.integers(1, 12))
def test_a_response_of_twice_the_length(name: str, factor: float, seed: int, length: int) -> None:
    """With the same terms per token: twice the contribution, but the same under GRPO, whose length bias this is."""
    (row,) = make_rows([-0.5], [length], seed)
    twice = Row(row.advantage, row.logprobs.detach().repeat(2).requires_grad_(), row.old_logprobs.repeat(2))
    (loss, (gradient,)), (loss_2, (gradient_2,)) = step_loss(name, [row], 10), step_loss(name, [twice], 10)
    assert loss_2 == pytest.approx(factor * loss, rel=1e-5)
    torch.testing.assert_close(gradient_2, (factor / 2) * gradient.repeat(2))


@given(seed=st.integers(1, 99))
def test_token_mean_weighs_every_token_of_the_step_the_same(seed: int) -> None:
    rows = make_rows([0.5, -0.5], [3, 9], seed)
    _, gradients = step_loss("token_mean", rows, 10)
    terms = [clipped_losses(row.logprobs, row.old_logprobs, torch.tensor(row.advantage), torch.ones(1), 0.2, 0.2) for row in rows]
    for row, gradient, term in zip(rows, gradients, terms, strict=True):
        torch.testing.assert_close(gradient, torch.autograd.grad(term.losses_R.sum(), row.logprobs)[0] / 12)


@given(seed=st.integers(1, 99), lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_ppo_is_the_mean_over_responses_of_means_over_tokens_with_advantages_of_their_own(seed: int, lengths: list[int]) -> None:
    rows = make_rows([0.0] * len(lengths), lengths, seed)
    generator = torch.Generator().manual_seed(seed)
    for row in rows:
        row.advantage = torch.randn(row.logprobs.shape, generator=generator)
    loss, gradients = step_loss("ppo", rows, 10)
    means = []
    for row in rows:
        ratio = torch.exp(row.logprobs - row.old_logprobs)
        means.append(-torch.minimum(ratio * row.advantage, ratio.clamp(0.8, 1.2) * row.advantage).mean())
    expected = torch.stack(means).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    for gradient, other in zip(gradients, torch.autograd.grad(expected, [row.logprobs for row in rows]), strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_a_step_without_a_single_token_has_a_denominator(name: str) -> None:
    assert AGGREGATIONS[name].denominator([0, 0], 10) >= 1
    assert AGGREGATIONS[name].denominator([], 10) >= 1
    assert AGGREGATIONS[name].token_weight(0) == 1.0


@given(seed=st.integers(0, 99))
def test_likelihood_losses_are_the_weighted_negative_logprobs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logprobs = torch.randn(7, generator=generator).requires_grad_()
    weights = torch.rand(7, generator=generator)
    terms = likelihood_losses(logprobs, weights)
    assert torch.equal(terms.losses_R, -weights * logprobs)
    assert torch.equal(torch.autograd.grad(terms.losses_R.sum(), logprobs)[0], -weights)
    assert torch.equal(terms.ratio_R, torch.ones(7))
    assert not terms.clipped_R.any()


# ---------------------------------------------------------------------------------------------------------------------- divergence


@given(seed=st.integers(0, 99), scale=st.floats(0.01, 3))
def test_the_divergence_is_estimated_without_bias_and_never_below_zero(seed: int, scale: float) -> None:
    """Over a whole vocabulary the expectation is a sum: that of the terms is KL(engine || policy)."""
    generator = torch.Generator().manual_seed(seed)
    engine, policy = (torch.log_softmax(scale * torch.randn(50, generator=generator, dtype=torch.float64), -1) for _ in range(2))
    terms = kl_terms(policy, engine)
    assert (terms >= 0).all()
    assert (engine.exp() * terms).sum().item() == pytest.approx((engine.exp() * (engine - policy)).sum().item(), rel=1e-9, abs=1e-12)


def test_the_divergence_of_nearly_equal_log_probs_is_not_lost_to_rounding() -> None:
    assert kl_terms(torch.tensor([-1.0]), torch.tensor([-1.0 - 2**-20])).item() == pytest.approx(2**-41, rel=1e-6)
