"""What a reader of the report sees, and the pictures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_r1z.analysis.examine import ExaminedQuestion, Judgement
from megatron_r1z.analysis.figures import CellFigures, make_figures
from megatron_r1z.analysis.plots import draw
from megatron_r1z.analysis.report import make_tree, render, summarise
from megatron_r1z.config import AnalyseConfig, make_config
from tests.unit.analysis.made import make_question, make_response


def config_of(**analysis: Any) -> AnalyseConfig:
    tree = {"model": {"path": "models/m"}, "logging": {"folder": "runs/x"}, "analysis": {"questions": {"path": "q.jsonl"}, **analysis}}
    return make_config(AnalyseConfig, tree)


def plain() -> list[CellFigures]:
    rows = [[make_question("rRw", "1"), make_question("Wuu", "2")], [make_question("rrr", "1"), make_question("ccc", "2")]]
    return [make_figures("r1", temperature, questions, (1, 3)) for temperature, questions in zip((0.5, 1.0), rows, strict=True)]


def judged() -> list[CellFigures]:
    responses = tuple(make_response("r", "Let me recheck.", judgement=Judgement(answers, 2)) for answers in (1, 0, None))
    return [make_figures("no", 0.5, [ExaminedQuestion("q/0", None, responses)], (1, 3))]


def test_the_report_has_a_table_for_each_question() -> None:
    text = render(config_of(), plain(), ["temperatures.png"])
    assert text.startswith("# Analysis of models/m\n\n2 questions of q.jsonl, 3 responses to each")
    assert "No judge was asked: whether a response answers is told from its form" in text
    assert "![temperatures](temperatures.png)" in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Does it answer?",
        "## Does it explore?",
        "## Does it reflect on itself?",
        "## Accuracy by level",
        "## How responses end",
        "## Are responses with self-reflection more often right?",
    ]
    assert "| template, temperature | pass@1 | pass@3 | mixed |" in text
    assert "Highest pass@3: template r1 at temperature 0.5, 50.0%." in text
    assert "| recheck | 2 |" in text
    assert "| r1, 1 | 50.0%, 1 / 0 | 0.0% | 0.0% | 50.0%, 1 / 0 |" in text
    assert "| r1, 0.5 | 50.0% (9.5% - 90.5%) of 2 | 25.0% (" in text
    assert "| 2 | +0.25 (-0.24 to +0.74) | +0.12, +0.25, +0.38 | 50.0% |" in text


def test_a_table_has_cells_of_one_number() -> None:
    for figures in (plain(), judged()):
        for block in render(config_of(), figures, []).split("\n\n"):
            if block.startswith("|"):
                assert len({line.count("|") for line in block.splitlines()}) == 1


def test_the_report_says_who_judged() -> None:
    text = render(config_of(judge={"url": "http://x/v1", "model": "the-judge"}), judged(), [])
    assert "Judge: the-judge. Of 6 replies, 2 on each response, 1 have no verdict in them or were refused; they count as no." in text
    assert "| template, temperature | by the judge | by form | accuracy |" in text
    assert "| responses, both | questions, both |" in text
    assert "Most by the judge: template no at temperature 0.5, 33.3%." in text
    assert "## Accuracy by level" not in text
    assert "Self-reflection by keywords and judge together." in text


def test_without_a_keyword_found_the_report_says_so() -> None:
    text = render(config_of(), [make_figures("no", 1.0, [make_question("rw")], (1,))], [])
    assert "No response has a keyword in it." in text


def test_the_summary_has_a_row_for_each_cell() -> None:
    rows = [line.split() for line in summarise(plain()).splitlines()]
    assert rows[0][:4] == ["template", "temperature", "answers", "accuracy"]
    assert rows[1:] == [
        ["r1", "0.5", "0.0%", "33.3%", "50.0%", "50.0%", "0.0%", "2"],
        ["r1", "1", "0.0%", "50.0%", "50.0%", "0.0%", "50.0%", "0"],
    ]


def test_the_figures_are_json() -> None:
    tree = make_tree(config_of(), plain())
    assert json.loads(json.dumps(tree))["cells"][0]["levels"]["1"]["accuracy"]["value"] == pytest.approx(2 / 3)
    assert (tree["judge"], tree["questions"], tree["model"]) == (None, "q.jsonl", "models/m")


@pytest.mark.parametrize("figures", [plain(), judged()], ids=["plain", "judged"])
def test_the_pictures_are_drawn(figures: list[CellFigures], tmp_path: Path) -> None:
    names = draw(figures, tmp_path)
    assert names == ["temperatures.png", "endings.png", "reflection.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_without_matplotlib_there_are_no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert draw(plain(), tmp_path) == []
    assert list(tmp_path.iterdir()) == []
