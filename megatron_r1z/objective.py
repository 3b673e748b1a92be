"""Dr. GRPO and its relatives: advantages, token weights, denominator and the clipped loss. Imports torch only.

One optimizer step over N samples with length constant C (the generation budget) minimises, by eq. 3 of arXiv 2503.20783 as
implemented in its listing 1,

    L = 1/D * sum_i w_i * sum_t max(-A_i * rho_it, -A_i * clip(rho_it, 1 - low, 1 + high)),   rho_it = exp(logp_it - old_logp_it)

and the algorithms differ in three entries of a table: the advantage A_i, the token weight w_i and the denominator D. All three are
known before the first forward pass and are the same on every rank, so no division by anything measured in a micro-batch exists. An
advantage may also be one per token, A_it, as PPO's are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor

STD_EPSILON = 1e-8
"""Added to the group's standard deviation under GRPO (OAT, `oat/algorithms/ppo.py`)."""


@dataclass(frozen=True)
class Aggregation:
    """How the losses of the response tokens of a step are added up."""

    token_weight: Callable[[int], float]
    """Response length to w_i."""
    denominator: Callable[[Sequence[int], int], int]
    """Response lengths of the whole step and the length constant to D."""


@dataclass(frozen=True)
class Objective(Aggregation):
    """One row of the table."""

    advantages: Callable[[Sequence[float]], list[float]]
    """Rewards of one group to advantages."""


def centred(rewards_G: Sequence[float]) -> list[float]:
    """Reward minus group mean: Dr. GRPO. An all-equal group gives exact zeros, which packing leaves out, whatever rounding does."""
    mean = rewards_G[0] if len(set(rewards_G)) == 1 else fmean(rewards_G)
    return [reward - mean for reward in rewards_G]


def standardised(rewards_G: Sequence[float]) -> list[float]:
    """Centred and divided by the group's unbiased standard deviation: GRPO. An all-equal group gives zeros."""
    scale = stdev(rewards_G) + STD_EPSILON
    return [value / scale for value in centred(rewards_G)]


def leave_one_out(rewards_G: Sequence[float]) -> list[float]:
    """Reward minus the mean of the other samples, which is the centred advantage times G / (G - 1): RLOO."""
    factor = len(rewards_G) / (len(rewards_G) - 1)
    return [value * factor for value in centred(rewards_G)]


def _one(_length: int) -> float:
    return 1.0


def _inverse(length: int) -> float:
    return 1.0 / max(length, 1)


def _samples_times_constant(lengths_N: Sequence[int], length_constant: int) -> int:
    return len(lengths_N) * length_constant


def _samples(lengths_N: Sequence[int], _length_constant: int) -> int:
    return len(lengths_N)


def _tokens(lengths_N: Sequence[int], _length_constant: int) -> int:
    return max(sum(lengths_N), 1)


OBJECTIVES: dict[str, Objective] = {
    "drgrpo": Objective(_one, _samples_times_constant, centred),
    "grpo": Objective(_inverse, _samples, standardised),
    "rloo": Objective(_one, _samples_times_constant, leave_one_out),
    "token_mean": Objective(_one, _tokens, centred),
}
"""`drgrpo`: arXiv 2503.20783; `grpo`: 2402.03300; `rloo`: 2402.14740; `token_mean`: the aggregation of DAPO, 2503.14476."""

AGGREGATIONS: dict[str, Aggregation] = {**OBJECTIVES, "ppo": Aggregation(_inverse, _samples)}
"""`ppo`: the mean over the tokens of a response, then over responses (OAT, `oat/algorithms/ppo.py`). Its advantages come per token from a
critic, of which there is none: it is no objective that a run can have."""


@dataclass(frozen=True)
class TokenLosses:
    """Terms of the loss per response token; R tokens."""

    losses_R: Tensor
    """w_i * max(...), not divided by D; carries the gradient."""
    ratio_R: Tensor
    """rho, detached."""
    clipped_R: Tensor
    """True where the clipped branch is the larger one, so that the token has no gradient."""


def clipped_losses(
    logprobs_R: Tensor, old_logprobs_R: Tensor, advantages_R: Tensor, weights_R: Tensor, clip_low: float, clip_high: float
) -> TokenLosses:
    """The clipped surrogate per token, in float32. Advantages and weights are those of the token's sample."""
    ratio = torch.exp(logprobs_R.float() - old_logprobs_R.float())
    unclipped = -advantages_R * ratio
    clipped = -advantages_R * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    losses = weights_R * torch.maximum(unclipped, clipped)
    return TokenLosses(losses, ratio.detach(), (clipped > unclipped).detach())


def likelihood_losses(logprobs_R: Tensor, weights_R: Tensor) -> TokenLosses:
    """Next-token loss in the same form: minus the weighted log-prob of each token, ratio 1, nothing clipped."""
    return TokenLosses(-weights_R * logprobs_R, torch.ones_like(logprobs_R), torch.zeros_like(logprobs_R, dtype=torch.bool))


def kl_terms(logprobs_R: Tensor, engine_logprobs_R: Tensor) -> Tensor:
    """Estimate of the divergence of the sampled distribution from the policy's, KL(engine || policy), by token; nats, float64.

    The mean over sampled tokens is unbiased and no term is below 0: exp(d) - 1 - d with d = policy minus engine log-prob ("k3" of
    J. Schulman, "Approximating KL divergence", 2020). It says how far apart they are and is in no loss.
    """
    difference = logprobs_R.double() - engine_logprobs_R.double()
    return torch.expm1(difference) - difference
