"""Checkpoints of a run: weights, optimizer and schedule by Megatron's `dist_checkpointing`, the rest as JSON beside them.

    checkpoints/step_000050/        complete, or it does not have this name: written as `.partial`, synced, renamed
    checkpoints/latest              the name of the newest complete one; moved last (`resume_point.py` reads it)

A checkpoint of weights alone (`megatron-r1z convert`) is a folder of its own, with `weights.json` in place of `state.json`.

The degrees of parallelism may change between save and load. No random number generator is kept: seeds are functions of the run's seed, the
iteration and the prompt, and dropout is off.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_r1z.errors import DataError, ExportError, TrainingError
from megatron_r1z.host.rank import die_with_parent
from megatron_r1z.policy.cpu import megatron_device
from megatron_r1z.policy.model import EXTRA_STATE
from megatron_r1z.policy.trained import CRITIC_PREFIX
from megatron_r1z.ranks import broadcast, decide, gather
from megatron_r1z.weights.folders import STATE_FILE, WEIGHTS_FILE
from megatron_r1z.weights.hf_files import replace_folder, sync, sync_entries
from megatron_r1z.weights.resume_point import POINTER, ResumePoint, damage_of, find_resume_point, steps_of, way_on

if TYPE_CHECKING:
    from megatron_r1z.policy.critic import MegatronCritic
    from megatron_r1z.policy.policy import MegatronPolicy


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run folder."""

    folder: Path
    keep: int

    def resume_point(self) -> ResumePoint | None:
        """The checkpoint to go on from, as rank 0 sees the files; all ranks call this.

        Raises:
            DataError: see `find_resume_point`; on every rank.
        """
        return decide(lambda: find_resume_point(self.folder))

    def path(self, step: int) -> Path:
        """Of checkpoint `step`, which need not be there."""
        return self.folder / f"step_{step:06d}"

    def save(self, step: int, policy: MegatronPolicy, state: Mapping[str, Any], critic: MegatronCritic | None = None) -> Path | None:
        """Write checkpoint `step`; all ranks call this. `state` is JSON-able and the same on every rank.

        None, and nothing written, before the first optimizer step: Megatron reads no checkpoint without moments.

        Raises:
            TrainingError: a weight is not finite; what is there stays as it is.
            ExportError: a rank could not write.
        """
        if not policy.has_moments or not (critic is None or critic.has_moments):
            return None
        target = self.path(step)
        for model, name in ((policy, "policy"), (critic, "critic")):
            if model is not None:
                check_finite(model.parameters(), f"the {name} after step {step}")
        _save(target, _sharded_state(policy, critic, is_loading=False), STATE_FILE, state)
        if dist.get_rank() == 0:
            _replace_synced(self.folder / POINTER, target.name)
            self._delete_old(step)
        dist.barrier()
        return target

    def note(self, step: int, state: Mapping[str, Any]) -> None:
        """Replace what checkpoint `step` says beside the weights; all ranks call this."""
        if dist.get_rank() == 0 and self.path(step).exists():
            _replace_synced(self.path(step) / STATE_FILE, json.dumps(state, indent=1))
        dist.barrier()

    def load(self, path: Path, policy: MegatronPolicy, critic: MegatronCritic | None = None) -> dict[str, Any]:
        """Put a checkpoint into `policy` and `critic` and return its `state`; all ranks call this.

        Raises:
            DataError: the checkpoint cannot be read, or has no critic where there is one.
        """
        if critic is not None and not any(key.startswith(CRITIC_PREFIX) for key in load_sharded_metadata(str(path))):
            raise DataError(
                f"{path} has no critic; go on with the algorithm.name that the run had, or start a new one with model.checkpoint."
            )
        try:
            with megatron_device():
                loaded = _load(_sharded_state(policy, critic, is_loading=True), path)
        except (CheckpointException, CheckpointingException) as error:
            raise DataError(f"checkpoint {path} cannot be read ({_first_line(error)}); {way_on(path)}") from error
        policy.load_state(loaded)
        if critic is not None:
            critic.load_state(loaded["critic"])
        state: dict[str, Any] = json.loads((path / STATE_FILE).read_text())
        return state

    def _delete_old(self, newest: int) -> None:
        """All but the last `keep` up to the newest; what lies beyond it, of a run that was gone back in, is for its owner to delete."""
        for path in [path for step, path in steps_of(self.folder).items() if step <= newest][: -self.keep]:
            shutil.rmtree(path)


def check_finite(parameters: Mapping[str, Tensor], what: str) -> None:
    """Refuse to keep weights that nobody can go on from; all ranks call this with their own.

    Raises:
        TrainingError: on every rank, when one of them holds an element that is not finite.
    """
    names = [name for name, tensor in parameters.items() if not tensor.isfinite().all()]
    broken = gather(names)
    if broken:
        raise TrainingError(
            f"weights of {what} are not finite, in {len(broken)} tensors on all ranks (the first is {broken[0]}), so they are not saved; "
            "go on from an older checkpoint with a lower optimizer.lr."
        )


def _first_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next((reason for reason, _ in error.failures.values()), error)
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def save_weights(path: Path, policy: MegatronPolicy, origin: Mapping[str, Any]) -> None:
    """Write the weights alone, as a checkpoint that `load_weights` reads; all ranks call this.

    Args:
        path: folder to be written; an older one of that name is replaced when the new one is complete.
        policy: whose weights.
        origin: JSON-able, the same on every rank: where the weights come from.
    """
    _save(path, policy.sharded_weights(), WEIGHTS_FILE, origin)


def load_weights(path: Path, policy: MegatronPolicy) -> None:
    """Put the weights of a checkpoint, and nothing else of it, into `policy`; all ranks call this.

    Padding that the checkpoint does not have, because it was saved with another tensor-parallel size, becomes zero.
    """
    for tensor in policy.parameters().values():
        tensor.zero_()
    with megatron_device():
        policy.load_weights(_load(policy.sharded_weights(), path))


def _sharded_state(policy: MegatronPolicy, critic: MegatronCritic | None, *, is_loading: bool) -> dict[str, Any]:
    state = policy.sharded_state(is_loading=is_loading)
    return state if critic is None else state | {"critic": critic.sharded_state(is_loading=is_loading)}


def _load(sharded: dict[str, Any], path: Path) -> dict[str, Any]:
    """What `sharded` describes, without the extra state of modules that had none when the checkpoint was written.

    Weights have the same names under both layer specs. Extra state, by which Transformer Engine keeps the scales of recipe `delayed`, is
    empty otherwise, and norms have one under its spec only.
    """
    stored = load_sharded_metadata(str(path))

    def is_there(entry: object) -> bool:
        return not isinstance(entry, ShardedObject) or not entry.key.endswith(EXTRA_STATE) or entry.unique_key in stored

    def readable(parts: dict[str, Any]) -> dict[str, Any]:
        found = {name: {key: entry for key, entry in part.items() if is_there(entry)} for name, part in parts.items() if _is_model(name)}
        return parts | found | ({"critic": readable(parts["critic"])} if "critic" in parts else {})

    loaded: dict[str, Any] = dist_checkpointing.load(readable(sharded), str(path))
    return loaded


def _is_model(name: str) -> bool:
    return name.startswith("model")


def _save(target: Path, sharded: dict[str, Any], last_file: str, content: Mapping[str, Any]) -> None:
    """Write what `sharded` describes and, last, a JSON file that says that it is complete; then give the folder its name.

    Raises:
        ExportError: on every rank, when one of them could not write, or wrote where rank 0 does not see it.
    """
    partial = target.with_name(f"{target.name}.partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    _write_results_in_process()
    try:
        with _writers_bound(), megatron_device():
            dist_checkpointing.save(sharded, str(partial))
    except CheckpointException as error:  # on every rank, with the reasons on rank 0
        reasons = broadcast([str(reason) for reason, _ in error.failures.values()])
        raise ExportError(f"cannot write {partial}: {reasons[0]}; make room there or name another folder.") from error
    dist.barrier()
    decide(lambda: _complete(partial, target, last_file, content))


def _complete(partial: Path, target: Path, last_file: str, content: Mapping[str, Any]) -> None:
    """Give a folder its name once every file that its metadata names is there, of its length."""
    (partial / last_file).write_text(json.dumps(content, indent=1), encoding="utf-8")
    wrong = damage_of(partial)
    if wrong is not None:
        raise ExportError(
            f"checkpoint {partial} is not complete ({wrong}), so it keeps that name and the one before it stays; see whether all hosts "
            "write into one folder."
        )
    replace_folder(partial, target)


_saving_process: int | None = None


def _bind_writer() -> None:
    """In every process that this one forks: while it saves, that is one of Megatron's writers."""
    global _saving_process
    if _saving_process is not None:
        die_with_parent(_saving_process)
        _saving_process = None


os.register_at_fork(after_in_child=_bind_writer)


@contextmanager
def _writers_bound() -> Iterator[None]:
    """Inside, a process that is forked ends with this one: Megatron's writers would outlive a rank that is killed while they write."""
    global _saving_process
    _saving_process = os.getpid()
    try:
        yield
    finally:
        _saving_process = None


def _write_results_in_process() -> None:
    """Let the writer hand its results over through a plain queue.

    megatron-core 0.16.1 starts a manager process for them, which an asynchronous save in another process needs, and which outlives the
    run (`tests/loop/test_train.py` looks for processes left behind). A synchronous save writes and reads the results in this process.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.SimpleQueue()


def _replace_synced(path: Path, text: str) -> None:
    """Write a small file so that there is the old one or the new one, whatever happens."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.rename(path)
    sync_entries(path.parent)
