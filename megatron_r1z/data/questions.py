"""Questions: what a row of a question file or a dataset becomes, and which rows are unfit.

Standard library only; pyarrow and datasets are imported where a Parquet file or a dataset is opened.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from itertools import chain
from typing import Any

from megatron_r1z.config import QuestionSource
from megatron_r1z.data.fingerprint import RowsMark, digest_texts
from megatron_r1z.data.naming import name_sources
from megatron_r1z.data.rows import Row, explain_filter, matches, parse_answers, scan_rows
from megatron_r1z.errors import DataError

SYSTEM, USER = "system", "user"
"""Roles of messages."""

DEFAULT_COLUMNS = (QuestionSource.problem_column, QuestionSource.answer_column)

MESSAGES_COLUMNS = ("prompt", "reward_model.ground_truth")
"""Question and answer in the layout of verl, which most data sets for reinforcement learning have: a file with these columns and without
the default ones needs no column names."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Question:
    """One row of a question file or a dataset.

    >>> Question("asdiv/17", "What is 1 + 1?", ("2",), "asdiv").source
    'asdiv'
    """

    question_id: str
    """`<source>/<row>`, the row counted from 0 in the whole file or split."""
    problem: str
    answers: tuple[str, ...]
    """Any of them is right."""
    source: str
    messages: tuple[Message, ...] = ()
    """Where the row holds a conversation: all of it, its last turn being `problem`."""
    where: str = field(default="", compare=False)
    """File and line, for messages."""


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """The questions of one source."""

    name: str
    questions: list[Question]


@dataclass(frozen=True, slots=True)
class Reading:
    """What became of the rows of one source: those before `offset` and behind `limit` are in none of the three."""

    questions: list[Question]
    faults: list[str]
    """One sentence for each unfit row, with its place and what is wrong."""
    num_filtered: int
    """Rows that `where` leaves out."""


def load_questions(source: QuestionSource, name: str | None = None) -> list[Question]:
    """The questions of one source that `where`, `offset` and `limit` choose, under the source's own name or `name`.

    Raises:
        DataError: the source, or a row that is used, is unfit; the message names file, line and what is wrong.
    """
    reading = read_questions(source, name)
    if reading.faults:
        raise DataError(reading.faults[0])
    if not reading.questions:
        chosen = f" from row {source.offset}" if source.offset else ""
        raise DataError(f"{source.label} holds no questions{chosen}{explain_filter(source) if reading.num_filtered else ''}.")
    return reading.questions


def load_question_sets(sources: Sequence[QuestionSource]) -> list[QuestionSet]:
    """The questions of each of `sources` (training or evaluation), named as in the run.

    Raises:
        DataError: a source is unfit; the message names file, line and what is wrong.
    """
    return [QuestionSet(name, load_questions(source, name)) for source, name in zip(sources, name_sources(sources), strict=True)]


def read_questions(source: QuestionSource, name: str | None = None) -> Reading:
    """The chosen rows of one source, unfit ones judged and passed over.

    Raises:
        DataError: the file or the dataset as a whole cannot be read.
    """
    name = name or name_sources([source])[0]
    questions: list[Question] = []
    faults: list[str] = []
    position = num_filtered = 0  # of a row among those that `where` leaves
    for row in scan_rows(source):
        if source.limit is not None and position == source.offset + source.limit:
            break
        try:
            if not matches(row, source.where):
                num_filtered += 1
                continue
            if position >= source.offset:
                questions.append(_make_question(row, source, name))
        except DataError as error:
            if position >= source.offset:
                faults.append(str(error))
        position += 1
    return Reading(questions, faults, num_filtered)


def _make_question(row: Row, source: QuestionSource, name: str) -> Question:
    problem_column, answer_column = _columns_of(row, source)
    messages: tuple[Message, ...] = ()
    if isinstance(row.get(problem_column), list):
        messages = _parse_messages(row.get(problem_column), row.where, problem_column)
    problem = messages[-1].content if messages else row.get_text(problem_column)
    return Question(f"{name}/{row.index}", problem, _find_answers(row, answer_column, source.answer_after), name, messages, row.where)


def _columns_of(row: Row, source: QuestionSource) -> tuple[str, str]:
    """Where the row has its question and its answer; names that were given are taken as they are."""
    columns = (source.problem_column, source.answer_column)
    if columns == DEFAULT_COLUMNS and not any(map(row.has, DEFAULT_COLUMNS)) and all(map(row.has, MESSAGES_COLUMNS)):
        return MESSAGES_COLUMNS
    return columns


def _parse_messages(value: Sequence[Any], where: str, column: str) -> tuple[Message, ...]:
    """The turns of a conversation that ends with the user's."""
    messages = []
    for number, item in enumerate(value):
        role, content = (item.get("role"), item.get("content")) if isinstance(item, Mapping) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(
                f"{where}: '{column}' must be text or messages with a 'role' and a 'content' of text each; entry {number} is "
                f"{reprlib.repr(item)}."
            )
        messages.append(Message(role, content))
    if not messages or messages[-1].role != USER:
        last = f"of role '{messages[-1].role}'" if messages else "missing"
        raise DataError(f"{where}: the last message of '{column}' is {last}; the question must be one of role '{USER}', and stand there.")
    if not messages[-1].content.strip():
        raise DataError(f"{where}: the last message of '{column}' is empty; remove the row or fill it in.")
    return tuple(messages)


def _find_answers(row: Row, column: str, answer_after: str | None) -> tuple[str, ...]:
    value = row.get(column)
    if answer_after is not None:
        value = [_cut_answer(entry, answer_after, row, column) for entry in (value if isinstance(value, list) else [value])]
    return parse_answers(value, row.where, column)


def _cut_answer(value: Any, marker: str, row: Row, column: str) -> str:
    if not isinstance(value, str) or marker not in value:
        raise DataError(f"{row.where}: '{column}' has no {marker!r} ({reprlib.repr(value)}); change answer_after, or remove the row.")
    return value.rpartition(marker)[2].strip()


def digest_questions(questions: Sequence[Question]) -> str:
    """A digest of questions and answers in order, whatever their source is called."""
    return digest_texts((question.problem, *chain(*map(astuple, question.messages)), *question.answers) for question in questions)[1]


def mark_questions(sources: Sequence[QuestionSource], sets: Sequence[QuestionSet]) -> list[RowsMark]:
    """What the questions of `sources`, read as `sets`, are recognised by."""
    pairs = zip(sources, sets, strict=True)
    return [RowsMark.of(source, len(item.questions), digest_questions(item.questions)) for source, item in pairs]
