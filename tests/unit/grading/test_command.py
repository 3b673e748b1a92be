"""`megatron-r1z grade`: rows in, verdicts out."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_r1z.errors import DataError
from megatron_r1z.grading.answers import extract_boxed_answer
from megatron_r1z.grading.command import grade_lines
from megatron_r1z.grading.comparer import Comparer
from megatron_r1z.types import VerdictKind

DATA = Path(__file__).parents[4] / "shared" / "data" / "grader"


@pytest.fixture(scope="module")
def comparer() -> Iterator[Comparer]:
    comparer = Comparer("strict", 1, 10.0)
    yield comparer
    comparer.close()


def grade(comparer: Comparer, *rows: object) -> list[dict[str, object]]:
    output = io.StringIO()
    grade_lines([row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows], output, comparer, extract_boxed_answer)
    return [json.loads(line) for line in output.getvalue().splitlines()]


def test_rows_come_out_with_verdict_and_reward(comparer: Comparer) -> None:
    found = grade(
        comparer,
        {"id": 3, "answer": r"\frac{10}{4}", "reference": "2.5"},
        b"",
        {"answer": "3", "reference": ["2", 3]},
        {"answer": "3", "reference": 4},
        {"response": r"so \boxed{\text{é}}", "answers": ["é"]},
        {"response": "so 5", "reference": "5"},
        {"response": r"\boxed{5}", "reference": "5", "finish_reason": "length"},
    )
    assert [(row["verdict"], row["reward"]) for row in found] == [
        ("correct", 1.0),
        ("correct", 1.0),
        ("wrong", 0.0),
        ("correct", 1.0),
        ("unformatted", 0.0),
        ("truncated", 0.0),
    ]
    assert found[0] == {"id": 3, "answer": r"\frac{10}{4}", "reference": "2.5", "verdict": "correct", "reward": 1.0}
    assert [row.get("extracted") for row in found] == [None, None, None, r"\text{é}", None, "5"]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (b"{", "line 2: not valid JSON"),
        (b"[1]", "line 2: each line must be a JSON object, not list"),
        (b'{"answer": "5", "answer": "6", "reference": "5"}', "line 2: the key 'answer' is there twice"),
        (b'{"answer": "\xe9", "reference": "5"}', "line 2: not UTF-8 text .* at byte 12"),
        (b'{"answer": "5", "reference": ' + b"[" * 100_000, "line 2: lists or objects in one another"),
        (b'{"answer": "5", "reference": ' + b"7" * 5000 + b"}", "line 2: a whole number is too long"),
        ({"reference": "5"}, "line 2: a row needs 'answer' or 'response' as text; its columns are 'reference'"),
        ({"answer": 5, "reference": "5"}, "line 2: a row needs 'answer'"),
        ({"answer": "5"}, "line 2: no column 'reference'"),
        ({"answer": "5", "reference": None}, "line 2: 'reference' .*None"),
        ({"answer": "5", "reference": ["5", None]}, "line 2: 'reference'"),
        ({"answer": "5", "reference": []}, "line 2: 'reference' is an empty list"),
        ({"answer": "5", "answers": []}, "line 2: 'answers' is an empty list"),
        ({"answer": "5", "reference": True}, "line 2: 'reference' must be text, a number or a list"),
        ({"answer": "5", "reference": {"a": 1}}, "line 2: 'reference' must be text, a number or a list"),
        ({"answer": "5", "reference": [["5"]]}, "line 2: 'reference' must be text, a number or a list"),
        *(({"answer": "5", "reference": text}, "line 2: 'reference' has no answer") for text in ("", " ", "\n")),
        *(({"answer": "5", "reference": [value]}, "line 2: 'reference' has no answer") for value in (math.nan, math.inf, -math.inf)),
        (b'{"answer": "5", "reference": 1e400}', "line 2: 'reference' has no answer"),
        ({"answer": "\ud83d", "reference": "5"}, "line 2: 'answer' holds half of a character"),
        ({"answer": "5", "reference": ["5", "\ud83d"]}, "line 2: 'reference' holds half of a character"),
        ({"response": "\\boxed{\ude00}", "reference": "5"}, "line 2: 'response' holds half of a character"),
    ],
)
def test_a_bad_row_is_named_and_what_came_before_is_written(comparer: Comparer, row: object, complaint: str) -> None:
    output = io.StringIO()
    lines = [json.dumps({"answer": "5", "reference": "5"}).encode(), row if isinstance(row, bytes) else json.dumps(row).encode()]
    with pytest.raises(DataError, match=complaint):
        grade_lines(lines, output, comparer, extract_boxed_answer)
    assert json.loads(output.getvalue())["verdict"] == "correct"


def test_a_number_of_any_length_is_a_reference(comparer: Comparer) -> None:
    (row,) = grade(comparer, {"answer": "7" * 400, "reference": int("7" * 400)})
    assert row["verdict"] == "correct"


def test_columns_that_are_not_looked_at_may_hold_anything(comparer: Comparer) -> None:
    """What comes out is JSON, which has no Infinity."""
    (row,) = grade(comparer, {"id": "\ud83d", "\ud83d": [math.inf], "answer": "é", "reference": "é"})
    assert (row["id"], row["\ud83d"], row["answer"], row["verdict"]) == ("\ud83d", [None], "é", "correct")


class ClosedAfter(io.StringIO):
    """A pipe whose reader goes away after some rows."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.left = rows

    def write(self, text: str) -> int:
        if not self.left:
            raise BrokenPipeError
        self.left -= 1
        return super().write(text)


def test_nothing_is_written_again_after_the_reader_has_gone(comparer: Comparer) -> None:
    output = ClosedAfter(3)
    with pytest.raises(BrokenPipeError) as caught:
        grade_lines(
            [json.dumps({"id": number, "answer": "5", "reference": "5"}).encode() for number in range(9)],
            output,
            comparer,
            extract_boxed_answer,
        )
    assert [json.loads(line)["id"] for line in output.getvalue().splitlines()] == [0, 1, 2]
    assert caught.value.__context__ is None


@pytest.mark.parametrize("language", ["C", "C.UTF-8", "POSIX"])
def test_what_comes_and_goes_through_the_pipe_is_utf_8_in_every_language(language: str) -> None:
    text = '{"answer": "é", "reference": "é"}\n'.encode()
    environment = {**os.environ, "LC_ALL": language, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_r1z", "grade"], input=text + b'{"answer": "\xe9"}\n', capture_output=True, env=environment
    )
    assert done.stdout == '{"answer": "é", "reference": "é", "verdict": "correct", "reward": 1.0}\n'.encode()
    assert done.stderr == b"megatron-r1z: line 2: not UTF-8 text (invalid continuation byte at byte 12 of the line).\n"
    assert done.returncode == 2


def test_counts(comparer: Comparer) -> None:
    counts = grade_lines(
        [json.dumps({"answer": "5", "reference": str(number)}).encode() for number in range(600)],
        io.StringIO(),
        comparer,
        extract_boxed_answer,
    )
    assert counts == dict.fromkeys(VerdictKind, 0) | {VerdictKind.CORRECT: 1, VerdictKind.WRONG: 599}


@pytest.mark.parametrize("mode", ["fast", "math_verify"])
def test_reference_modes_agree_with_the_stored_verdicts_by_the_command(mode: str) -> None:
    if not DATA.exists():
        pytest.skip("shared/data/grader/cases.jsonl is not beside this checkout")
    stored = (json.loads(line) for line in (DATA / "cases.jsonl").read_text().splitlines())
    text = "".join(json.dumps(row) + "\n" for row in stored if row["reference"])  # an empty one is refused
    command = [sys.executable, "-m", "megatron_r1z", "grade", "--mode", mode, "--timeout", "60"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(text.splitlines())
    assert [row for row in rows if (row["reward"] == 1.0) != row[mode]] == []
    assert done.stderr.strip() == f"{sum(row[mode] for row in rows)} correct, {sum(not row[mode] for row in rows)} wrong"
