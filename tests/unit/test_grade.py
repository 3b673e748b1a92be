"""`megatron-r1z grade`: rows in, verdicts out."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_r1z.errors import DataError
from megatron_r1z.grade import grade_lines
from megatron_r1z.grading.answers import extract_boxed_answer
from megatron_r1z.grading.comparer import Comparer
from megatron_r1z.types import VerdictKind

DATA = Path(__file__).parents[3] / "shared" / "data" / "grader"


@pytest.fixture(scope="module")
def comparer() -> Iterator[Comparer]:
    comparer = Comparer("strict", 1, 10.0)
    yield comparer
    comparer.close()


def grade(comparer: Comparer, *rows: object) -> list[dict[str, object]]:
    output = io.StringIO()
    grade_lines([row if isinstance(row, str) else json.dumps(row) for row in rows], output, comparer, extract_boxed_answer)
    return [json.loads(line) for line in output.getvalue().splitlines()]


def test_rows_come_out_with_verdict_and_reward(comparer: Comparer) -> None:
    found = grade(
        comparer,
        {"id": 3, "answer": r"\frac{10}{4}", "reference": "2.5"},
        "",
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
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: each line must be a JSON object, not list"),
        ({"reference": "5"}, "line 2: a row needs 'answer' or 'response' as text; its columns are 'reference'"),
        ({"answer": 5, "reference": "5"}, "line 2: a row needs 'answer'"),
        ({"answer": "5"}, "line 2: 'reference'"),
        ({"answer": "5", "reference": None}, "line 2: 'reference' .* not None"),
        ({"answer": "5", "reference": ["5", None]}, "line 2: 'reference'"),
    ],
)
def test_a_bad_row_is_named_and_what_came_before_is_written(comparer: Comparer, row: object, complaint: str) -> None:
    output = io.StringIO()
    lines = [json.dumps({"answer": "5", "reference": "5"}), row if isinstance(row, str) else json.dumps(row)]
    with pytest.raises(DataError, match=complaint):
        grade_lines(lines, output, comparer, extract_boxed_answer)
    assert json.loads(output.getvalue())["verdict"] == "correct"


def test_counts(comparer: Comparer) -> None:
    counts = grade_lines(
        [json.dumps({"answer": "5", "reference": str(number)}) for number in range(600)], io.StringIO(), comparer, extract_boxed_answer
    )
    assert counts == dict.fromkeys(VerdictKind, 0) | {VerdictKind.CORRECT: 1, VerdictKind.WRONG: 599}


@pytest.mark.parametrize("mode", ["fast", "math_verify"])
def test_reference_modes_agree_with_the_stored_verdicts_by_the_command(mode: str) -> None:
    if not DATA.exists():
        pytest.skip("shared/data/grader/cases.jsonl is not beside this checkout")
    text = (DATA / "cases.jsonl").read_text()
    command = [sys.executable, "-m", "megatron_r1z", "grade", "--mode", mode, "--timeout", "60"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(text.splitlines())
    assert [row for row in rows if (row["reward"] == 1.0) != row[mode]] == []
    assert done.stderr.strip() == f"{sum(row[mode] for row in rows)} correct, {sum(not row[mode] for row in rows)} wrong"
