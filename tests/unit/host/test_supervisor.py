"""How runs end. Every run is a process of its own, its ranks are small scripts, and what is looked at is what a user sees."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from megatron_r1z.errors import ConfigError, EngineError
from megatron_r1z.host import supervisor
from megatron_r1z.host.rank import is_rank, leftover_notice, rank_entry

PRELUDE = """
import os, signal, subprocess, sys, time
from pathlib import Path
from megatron_r1z import errors
from megatron_r1z.host.rank import STOPPED, StopFlag, rank_entry
rank = int(os.environ["RANK"])
"""

HOST = """
import sys
from pathlib import Path
from megatron_r1z.host.supervisor import Patience, run_ranks
script, num_ranks, stop_s, death_s, errors = sys.argv[1:]
sys.exit(run_ranks(
    int(num_ranks), 1, ["argument"], command=[sys.executable, script],
    patience=Patience(after_stop_s=float(stop_s), after_death_s=float(death_s)), error_folder=Path(errors) if errors else None,
))
"""

UNTIL_STOPPED = """
    def main():
        flag = StopFlag().install()
        Path(f"ready_{rank}").touch()
        while not flag.requested:
            time.sleep(0.02)
        Path(f"saved_{rank}").touch()
        return STOPPED
    sys.exit(rank_entry(main))
"""


HANGS_S = 600
"""What takes so long waits for ever, however busy the machine."""


class Run:
    """A supervisor at work on ranks that run `script`, in a folder of its own."""

    def __init__(self, folder: Path, script: str, *, num_ranks: int = 2, stop_s: float = 300, death_s: float = 1, errors: str = "") -> None:
        (folder / "rank.py").write_text(PRELUDE + textwrap.dedent(script), encoding="utf-8")
        self.folder = folder
        environment = {name: value for name, value in os.environ.items() if name != "RANK"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOST, "rank.py", str(num_ranks), str(stop_s), str(death_s), errors],
            cwd=folder,
            env={**environment, "PYTHONPATH": str(Path(supervisor.__file__).parents[2]), "TMPDIR": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, *names: str) -> None:
        """Until the ranks have made these files."""
        deadline = time.monotonic() + HANGS_S
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < deadline, f"no {names}: {self.process.poll()}"
            time.sleep(0.02)

    def end(self) -> SimpleNamespace:
        """Wait for the supervisor; return its status, what it printed and what is left of its processes."""
        out, err = self.process.communicate(timeout=HANGS_S)
        return SimpleNamespace(status=self.process.returncode, out=out, err=err, left=self.processes())

    def processes(self) -> list[int]:
        """Processes that run in the folder of this run."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(self.folder):
                    found.append(process.pid)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start(script: str, **options: object) -> Run:
        runs.append(Run(tmp_path, script, **options))  # type: ignore[arg-type]
        return runs[-1]

    yield start
    for started in runs:
        for process_id in started.processes():
            os.kill(process_id, signal.SIGKILL)
        started.process.communicate()


def test_all_ranks_succeed_in_the_environment_of_torchrun(run: Callable[..., Run]) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"]
    result = run(f"""
        line = " ".join(os.environ[name] for name in {names}) + " " + " ".join(sys.argv[1:])
        sys.exit(rank_entry(lambda: os.write(1, line.encode() + b"\\n") * 0))
    """).end()
    assert (result.status, result.err, result.left) == (0, "", [])
    lines = sorted(result.out.splitlines())
    ports = {line.split()[5] for line in lines}
    assert len(ports) == 1
    assert [line.replace(*ports, "PORT") for line in lines] == [f"{rank} {rank} 2 2 127.0.0.1 PORT 1 argument" for rank in (0, 1)]


def test_an_error_is_one_sentence_with_its_rank(run: Callable[..., Run]) -> None:
    result = run("""
        def main():
            if rank == 1:
                raise errors.EngineError("the engine died;\\n  look at its log.")
            time.sleep(1000)
        sys.exit(rank_entry(main))
    """).end()
    assert (result.status, result.out, result.left) == (1, "", [])
    assert result.err == "rank 1: the engine died; look at its log.\n"


def test_a_usage_error_has_status_2(run: Callable[..., Run]) -> None:
    result = run("""
        def main():
            raise errors.ConfigError("no such model.")
        sys.exit(rank_entry(main))
    """).end()
    assert result.status == 2
    assert re.fullmatch(r"rank [01]: no such model\.\n", result.err)


def test_a_bug_leaves_its_traceback_in_the_error_folder(run: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "errors").mkdir()
    (tmp_path / "errors" / "rank_1.json").write_text("of an earlier run")
    script = "sys.exit(rank_entry(lambda: 0 // rank))"
    result = run(script, errors="errors").end()
    assert result.status == 1
    assert (
        result.err == f"rank 0: ZeroDivisionError: integer division or modulo by zero (the traceback is in {Path('errors/rank_0.txt')})\n"
    )
    assert not (tmp_path / "errors" / "rank_1.json").exists()
    assert "0 // rank" in (tmp_path / "errors" / "rank_0.txt").read_text()


def test_a_rank_that_was_killed_is_named_and_takes_the_others_with_it(run: Callable[..., Run]) -> None:
    """Rank 0 is stuck where no signal but SIGKILL helps and has a helper; the error of rank 1 is a consequence; rank 2 is the cause."""
    result = run(
        """
        if rank == 0:
            subprocess.Popen(["sleep", "1000"], start_new_session=True)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            Path("ready_0").touch()
            time.sleep(1000)
        while not Path("ready_0").exists():
            time.sleep(0.02)
        if rank == 2:
            Path("written").write_text(str(os.getpid()))
            os.rename("written", "process_2")
            os.kill(os.getpid(), signal.SIGKILL)
        def is_alive(process):
            try:
                return " Z " not in Path(f"/proc/{process}/stat").read_text()
            except OSError:
                return False
        def main():
            while not Path("process_2").exists() or is_alive(Path("process_2").read_text()):
                time.sleep(0.001)
            raise RuntimeError("Connection closed by peer")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(rank_entry(main))
        """,
        num_ranks=3,
    ).end()
    assert (result.status, result.left) == (1, [])
    assert result.err.startswith("rank 2 was ended by SIGKILL")


def test_the_others_are_told_to_end_when_a_rank_dies(run: Callable[..., Run]) -> None:
    started = run(
        """
        def flush(*_):
            Path("flushed").touch()
            os._exit(0)
        if rank == 0:
            signal.signal(signal.SIGTERM, flush)
            Path("ready_0").touch()
            time.sleep(1000)
        while not Path("ready_0").exists():
            time.sleep(0.02)
        os.abort()
        """,
        death_s=40,
    )
    result = started.end()
    assert (result.status, result.left) == (1, [])
    assert result.err.startswith("rank 1 was ended by SIGABRT.")
    assert (started.folder / "flushed").exists()


def test_an_exit_status_without_an_error_is_named(run: Callable[..., Run]) -> None:
    result = run("sys.exit(3 * rank)").end()
    assert result.status == 1
    assert result.err.startswith("rank 1 ended with exit status 3.")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_ranks_finish(run: Callable[..., Run], number: signal.Signals) -> None:
    started = run(UNTIL_STOPPED)
    started.wait_for("ready_0", "ready_1")
    started.process.send_signal(number)
    result = started.end()
    assert (result.status, result.left) == (130, [])
    started.wait_for("saved_0", "saved_1")
    assert result.err.count("\n") == 1
    assert result.err.startswith("stopping")


def test_the_slower_rank_may_take_its_time_to_stop(run: Callable[..., Run]) -> None:
    """Rank 0 ends at once; with a patience after death of a second, rank 1 still gets its two seconds."""
    started = run(UNTIL_STOPPED.replace('Path(f"saved', 'time.sleep(2 * rank); Path(f"saved'))
    started.wait_for("ready_0", "ready_1")
    started.process.send_signal(signal.SIGINT)
    assert started.end().status == 130
    started.wait_for("saved_1")


def test_a_signal_during_the_imports_of_a_rank_prints_no_traceback(run: Callable[..., Run]) -> None:
    started = run('Path(f"ready_{rank}").touch(); time.sleep(1)' + textwrap.dedent(UNTIL_STOPPED).replace("ready", "later"))
    started.wait_for("ready_0", "ready_1")
    started.process.send_signal(signal.SIGINT)
    result = started.end()
    assert result.status == 130
    assert "Traceback" not in result.err


def test_a_second_signal_ends_everything_at_once(run: Callable[..., Run]) -> None:
    started = run('Path(f"ready_{rank}").touch(); time.sleep(1000)')
    started.wait_for("ready_0", "ready_1")
    started.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    started.process.send_signal(signal.SIGINT)  # the same key press
    time.sleep(2.5)
    assert started.process.poll() is None
    while started.process.poll() is None:  # again, where a busy machine took a second to note the first
        started.process.send_signal(signal.SIGINT)
        time.sleep(2.5)
    result = started.end()
    assert (result.status, result.left) == (1, [])
    assert "stopped without a new checkpoint: ranks 0, 1 killed at the second signal." in result.err


def test_ranks_that_do_not_stop_are_killed(run: Callable[..., Run]) -> None:
    started = run("time.sleep(1000 * rank); sys.exit(130)", stop_s=1)
    result = started.end()
    assert (result.status, result.left) == (1, [])
    assert "rank 1 killed after 1 s without an end" in result.err


def test_what_a_killed_rank_has_on_record_is_removed_with_it(run: Callable[..., Run]) -> None:
    """Also where the tracker of Python, which would see to it, is killed first."""
    started = run(
        """
        from multiprocessing import resource_tracker
        from multiprocessing.shared_memory import SharedMemory
        from megatron_r1z.host.segments import record_segments
        def main():
            segment = SharedMemory(create=True, size=4096)
            resource_tracker.unregister(segment._name, "shared_memory")
            Path("names").write_text(f"{segment.name} {record_segments().name}")
            os.kill(os.getpid(), signal.SIGKILL)
        sys.exit(rank_entry(main))
    """,
        num_ranks=1,
    )
    result = started.end()
    assert result.err.startswith("rank 0 was ended by SIGKILL")
    paths = [Path("/dev/shm") / name for name in (started.folder / "names").read_text().split()]
    assert [path.exists() for path in paths] == [False, False]


def test_ranks_die_with_a_killed_supervisor(run: Callable[..., Run]) -> None:
    started = run(UNTIL_STOPPED)
    started.wait_for("ready_0", "ready_1")
    started.process.kill()
    started.process.wait()
    deadline = time.monotonic() + HANGS_S
    while started.processes():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_reserved_port_is_free_for_rank_0_only() -> None:
    from torch.distributed import TCPStore

    with supervisor._reserved_port() as port, supervisor._reserved_port() as other:
        assert port != other
        store = TCPStore("127.0.0.1", port, 1, True)
        store.set("key", "value")
        assert store.get("key") == b"value"


@pytest.mark.parametrize(("error", "status"), [(ConfigError("no."), 2), (EngineError("dead."), 1), (ValueError("bug"), 1)])
def test_errors_are_written_as_torchrun_reads_them(
    error: Exception, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    monkeypatch.delenv("RANK", raising=False)

    def main() -> int:
        raise error

    assert rank_entry(main) == status
    text = str(error) if status == 2 or isinstance(error, EngineError) else f"ValueError: {error}"
    assert capsys.readouterr().err == f"{text}\n"
    failure = ProcessFailure(0, 1, status, str(path))
    assert failure.message["message"] == f"{type(error).__name__}: {error}"  # type: ignore[index]
    assert "raise error" in json.loads(path.read_text())["message"]["extraInfo"]["py_callstack"]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def run_torchrun(folder: Path, script: str, *options: str, num_ranks: int = 1, **variables: str) -> subprocess.Popen[str]:
    """torchrun over ranks that run `script` in a folder of its own."""
    (folder / "rank.py").write_text(PRELUDE + textwrap.dedent(script), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "R1Z"))}
    environment |= {"PYTHONPATH": str(Path(supervisor.__file__).parents[2]), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"} | variables
    command = [*TORCHRUN, str(num_ranks), *options, "rank.py"]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("status", [0, 1])
def test_a_rank_of_torchrun_removes_the_shared_memory_of_its_run(status: int, tmp_path: Path) -> None:
    """Its engines are not shut down by the interpreter, and no supervisor cleans up behind it."""
    name = f"/dev/shm/{tmp_path.name}"
    process = run_torchrun(
        tmp_path,
        f"""
        def main():
            for more in ("", "0"):
                Path(f"{name}-{{os.environ['MASTER_PORT']}}{{more}}-tp:0-[0-1]-cpushm_0").touch()
            if {status}:
                raise errors.EngineError("dead.")
            return 0
        sys.exit(rank_entry(main))
        """,
    )
    _, err = process.communicate(timeout=120)
    left = list(Path("/dev/shm").glob(f"{tmp_path.name}-*"))
    try:
        assert process.returncode == status, err
        assert ("rank 0: dead." in err) == bool(status)
        (path,) = left
        assert re.search(r"-\d+0-tp:0", path.name)
    finally:
        for path in left:
            path.unlink(missing_ok=True)


@pytest.mark.parametrize("is_final", [True, False])
def test_torchrun_does_not_start_a_run_again_that_ended_for_good(is_final: bool, tmp_path: Path) -> None:
    error = "TrainingError" if is_final else "EngineError"
    process = run_torchrun(
        tmp_path,
        f"""
        def main():
            Path(f"began_{{os.environ['TORCHELASTIC_RESTART_COUNT']}}_{{rank}}").touch()
            raise errors.{error}("no step came to anything.")
        sys.exit(rank_entry(main))
        """,
        *("--max-restarts", "2"),
        R1Z_FINAL_FILE=str(tmp_path / "final"),
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "rank 0: no step came to anything." in err
    began = sorted(path.name for path in tmp_path.glob("began_*"))
    assert began == (["began_0_0"] if is_final else ["began_0_0", "began_1_0", "began_2_0"])
    assert (tmp_path / "final").exists() == is_final


def test_ranks_of_torchrun_have_the_time_that_launch_gives_them(tmp_path: Path) -> None:
    """40 seconds, where torchrun has 30 of its own: in the variable that `launch` sets, and one rank needs them."""
    script = UNTIL_STOPPED.replace('Path(f"saved', 'time.sleep(40 * rank); Path(f"saved')
    process = run_torchrun(tmp_path, script, num_ranks=2, **grace_of_launch(300))
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"ready_{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert (tmp_path / "saved_0").exists()
    assert (tmp_path / "saved_1").exists()


def grace_of_launch(seconds: int) -> dict[str, str]:
    """The variable of torchrun that `launch` sets, as its source has it: that module needs nemo-run."""
    source = (Path(supervisor.__file__).parents[1] / "launch" / "executors.py").read_text()
    (name,) = re.findall(r'"(\w+_SHUTDOWN_TIMEOUT)": str\(math.ceil\(job.config.parallel.grace_s\)\)', source)
    return {name: str(seconds)}


LEFT_OVER = {
    **{"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"},
    **{"GROUP_RANK": "1", "ROLE_RANK": "3", "ROLE_WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True"},
    **{"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_ERROR_FILE": "/no/such/attempt_1/0/error.json", "SLURM_PROCID": "3"},
}
"""Of a torchrun that is no longer there."""


def test_variables_alone_make_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("R1Z_SUPERVISOR", raising=False)
    for name in LEFT_OVER:
        monkeypatch.delenv(name, raising=False)
    assert not is_rank()
    assert leftover_notice() is None
    for name, value in LEFT_OVER.items():
        monkeypatch.setenv(name, value)
    assert not is_rank()
    assert "RANK, LOCAL_RANK, WORLD_SIZE" in str(leftover_notice())
    monkeypatch.setenv("R1Z_SUPERVISOR", "1")
    assert is_rank()


def test_what_a_torchrun_left_in_the_environment_does_not_reach_the_ranks(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the agent's store in the environment, rank 0 would look for a store of another instead of making one."""
    for name, value in LEFT_OVER.items():
        monkeypatch.setenv(name, value)
    result = run("""
        def main():
            import torch.distributed as dist
            dist.init_process_group("gloo")
            dist.barrier()
            os.write(1, f"{dist.get_rank()} {dist.get_world_size()}\\n".encode())
            dist.destroy_process_group()
            return 0
        sys.exit(rank_entry(main))
    """).end()
    assert (result.status, result.err, sorted(result.out.splitlines())) == (0, "", ["0 2", "1 2"])


def test_a_run_that_another_start_would_not_change_has_status_3(run: Callable[..., Run]) -> None:
    result = run("""
        def main():
            raise errors.TrainingError("no step came to anything.")
        sys.exit(rank_entry(main))
    """).end()
    assert (result.status, result.left) == (3, [])
    assert re.fullmatch(r"rank [01]: no step came to anything\.\n", result.err)
