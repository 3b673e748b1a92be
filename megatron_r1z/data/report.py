"""What the questions of a run are, before it is started: counts, lengths, repetitions, unfit rows and leaks.

`leak_warnings` is the part that `train` prints by itself.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_r1z.config import DataConfig, QuestionSource, TrainConfig, to_tree
from megatron_r1z.data.naming import name_sources
from megatron_r1z.data.overlap import Overlap, find_overlaps, normalise
from megatron_r1z.data.prompts import find_remarks, make_prompts
from megatron_r1z.data.questions import Question, QuestionSet, read_questions
from megatron_r1z.data.templates import make_template
from megatron_r1z.data.tokenizer import Tokenizer, load_tokenizer
from megatron_r1z.record.tables import align

MAX_FAULTS = 3
"""Unfit rows that are shown of each source."""
MAX_EXAMPLES = 3
"""Leaked questions that are shown of each evaluation set."""
ANSWER_KINDS = (
    ("integer", re.compile(r"[-+]?(\d+|\d{1,3}(,\d{3})+)(\.0*)?")),
    ("number", re.compile(r"[-+]?[$\\]*(\d+|\d{1,3}(,\d{3})+)?\.?\d+(e[-+]?\d+|/\d+)?\\?%?|-?\\[dt]?frac\{?-?\d+\}?\{?\d+\}?")),
)
"""Kinds of an answer that is written as a number; the rest is text, such as a formula or a list."""

Role = Literal["training", "evaluation"]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of the prompts of one source, over-long ones included."""

    median: int
    percentile_99: int
    longest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceReport:
    """What became of the rows of one source: filtered, unfit, over-long and used add up to the rows."""

    name: str
    label: str
    """File or dataset."""
    role: Role
    num_rows: int
    """Rows that `offset` and `limit` leave, and those that `where` leaves out."""
    num_filtered: int
    """Left out by `where`."""
    num_unfit: int
    """Malformed, or without a question or an answer; `train` refuses to start."""
    num_over_long: int
    """Prompts of more than `data.max_prompt_tokens`."""
    num_used: int
    num_repeated: int
    """Used questions that stand earlier in the same source, after normalisation."""
    num_shared: int
    """Different questions among the used ones that stand in an earlier training source; 0 for an evaluation set."""
    lengths: Lengths | None
    """None where no row is fit."""
    answers: Mapping[str, int]
    """Used questions by the kind of their answer: integer, number, text, several."""
    faults: tuple[str, ...]
    """The first unfit rows: place and what is wrong."""
    remarks: tuple[str, ...]
    """What one would not expect of the fit ones, see `prompts.find_remarks`."""


@dataclass(frozen=True, slots=True)
class Leak:
    """What of one evaluation set stands in the training sets."""

    evaluation: str
    """Name of the evaluation set."""
    num_questions: int
    num_exact: int
    num_near: int
    """Evaluation questions that are near a training question and equal to none."""
    examples: tuple[Overlap, ...]
    """One for each of the first few such questions, exact ones first."""


@dataclass(frozen=True, slots=True)
class DataReport:
    """What the questions of a run are."""

    template: str
    max_prompt_tokens: int
    sources: tuple[SourceReport, ...]
    leaks: tuple[Leak, ...]
    """One for each evaluation set, in their order."""

    def to_tree(self) -> Any:
        """Plain mappings, lists and scalars, as JSON has them."""
        return to_tree(self)


def make_report(config: TrainConfig) -> DataReport:
    """What the questions of a run are, under the tokenizer of its model.

    Raises:
        DataError: a file, a dataset or the tokenizer as a whole cannot be read.
    """
    return describe_data(config.data, config.evaluation.sets, load_tokenizer(config.model.path))


def describe_data(config: DataConfig, evaluation: Sequence[QuestionSource], tokenizer: Tokenizer) -> DataReport:
    """What the questions of `config.train` and of `evaluation` are.

    Raises:
        DataError: a file or a dataset as a whole cannot be read.
    """
    reader = _Reader(config, tokenizer)
    train_sets = reader.read("training", config.train)
    evaluation_sets = reader.read("evaluation", evaluation)
    return DataReport(config.template, config.max_prompt_tokens, tuple(reader.reports), tuple(find_leaks(train_sets, evaluation_sets)))


def find_leaks(train: Sequence[QuestionSet], evaluation: Sequence[QuestionSet], num_examples: int = MAX_EXAMPLES) -> list[Leak]:
    """What of each evaluation set, in their order, stands in any of the training sets."""
    questions = [question for item in train for question in item.questions]
    return [_make_leak(item, find_overlaps(questions, item.questions), num_examples) for item in evaluation]


def leak_warnings(train: Sequence[QuestionSet], evaluation: Sequence[QuestionSet]) -> list[str]:
    """One sentence for each evaluation set of which questions stand in the training sets."""
    return [_describe(leak) for leak in find_leaks(train, evaluation, num_examples=1) if leak.examples]


def _make_leak(item: QuestionSet, overlaps: Sequence[Overlap], num_examples: int) -> Leak:
    best: dict[str, Overlap] = {}
    for overlap in sorted(overlaps, key=lambda overlap: (overlap.kind, -overlap.share)):  # "exact" comes before "near"
        best.setdefault(overlap.evaluation_id, overlap)
    num_exact = sum(overlap.kind == "exact" for overlap in best.values())
    return Leak(item.name, len(item.questions), num_exact, len(best) - num_exact, tuple(best.values())[:num_examples])


def _describe(leak: Leak) -> str:
    first = leak.examples[0]
    return (
        f"{leak.num_exact + leak.num_near} of the {leak.num_questions} questions of evaluation set {leak.evaluation} are also trained on "
        f"({leak.num_exact} word for word, {leak.num_near} nearly so), such as {first.evaluation_id} ({first.train_id} in training); "
        "its figures will be too good."
    )


class _Reader:
    """Reads sources one after the other and remembers the training questions, so that repetitions are seen."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer) -> None:
        self.reports: list[SourceReport] = []
        self._max_tokens = config.max_prompt_tokens
        self._template = make_template(config, tokenizer)
        self._tokenizer = tokenizer
        self._trained: set[str] = set()

    def read(self, role: Role, sources: Sequence[QuestionSource]) -> list[QuestionSet]:
        """The questions that are used of each source; their reports go to `reports`."""
        return [self._read(role, source, name) for source, name in zip(sources, name_sources(sources), strict=True)]

    def _read(self, role: Role, source: QuestionSource, name: str) -> QuestionSet:
        reading = read_questions(source, name)
        prompts, _ = make_prompts(reading.questions, self._template, self._tokenizer, sys.maxsize)
        lengths = [len(prompt.token_ids) for prompt in prompts]
        used = [question for question, length in zip(reading.questions, lengths, strict=True) if length <= self._max_tokens]
        texts = [normalise(question.problem) for question in used]
        report = SourceReport(
            name=name,
            label=source.label,
            role=role,
            num_rows=len(reading.questions) + len(reading.faults) + reading.num_filtered,
            num_filtered=reading.num_filtered,
            num_unfit=len(reading.faults),
            num_over_long=len(reading.questions) - len(used),
            num_used=len(used),
            num_repeated=len(texts) - len(set(texts)),
            num_shared=len(self._trained.intersection(texts)) if role == "training" else 0,
            lengths=_make_lengths(lengths) if lengths else None,
            answers=Counter(map(_answer_kind, used)),
            faults=tuple(reading.faults[:MAX_FAULTS]),
            remarks=find_remarks(reading.questions, self._template, self._tokenizer),
        )
        self.reports.append(report)
        if role == "training":
            self._trained.update(texts)
        return QuestionSet(name, used)


def _make_lengths(lengths: Sequence[int]) -> Lengths:
    ordered = sorted(lengths)
    return Lengths(ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100], ordered[-1])


def _answer_kind(question: Question) -> str:
    if len(question.answers) > 1:
        return "several"
    answer = question.answers[0].strip().strip("$").replace("\\!", "")
    return next((kind for kind, pattern in ANSWER_KINDS if pattern.fullmatch(answer)), "text")


def render(report: DataReport) -> str:
    """The report for a terminal."""
    lines = [f"template {report.template}, prompts of at most {report.max_prompt_tokens} tokens"]
    lines += ["", *_render_counts(report.sources), "", *_render_contents(report.sources)]
    for item in report.sources:
        if item.faults:
            shown = f"the first {len(item.faults)} of {item.num_unfit}" if item.num_unfit > len(item.faults) else str(item.num_unfit)
            lines += ["", f"unfit rows of {item.name} ({shown}); train refuses to start", *(f"  {fault}" for fault in item.faults)]
        elif not item.num_used:
            lines += ["", f"no question of {item.name} is used; train refuses to start"]
        lines += [line for remark in item.remarks for line in ("", f"{item.name}: {remark}")]
    if report.leaks:
        lines += ["", "evaluation questions that are also trained on"]
        lines += [line for leak in report.leaks for line in _render_leak(leak)]
    return "\n".join(lines)


def _render_counts(sources: Sequence[SourceReport]) -> list[str]:
    head = ["questions", "rows", "filtered", "unfit", "over-long", "used", "repeated", "shared"]
    rows = [
        [
            f"{item.role} {item.name}",
            *(item.num_rows, item.num_filtered, item.num_unfit, item.num_over_long, item.num_used, item.num_repeated, item.num_shared),
        ]
        for item in sources
    ]
    return align([head, *rows])


def _render_contents(sources: Sequence[SourceReport]) -> list[str]:
    kinds = [*(kind for kind, _ in ANSWER_KINDS), "text", "several"]
    head = ["prompt tokens, answers", "median", "99 %", "longest", *kinds]
    rows = [
        [
            f"{item.role} {item.name}",
            *((item.lengths.median, item.lengths.percentile_99, item.lengths.longest) if item.lengths else ("-", "-", "-")),
            *(item.answers.get(kind, 0) for kind in kinds),
        ]
        for item in sources
    ]
    return align([head, *rows])


def _render_leak(leak: Leak) -> list[str]:
    counts = f"{leak.num_exact} word for word and {leak.num_near} nearly so, of {leak.num_questions}"
    examples = [f"    {item.evaluation_id} is {item.train_id} ({item.kind}, {item.share:.0%})" for item in leak.examples]
    return [f"  {leak.evaluation}: {counts}", *examples]
