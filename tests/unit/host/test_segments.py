"""Shared memory of killed processes is removed by a later run, and that of nobody else."""

from __future__ import annotations

import mmap
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from megatron_r1z.host.segments import remove_abandoned_segments, remove_orphaned_segments, remove_segments_of

FOLDER = Path("/dev/shm")
SCRIPT = """
import sys, time
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from megatron_r1z.host.segments import forget_segments, record_segments
segment = SharedMemory(create=True, size=4096)
resource_tracker.unregister(segment._name, "shared_memory")  # the tracker is killed with the job
record = record_segments()
print(segment.name, record.name, flush=True)
sys.stdin.readline()
forget_segments()
"""


@pytest.fixture
def maker() -> Iterator[tuple[subprocess.Popen[str], Path, Path]]:
    """A process with a segment on record, that segment and the record."""
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    segment, record = (FOLDER / name for name in process.stdout.readline().split())
    yield process, segment, record
    process.kill()
    process.communicate()
    for path in (segment, record):
        path.unlink(missing_ok=True)


def test_the_segment_of_a_process_that_lives_is_left_alone(maker: tuple[subprocess.Popen[str], Path, Path]) -> None:
    _, segment, record = maker
    assert segment.name not in remove_orphaned_segments()
    assert segment.exists()
    assert record.exists()


def test_the_segment_of_a_killed_process_is_removed_with_its_record(maker: tuple[subprocess.Popen[str], Path, Path]) -> None:
    process, segment, record = maker
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert segment.exists()
    assert segment.name in remove_orphaned_segments()
    assert not segment.exists()
    assert not record.exists()


def test_a_segment_of_the_same_name_that_another_has_made_since_is_left_alone(maker: tuple[subprocess.Popen[str], Path, Path]) -> None:
    process, segment, record = maker
    process.kill()
    process.wait()
    kept = SharedMemory(create=True, size=1)  # so that the inode is not given out again
    segment.rename(segment.with_suffix(".moved"))
    other = SharedMemory(segment.name, create=True, size=4096)
    try:
        assert segment.name not in remove_orphaned_segments()
        assert segment.exists()
        assert not record.exists()
    finally:
        segment.with_suffix(".moved").unlink()
        for made in (kept, other):
            made.close()
            made.unlink()


def test_a_process_that_ends_takes_its_record_back(maker: tuple[subprocess.Popen[str], Path, Path]) -> None:
    process, _, record = maker
    process.communicate("end\n")
    assert process.returncode == 0
    assert not record.exists()


def test_a_segment_without_a_record_is_left_alone() -> None:
    segment = SharedMemory(create=True, size=4096)
    try:
        assert segment.name not in remove_orphaned_segments()
        assert (FOLDER / segment.name).exists()
    finally:
        segment.close()
        segment.unlink()


def test_shared_memory_of_this_run_only_is_removed() -> None:
    ours = ["-tp:0-[0-1]-cpushm_0", "-tp:0-[0-1]-cpushm_1"]
    port = random.randrange(100_000, 10_000_000)  # of nobody
    names = [f"{port}{ours[0]}", f"r1z_{port}{ours[1]}", f"1{port}{ours[0]}", f"{port + 1}{ours[0]}", f"{port}0{ours[0]}"]
    try:
        for name in names:
            (FOLDER / name).touch(exist_ok=False)
        assert sorted(remove_segments_of(port)) == sorted(names[:2])
        assert [name for name in names if (FOLDER / name).exists()] == names[2:]
    finally:
        for name in names:
            (FOLDER / name).unlink(missing_ok=True)


def test_shared_memory_is_abandoned_when_it_is_old_and_nobody_has_it_mapped(tmp_path: Path) -> None:
    old, mapped, new = (FOLDER / f"{tmp_path.name}-{name}-tp:0-[0-1]-cpushm_0" for name in ("old", "mapped", "new"))
    try:
        for path in (old, mapped, new):
            path.write_bytes(bytes(4096))
        for path in (old, mapped):
            os.utime(path, (0, 0))
        with mapped.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
            remove_abandoned_segments()  # or another run at the same moment
            assert [path.exists() for path in (old, mapped, new)] == [False, True, True]
    finally:
        for path in (old, mapped, new):
            path.unlink(missing_ok=True)
