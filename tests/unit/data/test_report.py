"""The report on the questions of a run, and the warning about leaks."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_r1z.config import DataConfig, QuestionSource, TrainConfig, make_config
from megatron_r1z.data.overlap import Overlap
from megatron_r1z.data.questions import Question, QuestionSet
from megatron_r1z.data.report import DataReport, Lengths, describe_data, leak_warnings, make_report, render
from megatron_r1z.errors import DataError

LONG = "Ada puts 3 red apples and 4 green apples into a basket and gives 2 of them to her friend. How many are in the basket now?"


@dataclass
class Encoding:
    input_ids: list[list[int]]


class WordTokenizer:
    """One token per word."""

    eos_token_id: int | None = None

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Encoding:
        return Encoding([[0] * len(entry.split()) for entry in text])

    def apply_chat_template(self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool) -> str:
        raise NotImplementedError


def save(path: Path, *rows: Any, **fields: Any) -> QuestionSource:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return QuestionSource(path=str(path), **fields)


def row(problem: str, answer: Any = "1", **columns: Any) -> dict[str, Any]:
    return {"problem": problem, "answer": answer, **columns}


@pytest.fixture
def report(tmp_path: Path) -> DataReport:
    """Two training sources and an evaluation set with something of everything."""
    first = save(
        tmp_path / "first.jsonl",
        row("What is 1 + 1?", 2, level=1),
        row("what is $1+1$", "2", level=1),  # a repetition
        row("What is 2 + 2?", "4", level=2),  # left out
        row(LONG, "5", level=1),
        row("word " * 40, "\\frac{1}{2}", level=1),  # too long
        "{",
        row("What is 3 + 3?", "", level=1),
        row("What is 4 + 4?", None, level=1),
        row("", "1", level=1),
        where={"level": (1,)},
    )
    second = save(
        tmp_path / "second.jsonl", row("What is 1+1 ?", "x + 1"), row("What is 1 / 2?", ["0.5", "1/2"]), row("What is pi?", "3.14")
    )
    test = save(tmp_path / "test.jsonl", row("What is 1 + 1 ?"), row(LONG.replace("her friend", "a friend"), 5), row("What is 9 + 9?"))
    return describe_data(DataConfig(train=(first, second), template="no", max_prompt_tokens=30), (test,), WordTokenizer())


def test_counts(report: DataReport) -> None:
    first, second, test = report.sources
    assert (first.num_rows, first.num_filtered, first.num_unfit, first.num_over_long, first.num_used) == (9, 1, 4, 1, 3)
    assert (first.num_repeated, first.num_shared) == (1, 0)
    assert (second.num_rows, second.num_used, second.num_repeated, second.num_shared) == (3, 3, 0, 1)
    assert (test.role, test.num_rows, test.num_used, test.num_shared) == ("evaluation", 3, 3, 0)
    for item in report.sources:
        assert item.num_rows == item.num_filtered + item.num_unfit + item.num_over_long + item.num_used


def test_the_first_unfit_rows_are_named(report: DataReport) -> None:
    first = report.sources[0]
    assert len(first.faults) == 3
    assert [fault.removeprefix(f"{first.label}:")[0] for fault in first.faults] == ["6", "7", "8"]


def test_lengths_include_what_is_too_long(report: DataReport) -> None:
    assert report.sources[0].lengths == Lengths(27, 40, 40)
    assert report.sources[1].lengths == Lengths(4, 5, 5)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        *((answer, "integer") for answer in (7, "025", "-3", "30,000", "34,\\!650", "$5$", "142.0")),
        *(
            (answer, "number")
            for answer in ("0.5", ".5", "1/2", "-3/4", "\\frac{1}{2}", "\\dfrac12", "-\\frac{3}{4}", "50\\%", "$3.50", 1e-9)
        ),
        *((answer, "text") for answer in ("x + 1", "(1, 2)", "1,2", "\\sqrt{2}", "$\\frac{1}{2 n+2}$", "12 cm", "B")),
        (["1", "2"], "several"),
    ],
)
def test_answers_by_kind(answer: Any, kind: str, tmp_path: Path) -> None:
    source = save(tmp_path / "q.jsonl", row("What?", answer))
    report = describe_data(DataConfig(train=(source,), template="no"), (), WordTokenizer())
    assert report.sources[0].answers == {kind: 1}


def test_leaks(report: DataReport) -> None:
    (leak,) = report.leaks
    assert (leak.evaluation, leak.num_questions, leak.num_exact, leak.num_near) == ("test", 3, 1, 1)
    assert leak.examples[0] == Overlap("first/0", "test/0", "exact", 1.0)
    assert (leak.examples[1].train_id, leak.examples[1].evaluation_id, leak.examples[1].kind) == ("first/3", "test/1", "near")


def test_the_table(report: DataReport) -> None:
    text = render(report)
    assert text.splitlines()[0] == "template no, prompts of at most 30 tokens"
    lines = [line.split()[2:] for line in text.splitlines() if line.startswith("training first ")]
    assert lines == [["9", "1", "4", "1", "3", "1", "0"], ["27", "40", "40", "3", "0", "0", "0"]]
    assert "unfit rows of first (the first 3 of 4); train refuses to start" in text
    assert "  test: 1 word for word and 1 nearly so, of 3" in text
    assert "    test/0 is first/0 (exact, 100%)" in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_the_report_is_json(report: DataReport) -> None:
    tree = json.loads(json.dumps(report.to_tree()))
    assert tree["sources"][0]["num_unfit"] == 4
    assert tree["sources"][1]["answers"] == {"text": 1, "several": 1, "number": 1}
    assert tree["leaks"][0]["examples"][0] == {"train_id": "first/0", "evaluation_id": "test/0", "kind": "exact", "share": 1.0}


def test_a_source_without_a_fit_row_is_reported(tmp_path: Path) -> None:
    source = save(tmp_path / "q.jsonl", "{")
    report = describe_data(DataConfig(train=(source,), template="no"), (), WordTokenizer())
    assert (report.sources[0].num_unfit, report.sources[0].num_used, report.sources[0].lengths) == (1, 0, None)
    assert "unfit rows of q (1); train refuses to start" in render(report)


@pytest.mark.parametrize(("name", "content"), [("q.jsonl", ""), ("q.json", "[]"), ("q.csv", "problem,answer\n")])
def test_a_source_without_a_row_is_reported(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    report = describe_data(DataConfig(train=(QuestionSource(path=str(tmp_path / name)),), template="no"), (), WordTokenizer())
    assert (report.sources[0].num_rows, report.sources[0].num_used) == (0, 0)
    assert "no question of q is used; train refuses to start" in render(report)


def test_unfit_text_and_numbers_are_reported_and_the_rest_is_counted(tmp_path: Path) -> None:
    bad = ('{"problem": "\\ud83d", "answer": 1}', '{"problem": "p", "answer": "\\ud83d"}', '{"problem": "p", "answer": 1e400}')
    source = save(tmp_path / "q.jsonl", *bad, row("p", int("7" * 400)), row("p", []))
    report = describe_data(DataConfig(train=(source,), template="no"), (), WordTokenizer())
    assert (report.sources[0].num_unfit, report.sources[0].num_used, report.sources[0].answers) == (4, 1, {"integer": 1})
    render(report).encode()


def test_what_a_prompt_does_not_show_is_told(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1"}]
    source = save(tmp_path / "q.jsonl", {"prompt": turns, "reward_model": {"style": "rule", "ground_truth": "2"}})
    report = describe_data(DataConfig(train=(source,), template="no"), (), WordTokenizer())
    assert report.sources[0].num_used == 1
    remark = (
        f"1 turns of 1 conversations are not shown under template no, the first in {source.path}:1; only the last user turn is the question"
    )
    assert render(report).splitlines()[-1] == f"q: {remark}"
    assert report.to_tree()["sources"][0]["remarks"] == [remark]


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    config = DataConfig(train=(QuestionSource(path=str(tmp_path / "none.jsonl")),), template="no")
    with pytest.raises(DataError, match="there is no file"):
        describe_data(config, (), WordTokenizer())


def test_with_the_tokenizer_of_the_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "quickstart"))
    importlib.import_module("make_task").save_model(tmp_path / "model")
    save(tmp_path / "q.jsonl", row(" Sum7+5+8+1?", "21"))
    tree = {
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": [{"path": str(tmp_path / "q.jsonl")}], "template": "no"},
        "algorithm": {"iterations": 1},
        "logging": {"folder": str(tmp_path / "run")},
    }
    assert make_report(make_config(TrainConfig, tree)).sources[0].lengths == Lengths(9, 9, 9)


class TestWarnings:
    @staticmethod
    def make_set(name: str, *texts: str) -> QuestionSet:
        return QuestionSet(name, [Question(f"{name}/{index}", text, ("1",), name) for index, text in enumerate(texts)])

    def test_one_sentence_for_each_set_that_leaks(self) -> None:
        train = [self.make_set("a", "What is 1 + 1?", LONG), self.make_set("b", "what is 1+1", "What is 2 + 2?")]
        evaluation = [
            self.make_set("near", "What is 5 + 5?", LONG.replace("her", "a")),
            self.make_set("clean", "What is 3 + 3?"),
            self.make_set("both", LONG + " Say it!", "WHAT IS 1 + 1", "What is 2 + 2"),
        ]
        assert leak_warnings(train, evaluation) == [
            "1 of the 2 questions of evaluation set near are also trained on (0 word for word, 1 nearly so), such as near/1 (a/1 in "
            "training); its figures will be too good.",
            "3 of the 3 questions of evaluation set both are also trained on (2 word for word, 1 nearly so), such as both/1 (a/0 in "
            "training); its figures will be too good.",
        ]

    def test_nothing_to_say(self) -> None:
        assert leak_warnings([self.make_set("a", "1")], []) == []
        assert leak_warnings([self.make_set("a", "1")], [self.make_set("b", "2")]) == []
