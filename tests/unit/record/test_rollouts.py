"""Responses on disk: enough to compute the updates again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_r1z.objective import OBJECTIVES
from megatron_r1z.record.rollouts import drop_rollouts, save_rollouts
from megatron_r1z.types import FinishReason, GradedGroup, Group, Prompt, Response, Sample, Verdict, VerdictKind

zstandard = pytest.importorskip("zstandard")

TEXTS = ("so </think> <answer>7</answer>", "線 ½\n\u2028no newline ends this row early, nor does half a character \ud83d")


def graded(group_id: int, rewards: tuple[float, ...]) -> GradedGroup:
    responses = tuple(
        Response(TEXTS[index % 2], (5, 6 + index), (-0.1, -0.2 - index), (FinishReason.STOP, FinishReason.LENGTH)[index % 2], 12)
        for index in range(len(rewards))
    )
    verdicts = tuple(Verdict(VerdictKind.CORRECT, 1.0, "7") if reward else Verdict(VerdictKind.TRUNCATED, 0.0, None) for reward in rewards)
    return GradedGroup(Group(group_id, Prompt(f"asdiv/{group_id}", "?", (1, 2, 3), ("7", "7.0"), "asdiv"), responses), verdicts)


def make_samples(groups: list[GradedGroup]) -> list[Sample]:
    return [
        Sample(f"{item.group.group_id}/{index}", item.group.prompt.token_ids + response.token_ids, 3, advantage, 0.7, response.logprobs, 12)
        for item in groups
        for index, (response, advantage) in enumerate(zip(item.group.responses, advantages(item), strict=True))
    ]


def advantages(item: GradedGroup) -> list[float]:
    return OBJECTIVES["drgrpo"].advantages([verdict.reward for verdict in item.verdicts])


def read(path: Path) -> list[dict[str, Any]]:
    text = zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read().decode()
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    groups = [graded(0, (1.0, 0.0, 0.0)), graded(1, (1.0, 1.0, 0.0))]
    samples = make_samples(groups)
    step_of = {sample.sample_id: index % 2 for index, sample in enumerate(samples)}
    save_rollouts(tmp_path / "rollouts", 12, groups, samples, step_of)
    return read(tmp_path / "rollouts" / "iter_000012.jsonl.zst")


def test_one_row_per_response_in_group_order(rows: list[dict[str, Any]]) -> None:
    assert [row["sample_id"] for row in rows] == ["0/0", "0/1", "0/2", "1/0", "1/1", "1/2"]
    assert [row["prompt_id"] for row in rows] == ["asdiv/0"] * 3 + ["asdiv/1"] * 3
    assert [row["step"] for row in rows] == [0, 1, 0, 1, 0, 1]


def test_a_row_is_complete(rows: list[dict[str, Any]]) -> None:
    assert rows[1] == {
        "sample_id": "0/1",
        "prompt_id": "asdiv/0",
        "prompt_token_ids": [1, 2, 3],
        "answers": ["7", "7.0"],
        "response": TEXTS[1],
        "response_token_ids": [5, 7],
        "engine_logprobs": [-0.1, -1.2],
        "temperature": 0.7,
        "finish_reason": "length",
        "verdict": "truncated",
        "extracted": None,
        "reward": 0.0,
        "extra_rewards": {},
        "advantage": pytest.approx(-1 / 3),
        "is_counted": True,
        "policy_version": 12,
        "step": 1,
    }


def test_advantages_follow_from_the_rewards_on_disk(rows: list[dict[str, Any]]) -> None:
    for first in (0, 3):
        group = rows[first : first + 3]
        assert OBJECTIVES["drgrpo"].advantages([row["reward"] for row in group]) == [row["advantage"] for row in group]


def test_an_iteration_that_is_repeated_replaces_its_file(tmp_path: Path) -> None:
    """A run that resumes before it goes over it again."""
    for rewards in ((1.0, 0.0, 0.0), (0.0, 1.0)):
        groups = [graded(0, rewards)]
        samples = make_samples(groups)
        save_rollouts(tmp_path, 3, groups, samples, {sample.sample_id: 0 for sample in samples})
    assert [row["reward"] for row in read(tmp_path / "iter_000003.jsonl.zst")] == [0.0, 1.0]


def test_the_values_of_a_critic_are_kept(tmp_path: Path) -> None:
    groups = [graded(0, (1.0,))]
    samples = [replace(sample, advantage=(0.5, 0.25), values=(0.5, 0.75)) for sample in make_samples(groups)]
    save_rollouts(tmp_path, 3, groups, samples, {"0/0": 0})
    (row,) = read(tmp_path / "iter_000003.jsonl.zst")
    assert [advantage + value for advantage, value in zip(row["advantage"], row["values"], strict=True)] == [1.0, 1.0]


@pytest.mark.parametrize("first", [0, 2, 9, 10])
def test_a_run_that_goes_on_deletes_what_it_samples_again(tmp_path: Path, first: int) -> None:
    """Nothing of a part of the run that is not there any more is left beside it."""
    drop_rollouts(tmp_path / "none", first)
    groups = [graded(0, (1.0, 0.0))]
    samples = make_samples(groups)
    for iteration in (0, 1, 2, 9, 10, 1_000_000):
        save_rollouts(tmp_path, iteration, groups, samples, {sample.sample_id: 0 for sample in samples})
    drop_rollouts(tmp_path, first)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"iter_{number:06d}.jsonl.zst" for number in (0, 1, 2, 9) if number < first]
