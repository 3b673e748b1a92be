"""The figures of one template at one temperature, computed from its examined responses. Standard library only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median, quantiles, stdev
from typing import Any

from megatron_r1z.analysis.examine import Examined, ExaminedQuestion, Outcome
from megatron_r1z.evaluation.scores import Z_95, clustered_interval, interval, pass_at_k

Test = Callable[[Examined], bool]


@dataclass(frozen=True, slots=True)
class Share:
    """A share and its 95 % interval over the draw of questions."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Reflection:
    """How often one detector finds self-reflection."""

    responses: Share
    questions: int
    """Questions with at least one such response."""
    question_share: Share


@dataclass(frozen=True, slots=True)
class OutcomeFigures:
    """The responses that ended in one way; lengths are None where there are none."""

    count: int
    share: float
    mean_tokens: float | None
    mean_characters: float | None


@dataclass(frozen=True, slots=True)
class LevelFigures:
    """The questions of one level."""

    questions: int
    accuracy: Share
    outcomes: dict[str, OutcomeFigures]


@dataclass(frozen=True, slots=True)
class Spread:
    """Accuracy of responses with self-reflection minus that of those without, over questions that have both."""

    questions: int
    mean: float
    low: float | None
    """Bounds of the 95 % interval of the mean; None for one question."""
    high: float | None
    minimum: float
    lower_quartile: float
    median: float
    upper_quartile: float
    maximum: float
    no_gain_share: float
    """Questions where it is 0 or below."""


@dataclass(frozen=True, slots=True)
class ReflectionEffect:
    """Right answers with self-reflection against without: over all responses, of which hard questions may draw more, and by question."""

    detector: str
    num_with: int
    num_without: int
    accuracy_with: Share | None
    """None where no response shows self-reflection."""
    accuracy_without: Share | None
    difference: Spread | None
    """None where no question has responses of both kinds."""
    differences: tuple[float, ...]
    """The difference of each such question, in order."""


@dataclass(frozen=True, slots=True)
class CellFigures:
    """Everything about one template at one temperature."""

    template: str
    temperature: float
    questions: int
    samples: int
    """Responses to each question."""
    accuracy: Share
    answering_by_form: Share
    answering_by_judge: Share | None
    """None where no judge was asked."""
    pass_at: dict[int, Share]
    mixed: Share
    """Questions with right and wrong responses: only these have a gradient under Dr. GRPO."""
    reflection: dict[str, Reflection]
    """By detector: `keywords`, and with a judge `judge` and `both`."""
    keyword_counts: dict[str, int]
    """Responses that contain each keyword that occurs, most frequent first."""
    outcomes: dict[str, OutcomeFigures]
    levels: dict[str, LevelFigures]
    """By level, in order; empty without levels."""
    effect: ReflectionEffect
    without_verdict: int
    """Replies of the judge without a verdict in them, which count as no; an equal reply to an equal response counts again."""

    @property
    def answering(self) -> Share:
        """The judge's rate where there is one, else that by form."""
        return self.answering_by_form if self.answering_by_judge is None else self.answering_by_judge

    @property
    def best_pass(self) -> Share:
        """pass@k for the largest k."""
        return self.pass_at[max(self.pass_at)]

    @property
    def detector(self) -> str:
        """The strictest one there is: keywords and judge together, or the keywords alone."""
        return self.effect.detector

    def to_tree(self) -> dict[str, Any]:
        """Plain JSON-able mapping."""
        return asdict(self)


DETECTORS: dict[str, Test] = {
    "keywords": lambda item: item.reflects_by_keyword,
    "judge": lambda item: item.reflects_by_judge,
    "both": lambda item: item.reflects_by_both,
}


def make_figures(template: str, temperature: float, questions: Sequence[ExaminedQuestion], ks: Sequence[int]) -> CellFigures:
    """The figures of one template at one temperature; every question has the same number of responses, at least the largest of `ks`."""
    responses = [response for question in questions for response in question.responses]
    is_judged = any(response.judgement is not None for response in responses)
    samples = len(questions[0].responses)
    detectors = list(DETECTORS) if is_judged else ["keywords"]
    return CellFigures(
        template=template,
        temperature=temperature,
        questions=len(questions),
        samples=samples,
        accuracy=share_of(questions, _is_right),
        answering_by_form=share_of(questions, lambda item: item.answers_by_form),
        answering_by_judge=share_of(questions, lambda item: item.answers_by_judge) if is_judged else None,
        pass_at={k: _mean([pass_at_k(samples, question.num_right, k) for question in questions], samples) for k in ks},
        mixed=_mean([float(0 < question.num_right < samples) for question in questions], 1),
        reflection={name: _make_reflection(questions, DETECTORS[name]) for name in detectors},
        keyword_counts=dict(Counter(keyword for response in responses for keyword in response.keywords).most_common()),
        outcomes=make_outcomes(responses),
        levels=_make_levels(questions),
        effect=make_effect(questions, detectors[-1]),
        without_verdict=sum(_missing(response) for response in responses),
    )


def share_of(questions: Sequence[ExaminedQuestion], holds: Test) -> Share:
    """The share of responses for which `holds`, over questions with equally many of them."""
    samples = len(questions[0].responses)
    return _mean([sum(map(holds, question.responses)) / samples for question in questions], samples)


def make_outcomes(responses: Sequence[Examined]) -> dict[str, OutcomeFigures]:
    """Count and length of the responses by how they ended; the shares add up to 1."""
    by_outcome = {outcome: [item.attempt for item in responses if item.outcome is outcome] for outcome in Outcome}
    return {
        outcome.value: OutcomeFigures(
            count=len(found),
            share=len(found) / len(responses),
            mean_tokens=fmean(attempt.length for attempt in found) if found else None,
            mean_characters=fmean(len(attempt.text) for attempt in found) if found else None,
        )
        for outcome, found in by_outcome.items()
    }


def make_effect(questions: Sequence[ExaminedQuestion], detector: str) -> ReflectionEffect:
    """Accuracy with against without what `detector` takes for self-reflection."""
    reflects = DETECTORS[detector]
    groups = [_split(question.responses, reflects) for question in questions]
    with_it, without = [found for found, _ in groups if found], [rest for _, rest in groups if rest]
    differences = tuple(_accuracy(found) - _accuracy(rest) for found, rest in groups if found and rest)
    return ReflectionEffect(
        detector=detector,
        num_with=sum(map(len, with_it)),
        num_without=sum(map(len, without)),
        accuracy_with=_pooled(with_it),
        accuracy_without=_pooled(without),
        difference=make_spread(differences) if differences else None,
        differences=differences,
    )


def make_spread(values: Sequence[float]) -> Spread:
    """Mean with its interval (normal, over questions), quartiles and range of at least one difference."""
    mean = fmean(values)
    margin = Z_95 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    quartiles = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [mean] * 3
    return Spread(
        questions=len(values),
        mean=mean,
        low=None if margin is None else mean - margin,
        high=None if margin is None else mean + margin,
        minimum=min(values),
        lower_quartile=quartiles[0],
        median=median(values),
        upper_quartile=quartiles[2],
        maximum=max(values),
        no_gain_share=fmean(value <= 0 for value in values),
    )


def best_cell(cells: Iterable[CellFigures]) -> CellFigures:
    """The one with the highest pass@k for the largest k; of equal ones the first."""
    return max(cells, key=lambda cell: cell.best_pass.value)


def _make_reflection(questions: Sequence[ExaminedQuestion], reflects: Test) -> Reflection:
    found = [float(any(map(reflects, question.responses))) for question in questions]
    return Reflection(share_of(questions, reflects), int(sum(found)), _mean(found, 1))


def _make_levels(questions: Sequence[ExaminedQuestion]) -> dict[str, LevelFigures]:
    names = sorted({question.level for question in questions if question.level is not None}, key=_as_number)
    by_level = {name: [question for question in questions if question.level == name] for name in names}
    return {
        name: LevelFigures(
            questions=len(found),
            accuracy=share_of(found, _is_right),
            outcomes=make_outcomes([response for question in found for response in question.responses]),
        )
        for name, found in by_level.items()
    }


def _as_number(level: str) -> tuple[float, str]:
    """Level 10 comes after level 9; what is no number comes last."""
    try:
        return float(level), level
    except ValueError:
        return math.inf, level


def _split(responses: Sequence[Examined], holds: Test) -> tuple[list[Examined], list[Examined]]:
    return [item for item in responses if holds(item)], [item for item in responses if not holds(item)]


def _accuracy(responses: Sequence[Examined]) -> float:
    return fmean(map(_is_right, responses))


def _pooled(groups: Sequence[Sequence[Examined]]) -> Share | None:
    """The share of right responses over groups of any size, one group for each question."""
    if not groups:
        return None
    means, counts = [_accuracy(group) for group in groups], [len(group) for group in groups]
    return Share(fmean(means, weights=counts), *clustered_interval(means, counts))


def _mean(values: Sequence[float], samples: int) -> Share:
    return Share(fmean(values), *interval(values, samples))


def _is_right(item: Examined) -> bool:
    return item.attempt.is_right


def _missing(response: Examined) -> int:
    """Replies about a response that had no verdict in them."""
    judgement = response.judgement
    return 0 if judgement is None else (judgement.answers is None) + (judgement.category is None)
