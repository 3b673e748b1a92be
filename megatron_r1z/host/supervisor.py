"""Starts the ranks of one machine and sees to it that they end together; for a run that is not started by torchrun.

Ranks find the environment that torchrun gives them. torchrun's own launcher is not used here:
it gives a stop and a death the same fate as soon as one rank has ended (30 seconds, then SIGKILL, in the middle of a checkpoint),
does not say how the ranks ended after a stop, and needs torch in the supervisor.

The rank's side is in `rank.py`: `rank_entry` around its main function and `StopFlag`, which the loop polls:

    a rank dies         the others get SIGTERM and, ten seconds later, SIGKILL; one sentence names the rank and how it ended
    Ctrl-C or SIGTERM   the ranks get SIGINT, which sets their `StopFlag`; they have `Patience` to save and to end with status 130
    a second Ctrl-C     everything ends at once
    the supervisor      its ranks die with it, even when it is killed
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_r1z.host.rank import ERROR_FILE_VARIABLE, STOPPED, SUPERVISOR_VARIABLE, prctl
from megatron_r1z.host.segments import remove_abandoned_segments, remove_orphaned_segments, remove_segments_of

_TRACKER_WARNING = "ignore:resource_tracker:UserWarning"  # of Python, about what a killed rank had open; the sentence says who died
_OF_TORCHRUN = re.compile(r"TORCH_?ELASTIC_.*|(GROUP|ROLE)_.*(RANK|SIZE|NAME)")  # what it leaves in the environment of what it starts
_POLL_S = 0.05
_REPEAT_STOP_S = 2.0  # SIGINT is repeated: a rank that is still importing ignores it
_DYING_S = 2.0  # a killed process loses its connections, which its peers notice, before it is seen to have ended
_SECOND_SIGNAL_S = 1.0  # a signal this soon after the first is the same key press, come by another way
_KILL_S = 10.0  # a killed process that is still there then waits in the kernel, which nobody can end
_GO_ON = "Start the run again to go on from its last checkpoint."
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long ranks may take to end, in seconds, before they are killed."""

    after_stop_s: float = 300.0
    """Enough for the phase at work to end and a checkpoint to be written."""
    after_death_s: float = 10.0
    """The others cannot go on without the dead rank; this is for flushing what they hold."""


def run_ranks(
    num_ranks: int,
    threads_per_rank: int,
    argv: Sequence[str],
    *,
    command: Sequence[str] = (sys.executable, "-m", "megatron_r1z"),
    error_folder: Path | None = None,
    patience: Patience | None = None,
) -> int:
    """Run `command` with `argv` once per rank, wait for all of them and return the exit status of the run.

    0: every rank succeeded. 130: stopped on request after a clean end. Otherwise that of the rank that failed first, with one sentence on
    standard error: 2 for a `UsageError`, 3 for a `TrainingError`, 1 for anything else. `error_folder` keeps the tracebacks of the ranks
    that failed, as `rank_<n>.txt`.
    Call it from the main thread: it handles signals, and the death of that thread is what ranks die with.
    """
    _become_subreaper()
    remove_abandoned_segments()
    remove_orphaned_segments()
    strangers = _descendants()
    stop = _StopRequests()
    run = _Run(stop, patience or Patience())
    with _error_files(error_folder) as folder, _reserved_port() as port, stop.handled():
        try:
            with stop.ignored_by_children():
                for rank in range(num_ranks):
                    run.ranks.append(_start(rank, num_ranks, threads_per_rank, port, folder, [*command, *argv]))
            run.wait()
        finally:
            _kill_descendants(strangers)
            remove_segments_of(port)
            remove_orphaned_segments()
        return run.report(traceback_kept=error_folder is not None)


@dataclass
class _Rank:
    """One rank as the supervisor sees it."""

    number: int
    process: subprocess.Popen[bytes]
    error_file: Path
    last_seen: float = field(default_factory=time.time)
    """The last time it was seen alive: what it says before that came before its death."""
    ended_by: set[int] = field(default_factory=set)
    """Signals that the supervisor sent it to end it."""

    def poll(self) -> bool:
        """Look whether it runs."""
        now = time.time()
        if self.process.poll() is None:
            self.last_seen = now
        return self.status is None

    @property
    def status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self.process.returncode

    @property
    def failed(self) -> bool:
        """It ended, and neither well nor on request."""
        return self.status not in {None, 0, STOPPED}

    def send(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.status is None:
            self.process.send_signal(number)

    def end_by(self, number: int) -> None:
        """Send a signal that is meant to end it."""
        self.ended_by.add(-number)
        self.send(number)


@dataclass(frozen=True)
class _Failure:
    """Why one rank failed."""

    when: float
    """Unix time, or just before it where the moment is not known."""
    sentence: str
    status: int = 1


@dataclass
class _StopRequests:
    """Signals to the supervisor that ask for the end of the run."""

    first: float = math.inf
    at_once: bool = False
    """A second request came: nothing is waited for."""

    @property
    def requested(self) -> bool:
        """A first request came."""
        return self.first < math.inf

    def request(self, _number: int = 0, _frame: FrameType | None = None) -> None:
        """Note that the run is to stop (a signal handler: no buffered output)."""
        now = time.monotonic()
        if not self.requested:
            self.first = now
            with contextlib.suppress(OSError):  # nobody reads it any more
                os.write(2, b"stopping: the ranks save a checkpoint and end; a second signal ends them at once\n")
        elif now - self.first >= _SECOND_SIGNAL_S:
            self.at_once = True

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Note signals instead of dying of them. A hang-up that is ignored (nohup) stays ignored."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        previous = {number: signal.signal(number, self.request) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def ignored_by_children(self) -> Iterator[None]:
        """Start children that ignore SIGINT until `rank_entry`: no tracebacks from the middle of their imports."""
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


@dataclass
class _Run:
    """The ranks, and how their end comes about."""

    stop: _StopRequests
    patience: Patience
    ranks: list[_Rank] = field(default_factory=list)
    stopping: bool = False
    dying: bool = False
    deadline: float = math.inf
    next_signal: float = math.inf
    killed: list[int] = field(default_factory=list)
    """Ranks that did not end in time after a stop."""

    def wait(self) -> None:
        """Return when every rank has ended; make them end where one has failed or a stop was asked for."""
        while _running(self.ranks):
            now = time.monotonic()
            if not self.stopping and (self.stop.requested or any(rank.status == STOPPED for rank in self.ranks)):
                self._begin_stop(now)
            if not self.dying and any(rank.failed for rank in self.ranks):
                self._begin_death(now)
            if now >= self.next_signal:
                self._pass_on_stop(now)
            if now >= self.deadline or self.stop.at_once:
                self._kill()
                return
            time.sleep(_POLL_S)

    def _begin_stop(self, now: float) -> None:
        self.stopping, self.next_signal = True, now
        self.deadline = now + self.patience.after_stop_s

    def _begin_death(self, now: float) -> None:
        self.dying, self.next_signal = True, math.inf
        self.deadline = min(self.deadline, now + self.patience.after_death_s)
        for rank in self.ranks:
            rank.end_by(signal.SIGTERM)

    def _pass_on_stop(self, now: float) -> None:
        self.next_signal = now + _REPEAT_STOP_S
        for rank in self.ranks:
            rank.send(signal.SIGINT)

    def _kill(self) -> None:
        left = [rank for rank in self.ranks if rank.status is None]
        if not self.dying:
            self.killed = [rank.number for rank in left]
        for rank in left:
            rank.end_by(signal.SIGKILL)
        deadline = time.monotonic() + _KILL_S
        while _running(left) and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def report(self, *, traceback_kept: bool) -> int:
        """Print how the run failed, if it did, and return its exit status."""
        failures = [_explain(rank, traceback_kept) for rank in self.ranks if rank.error_file.exists() or _failed_by_itself(rank)]
        if failures:
            first = min(failures, key=lambda failure: failure.when)
            print(first.sentence, file=sys.stderr)
            return first.status
        if self.killed:
            print(self._unfinished_stop(), file=sys.stderr)
            return 1
        return STOPPED if any(rank.status == STOPPED for rank in self.ranks) else 0

    def _unfinished_stop(self) -> str:
        ranks = ("rank " if len(self.killed) == 1 else "ranks ") + ", ".join(map(str, self.killed))
        reason = "at the second signal" if self.stop.at_once else f"after {self.patience.after_stop_s:.0f} s without an end"
        return f"stopped without a new checkpoint: {ranks} killed {reason}. {_GO_ON}"


def _running(ranks: Sequence[_Rank]) -> list[_Rank]:
    """Look at every rank; return those that run."""
    return [rank for rank in ranks if rank.poll()]


def _failed_by_itself(rank: _Rank) -> bool:
    return rank.failed and rank.status not in rank.ended_by


def _explain(rank: _Rank, traceback_kept: bool) -> _Failure:
    """What the rank wrote about its failure, or else what its exit status says."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        record = json.loads(rank.error_file.read_text(encoding="utf-8"))
        where = "" if record["deliberate"] else f" (the traceback is in {rank.error_file.with_suffix('.txt')})"
        if not traceback_kept and where:
            where = " (--debug prints the traceback)"
        return _Failure(record["time"], f"rank {rank.number}: {record['sentence']}{where}", record["status"])
    if rank.status is not None and rank.status < 0:
        how = f"was ended by {_signal_name(-rank.status)}"
        how += ", which is what the system sends when memory runs out" if rank.status == -signal.SIGKILL else ""
    else:
        how = f"ended with exit status {rank.status}"
    when = rank.last_seen - (_DYING_S if rank.status == -signal.SIGKILL else 0)
    return _Failure(when, f"rank {rank.number} {how}. {_GO_ON}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _start(rank: int, num_ranks: int, threads: int, port: int, folder: Path, command: Sequence[str]) -> _Rank:
    """Start one rank with the environment that torchrun gives."""
    error_file = folder / f"rank_{rank}.json"
    environment = {
        "GLOO_SOCKET_IFNAME": "lo",  # one machine, whose name need not resolve
        **{name: value for name, value in os.environ.items() if not _OF_TORCHRUN.fullmatch(name)},
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": ",".join(filter(None, (_TRACKER_WARNING, os.environ.get("PYTHONWARNINGS")))),
        ERROR_FILE_VARIABLE: str(error_file.absolute()),
        SUPERVISOR_VARIABLE: str(os.getpid()),
    }
    # In a session of its own, so that the terminal's Ctrl-C does not reach the rank's helpers: the supervisor passes it to the rank alone.
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    return _Rank(rank, process, error_file)


@contextlib.contextmanager
def _error_files(folder: Path | None) -> Iterator[Path]:
    """The folder for the errors of the ranks, without those of an earlier run."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="r1z_") as temporary:
            yield Path(temporary)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("rank_*.*"):
        path.unlink()
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if no rank wrote there


@contextlib.contextmanager
def _reserved_port() -> Iterator[int]:
    """A free port that nobody else is given: it is bound here and, since both sides allow its reuse, by rank 0 as well."""
    with socket.socket() as reservation:
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.bind(("", 0))
        yield reservation.getsockname()[1]


def _become_subreaper() -> None:
    """Inherit the processes whose parents die below this one, so that they can be found (Linux only)."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _descendants() -> set[Any]:
    """Every process below this one."""
    import psutil

    return set(psutil.Process().children(recursive=True))


def _kill_descendants(strangers: set[Any]) -> None:
    """Kill what the run has left below this process; `strangers` were there before."""
    import psutil

    while left := _descendants() - strangers:
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        _, alive = psutil.wait_procs(left, timeout=_KILL_S)
        if alive:
            return  # in the kernel's hands; nothing more can be done
