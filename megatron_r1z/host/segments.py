"""Shared memory of ranks that were killed: who made it is on record, so that a later run may remove it.

vLLM's engines make segments in /dev/shm (`psm_*`, `*-cpushm*`). They are removed when a rank ends, and by Python's tracker when the rank
alone is killed; a job that is killed whole leaves them. So each rank keeps a record beside them, a file that it holds locked for as long as
it lives. A record whose lock is free is of nobody that lives, in whatever container it was, and a segment is the one that was recorded if
its inode is.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import tempfile
import time
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
_PREFIX, _SUFFIX = "r1z_", ".segments"
_ABANDONED_S = 120.0
_MAPPED = re.compile(rf"{SHARED_MEMORY}/(\S+)$", re.MULTILINE)
_held: list[int] = []  # descriptors of this process's records, whose locks go with it


def record_segments() -> Path | None:
    """Put the segments that this process has mapped now on record; None where there are none. Call it once the engine is there."""
    names = sorted(set(_MAPPED.findall(Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace"))))
    inodes = {name: status.st_ino for name in names if (status := _own(SHARED_MEMORY / name)) is not None}
    if not inodes:
        return None
    descriptor, path = tempfile.mkstemp(_SUFFIX, _PREFIX, SHARED_MEMORY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.write(descriptor, json.dumps(inodes).encode())
    _held.append(descriptor)
    return Path(path)


def forget_segments() -> None:
    """Take this process's records back: it is about to end and its engine is closed, or is cleaned up after by who started it."""
    while _held:
        descriptor = _held.pop()
        with contextlib.suppress(OSError):
            Path(f"/proc/self/fd/{descriptor}").resolve().unlink(missing_ok=True)
        os.close(descriptor)


def remove_orphaned_segments() -> list[str]:
    """Remove what is on the record of processes that are gone, and their records; return the names of the segments."""
    removed = []
    for path in SHARED_MEMORY.glob(f"{_PREFIX}*{_SUFFIX}"):
        if _own(path) is None:
            continue
        with contextlib.suppress(OSError), path.open("rb") as file:  # another run may be faster
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            removed += _remove(file.read())
            path.unlink(missing_ok=True)
    return removed


def _remove(record: bytes) -> list[str]:
    removed = []
    with contextlib.suppress(ValueError):  # killed before it was written; then it says nothing
        for name, inode in json.loads(record or b"{}").items():
            status = _own(SHARED_MEMORY / name)
            if status is not None and status.st_ino == inode:
                (SHARED_MEMORY / name).unlink(missing_ok=True)
                removed.append(name)
    return removed


def _own(path: Path) -> os.stat_result | None:
    """Of a file of this user; None for any other."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status if status.st_uid == os.getuid() else None


def remove_segments_of(port: int) -> list[str]:
    """Remove the shared-memory segments that the engines of the run on `port` left behind; return their names.

    vLLM's CPU engine with more than one rank names a segment `<identifier>-<group>-[<ranks>]-cpushm_<rank>`
    (`_CPUSHMDistributed.make_group_name` in vllm/distributed/device_communicators/cpu_communicator.py). Our identifier ends in the port.
    """
    segment = re.compile(rf"(?:.*\D)?{port}-.*-cpushm(?:_\d+)?")
    return _unlink([name for name in _segments() if segment.fullmatch(name)])


def remove_abandoned_segments() -> list[str]:
    """Remove such segments of runs whose supervisor was killed: minutes old, and no process has them mapped; return their names."""
    old = [name for name, made in _segments().items() if time.time() - made > _ABANDONED_S]
    mapped = _mappings() if old else ""
    return _unlink([name for name in old if name not in mapped])


def _segments() -> dict[str, float]:
    """The segments of this user's engines and when they were made; another run may remove its own meanwhile."""
    return {path.name: status.st_mtime for path in SHARED_MEMORY.glob("*-cpushm*") if (status := _own(path)) is not None}


def _mappings() -> str:
    """What the processes that we may look into have mapped."""
    texts = []
    for path in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
    return "".join(texts)


def _unlink(names: list[str]) -> list[str]:
    for name in names:
        (SHARED_MEMORY / name).unlink(missing_ok=True)
    return names
