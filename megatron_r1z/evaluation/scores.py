"""What an evaluation measures, computed from its records: accuracy with its interval, pass@k, majority vote, lengths.

Standard library only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from megatron_r1z.record.tables import align
from megatron_r1z.types import FinishReason, GradedGroup, VerdictKind

Z_95 = 1.959964
"""Standard normal quantile of a two-sided interval of 95 %."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One response to a question."""

    text: str
    length: int
    """Sampled tokens."""
    finish_reason: FinishReason
    verdict: VerdictKind
    extracted: str | None

    @property
    def is_right(self) -> bool:
        """Whether it counts for accuracy."""
        return self.verdict is VerdictKind.CORRECT

    @property
    def is_formatted(self) -> bool:
        """Whether the answer was where it was looked for; a box that never closes does not count."""
        return self.extracted is not None or self.verdict not in (VerdictKind.UNFORMATTED, VerdictKind.TRUNCATED)


@dataclass(frozen=True, slots=True)
class QuestionResult:
    """All responses to one question."""

    question_id: str
    prompt: str
    answers: tuple[str, ...]
    attempts: tuple[Attempt, ...]
    majority: float | None
    """1 if the most frequent answer is right, 0 if not, in between where several are equally frequent; None where there is no vote."""

    @property
    def num_right(self) -> int:
        """Right responses."""
        return sum(attempt.is_right for attempt in self.attempts)


Judge = Callable[[Sequence[tuple[str, str]]], Mapping[tuple[str, str], VerdictKind]]
"""Which pairs of answers are equal; `MathGrader.judge`."""


def make_results(graded: Sequence[GradedGroup], judge: Judge | None) -> list[QuestionResult]:
    """The record of each group; several responses also vote, unless `judge` is None because no answers are found in them."""
    rows = [
        tuple(
            Attempt(response.text, response.length, response.finish_reason, verdict.kind, verdict.extracted)
            for response, verdict in zip(item.group.responses, item.verdicts, strict=True)
        )
        for item in graded
    ]
    votes: list[float | None] = [None] * len(rows)
    if judge is not None and any(len(row) > 1 for row in rows):
        votes = list(vote(rows, judge))
    return [
        QuestionResult(item.group.prompt.prompt_id, item.group.prompt.text, item.group.prompt.answers, row, majority)
        for item, row, majority in zip(graded, rows, votes, strict=True)
    ]


def vote(rows: Sequence[Sequence[Attempt]], judge: Judge) -> list[float]:
    """Whether the most frequent answer of each row of attempts is right.

    Right answers are one answer, since each equals the reference; wrong ones are one answer where `judge` finds them equal. A response
    without an answer, or cut off, has no vote. Of k answers that are equally frequent the right one counts 1/k.
    """
    ballots = [_ballot(row) for row in rows]
    pairs = [(later, earlier) for ballot in ballots for place, later in enumerate(ballot.wrong) for earlier in list(ballot.wrong)[:place]]
    equal = judge(pairs) if pairs else {}
    return [_winner_share(ballot, equal) for ballot in ballots]


@dataclass(frozen=True, slots=True)
class _Ballot:
    num_right: int
    wrong: Counter[str]
    """Wrong answers by their text, in order of appearance."""


def _ballot(row: Sequence[Attempt]) -> _Ballot:
    voting = [item for item in row if item.extracted is not None and item.finish_reason is FinishReason.STOP]
    return _Ballot(sum(item.is_right for item in voting), Counter(item.extracted or "" for item in voting if not item.is_right))


def _winner_share(ballot: _Ballot, equal: Mapping[tuple[str, str], VerdictKind]) -> float:
    clusters: dict[str, int] = {}
    for text, count in ballot.wrong.items():
        home = next((first for first in clusters if equal[text, first] is VerdictKind.CORRECT), text)
        clusters[home] = clusters.get(home, 0) + count
    most = max([ballot.num_right, *clusters.values()])
    if ballot.num_right == 0 or ballot.num_right < most:
        return 0.0
    return 1 / (1 + sum(count == most for count in clusters.values()))


@dataclass(frozen=True, slots=True)
class Lengths:
    """Response length in tokens over some responses; None where there are none."""

    mean: float | None
    max: int | None


@dataclass(frozen=True, slots=True)
class SetScore:
    """The figures of one evaluation set."""

    name: str
    questions: int
    samples: int
    """Responses to each question."""
    accuracy: float
    """Mean over questions of the share of right responses."""
    low: float
    """Bounds of the 95 % interval of the accuracy, over the draw of questions."""
    high: float
    pass_at: dict[int, float]
    """Probability that one of k responses is right, by k; empty with one response."""
    majority: float | None
    """Share of questions whose most frequent answer is right; None where there was no vote."""
    length: Lengths
    length_right: Lengths
    length_wrong: Lengths
    formatted_share: float | None
    """None where answers are not looked for: a reward function of the user's own says nothing about its form."""
    truncated_share: float
    verdict_shares: dict[str, float]

    def to_tree(self) -> dict[str, Any]:
        """Plain JSON-able mapping."""
        return asdict(self)


def score(name: str, results: Sequence[QuestionResult]) -> SetScore:
    """The figures of a set from its records, the same number of responses to every question."""
    samples = len(results[0].attempts)
    attempts = [attempt for result in results for attempt in result.attempts]
    means = [result.num_right / samples for result in results]
    low, high = interval(means, samples)
    kinds = Counter(attempt.verdict for attempt in attempts)
    votes = [result.majority for result in results if result.majority is not None]
    return SetScore(
        name=name,
        questions=len(results),
        samples=samples,
        accuracy=fmean(means),
        low=low,
        high=high,
        pass_at={k: fmean(pass_at_k(samples, result.num_right, k) for result in results) for k in powers_up_to(samples)},
        majority=fmean(votes) if votes else None,
        length=_lengths(attempts),
        length_right=_lengths([attempt for attempt in attempts if attempt.is_right]),
        length_wrong=_lengths([attempt for attempt in attempts if not attempt.is_right]),
        formatted_share=_formatted_share(attempts),
        truncated_share=fmean(attempt.finish_reason is FinishReason.LENGTH for attempt in attempts),
        verdict_shares={kind.value: kinds[kind] / len(attempts) for kind in VerdictKind},
    )


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k responses is right (Chen et al. 2021, arXiv 2107.03374, equation 1).

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def interval(means: Sequence[float], samples: int) -> tuple[float, float]:
    """95 % Wilson interval of the mean of per-question shares.

    With one response a question this is the usual interval of a proportion. With several, the responses to a question are not
    independent: the number of trials is the one whose binomial variance equals the variance of the mean over questions, at most all
    responses, at least the questions.

    >>> [round(bound, 3) for bound in interval([1.0] * 45 + [0.0] * 155, 1)]
    [0.173, 0.288]
    """
    return clustered_interval(means, [samples] * len(means))


def clustered_interval(means: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """95 % Wilson interval of the share over all responses where question i has `counts[i]` of them, `means[i]` of which hold.

    The variance is that of a ratio over clusters (Cochran, Sampling Techniques, section 6.4); with equal counts, `interval`.

    >>> clustered_interval([1.0, 0.0], [3, 3]) == interval([1.0, 0.0], 3)
    True
    """
    total, mean = sum(counts), fmean(means, weights=counts)
    variance = sum((count * (value - mean)) ** 2 for value, count in zip(means, counts, strict=True)) / total**2
    trials = mean * (1 - mean) / variance if variance > 0 else total if 0 < mean < 1 else len(means)
    trials = min(max(trials, len(means)), total)
    centre = mean + Z_95**2 / (2 * trials)
    spread = Z_95 * math.sqrt(mean * (1 - mean) / trials + Z_95**2 / (4 * trials**2))
    scale = 1 + Z_95**2 / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def render(scores: Sequence[SetScore]) -> str:
    """A table for a terminal; several sets get a last row with the unweighted mean of their accuracies."""
    ks = sorted({k for item in scores for k in item.pass_at if k > 1})
    voted = any(item.majority is not None for item in scores)
    header = ["set", "questions", "samples", "accuracy", "95 %"]
    header += [f"pass@{k}" for k in ks] + (["majority"] if voted else []) + ["length", "longest", "right", "wrong", "formatted", "cut"]
    rows = [header, *(_row(item, ks, voted) for item in scores)]
    if len(scores) > 1:
        rows.append(["mean", "", "", f"{fmean(item.accuracy for item in scores):.1%}", *[""] * (len(header) - 4)])
    return "\n".join(align(rows))


def _row(item: SetScore, ks: Sequence[int], voted: bool) -> list[str]:
    lengths = (item.length.mean, item.length.max, item.length_right.mean, item.length_wrong.mean)
    return [
        item.name,
        str(item.questions),
        str(item.samples),
        f"{item.accuracy:.1%}",
        f"{item.low:.1%} - {item.high:.1%}",
        *(f"{item.pass_at[k]:.1%}" if k in item.pass_at else "-" for k in ks),
        *([] if not voted else ["-" if item.majority is None else f"{item.majority:.1%}"]),
        *("-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value) for value in lengths),
        "-" if item.formatted_share is None else f"{item.formatted_share:.1%}",
        f"{item.truncated_share:.1%}",
    ]


def powers_up_to(samples: int) -> list[int]:
    """1, 2, 4, ... and the number itself; nothing for one response."""
    powers = [2**exponent for exponent in range(samples.bit_length()) if 2**exponent <= samples]
    return sorted({*powers, samples}) if samples > 1 else []


def _formatted_share(attempts: Sequence[Attempt]) -> float | None:
    told = (VerdictKind.UNFORMATTED, VerdictKind.TRUNCATED)  # a function of the user's own gives neither
    is_looked_for = any(attempt.extracted is not None or attempt.verdict in told for attempt in attempts)
    return fmean(attempt.is_formatted for attempt in attempts) if is_looked_for else None


def _lengths(attempts: Sequence[Attempt]) -> Lengths:
    lengths = [attempt.length for attempt in attempts]
    return Lengths(fmean(lengths), max(lengths)) if lengths else Lengths(None, None)
