"""From graded groups to the samples of an update: which groups are trained on, and the advantage of each response."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress

from megatron_r1z.config import AlgorithmConfig
from megatron_r1z.objective import Aggregation, Objective, estimated, token_rewards
from megatron_r1z.types import FinishReason, GradedGroup, Sample, TokenFigures


def choose_groups(graded: Sequence[GradedGroup], count: int) -> list[GradedGroup]:
    """The `count` groups that are trained on: the first mixed ones, then, where these are too few, the first others; in their order."""
    chosen = sorted(graded, key=lambda item: not item.is_mixed)[:count]
    return sorted(chosen, key=lambda item: item.group.group_id)


@dataclass(frozen=True)
class Estimates:
    """What models say of the response tokens before advantages are taken; None where nothing asks for it."""

    divergences: TokenFigures | None = None
    """From the reference model, of the policy that sampled; where rewards have a KL term."""
    values: TokenFigures | None = None
    """The critic's before each token."""


def make_rows(graded: Sequence[GradedGroup], temperature: float) -> list[Sample]:
    """One row per response, in group order, without an advantage yet; `temperature` is what they were sampled at."""
    return [
        Sample(
            sample_id=f"{item.group.group_id}/{index}",
            token_ids=item.group.prompt.token_ids + response.token_ids,
            prompt_length=len(item.group.prompt.token_ids),
            advantage=0.0,
            temperature=temperature,
            engine_logprobs=response.logprobs,
            policy_version=response.policy_version,
        )
        for item in graded
        for index, response in enumerate(item.group.responses)
    ]


def make_samples(
    graded: Sequence[GradedGroup],
    objective: Aggregation,
    temperature: float,
    algorithm: AlgorithmConfig,
    estimates: Estimates | None = None,
) -> list[Sample]:
    """The rows with their advantages: of the group's rewards or, under PPO, of the critic's values.

    Each token pays for its divergence from the reference model where rewards have a KL term. With `mask_truncated` a response that ended at
    the token limit gets advantage 0, after its reward went into those of its group. A response that was not judged is no sample: it is in
    no baseline, and its row has advantage 0 and is not counted.
    """
    known = estimates or Estimates()
    samples = []
    for item in graded:
        rows = make_rows([item], temperature)
        judged = list(compress(rows, item.is_judged))
        rewards = [
            token_rewards(reward, row.response_length, algorithm.kl_coef, (known.divergences or {}).get(row.sample_id))
            for row, reward in zip(judged, item.rewards, strict=True)
        ]
        if isinstance(objective, Objective):
            made = _with_group_advantages(item, judged, objective.advantages([math.fsum(of_tokens) for of_tokens in rewards]), algorithm)
        else:
            made = [_with_token_advantages(*pair, known.values or {}, algorithm.gae_lambda) for pair in zip(judged, rewards, strict=True)]
        by_id = {sample.sample_id: sample for sample in made}
        samples += [by_id.get(row.sample_id, replace(row, is_counted=False)) for row in rows]
    return samples


def _with_token_advantages(row: Sample, rewards: Sequence[float], values: TokenFigures, decay: float) -> Sample:
    before = values[row.sample_id]
    return replace(row, advantage=tuple(estimated(rewards, before, decay)), values=tuple(before), has_further_terms=True)


def _with_group_advantages(
    item: GradedGroup, rows: Sequence[Sample], advantages: Sequence[float], algorithm: AlgorithmConfig
) -> list[Sample]:
    is_counted = item.is_mixed or not algorithm.filter_groups
    return [
        replace(
            row,
            advantage=0.0 if algorithm.mask_truncated and response.finish_reason is FinishReason.LENGTH else advantage,
            is_counted=is_counted,
            has_further_terms=algorithm.has_further_terms and is_counted,
        )
        for row, response, advantage in zip(rows, compress(item.group.responses, item.is_judged), advantages, strict=True)
    ]
