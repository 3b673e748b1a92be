"""What can be said of one response: whether it answers, whether it reflects, and how it ended. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from megatron_r1z.config import QuestionSource
from megatron_r1z.data.questions import Question
from megatron_r1z.data.rows import scan_rows
from megatron_r1z.evaluation.scores import Attempt, QuestionResult
from megatron_r1z.types import FinishReason, VerdictKind

ANSWER_MARKS = ("\\boxed{", "</answer>", "final answer", "answer is")
"""What a response that answers has in it, in whatever case; ours, for want of a judge."""


class Task(Enum):
    """What a judge is asked about a response."""

    ANSWERING = "answering"
    """Whether it tries to answer: 1 or 0."""
    REFLECTION = "reflection"
    """What it does, as one of `Category`."""


class Category(Enum):
    """What a response does, in the judge's eyes; the four categories of arXiv 2503.20783."""

    OFF_TOPIC = 0
    """Off-topic, incoherent or repetitive."""
    PLAIN = 1
    """Answers without self-reflection."""
    REFLECTS = 2
    """Any self-reflection, explicit or implicit, whatever the correctness."""
    CODE_ONLY = 3
    """Nothing but Python code."""


class Outcome(Enum):
    """How a response ended; each has exactly one."""

    RIGHT = "right"
    WRONG = "wrong"
    """It finished with an answer that is not right, or that cannot be read or compared."""
    UNFORMATTED = "unformatted"
    """It finished without an answer where one is looked for."""
    CUT = "cut off"
    """It reached the token limit, which makes it not right whatever it holds."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """A judge's verdicts on one response; None where its reply had no verdict in it."""

    answers: int | None
    category: int | None


@dataclass(frozen=True, slots=True)
class Examined:
    """One response and what was found in it."""

    attempt: Attempt
    keywords: tuple[str, ...]
    """Those keywords of self-reflection that it contains."""
    judgement: Judgement | None
    """None where no judge was asked."""

    @property
    def outcome(self) -> Outcome:
        """How it ended."""
        special = {
            VerdictKind.CORRECT: Outcome.RIGHT,
            VerdictKind.UNFORMATTED: Outcome.UNFORMATTED,
            VerdictKind.TRUNCATED: Outcome.CUT,
        }
        return special.get(self.attempt.verdict, Outcome.WRONG)

    @property
    def answers_by_form(self) -> bool:
        """Whether it ended by itself and has a mark of an answer: a stand-in for the judge, blind to what the mark stands in."""
        text = self.attempt.text.lower()
        return self.attempt.finish_reason is FinishReason.STOP and any(mark in text for mark in ANSWER_MARKS)

    @property
    def answers_by_judge(self) -> bool:
        """Whether the judge says that it tries to answer."""
        return self.judgement is not None and self.judgement.answers == 1

    @property
    def reflects_by_keyword(self) -> bool:
        """Whether it contains a keyword of self-reflection."""
        return bool(self.keywords)

    @property
    def reflects_by_judge(self) -> bool:
        """Whether the judge says that it reflects."""
        return self.judgement is not None and self.judgement.category == Category.REFLECTS.value

    @property
    def reflects_by_both(self) -> bool:
        """Whether keywords and judge agree that it reflects: what the paper counts."""
        return self.reflects_by_keyword and self.reflects_by_judge


@dataclass(frozen=True, slots=True)
class ExaminedQuestion:
    """All responses to one question."""

    question_id: str
    level: str | None
    responses: tuple[Examined, ...]

    @property
    def num_right(self) -> int:
        """Right responses."""
        return sum(response.attempt.is_right for response in self.responses)


Inquiry = tuple[Task, str, str]
"""A task, the question and the response that it is about."""


def find_keywords(text: str, keywords: Sequence[str]) -> tuple[str, ...]:
    """Those of `keywords` that `text` contains, in whatever case.

    >>> find_keywords("Let me Re-evaluate this and check again.", ["recheck", "re-evaluate", "check again"])
    ('re-evaluate', 'check again')
    """
    lowered = text.lower()
    return tuple(keyword for keyword in keywords if keyword.lower() in lowered)


def read_levels(source: QuestionSource, column: str | None, questions: Mapping[str, Question]) -> dict[str, str]:
    """The level of each of `questions` (by id), which `source` has in `column`; nothing without a column.

    Raises:
        DataError: there is no such column; the message lists those there are.
    """
    if column is None:
        return {}
    by_row = {int(question_id.rpartition("/")[2]): question_id for question_id in questions}
    return {by_row[row.index]: str(row.get(column)) for row in scan_rows(source) if row.index in by_row}


def make_inquiries(results: Sequence[QuestionResult], questions: Mapping[str, Question]) -> list[Inquiry]:
    """What a judge has to be asked about the responses, each once, in order; equal responses to a question are one."""
    found = {
        (task, questions[result.question_id].problem, attempt.text): None
        for result in results
        for attempt in result.attempts
        for task in Task
    }
    return list(found)


def examine(
    results: Sequence[QuestionResult],
    questions: Mapping[str, Question],
    levels: Mapping[str, str],
    keywords: Sequence[str],
    verdicts: Mapping[Inquiry, int | None] | None,
) -> list[ExaminedQuestion]:
    """What is found in each response; `questions` and `levels` by question id, `verdicts` None where no judge was asked."""

    def judgement(problem: str, text: str) -> Judgement | None:
        if verdicts is None:
            return None
        return Judgement(verdicts[Task.ANSWERING, problem, text], verdicts[Task.REFLECTION, problem, text])

    return [
        ExaminedQuestion(
            result.question_id,
            levels.get(result.question_id),
            tuple(
                Examined(attempt, find_keywords(attempt.text, keywords), judgement(questions[result.question_id].problem, attempt.text))
                for attempt in result.attempts
            ),
        )
        for result in results
    ]
