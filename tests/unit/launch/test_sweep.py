"""Sweeps: which runs there are, what came of them, and that only what is left is run."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_r1z.cli import main
from megatron_r1z.config import dump_config
from megatron_r1z.data.changes import record_work
from megatron_r1z.data.questions import load_question_sets, mark_questions
from megatron_r1z.errors import ConfigError
from megatron_r1z.host.rank import STOPPED
from megatron_r1z.launch import sweep

QUICKSTART = str(Path(__file__).parents[3] / "configs" / "quickstart.yaml")
AXES = ['data.template=[r1, qwen_math, "no"]', "data.seed,rollout.seed=[0, 1]"]


def cells_in(folder: Path, axes: list[str] = AXES, *overrides: str) -> list[sweep.Cell]:
    return sweep.make_cells(QUICKSTART, [sweep.parse_axis(text) for text in axes], [f"logging.folder={folder / 'run'}", *overrides])


def write_rows(cell: sweep.Cell, rewards: list[float], accuracies: dict[int, tuple[float, float]]) -> None:
    cell.folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = [{"iteration": number, "rollout/reward_mean": reward} for number, reward in enumerate(rewards, 1)]
    rows += [{"iteration": number, "evaluation/a_accuracy": a, "evaluation/b_accuracy": b} for number, (a, b) in accuracies.items()]
    (cell.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_combination_is_a_run_of_its_own(tmp_path: Path) -> None:
    cells = cells_in(tmp_path)
    assert [(cell.config.data.template, cell.config.data.seed) for cell in cells] == list(
        itertools.product(("r1", "qwen_math", "no"), (0, 1))
    )
    assert all(cell.config.data.seed == cell.config.rollout.seed for cell in cells)
    assert [cell.name for cell in cells[:2]] == ["r1-seed0", "r1-seed1"]
    assert len({cell.folder for cell in cells}) == 6
    assert {cell.folder.parent for cell in cells} == {tmp_path / "run"}
    assert sweep.sweep_folder(cells) == tmp_path / "run"


def test_a_path_is_named_by_its_last_part(tmp_path: Path) -> None:
    cells = cells_in(tmp_path, ["data.train.0.path=[a/b/one.jsonl, c/two.jsonl]"])
    assert [cell.name for cell in cells] == ["one.jsonl", "two.jsonl"]
    assert [cell.config.data.train[0].path for cell in cells] == ["a/b/one.jsonl", "c/two.jsonl"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("data.seed", "write section.field="),
        ("data.seed=3", "with at least two values"),
        ("data.seed=[3]", "with at least two values"),
        ("data.seed=[3, 3]", "two of its values have the name seed3"),
        ("data.train.0.path=[a/x, b/x]", "two of its values have the name x"),
        ("data.seed=[3", "with at least two values"),
    ],
)
def test_a_wrong_axis_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        sweep.parse_axis(text)


def test_a_run_that_cannot_work_is_refused_before_any_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train_batch_size 100"):
        cells_in(tmp_path, ["algorithm.train_batch_size=[256, 100]"])


def test_scores_are_means_over_the_held_out_sets(tmp_path: Path) -> None:
    cell = cells_in(tmp_path)[0]
    assert sweep.score(cell) == sweep.Score(0, None, None, None, None, None)
    write_rows(cell, [0.25, 0.5], {0: (0.0, 0.5), 1: (0.5, 0.75), 2: (0.25, 0.5)})
    assert sweep.score(cell) == sweep.Score(2, 0.5, 0.25, 0.625, 1, 0.375)


def test_a_row_cut_off_by_a_kill_is_passed_over(tmp_path: Path) -> None:
    cell = cells_in(tmp_path)[0]
    write_rows(cell, [0.25, 0.5], {})
    with (cell.folder / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "rollout/rew')
    assert sweep.score(cell).iterations == 2


def finish(cell: sweep.Cell) -> None:
    """Leave what a run leaves that went through all of its iterations."""
    write_rows(cell, [0.5] * cell.config.algorithm.iterations, {})
    (cell.folder / "hf" / "final").mkdir(parents=True)
    (cell.folder / "config.yaml").write_text(dump_config(cell.config))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optimizer.lr=1e-4", "optimizer.lr 5e-06, which is now 0.0001"),
        ("rollout.temperature=0.5", "rollout.temperature 1.0, which is now 0.5"),
        ("evaluation.samples=2", "evaluation.samples"),
        ("checkpoint.every=3", None),
        ("parallel.micro_batch_tokens=77", None),
    ],
)
def test_a_folder_with_another_run_is_not_through_and_the_sweep_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, named: str | None
) -> None:
    axes, base = AXES[1:], ["algorithm.iterations=1", "optimizer.lr=5e-6", "evaluation.temperature=0.5"]
    done = cells_in(tmp_path, axes, *base)
    for cell in done:
        finish(cell)
    assert all(map(sweep.is_through, done))
    changed = cells_in(tmp_path, axes, *base, override)
    assert [sweep.is_through(cell) for cell in changed] == [named is None] * 2
    arguments = ["sweep", QUICKSTART, "--over", *axes, "--table", f"logging.folder={tmp_path / 'run'}", *base, override]
    assert main(arguments) == (0 if named is None else 2)
    if named is not None:
        assert f"{done[0].folder} holds a run with {named}" in capsys.readouterr().err


def test_a_run_of_other_files_is_not_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, questions = tmp_path / "model", tmp_path / "questions.jsonl"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"1111")
    questions.write_text('{"problem": "1+1", "answer": "2"}\n')
    overrides = [f"model.path={model}", f"data.train=[{{path: {questions}}}]", "algorithm.iterations=1"]
    cell = cells_in(tmp_path, AXES[1:], *overrides)[0]
    finish(cell)
    record_work(cell.folder, cell.config, mark_questions(cell.config.data.train, load_question_sets(cell.config.data.train)))
    assert sweep.is_through(cell)
    questions.write_text('{"problem": "1+1", "answer": "3"}\n')
    assert not sweep.is_through(cell)
    questions.write_text('{"problem": "1+1", "answer": "2"}\n')
    (model / "model.safetensors").write_bytes(b"2222")
    with pytest.raises(ConfigError, match="other weights than"):
        sweep.check_folders([cell])
    (model / "model.safetensors").unlink()  # jobs are submitted from where the model need not be
    assert sweep.is_through(cell)


def test_the_grid_has_a_place_for_every_run(tmp_path: Path) -> None:
    axes, cells = [sweep.parse_axis(text) for text in AXES], cells_in(tmp_path)
    for number, cell in enumerate(cells):
        write_rows(cell, [0.1], {0: (0.0, 0.0), 1: (number / 10, number / 10)})
    scores = [sweep.score(cell) for cell in cells]
    lines = sweep.render(axes, cells, scores).splitlines()
    assert lines[-4].split() == ["first", "to", "best", "seed0", "seed1"]
    assert [line.split()[3::3] for line in lines[-3:]] == [["0.0%", "10.0%"], ["20.0%", "30.0%"], ["40.0%", "50.0%"]]
    sweep.write(axes, cells, scores)
    figures = json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert [figure["best"] for figure in figures] == [number / 10 for number in range(6)]
    assert figures[3]["labels"] == {"template": "qwen_math", "seed": "seed1"}


def test_only_what_is_left_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    started: list[str] = []
    answers = {"r1-seed1": 1, "no-seed0": STOPPED}

    def run(command: list[str]) -> int:
        assert command[:4] == [sys.executable, "-m", "megatron_r1z", "train"]
        started.append(Path(command[-1].partition("=")[2]).name)
        return answers.get(started[-1], 0)

    monkeypatch.setattr(sweep, "_run_one", run)
    options = [QUICKSTART, f"logging.folder={tmp_path / 'run'}", "algorithm.iterations=1"]
    axes = [part for text in AXES for part in ("--over", text)]
    done = cells_in(tmp_path, AXES, "algorithm.iterations=1")[0]
    write_rows(done, [0.5], {})
    (done.folder / "hf" / "final").mkdir(parents=True)
    assert sweep.is_through(done)
    assert main(["sweep", *options, *axes]) == 1
    assert started == ["r1-seed1", "qwen_math-seed0", "qwen_math-seed1", "no-seed0"]
    found = capsys.readouterr()
    assert "1 of 6 runs failed, the first is r1-seed1" in found.err
    assert "r1-seed0: done before" in found.out
    assert main(["sweep", *options, *axes, "--table"]) == 0
    assert len(started) == 4
    answers.clear()
    answers["r1-seed1"] = STOPPED
    assert main(["sweep", *options, *axes]) == STOPPED


@pytest.mark.parametrize("option", [["--dry-run"], ["--detach"], ["--cluster", "file.yaml"]])
def test_what_is_about_jobs_does_not_start_runs_here(
    option: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "_run_one", lambda command: pytest.fail(f"{command} was run"))
    assert main(["sweep", QUICKSTART, "--over", AXES[1], *option, f"logging.folder={tmp_path / 'run'}"]) == 2
    assert "say with --executor where they are to run" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_table_submits_nothing(tmp_path: Path) -> None:
    assert main(["sweep", QUICKSTART, "--over", AXES[1], "--table", "--executor", "slurm", f"logging.folder={tmp_path / 'run'}"]) == 0


def test_a_figure_that_is_null_and_a_row_that_was_cut_off_count_nothing(tmp_path: Path) -> None:
    (cell, *_) = cells_in(tmp_path)
    write_rows(cell, [0.5, 0.25], {0: (0.5, 0.5)})
    with (cell.folder / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "rollout/reward_mean": null, "evaluation/a_accuracy": null}\n{"iteration": 4, "roll')
    found = sweep.score(cell)
    assert (found.iterations, found.reward, found.best) == (3, None, 0.5)
    assert " - " in sweep.render([sweep.parse_axis(text) for text in AXES], [cell] * 6, [found] * 6)
