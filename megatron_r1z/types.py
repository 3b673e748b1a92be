"""The records that flow between the stages of the loop, in the order in which they arise.

Frozen, one per stage, and complete: a `Sample` cannot exist without its advantage. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

TokenFigures = Mapping[str, Sequence[float]]
"""Sample id to a figure for each of its response tokens, such as its part of a penalty; the same on every rank."""


@dataclass(frozen=True, slots=True)
class Prompt:
    r"""One question, templated and tokenised.

    >>> Prompt("asdiv/17", "Question: 1 + 1?\nAnswer:", (24, 17, 9), ("2",), "asdiv").answers
    ('2',)
    """

    prompt_id: str
    """`<source>/<row>`: unique within a run."""
    text: str
    """The question in its template, exactly what the tokenizer saw."""
    token_ids: tuple[int, ...]
    answers: tuple[str, ...]
    """Reference answers; a response that equals any of them is right."""
    source: str
    """Name of the question file it came from."""


class FinishReason(Enum):
    """Why the engine stopped."""

    STOP = "stop"
    """End-of-sequence token or stop string."""
    LENGTH = "length"
    """The token budget ran out: the response is truncated."""
    ABORT = "abort"
    """The engine gave the request up."""


@dataclass(frozen=True, slots=True)
class Response:
    """What the engine sampled after one prompt.

    >>> Response("2", (17, 2), (-0.1, -0.2), FinishReason.STOP, policy_version=3).length
    2
    """

    text: str
    token_ids: tuple[int, ...]
    """Sampled tokens, the end-of-sequence token or the tokens of the stop string included."""
    logprobs: tuple[float, ...]
    """Engine log-prob of each sampled token at the sampling temperature; nats, same length as `token_ids`."""
    finish_reason: FinishReason
    policy_version: int
    """Iterations contained in the weights that sampled it."""

    @property
    def length(self) -> int:
        """Number of sampled tokens."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Group:
    """All responses to one prompt of one iteration; `group_id` is its place in the iteration's draw."""

    group_id: int
    prompt: Prompt
    responses: tuple[Response, ...]


class VerdictKind(Enum):
    """The outcome of grading one response: a closed list, each member is counted and logged."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNFORMATTED = "unformatted"
    TRUNCATED = "truncated"
    UNPARSABLE = "unparsable"
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The reasoned outcome of grading one response; under the built-in rewards `CORRECT` has reward 1, the others 0."""

    kind: VerdictKind
    reward: float
    extracted: str | None
    """The answer found in the response, None where none was found."""
    extra: tuple[tuple[str, float], ...] = ()
    """Name and value of each extra reward, before its weight."""


UNJUDGED = frozenset({VerdictKind.TIMEOUT, VerdictKind.ERROR})
"""Verdicts that say something of the grader, and nothing of the response."""
SAME_SHARE, SAME_SIZE = 1e-6, 1e-9
"""Rewards that differ by no more than this share of the largest, or by no more than this, are equal: rounding makes such differences, in
float32 too, and sums of rewards that cancel make the second kind."""


def are_equal(rewards: Sequence[float]) -> bool:
    """Whether rewards are all the same but for rounding; none are, and so is one.

    >>> are_equal([0.1 + 0.2, 0.3]), are_equal([0.1 + 0.2 - 0.3, 0.0]), are_equal([1.0, 1.00001])
    (True, True, False)
    """
    return not rewards or math.isclose(min(rewards), max(rewards), rel_tol=SAME_SHARE, abs_tol=SAME_SIZE)


@dataclass(frozen=True, slots=True)
class GradedGroup:
    """A group and one verdict per response, in the same order."""

    group: Group
    verdicts: tuple[Verdict, ...]

    @property
    def is_judged(self) -> tuple[bool, ...]:
        """For each response whether its reward is one that it has earned.

        Not where the engine gave the request up, where there is no token, or where grading failed: such a response is no sample.
        """
        return tuple(
            response.length > 0 and response.finish_reason is not FinishReason.ABORT and verdict.kind not in UNJUDGED
            for response, verdict in zip(self.group.responses, self.verdicts, strict=True)
        )

    @property
    def rewards(self) -> list[float]:
        """Of the responses that were judged."""
        return [verdict.reward for verdict, is_judged in zip(self.verdicts, self.is_judged, strict=True) if is_judged]

    @property
    def is_mixed(self) -> bool:
        """Whether the rewards of those that were judged are not all equal; only then it has a gradient."""
        return not are_equal(self.rewards)


@dataclass(frozen=True, slots=True)
class Sample:
    """One row ready for training.

    >>> Sample("0/3", (24, 17, 9, 17, 2), 3, 0.875, 1.0, (-0.1, -0.2), 3).response_length
    2
    """

    sample_id: str
    """`<group_id>/<index of the response>`."""
    token_ids: tuple[int, ...]
    """Prompt and response."""
    prompt_length: int
    """Tokens of the prompt: the response starts here."""
    advantage: float | tuple[float, ...]
    """Of all response tokens, or one for each."""
    temperature: float
    """At which the engine sampled it, and at which its log-probs are taken."""
    engine_logprobs: tuple[float, ...]
    """One per response token."""
    policy_version: int
    is_counted: bool = True
    """Whether N and D have it; a sample that they have not must have no gradient."""
    has_further_terms: bool = False
    """Whether there is a loss that does not depend on the advantage: a KL term, an entropy bonus, that of a critic."""
    values: tuple[float, ...] = ()
    """The critic's before each response token; empty without a critic."""

    def __post_init__(self) -> None:
        if isinstance(self.advantage, tuple) and len(self.advantage) != self.response_length:
            raise ValueError(f"sample {self.sample_id} has {len(self.advantage)} advantages and {self.response_length} response tokens.")
        if self.has_gradient and not self.is_counted:
            raise ValueError(f"sample {self.sample_id} has a gradient and must be counted.")

    @property
    def response_length(self) -> int:
        """Number of response tokens."""
        return len(self.token_ids) - self.prompt_length

    @property
    def advantages(self) -> tuple[float, ...]:
        """One per response token."""
        return self.advantage if isinstance(self.advantage, tuple) else (self.advantage,) * self.response_length

    @property
    def returns(self) -> tuple[float, ...]:
        """Which the critic learns, one per response token: advantage plus value."""
        return tuple(advantage + value for advantage, value in zip(self.advantages, self.values, strict=True))

    @property
    def has_gradient(self) -> bool:
        """False where every advantage is 0 and the loss has no other terms: then no objective has a loss or gradient."""
        return self.has_further_terms or any(self.advantages)


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """What one optimizer step did; every figure is reduced over all ranks, so equal on all of them.

    Shares, means, maxima and percentiles are over the response tokens that went through the forward pass; nan where there were none.
    """

    loss: float
    grad_norm: float
    """Global gradient norm before clipping."""
    learning_rate: float
    clip_fraction: float
    """Share of response tokens whose ratio was clipped."""
    clipped_high: float
    """The part of it with a positive advantage: the ratio is above 1 + clip_high."""
    clipped_low: float
    """The part of it with a negative advantage: the ratio is below 1 - clip_low."""
    dual_clipped: float
    """The rest of it: a negative advantage and a ratio above dual_clip."""
    tis_weight: float
    """Mean factor of truncated importance sampling; 1 where it is off."""
    tis_truncated: float
    """Share of response tokens whose factor was cut at the cap."""
    ratio_mean: float
    ratio_max: float
    entropy: float
    """Mean entropy per response token in nats, of the distribution at the sampling temperature."""
    sampler_kl: float
    """Estimate of KL(engine || current policy) per response token in nats (`objective.kl_terms`)."""
    reference_kl: float
    """Estimate of KL(current policy || reference model) per response token in nats; 0 without a KL term in the loss."""
    mismatch_mean: float
    """Mean absolute difference of engine and old log-probs."""
    mismatch_p999: float
    """Its 99.9th percentile over tokens."""
    mismatch_max: float
    num_tokens: int
    """Response tokens that went through the forward pass."""
    skipped: bool
    """True when a loss or gradient that is not finite left the weights as they were."""
    non_finite: tuple[str, ...] = ()
    """Ids of the samples whose loss was not finite."""


@dataclass(frozen=True, slots=True)
class ValueStats:
    """What one optimizer step of the critic did; every figure is reduced over all ranks, so equal on all of them.

    Shares and means are over the response tokens that went through the forward pass; nan where there were none.
    """

    loss: float
    grad_norm: float
    """Global gradient norm before clipping."""
    learning_rate: float
    clip_fraction: float
    """Share of response tokens whose loss is the clipped one."""
    value_mean: float
    return_mean: float
    return_square: float
    """Mean of the squared return."""
    error_square: float
    """Mean of the squared difference of return and value."""
    num_tokens: int
    """Response tokens that went through the forward pass."""
    skipped: bool
    """True when a loss or gradient that is not finite left the weights as they were."""
    non_finite: tuple[str, ...] = ()
    """Ids of the samples whose loss was not finite."""


@dataclass(frozen=True, slots=True)
class RefitReceipt:
    """Proof of one hand-over of weights to the engine."""

    policy_version: int
    nbytes: int
    """Bytes written into engine parameters, over all ranks."""
    seconds: float
    """From the first copy to the stamped version, on this rank."""
    round_seconds: tuple[float, ...]
    """Of the copies within this rank, then of each round that it took part in."""
    digests: tuple[tuple[str, str], ...]
    """Each layer (or tensor outside of layers) and its digest, which the policy's and the engine's memory gave alike; 16 hexadecimal
    digits. Empty where the engine cannot be read back."""
    nbytes_by_format: tuple[tuple[str, int], ...] = ()
    """The same bytes by number format, where the engine has several: torch's names."""
    not_in_fp8: tuple[str, ...] = ()
    """Matrices of the layers that went to an FP8 engine in bf16, because no blocks of 128 x 128 fit them."""
