"""What becomes of a process whose reader goes away: each is a process of its own, since its standard output is what is looked at."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_r1z.host.streams import READER_GONE, reader_is_gone

TALK = """
import logging, os, sys
from pathlib import Path
from megatron_r1z.host.streams import outlive_readers
if sys.argv[1] == "lasting":
    outlive_readers()
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
print("first", flush=True)
sys.stdin.readline()
for number in range(1000):
    print("more", number, flush=True)
    print("more", number, file=sys.stderr, flush=True)
logging.info("of a library")
os.write(1, b"past the stream") if sys.argv[1] == "lasting" else None
print("\\ud83d")
Path("end").touch()
"""


def talk(folder: Path, kind: str, stdout: int, stderr: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", TALK, kind], cwd=folder, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr)


@pytest.mark.parametrize(("kind", "goes_on"), [("lasting", True), ("plain", False)])
def test_a_pipe_that_is_closed_after_the_first_line(tmp_path: Path, kind: str, goes_on: bool) -> None:
    process = talk(tmp_path, kind, subprocess.PIPE, subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"first\n"
    process.stdout.close()
    process.stderr.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert (process.wait() == 0, (tmp_path / "end").exists()) == (goes_on, goes_on)


def test_a_terminal_that_hangs_up(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = talk(tmp_path, "lasting", theirs, theirs)
    os.close(theirs)
    assert os.read(ours, 100) == b"first\r\n"
    os.close(ours)
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait() == 0
    assert (tmp_path / "end").exists()


def test_nobody_who_reads_from_the_start(tmp_path: Path) -> None:
    command = f"{sys.executable} -c '{TALK}' lasting < /dev/null >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path, check=False).returncode == 0
    assert (tmp_path / "end").exists()


def test_what_is_read_is_whole(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", TALK, "lasting"], cwd=tmp_path, capture_output=True, input=b"\n", check=True)
    numbers = "".join(f"more {number}\n" for number in range(1000))
    assert done.stdout.decode() == f"first\n{numbers}of a library\npast the stream\\ud83d\n"
    assert done.stderr.decode() == numbers


def test_a_pipe_knows_whether_it_has_a_reader() -> None:
    reader, writer = os.pipe()
    assert not reader_is_gone(writer)
    os.close(reader)
    assert reader_is_gone(writer)
    os.close(writer)


@pytest.mark.parametrize("arguments", [["doctor"], ["grade"]], ids=lambda arguments: arguments[0])
def test_a_command_that_only_prints_ends_like_other_tools(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    rows = b'{"answer": "5", "reference": "5"}\n' * 300
    done = subprocess.run(
        [sys.executable, "-m", "megatron_r1z", *arguments], input=rows, stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (READER_GONE, b"")


def test_a_stop_is_asked_for_also_when_nobody_reads_the_errors() -> None:
    program = (
        "from megatron_r1z.host.supervisor import _StopRequests\n"
        "stop = _StopRequests()\nstop.request()\nraise SystemExit(not stop.requested)"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", program], stderr=writer, check=False)
    os.close(writer)
    assert done.returncode == 0
