"""Figures of a few records by hand, and where they are written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing import event_accumulator

from megatron_r1z.metrics import (
    RunLog,
    SilentLog,
    Stopwatch,
    combine_steps,
    grading_warning,
    refit_metrics,
    rollout_metrics,
    update_metrics,
)
from megatron_r1z.types import (
    FinishReason,
    GradedGroup,
    Group,
    Prompt,
    RefitReceipt,
    Response,
    UpdateStats,
    Verdict,
    VerdictKind,
)


def graded(group_id: int, *responses: tuple[int, float, VerdictKind]) -> GradedGroup:
    """A group from length, reward and verdict of each response; truncated ones ran out of budget."""
    return GradedGroup(
        Group(
            group_id,
            Prompt(f"q/{group_id}", "?", (1, 2), ("7",), "q"),
            tuple(
                Response(
                    "r", (3,) * length, (-0.5,) * length, FinishReason.LENGTH if kind is VerdictKind.TRUNCATED else FinishReason.STOP, 0
                )
                for length, _, kind in responses
            ),
        ),
        tuple(Verdict(kind, reward, None) for _, reward, kind in responses),
    )


RIGHT, WRONG, CUT = VerdictKind.CORRECT, VerdictKind.WRONG, VerdictKind.TRUNCATED
MIXED = graded(0, (4, 1.0, RIGHT), (10, 0.0, WRONG), (16, 0.0, CUT), (6, 1.0, RIGHT))
ALL_RIGHT = graded(1, (2, 1.0, RIGHT), (2, 1.0, RIGHT))
ALL_WRONG = graded(2, (8, 0.0, WRONG), (8, 0.0, CUT))
STATS = UpdateStats(
    loss=0.5,
    grad_norm=2.0,
    learning_rate=1e-6,
    clip_fraction=0.21875,
    clipped_high=0.125,
    clipped_low=0.0625,
    dual_clipped=0.03125,
    tis_weight=0.99,
    tis_truncated=0.03,
    ratio_mean=1.02,
    ratio_max=1.5,
    entropy=3.0,
    sampler_kl=2e-3,
    reference_kl=4e-3,
    mismatch_mean=1e-4,
    mismatch_p999=5e-3,
    mismatch_max=1e-2,
    num_tokens=120,
    skipped=True,
)


def test_rollout_metrics() -> None:
    metrics = rollout_metrics([MIXED, ALL_RIGHT, ALL_WRONG])
    assert metrics["rollout/reward_mean"] == pytest.approx(4 / 8)
    assert metrics["rollout/length_mean_tokens"] == pytest.approx(56 / 8)
    assert metrics["rollout/length_max_tokens"] == 16
    assert metrics["rollout/truncated_share"] == pytest.approx(2 / 8)
    assert metrics["rollout/mixed_groups_share"] == pytest.approx(1 / 3)
    assert metrics["rollout/sampling_rounds"] == 1
    assert rollout_metrics([MIXED], 3) == rollout_metrics([MIXED]) | {"rollout/sampling_rounds": 3.0}
    assert metrics["rollout/length_right_tokens"] == pytest.approx(14 / 4)
    assert metrics["rollout/length_wrong_tokens"] == pytest.approx(42 / 4)
    assert metrics["grading/correct_share"] == pytest.approx(4 / 8)
    assert metrics["grading/wrong_share"] == pytest.approx(2 / 8)
    assert metrics["grading/truncated_share"] == pytest.approx(2 / 8)


def test_the_verdicts_of_all_kinds_add_up_to_one() -> None:
    every = graded(0, *((3, 0.0, kind) for kind in VerdictKind))
    shares = {name: value for name, value in rollout_metrics([every, MIXED]).items() if name.startswith("grading/")}
    assert set(shares) == {f"grading/{kind.value}_share" for kind in VerdictKind}
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(("groups", "absent"), [([ALL_RIGHT], "wrong"), ([ALL_WRONG], "right")])
def test_a_mean_over_nothing_is_left_out(groups: list[GradedGroup], absent: str) -> None:
    metrics = rollout_metrics(groups)
    assert f"rollout/length_{absent}_tokens" not in metrics
    assert metrics["rollout/length_mean_tokens"] > 0


def test_update_and_refit_metrics() -> None:
    metrics = update_metrics(STATS)
    assert metrics["update/loss"] == 0.5
    assert metrics["update/grad_norm"] == 2.0
    assert metrics["update/skipped_steps"] == 1.0
    assert metrics["update/trained_tokens"] == 120.0
    assert metrics["update/clip_fraction"] == sum(
        metrics[f"update/{name}_share"] for name in ("clipped_high", "clipped_low", "dual_clipped")
    )
    assert (metrics["update/tis_weight_mean"], metrics["update/tis_truncated_share"]) == (0.99, 0.03)
    assert metrics["update/mismatch_mean_nats"] < metrics["update/mismatch_p999_nats"] < metrics["update/mismatch_max_nats"]
    assert len(set(metrics.values())) == len(metrics), "each figure has its own value, so none is written under two names"
    assert refit_metrics(RefitReceipt(3, 4096, 0.5, (0.2, 0.3), ())) == {"refit/bytes": 4096.0, "refit/seconds_s": 0.5}


def test_the_steps_of_an_iteration_together() -> None:
    first, second = (
        update_metrics(STATS),
        update_metrics(replace(STATS, loss=1.5, ratio_max=1.2, mismatch_max=3e-2, num_tokens=80, skipped=False)),
    )
    found = combine_steps([first, second])
    assert found["update/loss"] == 1.0
    assert found["update/ratio_max"] == 1.5
    assert found["update/mismatch_max_nats"] == 3e-2
    assert found["update/trained_tokens"] == 200
    assert found["update/skipped_steps"] == 1
    assert found["update/entropy_nats"] == 3.0
    assert combine_steps([first]) == first


def rows(folder: Path) -> list[tuple[str, int, float]]:
    """Unit, number and loss of each row of `metrics.jsonl`."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row["time"] > 1.7e9 for row in found)
    return [(unit, row[unit], row["update/loss"]) for row in found for unit in ("iteration", "step") if unit in row]


def write_iterations(log: RunLog, first: int, last: int, loss: float) -> None:
    """Two steps per iteration."""
    for number in range(first, last + 1):
        for step in (2 * number - 1, 2 * number):
            log.write("step", step, {"update/loss": loss})
        log.write("iteration", number, {"update/loss": loss})
    log.close()


def test_the_log_writes_json_lines_and_tensorboard(tmp_path: Path) -> None:
    write_iterations(RunLog(tmp_path / "run", {"iteration": 0, "step": 0}), 1, 2, 0.5)
    assert rows(tmp_path / "run") == [
        ("step", 1, 0.5),
        ("step", 2, 0.5),
        ("iteration", 1, 0.5),
        ("step", 3, 0.5),
        ("step", 4, 0.5),
        ("iteration", 2, 0.5),
    ]
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


@pytest.mark.parametrize("finished", range(4))
def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path, finished: int) -> None:
    write_iterations(RunLog(tmp_path, {"iteration": 0, "step": 0}), 1, 3, 0.5)
    write_iterations(RunLog(tmp_path, {"iteration": finished, "step": 2 * finished}), finished + 1, 4, 0.25)
    found = rows(tmp_path)
    assert sorted(number for unit, number, _ in found if unit == "iteration") == [1, 2, 3, 4]
    assert sorted(number for unit, number, _ in found if unit == "step") == list(range(1, 9))
    assert [loss for unit, _, loss in found if unit == "iteration"] == [0.5] * finished + [0.25] * (4 - finished)


def test_tensorboard_has_each_iteration_once_and_no_steps(tmp_path: Path) -> None:
    """Two numberings would not share an axis; a resumed run replaces what it does again."""
    write_iterations(RunLog(tmp_path, {"iteration": 0, "step": 0}), 1, 3, 0.5)
    (first,) = (tmp_path / "tensorboard").iterdir()
    first.rename(first.with_name("events.out.tfevents.0000000001"))  # files go by their second, and this one is not over
    write_iterations(RunLog(tmp_path, {"iteration": 1, "step": 2}), 2, 4, 0.25)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["update/loss"]
    assert [(event.step, event.value) for event in events.Scalars("update/loss")] == [(1, 0.5), (2, 0.25), (3, 0.25), (4, 0.25)]


def test_evaluation_before_training_survives_a_resume(tmp_path: Path) -> None:
    log = RunLog(tmp_path, {"iteration": 0, "step": 0})
    log.write("iteration", 0, {"update/loss": 0.0})
    write_iterations(log, 1, 2, 0.5)
    RunLog(tmp_path, {"iteration": 1, "step": 2}).close()
    assert [row for row in rows(tmp_path) if row[0] == "iteration"] == [("iteration", 0, 0.0), ("iteration", 1, 0.5)]


def test_a_row_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    """A full disk ends a process within a line."""
    write_iterations(RunLog(tmp_path, {"iteration": 0, "step": 0}), 1, 1, 0.5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 1, "ti')
    write_iterations(RunLog(tmp_path, {"iteration": 1, "step": 2}), 2, 2, 0.25)
    assert [row for row in rows(tmp_path) if row[0] == "iteration"] == [("iteration", 1, 0.5), ("iteration", 2, 0.25)]


def test_rows_are_aligned_and_repeat_their_header_only_when_it_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, {"step": 0})
    log.row({"iteration": "1", "loss": "0.5"})
    log.row({"iteration": "2", "loss": "0.25"})
    log.row({"step": "3"})
    log.phase("rollout")  # silent unless a terminal is there
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [["iteration", "loss"], ["1", "0.5"], ["2", "0.25"], ["step"], ["3"]]
    assert len({len(line) for line in lines[:3]}) == 1


def test_the_silent_log_says_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = SilentLog()
    log.say("x")
    log.phase("x")
    log.row({"a": "1"})
    log.write("step", 1, {"a": 1.0})
    log.close()
    assert capsys.readouterr().out == ""


def test_the_stopwatch_adds_up_until_the_lap(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.5, 10.0, 12.0, 20.0, 20.25, 30.0, 31.0])
    monkeypatch.setattr("megatron_r1z.metrics.time.perf_counter", lambda: next(ticks))
    watch = Stopwatch(SilentLog())
    for name in ("rollout", "update", "rollout"):
        with watch.phase(name):
            pass
    assert watch.lap() == {"time/rollout_s": 1.75, "time/update_s": 2.0}
    with watch.phase("grade"):
        pass
    assert watch.lap() == {"time/grade_s": 1.0}
    assert watch.lap() == {}


@pytest.mark.parametrize(("timeout", "error", "is_told"), [(0.0, 0.0, False), (0.01, 0.01, False), (0.03, 0.0, True), (0.0, 1.0, True)])
def test_a_grader_that_gives_up_is_told(timeout: float, error: float, is_told: bool) -> None:
    sentence = grading_warning({"grading/timeout_share": timeout, "grading/error_share": error})
    assert (sentence is not None) == is_told
    if sentence is not None:
        assert f"timeout {timeout:.1%}, error {error:.1%}" in sentence
        assert ("raise grading.timeout_s" in sentence) == (timeout > 0)
        assert ("the first error of the reward function" in sentence) == (error > 0)
