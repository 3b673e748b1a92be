"""Checkpoints of a run: weights, optimizer and schedule by Megatron's `dist_checkpointing`, the rest as JSON beside them.

    checkpoints/step_000050/        complete, or it does not have this name: written as `.partial`, synced, renamed
    checkpoints/latest              the name of the newest complete one; moved last

The tensor-parallel, pipeline-parallel and data-parallel sizes may change between save and load. No random number generator is kept: seeds
are functions of the run's seed, the iteration and the prompt, and dropout is off.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_r1z.errors import DataError
from megatron_r1z.policy.cpu import megatron_device

if TYPE_CHECKING:
    from megatron_r1z.policy.policy import MegatronPolicy


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run folder."""

    folder: Path
    keep: int

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        pointer = self.folder / "latest"
        return self.folder / pointer.read_text().strip() if pointer.exists() else None

    def save(self, step: int, policy: MegatronPolicy, state: Mapping[str, Any]) -> Path:
        """Write checkpoint `step`; all ranks call this. `state` is JSON-able and the same on every rank."""
        target = self.folder / f"step_{step:06d}"
        partial = target.with_suffix(".partial")
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        _write_results_in_process()
        with megatron_device():
            dist_checkpointing.save(policy.sharded_state(is_loading=False), str(partial))
        dist.barrier()
        if dist.get_rank() == 0:
            _write_synced(partial / "state.json", json.dumps(state, indent=1))
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            _write_synced(self.folder / "latest.partial", target.name)
            (self.folder / "latest.partial").rename(self.folder / "latest")
            self._delete_old(target)
        dist.barrier()
        return target

    def load(self, path: Path, policy: MegatronPolicy) -> dict[str, Any]:
        """Put a checkpoint into `policy` and return its `state`; all ranks call this.

        Raises:
            DataError: the checkpoint is not complete.
        """
        if not is_complete(path):
            raise DataError(
                f"{path} is not a complete checkpoint; write the name of another one into the file 'latest' beside it, "
                "or delete that file to start again."
            )
        with megatron_device():
            policy.load_state(dist_checkpointing.load(policy.sharded_state(is_loading=True), str(path)))
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        return state

    def _delete_old(self, newest: Path) -> None:
        complete = sorted(path for path in self.folder.glob("step_*") if path.suffix != ".partial")
        for path in complete[: -self.keep]:
            if path != newest:
                shutil.rmtree(path)


def is_complete(path: Path) -> bool:
    """Whether a checkpoint was written to its end; `state.json` comes last."""
    return (path / "state.json").exists()


def load_weights(path: Path, policy: MegatronPolicy) -> None:
    """Put the weights of a checkpoint, and nothing else of it, into `policy`; all ranks call this."""
    with megatron_device():
        policy.load_weights(dist_checkpointing.load(policy.sharded_weights(), str(path)))


def _write_results_in_process() -> None:
    """Let the writer hand its results over through a plain queue.

    megatron-core 0.16.1 starts a manager process for them, which an asynchronous save in another process needs, and which outlives the
    run (`tests/loop/test_train.py` looks for processes left behind). A synchronous save writes and reads the results in this process.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.SimpleQueue()


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
