"""`megatron-r1z grade`: verdicts on JSONL from a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from megatron_r1z.errors import DataError
from megatron_r1z.grading.answers import Extraction
from megatron_r1z.grading.comparer import Comparer
from megatron_r1z.grading.grader import make_verdict
from megatron_r1z.result_files import to_json
from megatron_r1z.rows import MalformedRow, read_row
from megatron_r1z.types import FinishReason, Verdict, VerdictKind

CHUNK_ROWS = 256
"""Rows that are graded together; their verdicts are written at once."""


@dataclass(frozen=True, slots=True)
class _Item:
    row: dict[str, Any]
    extraction: Extraction
    references: tuple[str, ...]
    is_truncated: bool


def grade_lines(lines: Iterable[str], output: TextIO, comparer: Comparer, extract: Callable[[str], Extraction]) -> dict[VerdictKind, int]:
    """Write each JSON object of `lines` with `verdict` and `reward` added; returns how often each verdict was given.

    A row has `answer`, or `response`, in which `extract` looks for the answer (then `extracted` is added too); and `reference`, or
    `answers` as in a rollout file: text, a number, or a list of which any is right. A response with `finish_reason` other than `stop` is
    `truncated`.

    Raises:
        DataError: a line is not such an object; the verdicts on the lines before it have been written.
    """
    counts = dict.fromkeys(VerdictKind, 0)
    chunk: list[_Item] = []
    try:
        for item in _read(lines, extract):
            chunk.append(item)
            if len(chunk) == CHUNK_ROWS:
                _grade(chunk, output, comparer, counts)
                chunk = []
    finally:
        _grade(chunk, output, comparer, counts)
    return counts


def _read(lines: Iterable[str], extract: Callable[[str], Extraction]) -> Iterator[_Item]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row = read_row(number, f"line {number}", line.encode())
            if isinstance(row, MalformedRow):
                raise DataError(row.fault)
            yield _make_item(row.values, row.where, extract)


def _make_item(row: dict[str, Any], where: str, extract: Callable[[str], Extraction]) -> _Item:
    text = row.get("answer", row.get("response"))
    if not isinstance(text, str):
        raise DataError(f"{where}: a row needs 'answer' or 'response' as text; its columns are {', '.join(map(repr, row)) or 'none'}.")
    value = row.get("reference", row.get("answers"))
    references = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in references):
        raise DataError(f"{where}: 'reference' (or 'answers') must be text, a number or a list of them, not {value!r}.")
    is_truncated = row.get("finish_reason", FinishReason.STOP.value) != FinishReason.STOP.value
    return _Item(row, Extraction(True, text) if "answer" in row else extract(text), tuple(map(str, references)), is_truncated)


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
        row = item.row | extracted | {"verdict": verdict.kind.value, "reward": verdict.reward}
        output.write(to_json(row, ensure_ascii=False) + "\n")
    output.flush()
