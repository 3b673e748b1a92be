"""`megatron-r1z evaluate` and `analyse` with the real engine: broken off and resumed, from a folder and from a checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

QUESTIONS, CHUNK = 40, 8


@pytest.fixture(scope="module")
def evaluation(base: Path, task: Any) -> list[str]:
    """Arguments of `evaluate`, but for the run folder: two engines, two samples; the file is a training run's."""
    return [
        "configs/quickstart.yaml",
        f"model.path={base}",
        f"evaluation.sets=[{{path: {task.questions}, limit: {QUESTIONS}}}]",
        "evaluation.samples=2",
        "evaluation.temperature=1.0",
        "rollout.max_response_tokens=48",
        f"rollout.max_concurrent_sequences={CHUNK}",
        "rollout.tensor_parallel_size=1",
    ]


@pytest.fixture(scope="module")
def whole(evaluation: list[str], cli: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, cli.run("evaluate", *evaluation, f"logging.folder={folder}")


def scores_of(folder: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((folder / "evaluation" / "scores.json").read_text())
    return {name: value for name, value in tree.items() if name != "model"}


def records_of(folder: Path) -> bytes:
    path = folder / "evaluation" / "easy_questions.jsonl"
    return path.read_bytes() if path.exists() else b""


def test_it_ends_with_a_table_and_leaves_records(whole: tuple[Path, Any]) -> None:
    folder, outcome = whole
    assert (outcome.status, outcome.stderr, outcome.processes, outcome.segments) == (0, "", [], [])
    (score,) = scores_of(folder)["sets"]
    rows = [json.loads(line) for line in records_of(folder).splitlines()]
    attempts = [attempt for row in rows for attempt in row["attempts"]]
    assert [row["question_id"] for row in rows] == [f"easy_questions/{index}" for index in range(QUESTIONS)]
    assert score["accuracy"] == pytest.approx(sum(attempt["verdict"] == "correct" for attempt in attempts) / (2 * QUESTIONS))
    assert 0 < score["low"] < score["accuracy"] < score["high"] < 1
    assert score["accuracy"] <= score["pass_at"]["2"] <= 2 * score["accuracy"]
    assert re.search(rf"^easy_questions +{QUESTIONS} +2 +{score['accuracy']:.1%} ", outcome.stdout, re.MULTILINE)


def test_killed_half_way_it_goes_on_to_the_same_table(whole: tuple[Path, Any], evaluation: list[str], cli: Any, tmp_path: Path) -> None:
    command = cli.start("evaluate", *evaluation, f"logging.folder={tmp_path}")
    command.wait_until(lambda: records_of(tmp_path).count(b"\n") >= CHUNK)
    command.end()
    done = records_of(tmp_path).count(b"\n")
    assert CHUNK <= done < QUESTIONS
    outcome = cli.run("evaluate", *evaluation, f"logging.folder={tmp_path}")
    assert outcome.status == 0
    assert f"easy_questions: {done} of {QUESTIONS} questions are in" in outcome.stdout
    assert records_of(tmp_path) == records_of(whole[0])
    assert scores_of(tmp_path) == scores_of(whole[0])


def test_a_checkpoint_in_another_layout_has_the_scores_of_its_export(
    whole: tuple[Path, Any], evaluation: list[str], base: Path, task: Any, cli: Any, tmp_path: Path
) -> None:
    checkpoint = next((base.parents[1] / "checkpoints").glob("step_*"))
    layout = ["parallel.tensor_parallel_size=1", "parallel.pipeline_parallel_size=2"]
    weights = [f"model.path={task.model}", f"model.checkpoint={checkpoint}"]
    outcome = cli.run("evaluate", *evaluation, *layout, *weights, f"logging.folder={tmp_path}")
    assert (outcome.status, outcome.stderr) == (0, "")
    assert records_of(tmp_path) == records_of(whole[0])


def test_other_settings_in_the_same_folder_are_refused(whole: tuple[Path, Any], evaluation: list[str], cli: Any) -> None:
    outcome = cli.run("evaluate", *evaluation, "evaluation.temperature=0.5", f"logging.folder={whole[0]}")
    assert outcome.status == 2
    assert "evaluation.temperature 1.0, which is now 0.5; choose another logging.folder" in outcome.stderr


def test_other_weights_under_the_same_settings_are_refused(
    whole: tuple[Path, Any], evaluation: list[str], base: Path, cli: Any, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(base, model)
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "model.safetensors").write_bytes(content)
    outcome = cli.run("evaluate", *evaluation, f"model.path={model}", f"logging.folder={whole[0]}")
    assert (outcome.status, outcome.stdout) == (2, "")
    assert f"holds responses with other weights than {model} has now (model.path: model.safetensors)" in outcome.stderr


def test_a_killed_analysis_goes_on_and_each_of_its_cells_is_an_evaluation(
    whole: tuple[Path, Any], base: Path, task: Any, cli: Any, tmp_path: Path
) -> None:
    arguments = [
        "configs/analyse-smollm2.yaml",
        f"model.path={base}",
        f"analysis.questions={{path: {task.questions}, limit: {QUESTIONS}}}",
        *('analysis.templates=["no"]', "analysis.shots_path=null", "analysis.level_column=null", "analysis.max_prompt_tokens=32"),
        *("analysis.samples=2", "analysis.temperatures=[1.0, 0.5]", "precision.engine=fp32"),
        *("rollout.max_response_tokens=48", f"rollout.max_concurrent_sequences={CHUNK}", f"logging.folder={tmp_path}"),
    ]
    responses = tmp_path / "analysis" / "responses" / "no_t1.0.jsonl"
    command = cli.start("analyse", *arguments)
    command.wait_until(lambda: responses.exists() and responses.read_bytes().count(b"\n") >= CHUNK)
    command.end()
    assert responses.read_bytes().count(b"\n") < QUESTIONS
    outcome = cli.run("analyse", *arguments)
    assert (outcome.status, outcome.stderr, outcome.processes, outcome.segments) == (0, "", [], [])
    assert responses.read_bytes() == records_of(whole[0])
    (score,) = scores_of(whole[0])["sets"]
    cell, other = json.loads((tmp_path / "analysis" / "analysis.json").read_text())["cells"]
    assert (cell["template"], cell["temperature"], other["temperature"]) == ("no", 1.0, 0.5)
    assert cell["accuracy"] == {"value": score["accuracy"], "low": score["low"], "high": score["high"]}
    assert {k: share["value"] for k, share in cell["pass_at"].items()} == score["pass_at"]
    assert re.search(rf"^no +1 .* {score['accuracy']:.1%} ", outcome.stdout, re.MULTILINE)
    assert (tmp_path / "analysis" / "report.md").read_text().count("| no, 0.5 |") >= 5
