"""A run of made parts and graded groups of known rewards, for the tests of the loop and of samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from megatron_r1z.config import AlgorithmConfig, TrainConfig, make_config
from megatron_r1z.layout.topology import Topology
from megatron_r1z.loop import Run
from megatron_r1z.packing import MicroBatch, PackingRules
from megatron_r1z.record.metrics import SilentLog
from megatron_r1z.types import (
    FinishReason,
    GradedGroup,
    Group,
    Prompt,
    Response,
    UpdateStats,
    Verdict,
    VerdictKind,
)

BUDGET = 50
DEFAULT = AlgorithmConfig(iterations=1)
STATS = UpdateStats(*[0.1] * 17, num_tokens=2, skipped=False)


def make_run(algorithm: str = "drgrpo", prompts: int = 4, samples: int = 3, batch: int = 6, seed: int = 0, stopped: bool = False) -> Run:
    """The parts of a run that these functions look at."""
    config = make_config(
        TrainConfig,
        {
            "model": {"path": "model"},
            "data": {"train": [{"path": "questions.jsonl"}]},
            "algorithm": {"name": algorithm, "iterations": 5, "train_batch_size": batch},
            "rollout": {"prompts_per_iteration": prompts, "samples_per_prompt": samples, "max_response_tokens": BUDGET, "seed": seed},
            "logging": {"folder": "runs/x"},
        },
    )
    parts: Any = dict.fromkeys(("critic", "engine", "grader", "refit", "prompts", "checkpoints"))
    return Run(
        config=config,
        policy=SimpleNamespace(packing_rules=lambda: PackingRules(1, 64), topology=Topology(1)),  # type: ignore[arg-type]
        stop=("</answer>",),
        evaluation=(),
        log=SilentLog(),
        stop_flag=SimpleNamespace(requested=stopped),  # type: ignore[arg-type]
        state=SimpleNamespace(iteration=3),  # type: ignore[arg-type]
        **parts,
    )


def graded(group_id: int, rewards: list[float], cut: frozenset[int] = frozenset()) -> GradedGroup:
    """Responses of different lengths whose tokens tell group and place; those at the places `cut` ended at the token limit."""
    responses = tuple(
        Response(
            "r",
            tuple(1000 * (group_id + 1) + 10 * index + place for place in range(index + 1)),
            tuple(-0.01 * (place + 1) for place in range(index + 1)),
            FinishReason.LENGTH if index in cut else FinishReason.STOP,
            7,
        )
        for index in range(len(rewards))
    )
    verdicts = tuple(Verdict(VerdictKind.CORRECT if reward else VerdictKind.WRONG, reward, None) for reward in rewards)
    return GradedGroup(Group(group_id, Prompt(f"q/{group_id}", "?", (1, 2, 3)[: group_id % 3 + 1], ("7",), "q"), responses), verdicts)


def some_groups(count: int, samples: int) -> list[GradedGroup]:
    return [graded(number, [float((number + index) % 3 == 0) for index in range(samples)]) for number in range(count)]


class Policies:
    """A policy whose log-prob of a token is told by the token, and its reference."""

    topology = Topology(1)

    def __init__(self) -> None:
        self.is_reference = False

    def packing_rules(self) -> PackingRules:
        return PackingRules(1, 64)

    def response_logprobs(self, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        return [-(1 + self.is_reference) * item.targets_R.float() / 1000 for item in batches]

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        self.is_reference = True
        yield
        self.is_reference = False
