"""The roles of a configuration and what a rehearsal of one found; each is played by a process of its own, as it changes torch for good."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass, field
from typing import Any

from megatron_r1z.config import TrainConfig
from megatron_r1z.errors import R1ZError, UsageError
from megatron_r1z.layout.topology import Topology

MARK = "rehearsed: "
"""What the line of a process begins with that says what it found."""
GIB = 1 << 30


@dataclass(frozen=True)
class Task:
    """What a process is told."""

    config: str
    """Path of a training configuration."""
    overrides: tuple[str, ...]
    rank: int
    gpu: str
    memory_bytes: int
    capability: tuple[int, int]
    gpus_per_node: int
    response_tokens: int
    """Of each sample; its prompt is as long as prompts may be."""


@dataclass(frozen=True)
class Phase:
    """Bytes of tensors on the device."""

    name: str
    kept: int
    """Alive when it ends."""
    most: int
    """Alive at its fullest moment."""
    seconds: float
    """Of the rehearsal."""
    planned: int | None = None
    """What `plan` says of `most`, for the same micro-batches."""


@dataclass(frozen=True)
class Found:
    """What a rehearsal of one role found."""

    role: str
    """Such as `policy, stage 0`."""
    rank: int
    phases: tuple[Phase, ...] = ()
    num_parameters: int = 0
    layout_differences: tuple[str, ...] = ()
    """Parameters that the layout has otherwise than the live model, with both."""
    attention: tuple[str, ...] = ()
    """Which of its ways Transformer Engine took."""
    warnings: tuple[str, ...] = ()
    """Of the libraries, each once."""
    kernels: dict[str, int] = field(default_factory=dict)
    """How often each was called."""
    figures: dict[str, Any] = field(default_factory=dict)
    """Further ones, by what they are."""


def policy_ranks(topology: Topology) -> dict[str, int]:
    """A rank of each distinct role of the policy: the first, a middle and the last pipeline stage."""
    stages = {"first": 0, "last": topology.pp - 1, "middle": topology.pp // 2}
    names: dict[int, str] = {}
    for name, stage in stages.items():
        names.setdefault(stage, name)
    return {
        f"policy, {'only' if topology.pp == 1 else name} stage": topology.rank_of(0, 0, 0, stage) for stage, name in sorted(names.items())
    }


def rehearse(module: str, task: Task, timeout_s: float = 1200.0) -> Found:
    """Play one role in a process of its own.

    Args:
        module: `policy_role` or `engine_role`.
        task: what it is told.
        timeout_s: after so long it has hung.

    Raises:
        UsageError: what the libraries or this package refuse, in one sentence.
        R1ZError: the process failed otherwise, or takes longer than `timeout_s`.
    """
    command = [sys.executable, "-m", f"megatron_r1z.rehearse.{module}", json.dumps(dataclasses.asdict(task))]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    try:
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise R1ZError(
            f"the rehearsal of rank {task.rank} was ended after {timeout_s:.0f} s; try it on a machine that is less busy."
        ) from error
    lines = child.stdout.splitlines()
    found = next((line.removeprefix(MARK) for line in reversed(lines) if line.startswith(MARK)), None)
    if found is None and child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        raise R1ZError(
            f"the rehearsal of rank {task.rank} was ended by {name} from outside, as where memory runs out: it needs about 1.5 GB."
        )
    if found is None:
        raise R1ZError(f"the rehearsal of rank {task.rank} ended with status {child.returncode}: {child.stderr.strip()[-2000:]}")
    tree = json.loads(found)
    if "refusal" in tree:
        raise UsageError(tree["refusal"])
    if "limit" in tree:
        raise R1ZError(f"nothing was refused so far, but a rehearsal of rank {task.rank} cannot go on: {tree['limit']}")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in tree.items()}
    return Found(**values | {"phases": _phases(tree)})


def _phases(tree: dict[str, Any]) -> tuple[Phase, ...]:
    return tuple(Phase(**item) for item in tree["phases"])


def read_task(argv: list[str]) -> Task:
    """The process's side of `rehearse`."""
    tree = json.loads(argv[1])
    return Task(**tree | {"overrides": tuple(tree["overrides"]), "capability": tuple(tree["capability"])})


def say(found: Found) -> None:
    """The end of a process's side of `rehearse`."""
    sys.stdout.write(MARK + json.dumps(dataclasses.asdict(found)) + "\n")


def refuse(error: BaseException, *, is_limit: bool = False) -> None:
    """The same where a library or this package refused what it was given; `is_limit`: where the rehearsal itself cannot go on."""
    text = str(error) if isinstance(error, R1ZError) else f"{type(error).__module__}.{type(error).__name__}: {error}"
    sys.stdout.write(MARK + json.dumps({"limit" if is_limit else "refusal": text}) + "\n")
    traceback.print_exception(error)


def make_task(config: TrainConfig, path: str, overrides: tuple[str, ...], rank: int, **device: Any) -> Task:
    """For a configuration; `device`: the remaining fields but the length."""
    return Task(path, overrides, rank, response_tokens=config.rollout.max_response_tokens, **device)
