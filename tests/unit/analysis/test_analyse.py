"""An analysis on one rank with an engine that answers from a script: cells, resume, judge, report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_r1z.analysis import analyse, judge
from megatron_r1z.analysis.analyse import Analysis, Cell, OnDemand, cells_of, finish, sample
from megatron_r1z.config import AnalyseConfig, make_config
from megatron_r1z.data.prompts import PromptSet
from megatron_r1z.evaluation.evaluate import Evaluation, evaluation_sampling
from megatron_r1z.host.rank import StopFlag
from megatron_r1z.protocols import Sampling
from megatron_r1z.record.metrics import SilentLog
from megatron_r1z.types import FinishReason, GradedGroup, Group, Prompt, Response, Verdict, VerdictKind

QUESTIONS = 6


pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time, and test_report.py draws them; one test here keeps them."""
    if request.function is not test_every_template_at_every_temperature_is_sampled_and_reported:
        monkeypatch.setattr(analyse, "draw", lambda _figures, _folder: [])


class Script:
    """Engine and grader: question n is right where n is even, at temperature 1 every response rechecks; stops after `limit` calls."""

    finds_answers = True

    def __init__(self, limit: int = 1000) -> None:
        self.flag = StopFlag()
        self.calls: list[tuple[float, str]] = []
        self.limit = limit

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, policy_version: int) -> list[Group]:
        self.calls.append((sampling.temperature, prompts[0].text))
        self.flag.requested = len(self.calls) >= self.limit
        return [Group(place, prompt, self.respond(prompt, sampling)) for place, prompt in enumerate(prompts)]

    def respond(self, prompt: Prompt, sampling: Sampling) -> tuple[Response, ...]:
        text = f"{'Let me recheck. ' * (sampling.temperature == 1)}The answer is {prompt.answers[0]}"
        return (Response(text, (1, 2), (0.0, 0.0), FinishReason.STOP, 0),) * sampling.num_samples

    def grade(self, groups: Sequence[Group]) -> list[GradedGroup]:
        return [GradedGroup(item, (self.verdict(item.prompt),) * len(item.responses)) for item in groups]

    def verdict(self, prompt: Prompt) -> Verdict:
        is_right = int(prompt.answers[0]) % 2 == 0
        return Verdict(VerdictKind.CORRECT if is_right else VerdictKind.WRONG, float(is_right), prompt.answers[0])

    def judge(self, pairs: Sequence[tuple[str, str]]) -> Mapping[tuple[str, str], VerdictKind]:
        return dict.fromkeys(pairs, VerdictKind.WRONG)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., AnalyseConfig]:
    path = tmp_path / "set.jsonl"
    rows = [{"problem": f"{index}?", "answer": str(index), "level": index // 2} for index in range(QUESTIONS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(name: str, **analysis: Any) -> AnalyseConfig:
        settings = {"templates": ["no", "r1"], "temperatures": [0.5, 1], "samples": 2, "level_column": "level"} | analysis
        tree = {
            "model": {"path": "m"},
            "logging": {"folder": str(tmp_path / name)},
            "analysis": {"questions": {"path": str(path)}, **settings},
            "rollout": {"max_concurrent_sequences": 8},
        }
        return make_config(AnalyseConfig, tree)

    return config


def run(config: AnalyseConfig, script: Script) -> bool:
    sets = {
        template: PromptSet("set", [Prompt(f"set/{i}", f"{template} {i}?", (1,), (str(i),), "set") for i in range(QUESTIONS)], 1.0, 0)
        for template in config.analysis.templates
    }
    engine = OnDemand(lambda: script)  # type: ignore[arg-type, return-value]
    cells = {}
    for cell in cells_of(config):
        item = config.evaluation(cell.template, cell.temperature)
        sampling = evaluation_sampling(item.evaluation, item.rollout, ())
        cells[cell] = Evaluation(item, [sets[cell.template]], engine, script, sampling, SilentLog(), script.flag)  # type: ignore[arg-type]
    records = sample(Analysis(config, cells, SilentLog(), script.flag))
    return records is not None and finish(config, records, SilentLog(), script.flag)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_template_at_every_temperature_is_sampled_and_reported(make: Callable[..., AnalyseConfig]) -> None:
    config = make("run")
    assert run(config, script := Script())
    assert script.calls == [(t, f"{name} {first}?") for name in ("no", "r1") for t in (0.5, 1) for first in (0, 4)]
    tree = json.loads((config.folder / "analysis.json").read_text())
    assert [(cell["template"], cell["temperature"]) for cell in tree["cells"]] == [("no", 0.5), ("no", 1), ("r1", 0.5), ("r1", 1)]
    assert [cell["reflection"]["keywords"]["questions"] for cell in tree["cells"]] == [0, QUESTIONS, 0, QUESTIONS]
    assert {(cell["accuracy"]["value"], tuple(cell["pass_at"])) for cell in tree["cells"]} == {(0.5, ("1", "2"))}
    assert {tuple(cell["levels"]) for cell in tree["cells"]} == {("0", "1", "2")}
    assert sorted(files_of(config.folder)) == [
        *("analysis.json", "endings.png", "reflection.png", "report.md"),
        *(f"responses/{cell.name}.jsonl" for cell in sorted(cells_of(config), key=lambda cell: cell.name)),
        "temperatures.png",
    ]


@pytest.mark.parametrize("limit", [1, 4, 7])
def test_a_stopped_analysis_goes_on_to_the_same_files(limit: int, make: Callable[..., AnalyseConfig]) -> None:
    whole, broken = make("whole"), make("broken")
    assert run(whole, Script())
    assert not run(broken, Script(limit))
    assert not (broken.folder / "report.md").exists()
    assert run(broken, second := Script())
    assert len(second.calls) == 8 - limit + 1  # that at which the stop was asked for is given up
    assert files_of(broken.folder) == files_of(whole.folder)


def test_what_is_on_disk_needs_no_engine(make: Callable[..., AnalyseConfig]) -> None:
    """Keywords, k and levels are changed afterwards; a new temperature adds its own responses only."""
    assert run(make("run"), Script())
    changed = make("run", keywords=["answer"], k=[1], level_column=None)
    assert run(changed, script := Script())
    assert script.calls == []
    (cell, *_) = json.loads((changed.folder / "analysis.json").read_text())["cells"]
    assert (cell["keyword_counts"], list(cell["pass_at"]), cell["levels"]) == ({"answer": 2 * QUESTIONS}, ["1"], {})
    assert run(make("run", temperatures=[0.7, 1]), script := Script())
    assert {temperature for temperature, _ in script.calls} == {0.7}


def test_a_judge_reads_what_was_sampled(make: Callable[..., AnalyseConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def send(text: str) -> str:
        asked.append(text)
        if "Begin your reply" in text:
            return "1"
        return "Category 2" if "recheck" in text and "[Question]\n3?" in text else "Category 1"

    monkeypatch.setattr(judge, "make_sender", lambda _config: send)
    config = make("run", judge={"url": "http://x/v1", "model": "j"})
    assert run(config, Script())
    assert len(asked) == 2 * 2 * QUESTIONS  # two tasks, two texts a question: what the templates and samples have in common is asked once
    tree = json.loads((config.folder / "analysis.json").read_text())
    assert [cell["answering_by_judge"]["value"] for cell in tree["cells"]] == [1.0] * 4
    assert [cell["reflection"]["both"]["questions"] for cell in tree["cells"]] == [0, 1, 0, 1]
    assert "Judge: j. Of 96 replies, 2 on each response, 0 have no verdict" in (config.folder / "report.md").read_text()


def test_a_stop_while_judging_is_no_end(make: Callable[..., AnalyseConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "make_sender", lambda _config: lambda _text: "1")
    config = make("run", judge={"url": "http://x/v1"})
    assert run(config, Script())
    (config.folder / "report.md").unlink()
    (config.folder / "judge.jsonl").unlink()
    stopped = Script()
    stopped.flag.requested = True
    assert not run(config, stopped)
    assert not (config.folder / "report.md").exists()


def test_cells_are_named_by_template_and_temperature() -> None:
    assert Cell("few_shot", 1.0).name == "few_shot_t1.0"
    assert Cell("no", 0.05).name == "no_t0.05"
