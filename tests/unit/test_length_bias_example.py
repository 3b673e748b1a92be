"""What the length bias example makes of its runs: means, tables, picture."""

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_r1z.config import PretrainConfig, TrainConfig, load_config

EXAMPLE = Path(__file__).parents[2] / "examples" / "length_bias"
sys.path.insert(0, str(EXAMPLE))
results = importlib.import_module("results")
run = importlib.import_module("run")


def iteration(reward: float, right: float, wrong: float, number: int = 1) -> dict[str, Any]:
    """A row of metrics.jsonl; reward is the share of right responses, as in this example."""
    row = {
        "iteration": number,
        "rollout/reward_mean": reward,
        "rollout/length_mean_tokens": reward * right + (1 - reward) * wrong,
        "rollout/truncated_share": 0.0,
        "grading/correct_share": reward,
    }
    return (
        row
        | ({"rollout/length_right_tokens": right} if reward > 0 else {})
        | ({"rollout/length_wrong_tokens": wrong} if reward < 1 else {})
    )


def constant(reward: float, right: float, wrong: float, iterations: int = 30) -> list[dict[str, Any]]:
    return [iteration(reward, right, wrong, number) for number in range(1, iterations + 1)]


def save_run(folder: Path, rows: list[dict[str, Any]], responses: list[tuple[int, bool, int]]) -> None:
    """`responses`: row of the question, right or not, tokens; the same in every iteration."""
    import zstandard

    (folder / "rollouts").mkdir(parents=True)
    others = [{"iteration": 0, "evaluation/x_accuracy": 0.5}, {"step": 1, "update/loss": 0.1}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*others, *rows]))
    lines = [
        {"prompt_id": f"questions/{question}", "verdict": "correct" if right else "wrong", "response_token_ids": [1] * length}
        for question, right, length in responses
    ]
    payload = zstandard.compress("".join(json.dumps(line) + "\n" for line in lines).encode())
    for row in rows:
        (folder / "rollouts" / f"iter_{row['iteration']:06d}.jsonl.zst").write_bytes(payload)


def test_lengths_are_means_over_responses_not_over_iterations() -> None:
    rows = [iteration(0.25, right=10, wrong=40), iteration(0.75, right=30, wrong=80)]
    assert results.WRONG.mean(rows) == pytest.approx((0.75 * 40 + 0.25 * 80) / 1.0)
    assert results.RIGHT.mean(rows) == pytest.approx((0.25 * 10 + 0.75 * 30) / 1.0)
    assert results.REWARD.mean(rows) == pytest.approx(0.5)


def test_an_iteration_without_such_a_response_counts_nothing() -> None:
    rows = [iteration(0.0, right=0, wrong=40), iteration(0.5, right=30, wrong=60)]
    assert results.RIGHT.mean(rows) == 30
    assert results.WRONG.mean(rows) == pytest.approx((40 + 0.5 * 60) / 1.5)
    assert math.isnan(results.RIGHT.mean(rows[:1]))


def test_a_curve_is_the_mean_over_the_last_iterations_and_ends_in_that_of_the_table() -> None:
    rows = [iteration(0.5, right=20, wrong=number) for number in range(1, 31)]
    curve = results.WRONG.curve(rows)
    assert curve[0] == 1
    assert curve[9] == pytest.approx(5.5)
    assert curve[29] == pytest.approx(results.WRONG.mean(rows[-results.WINDOW :])) == pytest.approx(25.5)


def test_the_end_table_has_the_mean_and_the_range_over_seeds() -> None:
    table = results.end_table({"grpo": [constant(0.3, 25, 90), constant(0.5, 25, 110)], "drgrpo": [constant(0.4, 25, 30)] * 2})
    lines = table.splitlines()
    assert lines[0].startswith("| iterations 21-30 | reward |")
    assert lines[2].startswith("| GRPO | 0.400 (0.300 to 0.500) | ")
    assert "| 100.0 (90.0 to 110.0) |" in lines[2]
    assert "| 30.0 (30.0 to 30.0) |" in lines[3]


def test_a_short_run_is_its_own_end() -> None:
    rows = [iteration(0.5, right=20, wrong=number) for number in (10, 20, 60)]
    first, _, line = results.end_table({"drgrpo": [rows]}).splitlines()
    assert first.startswith("| iterations 1-3 |")
    assert line.endswith("| 20.0 | 30.0 | 0.0% |")


def test_ratios_are_of_the_same_seed() -> None:
    grpo, drgrpo = [constant(0.4, 25, 60), constant(0.4, 25, 90)], [constant(0.4, 25, 30), constant(0.4, 25, 45)]
    table = results.ratio_table(grpo, drgrpo, [3, 7])
    assert table.splitlines() == [
        "| wrong responses, GRPO / Dr. GRPO, iteration | 10 | 25 |",
        "|---|---|---|",
        "| seed 3 | 2.00 | 2.00 |",
        "| seed 7 | 2.00 | 2.00 |",
    ]


def test_the_verdict_has_the_ratio_and_the_reward_beside_its_error() -> None:
    grpo, drgrpo = [constant(0.30, 25, 60), constant(0.44, 25, 90)], [constant(0.32, 25, 30), constant(0.40, 25, 30)]
    text = results.verdict(grpo, drgrpo)
    assert "2.50 (2.00 to 3.00) times as long" in text
    assert "differs by +0.010 (standard error 0.030)" in text
    assert "standard error" not in results.verdict(grpo[:1], drgrpo[:1])


def test_levels_are_those_of_the_questions() -> None:
    answered = [results.Answered("sum-5", right=False, num_tokens=26), results.Answered("pick-4", right=True, num_tokens=20)]
    answered += [results.Answered("pick-4", right=False, num_tokens=50), results.Answered("pick-4", right=False, num_tokens=70)]
    assert results.level_table({"grpo": answered}).splitlines() == [
        "| right, and length of wrong ones | sum-5 | pick-4 |",
        "|---|---|---|",
        "| GRPO | 0%, 26.0 | 33%, 60.0 |",
    ]


def test_from_run_folders_to_table_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("zstandard")
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"problem": "?", "answer": "1", "level": level}) + "\n" for level in ("sum-5", "pick-4")))
    for seed in (0, 1):
        save_run(tmp_path / f"grpo-{seed}", constant(0.4, 25, 90), [(0, True, 26), (1, False, 90)])
        save_run(tmp_path / f"drgrpo-{seed}", constant(0.4, 25, 30), [(0, True, 26), (1, False, 30)])
    text = results.compare(tmp_path, questions, ["grpo", "drgrpo"], [0, 1])
    assert "| GRPO | 100% | 0%, 90.0 |" in text
    assert "3.00 (3.00 to 3.00) times" in text
    assert (tmp_path / "table.md").read_text() in text
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_questions_last_for_the_run() -> None:
    config = load_config(TrainConfig, EXAMPLE / "train.yaml", [f"algorithm.name={next(iter(results.OBJECTIVES))}"])
    asked = config.algorithm.iterations * config.rollout.prompts_per_iteration
    assert asked == run.QUESTIONS * len(run.LEVELS)


@pytest.mark.parametrize("objective", results.OBJECTIVES)
def test_the_configurations_meet_where_the_program_looks(objective: str) -> None:
    base = load_config(PretrainConfig, EXAMPLE / "pretrain.yaml")
    config = load_config(TrainConfig, EXAMPLE / "train.yaml", [f"algorithm.name={objective}"])
    assert Path(base.model.path) == run.FOLDER / "task" / "model"
    assert Path(base.corpus.sources[0].path or "") == run.FOLDER / "task" / "corpus.jsonl"
    assert Path(base.logging.folder) == run.FOLDER / "base"
    assert Path(config.model.path) == run.FOLDER / "base" / "hf" / "final"
    assert [source.path for source in config.data.train] == [str(run.FOLDER / "task" / "questions.jsonl")]
