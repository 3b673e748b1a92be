"""Dr. GRPO and its relatives: advantages, token weights, denominator and the loss of a token. Imports torch only.

One optimizer step over N samples with length constant C (the generation budget) minimises, by eq. 3 of arXiv 2503.20783 as
implemented in its listing 1,

    L = 1/D * sum_i w_i * sum_t max(-A_i * rho_it, -A_i * clip(rho_it, 1 - low, 1 + high)),   rho_it = exp(logp_it - old_logp_it)

and the algorithms differ in four entries of a table: the advantage A_i, the token weight w_i, the denominator D, and whether the loss of a
token is the clipped one above. The first three are known before the first forward pass and are the same on every rank, so no division by
anything measured in a micro-batch exists. An advantage may also be one per token, A_it, as PPO's are. What can be switched on beside the
row (dual clip, truncated importance sampling, a KL term, an entropy bonus) is per token too: it changes the summands and never D.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_r1z.types import are_equal

if TYPE_CHECKING:
    from megatron_r1z.config import AlgorithmConfig, KlEstimator
    from megatron_r1z.packing import MicroBatch

STD_EPSILON = 1e-8
"""Added to the group's standard deviation under GRPO (OAT, `oat/algorithms/ppo.py`)."""


@dataclass(frozen=True)
class Aggregation:
    """How the losses of the response tokens of a step are added up."""

    token_weight: Callable[[int], float]
    """Response length to w_i."""
    denominator: Callable[[Sequence[int], int], int]
    """Response lengths of the whole step, of counted samples, and the length constant to D; at least 1."""
    clips: bool = field(default=True, kw_only=True)
    """False: the loss of a token is -A_i * logp_it, which has no ratio."""


@dataclass(frozen=True)
class Objective(Aggregation):
    """A row of the table whose advantages come from the rewards of a group."""

    advantages: Callable[[Sequence[float]], list[float]]
    """Rewards of one group to advantages."""


def centred(rewards_G: Sequence[float]) -> list[float]:
    """Reward minus group mean: Dr. GRPO. A group that is equal but for rounding gives exact zeros, which packing leaves out."""
    if are_equal(rewards_G):
        return [reward - reward for reward in rewards_G]  # nan for what is not finite, so that its step is skipped
    mean = fmean(rewards_G)
    return [reward - mean for reward in rewards_G]


def standardised(rewards_G: Sequence[float]) -> list[float]:
    """Centred and divided by the group's unbiased standard deviation: GRPO. A group that is equal but for rounding gives zeros."""
    if are_equal(rewards_G):  # its standard deviation is noise, or there is none
        return centred(rewards_G)
    scale = stdev(rewards_G) + STD_EPSILON
    return [value / scale for value in centred(rewards_G)]


def leave_one_out(rewards_G: Sequence[float]) -> list[float]:
    """Reward minus the mean of the other samples, which is the centred advantage times G / (G - 1): RLOO. 0 without others."""
    factor = len(rewards_G) / max(len(rewards_G) - 1, 1)
    return [value * factor for value in centred(rewards_G)]


def token_rewards(reward: float, length: int, kl_coef: float, divergences_L: Sequence[float] | None) -> list[float]:
    """The reward of a response at its last token and, where there are divergences, each token's price for its own."""
    rewards = [-kl_coef * value for value in divergences_L] if divergences_L else [0.0] * length
    return [*rewards[:-1], rewards[-1] + reward] if rewards else []


def estimated(rewards_L: Sequence[float], values_L: Sequence[float], decay: float) -> list[float]:
    """Advantages of the tokens of one response by generalised advantage estimation (arXiv 1506.02438, eq. 16) with gamma 1.

    `values_L` are the critic's before each token, `decay` is lambda. Behind the last token there is nothing: value 0. With lambda 1 an
    advantage is the sum of the rewards from its token on, less its value; plus its value it is the return, which the critic learns.
    """
    advantages, following, value_behind = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards_L), reversed(values_L), strict=True):
        following = reward + value_behind - value + decay * following
        advantages.append(following)
        value_behind = value
    return advantages[::-1]


def _one(_length: int) -> float:
    return 1.0


def _inverse(length: int) -> float:
    return 1.0 / max(length, 1)


def _samples_times_constant(lengths_N: Sequence[int], length_constant: int) -> int:
    return max(len(lengths_N), 1) * length_constant


def _samples(lengths_N: Sequence[int], _length_constant: int) -> int:
    return max(len(lengths_N), 1)


def _tokens(lengths_N: Sequence[int], _length_constant: int) -> int:
    return max(sum(lengths_N), 1)


OBJECTIVES: dict[str, Objective] = {
    "drgrpo": Objective(_one, _samples_times_constant, centred),
    "grpo": Objective(_inverse, _samples, standardised),
    "grpo_remove_std_bias": Objective(_inverse, _samples, centred),
    "grpo_remove_len_bias": Objective(_one, _samples_times_constant, standardised),
    "rloo": Objective(_one, _samples_times_constant, leave_one_out),
    "token_mean": Objective(_one, _tokens, centred),
    "reinforce": Objective(_one, _samples_times_constant, centred, clips=False),
}
"""`drgrpo`: arXiv 2503.20783; `grpo`: 2402.03300, and the same with one of the two changes that make it Dr. GRPO (flags `remove_std_bias`
and `remove_len_bias` of OAT); `rloo`: 2402.14740; `token_mean`: the aggregation of DAPO, 2503.14476; `reinforce`: `reinforce_update` of
OAT's `oat/algorithms/ppo.py` with its default critic, which is Dr. GRPO's advantage and constant."""

AGGREGATIONS: dict[str, Aggregation] = {**OBJECTIVES, "ppo": Aggregation(_inverse, _samples)}
"""All rows. `ppo`: arXiv 1707.06347 with the mean over the tokens of a response, then over responses (OAT, `oat/algorithms/ppo.py`); its
advantages come per token from a critic (`estimated`)."""


@dataclass(frozen=True)
class PolicyTokens:
    """What a loss looks at besides the micro-batch, for each of its R response tokens; float32, nats."""

    logprobs_R: Tensor
    """Of the current policy; carries the gradient."""
    entropy_R: Tensor
    """Of its distribution; carries a gradient where the loss has an entropy bonus."""
    old_logprobs_R: Tensor
    reference_logprobs_R: Tensor | None
    """None where the loss has no KL term."""


@dataclass(frozen=True)
class TokenLosses:
    """Terms of the loss per response token; R tokens."""

    losses_R: Tensor
    """w_i times the loss of the token, not divided by D; carries the gradient."""
    ratio_R: Tensor
    """rho, detached."""
    clipped_R: Tensor
    """True where a clipped branch was taken, so that the advantage of the token has no gradient."""
    importance_R: Tensor
    """Factor of truncated importance sampling, which is in the losses; 1 without it."""
    truncated_R: Tensor
    """True where that factor was cut at its cap."""
    reference_kl_R: Tensor
    """Estimate of the divergence from the reference model, detached; 0 without a KL term."""


@dataclass(frozen=True)
class Loss:
    """The loss of a step."""

    terms: Callable[[PolicyTokens, MicroBatch], TokenLosses]
    has_kl: bool = False
    """Whether it needs the reference model's log-probs."""
    has_entropy: bool = False
    """Whether it needs the gradient of the entropy."""


def make_loss(config: AlgorithmConfig) -> Loss:
    """The loss that `algorithm` of a configuration asks for."""
    return Loss(functools.partial(_terms_of, config), has_kl=config.kl_is_in("loss"), has_entropy=config.entropy_coef != 0)


def _terms_of(config: AlgorithmConfig, tokens: PolicyTokens, batch: MicroBatch) -> TokenLosses:
    given = (tokens.logprobs_R, tokens.old_logprobs_R, batch.advantages_R, batch.weights_R)
    if AGGREGATIONS[config.name].clips:
        terms = clipped_losses(*given, config.clip_low, config.clip_high, config.dual_clip)
    else:
        terms = reinforce_losses(*given)
    if config.tis_cap is not None:
        terms = importance_sampled(terms, tokens.old_logprobs_R, batch.engine_logprobs_R, config.tis_cap)
    if tokens.reference_logprobs_R is not None:
        divergence = kl_estimate(config.kl_estimator, tokens.logprobs_R, tokens.reference_logprobs_R)
        terms = with_kl(terms, divergence, batch.weights_R, config.kl_coef)
    return with_entropy(terms, tokens.entropy_R, batch.weights_R, config.entropy_coef) if config.entropy_coef else terms


def clipped_losses(
    logprobs_R: Tensor,
    old_logprobs_R: Tensor,
    advantages_R: Tensor,
    weights_R: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> TokenLosses:
    """The clipped surrogate per token, in float32. Advantages and weights are those of the token's sample.

    With a dual clip c the loss of a token with a negative advantage is at most -A * c (arXiv 1912.09729, eq. 5): the ratio of such a token
    has no upper bound otherwise.
    """
    ratio = torch.exp(logprobs_R.float() - old_logprobs_R.float())
    unclipped = -advantages_R * ratio
    range_clipped = -advantages_R * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    losses = torch.maximum(unclipped, range_clipped)
    is_clipped = range_clipped > unclipped
    if dual_clip is not None:
        is_above = (advantages_R < 0) & (ratio > dual_clip)
        losses = torch.where(is_above, -advantages_R * dual_clip, losses)
        is_clipped = is_clipped | is_above
    return _terms(weights_R * losses, ratio, is_clipped)


def reinforce_losses(logprobs_R: Tensor, old_logprobs_R: Tensor, advantages_R: Tensor, weights_R: Tensor) -> TokenLosses:
    """Minus advantage times log-prob per token, in float32: the plain policy gradient, as if the current policy had sampled.

    The ratio is told and in no loss.
    """
    logprobs = logprobs_R.float()
    ratio = torch.exp(logprobs - old_logprobs_R.float())
    return _terms(-weights_R * advantages_R * logprobs, ratio, torch.zeros_like(ratio, dtype=torch.bool))


def importance_sampled(terms: TokenLosses, old_logprobs_R: Tensor, engine_logprobs_R: Tensor, cap: float) -> TokenLosses:
    """The terms with each loss times min(exp(old - engine log-prob), cap), a factor without gradient.

    Truncated importance sampling: the engine's tokens stand for samples of the old policy, whose log-probs differ by the mismatch (OAT,
    `tis_c` in `oat/algorithms/ppo.py`).
    """
    importance = torch.exp(old_logprobs_R.detach().float() - engine_logprobs_R.float())
    factor = importance.clamp(max=cap)
    return replace(terms, losses_R=factor * terms.losses_R, importance_R=factor, truncated_R=importance > cap)


def clipped_value_losses(
    values_R: Tensor, old_values_R: Tensor, returns_R: Tensor, weights_R: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """The critic's loss of each token, w_i / 2 * max((V - R)^2, (V clipped to old V +- clip - R)^2), and where it is a clipped one.

    The clip bounds how far one iteration moves a value (OAT, `oat/algorithms/ppo.py`).
    """
    moved = values_R - old_values_R
    squares = (values_R - returns_R).square()
    clipped_squares = (old_values_R + moved.clamp(-clip, clip) - returns_R).square()
    is_clipped = (moved.abs() > clip) & (clipped_squares > squares)  # within the clip both are the same but for rounding
    return weights_R * torch.where(is_clipped, clipped_squares, squares) / 2, is_clipped


def likelihood_losses(logprobs_R: Tensor, weights_R: Tensor) -> TokenLosses:
    """Next-token loss in the same form: minus the weighted log-prob of each token, ratio 1, nothing clipped."""
    return _terms(-weights_R * logprobs_R, torch.ones_like(logprobs_R), torch.zeros_like(logprobs_R, dtype=torch.bool))


def _terms(losses_R: Tensor, ratio_R: Tensor, clipped_R: Tensor) -> TokenLosses:
    """Without what can be added to them."""
    ratio = ratio_R.detach()
    return TokenLosses(losses_R, ratio, clipped_R, torch.ones_like(ratio), torch.zeros_like(clipped_R), torch.zeros_like(ratio))


def kl_estimate(estimator: KlEstimator, logprobs_R: Tensor, reference_logprobs_R: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) by token, in float32: k1, k2 or k3 of J. Schulman, "Approximating KL divergence" (2020).

    With d = reference minus policy log-prob: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - 1 - d. Over tokens of the policy the means of k1 and k3
    are the divergence, and that of k2 is near it where both are. Their gradients are another matter (docs/algorithms.md).
    """
    difference = reference_logprobs_R.float() - logprobs_R.float()
    if estimator == "k1":
        return -difference
    return difference.square() / 2 if estimator == "k2" else torch.expm1(difference) - difference


def with_kl(terms: TokenLosses, divergence_R: Tensor, weights_R: Tensor, coefficient: float) -> TokenLosses:
    """The terms with the divergence of each token, times weight and coefficient, in the loss."""
    losses = terms.losses_R + coefficient * weights_R * divergence_R
    return replace(terms, losses_R=losses, reference_kl_R=divergence_R.detach())


def with_entropy(terms: TokenLosses, entropy_R: Tensor, weights_R: Tensor, coefficient: float) -> TokenLosses:
    """The terms with an entropy bonus: the loss of each token less its entropy, times weight and coefficient."""
    return replace(terms, losses_R=terms.losses_R - coefficient * weights_R * entropy_R)


def kl_terms(logprobs_R: Tensor, engine_logprobs_R: Tensor) -> Tensor:
    """Estimate of the divergence of the sampled distribution from the policy's, KL(engine || policy), by token; nats, float64.

    The mean over sampled tokens is unbiased and no term is below 0: exp(d) - 1 - d with d = policy minus engine log-prob ("k3" of
    J. Schulman, "Approximating KL divergence", 2020). It says how far apart they are and is in no loss.
    """
    difference = logprobs_R.double() - engine_logprobs_R.double()
    return torch.expm1(difference) - difference
