"""Figures of a few records by hand, and where they are written."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing import event_accumulator

from megatron_r1z.record.metrics import (
    RunLog,
    SilentLog,
    Stopwatch,
    critic_metrics,
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
    ValueStats,
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
    assert metrics["rollout/unjudged_share"] == 0
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


@pytest.mark.parametrize("lost", [VerdictKind.TIMEOUT, VerdictKind.ERROR])
def test_what_was_not_judged_is_in_no_mean_of_rewards_or_lengths_by_outcome(lost: VerdictKind) -> None:
    given_up = graded(3, (40, 0.0, lost), (2, 1.0, RIGHT), (8, 0.0, WRONG))
    metrics = rollout_metrics([given_up])
    assert metrics["rollout/reward_mean"] == 0.5
    assert metrics["rollout/length_wrong_tokens"] == 8
    assert metrics["rollout/length_mean_tokens"] == pytest.approx(50 / 3)
    assert metrics["rollout/unjudged_share"] == metrics[f"grading/{lost.value}_share"] == pytest.approx(1 / 3)
    nothing = rollout_metrics([graded(0, (4, 0.0, lost))])
    assert math.isnan(nothing["rollout/reward_mean"])
    assert nothing["rollout/unjudged_share"] == 1
    assert "rollout/length_wrong_tokens" not in nothing


@pytest.mark.parametrize(("groups", "absent"), [([ALL_RIGHT], "wrong"), ([ALL_WRONG], "right")])
def test_a_mean_over_nothing_is_left_out(groups: list[GradedGroup], absent: str) -> None:
    metrics = rollout_metrics(groups)
    assert f"rollout/length_{absent}_tokens" not in metrics
    assert metrics["rollout/length_mean_tokens"] > 0


def test_update_and_refit_metrics() -> None:
    metrics = update_metrics([STATS])
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


STEPS = st.lists(
    st.builds(
        lambda number, tokens, skipped: replace(STATS, loss=number, grad_norm=number, entropy=number, num_tokens=tokens, skipped=skipped),
        st.floats(-5, 5),
        st.integers(0, 100),
        st.booleans(),
    ),
    min_size=1,
    max_size=6,
)


@given(steps=STEPS)
def test_the_figures_of_an_iteration_are_over_its_steps_that_were_taken(steps: list[UpdateStats]) -> None:
    """Means of the loss and the like over steps, of the rest over tokens; where none was taken, over all of them."""
    found, taken = update_metrics(steps), [step for step in steps if not step.skipped] or steps
    assert found["update/loss"] == found["update/grad_norm"] == pytest.approx(sum(step.loss for step in taken) / len(taken))
    assert found["update/trained_tokens"] == sum(step.num_tokens for step in steps)
    assert found["update/skipped_steps"] == sum(step.skipped for step in steps)
    tokens = sum(step.num_tokens for step in taken)
    assert ("update/entropy_nats" in found) == ("update/ratio_max" in found) == (tokens > 0)
    if tokens:
        assert found["update/entropy_nats"] == pytest.approx(sum(step.entropy * step.num_tokens for step in taken) / tokens)


def test_a_skipped_step_does_not_make_the_row_of_its_iteration_nan() -> None:
    taken = replace(STATS, skipped=False)
    broken = replace(STATS, loss=math.nan, grad_norm=math.inf, entropy=math.nan, ratio_max=math.nan)
    row = update_metrics([broken, taken])
    assert row == update_metrics([taken]) | {"update/trained_tokens": 240.0, "update/skipped_steps": 1.0}
    alone = update_metrics([replace(broken, ratio_max=1.0), broken])
    assert [alone[f"update/{name}"] for name in ("grad_norm", "skipped_steps")] == [math.inf, 2.0]
    assert all(math.isnan(alone[f"update/{name}"]) for name in ("loss", "entropy_nats", "ratio_max"))


def test_losses_that_have_no_sum_have_a_figure() -> None:
    """What is not finite may come with either sign."""
    row = update_metrics([replace(STATS, loss=loss) for loss in (math.inf, -math.inf)])
    assert math.isnan(row["update/loss"])


def test_the_critic_of_an_iteration_explains_what_all_its_tokens_do() -> None:
    """Two steps with one return each explain nothing alone."""
    shared = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-5, "clip_fraction": 0.0, "error_square": 0.0}
    steps = [ValueStats(value_mean=mean, return_mean=mean, return_square=mean**2, num_tokens=5, skipped=False, **shared) for mean in (0, 1)]
    assert [critic_metrics([step])["critic/explained_variance"] for step in steps] == [0.0, 0.0]
    assert critic_metrics(steps)["critic/explained_variance"] == 1.0
    nothing = replace(steps[0], num_tokens=0, value_mean=math.nan)
    assert critic_metrics([nothing, steps[1]])["critic/value_mean"] == 1.0
    assert "critic/value_mean" not in critic_metrics([nothing])


def rows(folder: Path) -> list[tuple[str, int, float | None]]:
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


def test_what_is_not_finite_is_null_in_json_and_no_point_in_tensorboard(tmp_path: Path) -> None:
    log = RunLog(tmp_path, {"iteration": 0})
    for number, loss in enumerate((0.5, math.nan, math.inf, 0.25), 1):
        log.write("iteration", number, {"update/loss": loss})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    read = [json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON")) for line in text.splitlines()]
    assert [row["update/loss"] for row in read] == [0.5, None, None, 0.25]
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("update/loss")] == [(1, 0.5), (4, 0.25)]
    RunLog(tmp_path, {"iteration": 3}).close()
    assert [loss for _, _, loss in rows(tmp_path)] == [0.5, None, None], "a row with null is read again"


def test_an_earlier_row_that_is_no_json_becomes_one(tmp_path: Path) -> None:
    """Python reads NaN, and earlier versions wrote it."""
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "time": 1.8e9, "update/loss": NaN}\n')
    RunLog(tmp_path, {"iteration": 1}).close()
    assert rows(tmp_path) == [("iteration", 1, None)]


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
    monkeypatch.setattr("megatron_r1z.record.metrics.time.perf_counter", lambda: next(ticks))
    watch = Stopwatch(SilentLog())
    for name in ("rollout", "update", "rollout"):
        with watch.phase(name):
            pass
    assert watch.lap() == {"time/rollout_s": 1.75, "time/update_s": 2.0}
    with watch.phase("grade"):
        pass
    assert watch.lap() == {"time/grade_s": 1.0}
    assert watch.lap() == {}
