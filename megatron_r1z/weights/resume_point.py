"""From which checkpoint of its folder a run goes on, and whether the files of a checkpoint are all there. Nothing is changed here."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_r1z.errors import DataError
from megatron_r1z.weights.folders import STATE_FILE, WEIGHTS_FILE

POINTER = "latest"
"""The file with the name of the checkpoint that a run goes on from."""
_STEP = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint whose files are all there."""

    path: Path
    note: str | None = None
    """Why it is not the one that `latest` names, as a sentence for the log."""


def find_resume_point(folder: Path) -> ResumePoint | None:
    """The checkpoint that `latest` in `folder` names, the newest complete one where it names none; None where there never was one.

    Raises:
        DataError: checkpoints are there and it cannot be told which one is meant, or the one that is meant is damaged.
    """
    steps, name = steps_of(folder), _read_pointer(folder)
    if name is None and not steps:
        return None
    if name and (Path(name).name != name or name == ".."):
        raise DataError(
            f"{folder / POINTER} names {name!r}, which is not a folder beside it; write the name of one that is ({_newest_of(steps)}), or "
            "begin a run of its own from those weights with model.checkpoint."
        )
    if name and (folder / name).is_dir():
        wrong = damage_of(folder / name)
        if wrong is not None:
            raise DataError(f"checkpoint {folder / name} is damaged: {wrong}; {_way_on(folder, name, steps)}")
        return ResumePoint(folder / name)
    complete = next(_complete(steps), None)
    if complete is None:
        found = _first_damage(steps) or f"{POINTER} names {name!r}, which is not there"
        raise DataError(
            f"{folder} holds no complete checkpoint ({found}); restore one, choose another logging.folder, or move that folder away to "
            "start from the beginning."
        )
    why = "has no file 'latest'" if name is None else f"has a file 'latest' that names {name!r}" if name else "has an empty file 'latest'"
    return ResumePoint(complete, f"warning: {folder} {why}; its newest complete checkpoint is taken, {complete.name}")


def holds_checkpoints(folder: Path) -> bool:
    """Whether a run has left anything there to go on from, complete or not."""
    return bool(steps_of(folder)) or _read_pointer(folder) is not None


def steps_of(folder: Path) -> dict[int, Path]:
    """The checkpoints of a run by number, oldest first; those being written or set aside do not count."""
    found = {int(match[1]): path for path in folder.glob("step_*") if (match := _STEP.fullmatch(path.name)) and path.is_dir()}
    return dict(sorted(found.items()))


def damage_of(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, such as "__0_0.distcp has 10 of 4096 bytes"; None where nothing is.

    Lengths are looked at, not contents.
    """
    if not (path / ".metadata").exists():
        return ".metadata is missing"
    for name in ("common.pt", "metadata.json"):
        if not (path / name).exists():
            return f"{name} is missing"
    if not zipfile.is_zipfile(path / "common.pt"):  # which torch.save writes, with its directory at the end
        return "common.pt cannot be read"
    for name in ("metadata.json", WEIGHTS_FILE if (path / WEIGHTS_FILE).exists() else STATE_FILE):
        try:
            content = json.loads((path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return f"{name} is missing, which is written last"
        except (OSError, ValueError):
            content = None
        if not isinstance(content, dict):
            return f"{name} cannot be read"
    return _damage_of_tensors(path)


def way_on(path: Path) -> str:
    """What to do about a checkpoint of a run that cannot be read."""
    return _way_on(path.parent, path.name, steps_of(path.parent))


def _damage_of_tensors(path: Path) -> str | None:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    try:
        stored = FileSystemReader(path).read_metadata().storage_data or {}
    except Exception as error:  # noqa: BLE001 - unpickling what is no pickle raises anything
        return f".metadata cannot be read ({type(error).__name__})"
    lengths: dict[str, int] = {}
    for item in stored.values():
        lengths[item.relative_path] = max(lengths.get(item.relative_path, 0), item.offset + item.length)
    for name, length in sorted(lengths.items()):
        if not (path / name).exists():
            return f"{name} is missing"
        found = (path / name).stat().st_size
        if found < length:
            return f"{name} has {found} of {length} bytes"
    return None


def _read_pointer(folder: Path) -> str | None:
    """What `latest` says; empty where it says nothing that can be read, None where there is none."""
    try:
        return (folder / POINTER).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return ""


def _complete(steps: dict[int, Path]) -> Iterator[Path]:
    """Newest first."""
    return (path for path in reversed(steps.values()) if damage_of(path) is None)


def _first_damage(steps: dict[int, Path]) -> str | None:
    return next((f"{path.name}: {damage_of(path)}" for path in reversed(steps.values())), None)


def _newest_of(steps: dict[int, Path]) -> str:
    newest = next(_complete(steps), None)
    return "there is no complete one" if newest is None else f"the newest complete one is {newest.name}"


def _way_on(folder: Path, name: str, steps: dict[int, Path]) -> str:
    match = _STEP.fullmatch(name)
    before = {number: path for number, path in steps.items() if match is None or number < int(match[1])}
    older = next(_complete(before), None)
    if older is None:
        return "there is no complete one before it: restore the file, choose another logging.folder, or begin from other weights."
    return f"the newest complete one before it is {older.name}: write that name into {folder / POINTER} to go on from there."
