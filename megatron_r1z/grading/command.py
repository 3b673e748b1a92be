"""`megatron-r1z grade`: verdicts on JSONL from a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from megatron_r1z.data.rows import MalformedRow, Row, has_lone_surrogate, parse_answers, read_row
from megatron_r1z.errors import DataError
from megatron_r1z.grading.answers import Extraction
from megatron_r1z.grading.comparer import Comparer
from megatron_r1z.grading.grader import make_verdict
from megatron_r1z.record.result_files import to_json
from megatron_r1z.types import FinishReason, Verdict, VerdictKind

CHUNK_ROWS = 256
"""Rows that are graded together; their verdicts are written at once."""


@dataclass(frozen=True, slots=True)
class _Item:
    row: dict[str, Any]
    extraction: Extraction
    references: tuple[str, ...]
    is_truncated: bool


def grade_lines(lines: Iterable[bytes], output: TextIO, comparer: Comparer, extract: Callable[[str], Extraction]) -> dict[VerdictKind, int]:
    """Write each JSON object of `lines` with `verdict` and `reward` added; returns how often each verdict was given.

    A row has `answer`, or `response`, in which `extract` looks for the answer (then `extracted` is added too); and `reference`, or
    `answers` as in a rollout file: text, a number, or a list of which any is right. A response with `finish_reason` other than `stop` is
    `truncated`.

    Raises:
        DataError: a line is not such an object, or its reference is nothing that an answer can equal (`rows.parse_answers`); the verdicts
            on the lines before it have been written.
    """
    counts = dict.fromkeys(VerdictKind, 0)
    chunk: list[_Item] = []
    try:
        for item in _read(lines, extract):
            chunk.append(item)
            if len(chunk) == CHUNK_ROWS:
                _grade(chunk, output, comparer, counts)
                chunk = []
    except DataError:
        _grade(chunk, output, comparer, counts)
        raise
    _grade(chunk, output, comparer, counts)
    return counts


def _read(lines: Iterable[bytes], extract: Callable[[str], Extraction]) -> Iterator[_Item]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row = read_row(number, f"line {number}", line)
            if isinstance(row, MalformedRow):
                raise DataError(row.fault)
            yield _make_item(row, extract)


def _make_item(row: Row, extract: Callable[[str], Extraction]) -> _Item:
    given = next((name for name in ("answer", "response") if row.has(name)), None)
    text = None if given is None else row.get(given)
    if not isinstance(text, str):
        names = ", ".join(map(repr, row.values))
        raise DataError(f"{row.where}: a row needs 'answer' or 'response' as text; its columns are {names or 'none'}.")
    column = "answers" if row.has("answers") and not row.has("reference") else "reference"
    references = parse_answers(row.get(column), row.where, column)
    is_truncated = row.values.get("finish_reason", FinishReason.STOP.value) != FinishReason.STOP.value
    return _Item(row.values, Extraction(True, text) if given == "answer" else extract(text), references, is_truncated)


def _grade(chunk: Sequence[_Item], output: TextIO, comparer: Comparer, counts: dict[VerdictKind, int]) -> None:
    judged = comparer.judge(
        (item.extraction.answer, reference)
        for item in chunk
        if item.extraction.answer is not None and not item.is_truncated
        for reference in item.references
    )
    for item in chunk:
        answer = item.extraction.answer
        truncated = Verdict(VerdictKind.TRUNCATED, 0.0, answer)
        verdict = truncated if item.is_truncated else make_verdict(item.extraction, item.references, judged)
        counts[verdict.kind] += 1
        extracted = {} if "answer" in item.row else {"extracted": answer}
        output.write(_to_line(item.row | extracted | {"verdict": verdict.kind.value, "reward": verdict.reward}))
    output.flush()


def _to_line(row: dict[str, Any]) -> str:
    """The row as JSON: characters as they are, or escaped where a column that is not looked at has some that no file can hold."""
    return to_json(row, ensure_ascii=has_lone_surrogate(row)) + "\n"
