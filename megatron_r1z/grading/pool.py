"""Worker processes that can be killed: tasks that may hang, exhaust memory or crash, each under a wall-clock limit.

Workers are spawned, never forked, because the parent runs threads (torch, gloo). Spawning imports the parent's `__main__` again, so an
entry point needs its main guard. A worker dies with the thread that started it (Linux), however that thread ends.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from time import monotonic
from typing import Any, Generic, TypeVar

from megatron_r1z.errors import Interrupted, R1ZError, UsageError
from megatron_r1z.host.rank import StopFlag, die_with_parent
from megatron_r1z.host.streams import outlive_readers

Task = TypeVar("Task")
Result = TypeVar("Result")

START_LIMIT_S = 120.0
"""A worker that is not ready by then counts as failed; imports take a second or two on a quiet machine."""
MAX_FAILED_STARTS = 3
"""In a row; then the pool gives up."""
BATCH_TASKS = 64
"""Tasks handed to a worker at once at most: one message each way costs as much as a comparison that needs no algebra."""
LOOK_S = 0.5
"""How long the parent waits for its workers before it looks whether it is to stop."""
REPORT_S = 0.005
"""A worker keeps results back no longer than this, unless it is busy with one task."""
DEFAULT_MEMORY_BYTES = 2 << 30
"""Address space of a worker; with sympy loaded it starts at about 0.1 GiB."""


class OutcomeKind(Enum):
    """How a task ended."""

    DONE = "done"
    TIMEOUT = "timeout"
    """Its worker was killed at the deadline."""
    ERROR = "error"
    """It raised, or its worker died."""


@dataclass(frozen=True, slots=True)
class Outcome(Generic[Result]):
    """What became of one task; `result` belongs to `DONE`, `message` to the others."""

    kind: OutcomeKind
    result: Result | None
    message: str


class WorkerPool(Generic[Task, Result]):
    """Runs `setup()(task)` in worker processes; `setup` runs once in each and its time is on nobody's limit.

    Args:
        setup: picklable; returns the function that handles a task.
        num_workers: processes at most; they start when there are tasks for them.
        timeout_s: wall-clock limit of one task, counted from the moment at which a worker takes it up.
        memory_bytes: address space of one worker, None for no limit. A worker that exceeds it dies and its task is an error.
        stop_flag: looked at every half second while tasks are at work; once it is set they are given up.
    """

    def __init__(
        self,
        setup: Callable[[], Callable[[Task], Result]],
        num_workers: int,
        timeout_s: float,
        memory_bytes: int | None = DEFAULT_MEMORY_BYTES,
        stop_flag: StopFlag | None = None,
    ) -> None:
        self._setup = setup
        self._stop_flag = stop_flag or StopFlag()
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._workers: list[_Worker] = []
        self._failed_starts = 0

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Process ids of the workers that live now."""
        return tuple(worker.pid for worker in self._workers)

    def run(self, tasks: Sequence[Task]) -> list[Outcome[Result]]:
        """One outcome per task, in their order; a task that hangs or crashes delays no other beyond the worker it occupies.

        Tasks are handed over in batches; one that was done but not reported when its worker had to be killed is done again.

        Raises:
            UsageError: `setup` raised it.
            R1ZError: workers do not start.
            Interrupted: a stop was requested; the workers have ended.
        """
        try:
            return self._run(tasks)
        except BaseException:  # interrupted: whatever the workers answer next must not be taken for answers to later tasks
            self.close()
            raise

    def close(self) -> None:
        """End the workers; the pool can be used again and starts new ones."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _run(self, tasks: Sequence[Task]) -> list[Outcome[Result]]:
        outcomes: dict[int, Outcome[Result]] = {}
        waiting = deque(enumerate(tasks))
        while len(outcomes) < len(tasks):
            if self._stop_flag.requested:
                raise Interrupted
            self._fill(len(tasks) - len(outcomes))
            for worker in self._workers:
                if worker.is_idle and waiting:
                    size = max(1, min(BATCH_TASKS, len(waiting) // (2 * self._num_workers)))
                    worker.assign([waiting.popleft() for _ in range(size)])
            for worker in self._wait():
                waiting.extendleft(reversed(self._collect(worker, outcomes)))
        return [outcomes[index] for index in range(len(tasks))]

    def _fill(self, num_tasks: int) -> None:
        """Replace idle workers that died and start as many as there is work for."""
        for worker in [worker for worker in self._workers if worker.is_idle and not worker.is_alive]:
            self._retire(worker)
        while len(self._workers) < min(self._num_workers, num_tasks):
            self._workers.append(_Worker(self._setup, self._timeout_s, self._memory_bytes))

    def _wait(self) -> list[_Worker]:
        """The workers that have something to say or whose deadline is over; blocks until there may be one, or for half a second."""
        pending = [worker for worker in self._workers if not worker.is_idle]
        earliest = min(worker.deadline() for worker in pending)
        readable = wait([worker.connection for worker in pending], min(max(0.0, earliest - monotonic()), LOOK_S))
        now = monotonic()
        return [worker for worker in pending if worker.connection in readable or worker.deadline() <= now]

    def _collect(self, worker: _Worker, outcomes: dict[int, Outcome[Result]]) -> Sequence[tuple[int, Task]]:
        """Take a worker's message; without one it is past its deadline, or dead, and goes. Returns the tasks that it leaves undone."""
        place = worker.place()  # before the deadline, so that the two belong together
        if not worker.connection.poll():
            if worker.deadline() > monotonic():
                return ()  # it went on while others were looked after
            return self._give_up(worker, place, Outcome(OutcomeKind.TIMEOUT, None, "the time limit is over"), outcomes)
        try:
            message: _Ready | UsageError | Outcome[Result] | list[Outcome[Result]] = worker.connection.recv()
        except (EOFError, OSError):
            return self._give_up(worker, worker.place(), Outcome(OutcomeKind.ERROR, None, "the worker died"), outcomes)
        if isinstance(message, UsageError):
            raise message  # another start would say the same
        if isinstance(message, _Ready):
            worker.is_ready, self._failed_starts = True, 0
        elif isinstance(message, Outcome):  # its setup failed
            return self._give_up(worker, place, message, outcomes)
        else:
            outcomes.update(zip(worker.finish(len(message)), message, strict=True))
        return ()

    def _give_up(
        self, worker: _Worker, place: int, outcome: Outcome[Result], outcomes: dict[int, Outcome[Result]]
    ) -> Sequence[tuple[int, Task]]:
        """End a worker: `outcome` is that of the task at `place` in its batch; the others are left."""
        self._retire(worker)
        if not worker.is_ready:
            self._note_failed_start(outcome)
            return ()
        left = list(worker.batch)
        outcomes[left.pop(place)[0]] = outcome
        return left

    def _note_failed_start(self, outcome: Outcome[Result]) -> None:
        self._failed_starts += 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            self._failed_starts = 0
            raise R1ZError(f"a grading worker could not start, {MAX_FAILED_STARTS} times in a row: {outcome.message}.")

    def _retire(self, worker: _Worker) -> None:
        worker.kill()
        if worker in self._workers:
            self._workers.remove(worker)


@dataclass(frozen=True, slots=True)
class _Ready:
    """A worker's first message."""


class _Worker:
    """The parent's end of one process: starting, then idle or busy with a batch of tasks.

    In shared memory the process notes which of its tasks, counted from its start, it took up when, so that the parent knows the one that
    hangs. The time is written before the number and read after it, so that no deadline is held against the wrong task.
    """

    def __init__(self, setup: Callable[[], Callable[[Any], Any]], timeout_s: float, memory_bytes: int | None) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._current = context.RawArray("d", [-1.0, 0.0])
        arguments = (theirs, self._current, setup, memory_bytes, os.getpid())
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self.is_ready = False
        self._timeout_s = timeout_s
        self.batch: deque[tuple[int, Any]] = deque()
        self._num_finished = 0
        self._asked = monotonic()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    @property
    def is_idle(self) -> bool:
        return self.is_ready and not self.batch

    def deadline(self) -> float:
        """When it is to be given up unless it reports or takes up another task."""
        return self._asked + START_LIMIT_S if not self.is_ready else max(self._asked, self._current[1]) + self._timeout_s

    def assign(self, batch: Sequence[tuple[int, Any]]) -> None:
        self.batch.extend(batch)
        with suppress(OSError):  # it died just now, which the end of its pipe tells next
            self.connection.send([task for _, task in batch])
        self._asked = monotonic()

    def finish(self, count: int) -> list[int]:
        """The indices of the next tasks of the batch, which it has done."""
        self._num_finished += count
        return [self.batch.popleft()[0] for _ in range(count)]

    def place(self) -> int:
        """Where in its batch it is; before that place may be tasks that it has done and not reported."""
        return max(0, int(self._current[0]) - self._num_finished)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def _serve(
    connection: Connection[Any, Any],
    current: Any,
    setup: Callable[[], Callable[[Any], Any]],
    memory_bytes: int | None,
    parent_pid: int,
) -> None:
    """The worker's life: restrict itself, set up, say so, work through batches of tasks until the pipe closes."""
    die_with_parent(parent_pid)
    outlive_readers()  # a reward function that prints does not fail because the run's output is no longer read
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when work ends
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    try:
        function = setup()
    except UsageError as error:
        connection.send(error)
        return
    except Exception as error:  # noqa: BLE001  (the parent raises it)
        connection.send(_failure(error))
        return
    gc.freeze()  # what the libraries have loaded lives as long as the worker; looking through it takes as long as hundreds of comparisons
    connection.send(_Ready())
    number = 0
    while True:
        try:
            tasks = connection.recv()
        except EOFError:
            return
        outcomes: list[Outcome[Any]] = []
        reported = monotonic()
        for task in tasks:
            current[1] = started = monotonic()
            current[0] = number
            if outcomes and started - reported > REPORT_S:
                connection.send(outcomes)
                outcomes, reported = [], started
            outcomes.append(_attempt(function, task))
            number += 1
        connection.send(outcomes)


def _attempt(function: Callable[[Any], Any], task: Any) -> Outcome[Any]:
    try:
        return Outcome(OutcomeKind.DONE, function(task), "")
    except MemoryError:
        os._exit(1)  # nothing in this process can be relied on any more
    except (Exception, SystemExit) as error:  # noqa: BLE001  (whatever a task raises is its outcome)
        return _failure(error)


def _failure(error: BaseException) -> Outcome[Any]:
    return Outcome(OutcomeKind.ERROR, None, f"{type(error).__name__}: {error}"[:500])
