"""The pool's promises: order kept, hanging and dying tasks contained, nothing outlives its parent.

The functions that workers run stand in this file's text, written to a module that a spawned process can import.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_r1z.errors import Interrupted, R1ZError
from megatron_r1z.grading.pool import Outcome, OutcomeKind, WorkerPool
from megatron_r1z.host.rank import StopFlag

ROOT = Path(__file__).parents[3]
TASKS = """
import os, signal, sys, time

def make():
    return handle

def make_slowly():
    time.sleep(4.0)
    return handle

def make_nothing():
    raise ValueError("no such grammar")

def handle(task):
    kind, value = task
    if kind == "echo":
        return value
    if kind == "pid":
        return os.getpid()
    if kind == "sleep":
        time.sleep(value)
        return value
    if kind == "interrupt":
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(value)
    if kind == "spin":
        return 9 ** 9 ** 9 ** 9
    if kind == "bloat":
        return len(bytearray(value))
    if kind == "raise":
        raise ValueError(value)
    if kind == "recurse":
        return handle(task) + 1
    if kind == "exit":
        sys.exit(3)
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "modules":
        return sorted(name for name in ("torch", "vllm", "megatron", "numpy") if name in sys.modules)
"""
Pool = WorkerPool[Any, Any]
LIMIT_S = 3.0
"""Where a task goes over it: far above what the others take on a busy machine."""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "r1z_pool_tasks.py").write_text(TASKS, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield importlib.import_module("r1z_pool_tasks")
        sys.modules.pop("r1z_pool_tasks")


@pytest.fixture
def make_pool(tasks: Any) -> Iterator[Callable[..., Pool]]:
    pools: list[Pool] = []

    def make(num_workers: int = 1, timeout_s: float = LIMIT_S, setup: str = "make", **options: Any) -> Pool:
        pools.append(WorkerPool(getattr(tasks, setup), num_workers, timeout_s, **options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def _kinds(outcomes: list[Outcome[Any]]) -> list[str]:
    return [outcome.kind.value for outcome in outcomes]


def test_order_is_kept_and_workers_start_on_demand(make_pool: Callable[..., Pool]) -> None:
    pool = make_pool(num_workers=2, timeout_s=30)
    assert list(pool.worker_pids) == []
    assert pool.run([]) == []
    assert list(pool.worker_pids) == []
    assert [outcome.result for outcome in pool.run([("echo", number) for number in range(200)])] == list(range(200))
    first = pool.worker_pids
    assert len(first) == 2
    pool.run([("echo", 1)] * 3)
    assert pool.worker_pids == first


def test_a_hanging_task_is_killed_and_the_others_are_done(make_pool: Callable[..., Pool]) -> None:
    pool = make_pool(num_workers=2)
    pool.run([("echo", 0)] * 20)
    outcomes = pool.run([("spin", 0), *[("echo", number) for number in range(50)]])
    assert _kinds(outcomes) == ["timeout"] + ["done"] * 50
    assert [outcome.result for outcome in outcomes[1:]] == list(range(50))


def test_the_limit_is_of_one_task_not_of_its_batch(make_pool: Callable[..., Pool]) -> None:
    """Sixteen tasks are three batches or more, the first over the limit as a whole."""
    outcomes = make_pool(num_workers=1).run([("sleep", 0.5)] * 16)
    assert _kinds(outcomes) == ["done"] * 16


def test_hanging_and_dying_tasks_within_batches_cost_no_other_its_result(make_pool: Callable[..., Pool]) -> None:
    kinds = ["echo"] * 150
    for place in (0, 7, 8, 40, 149):
        kinds[place] = "die"
    for place in (3, 41):
        kinds[place] = "spin"
    outcomes = make_pool(num_workers=2).run([(kind, place) for place, kind in enumerate(kinds)])
    expected = {"echo": "done", "die": "error", "spin": "timeout"}
    assert _kinds(outcomes) == [expected[kind] for kind in kinds]
    assert [outcome.result for outcome in outcomes] == [place if kind == "echo" else None for place, kind in enumerate(kinds)]


def test_dying_tasks_are_errors_and_the_worker_is_replaced(make_pool: Callable[..., Pool]) -> None:
    pool = make_pool(timeout_s=20)
    outcomes = pool.run([("raise", "why"), ("recurse", 0), ("die", 0), ("exit", 0), ("echo", 7)])
    assert _kinds(outcomes) == ["error"] * 4 + ["done"]
    assert outcomes[0].message == "ValueError: why"
    assert outcomes[1].message.startswith("RecursionError")
    assert outcomes[2].message == "the worker died"
    assert outcomes[4].result == 7


def test_a_bloated_task_is_an_error(make_pool: Callable[..., Pool]) -> None:
    pool = make_pool(timeout_s=20, memory_bytes=512 << 20)
    assert _kinds(pool.run([("bloat", 1 << 20), ("bloat", 1 << 30), ("echo", 1)])) == ["done", "error", "done"]


def test_start_up_time_is_not_on_the_limit_of_a_task(make_pool: Callable[..., Pool]) -> None:
    assert _kinds(make_pool(setup="make_slowly").run([("echo", 1)])) == ["done"]


def test_a_failing_setup_is_raised_after_a_few_tries(make_pool: Callable[..., Pool]) -> None:
    with pytest.raises(R1ZError, match="no such grammar"):
        make_pool(setup="make_nothing").run([("echo", 1)])


def test_a_worker_killed_between_runs_is_replaced(make_pool: Callable[..., Pool]) -> None:
    pool = make_pool(timeout_s=20)
    pid = _worker_pid(pool)
    os.kill(pid, signal.SIGKILL)
    _until_gone(pid)
    (outcome,) = pool.run([("pid", 0)])
    assert outcome.kind is OutcomeKind.DONE
    assert outcome.result != pid


def test_workers_ignore_interrupts_load_nothing_heavy_and_end_on_close(make_pool: Callable[..., Pool]) -> None:
    pool = make_pool(timeout_s=20)
    pid = _worker_pid(pool)
    os.kill(pid, signal.SIGINT)
    assert [outcome.result for outcome in pool.run([("pid", 0), ("modules", 0)])] == [pid, []]
    pool.close()
    assert not Path(f"/proc/{pid}").exists()
    assert pool.run([("echo", 4)])[0].result == 4


@pytest.fixture
def python_sigint() -> Iterator[None]:
    """Python's own handler, which a process started in the background does not have (its shell ignores SIGINT)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_tasks_are_given_up_once_a_stop_is_asked_for(tasks: Any) -> None:
    """And the pool can be used again by whoever takes the request back."""
    flag = StopFlag()
    pool = WorkerPool(tasks.make, 2, 1000.0, stop_flag=flag)
    try:
        assert [outcome.result for outcome in pool.run([("echo", 1)])] == [1]
        timer = threading.Timer(0.3, lambda: setattr(flag, "requested", True))
        timer.start()
        with pytest.raises(Interrupted):
            pool.run([("sleep", 1000.0)] * 4)
        timer.join()
        assert pool.worker_pids == ()
        with pytest.raises(Interrupted):
            pool.run([("echo", 2)])
        flag.requested = False
        assert [outcome.result for outcome in pool.run([("echo", 3)])] == [3]
    finally:
        pool.close()


def test_an_interrupted_run_leaves_no_stale_answers(make_pool: Callable[..., Pool], python_sigint: None) -> None:
    pool = make_pool(timeout_s=20)
    pool.run([("echo", 0)])
    with pytest.raises(KeyboardInterrupt):
        pool.run([("interrupt", 1.0)])
    assert pool.worker_pids == ()
    assert pool.run([("echo", "new")])[0].result == "new"


@pytest.mark.parametrize("busy", [False, True])
def test_no_worker_outlives_a_killed_parent(tasks: Any, busy: bool, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path[:0] = [{str(ROOT)!r}, {str(Path(tasks.__file__).parent)!r}]
            from megatron_r1z.grading.pool import WorkerPool
            import r1z_pool_tasks, time
            if __name__ == "__main__":
                pool = WorkerPool(r1z_pool_tasks.make, 1, 60.0)
                print(pool.run([("pid", 0)])[0].result, flush=True)
                pool.run([("spin", 0)]) if {busy} else time.sleep(60)
            """
        ),
        encoding="utf-8",
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.2)
        parent.kill()
    _until_gone(pid)


def _worker_pid(pool: Pool) -> int:
    return int(pool.run([("pid", 0)])[0].result or 0)


def _until_gone(pid: int) -> None:
    """Wait until the process has ended (a zombie has)."""
    for _ in range(1200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} is still there")
