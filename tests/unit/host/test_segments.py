"""Shared memory of killed processes is removed by a later run, and that of nobody else."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from megatron_r1z.host.segments import remove_orphaned_segments

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
