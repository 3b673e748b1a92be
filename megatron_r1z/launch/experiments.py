"""Submits jobs, watches them, and finds them again later. An experiment of nemo-run is one launch; it has one job."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import nemo_run as run
from nemo_run.config import get_nemorun_home
from nemo_run.core.frontend.console.api import CONSOLE

from megatron_r1z.errors import ConfigError, LaunchError
from megatron_r1z.launch.executors import make_executor
from megatron_r1z.launch.job import CODE, JOB_FOLDER, Job, stage
from megatron_r1z.supervisor import STOPPED

POLL_S = 0.5
RECENT = 20
"""Experiments that `status` lists when it is asked for none in particular."""
SUCCEEDED = "SUCCEEDED"


@dataclass(frozen=True)
class State:
    """What became of one launch."""

    experiment: str
    executor: str
    state: str
    """nemo-run's word, such as PENDING, RUNNING, SUCCEEDED, FAILED, CANCELLED, UNKNOWN."""
    job: str
    """Number or name that the executor's own tools know it by."""
    folder: Path
    """Logs and scripts."""


def script_of(job: Job) -> str:
    """What would be submitted: the batch script of a Slurm job, nemo-run's request for other executors.

    Raises:
        ConfigError: nothing could be submitted like this.
    """
    with _staged(job) as code, _experiment(job, code) as experiment:
        folder = Path(experiment._exp_dir)
        try:
            experiment.dryrun(log=False, delete_exp_dir=False)
            scripts = sorted(folder.glob("*_sbatch.sh"))
            if scripts:
                return scripts[0].read_text(encoding="utf-8")
            return str(experiment.jobs[0]._dryrun_info)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def submit(job: Job, *, detach: bool = False) -> State:
    """Start a job and, unless `detach`, follow its output to its end.

    A signal while a local job is followed stops the run, which saves a checkpoint; a job elsewhere goes on.

    Raises:
        ConfigError: nothing could be submitted like this.
        LaunchError: the executor did not take it.
    """
    if detach and job.launch.executor in ("local", "docker"):
        raise ConfigError(f"executor {job.launch.executor} ends with this command; leave out --detach.")
    files_are_here = job.launch.executor in ("local", "slurm") and job.launch.ssh is None
    with _staged(job) as code, _experiment(job, code) as experiment:
        name = experiment._id
        try:
            experiment.run(detach=detach, tail_logs=not detach and not files_are_here)
        except Exception as error:  # whatever a service, a tool or a connection comes up with
            raise LaunchError(f"{job.launch.executor} did not take the job: {_reason(error)}.") from error
        if detach:
            return _state(experiment)
        folder = Path(experiment.jobs[0].executor.job_dir)
        print(f"experiment {name} on {job.launch.executor}; its files are in {folder}", flush=True)
        with _interrupts(name, local=job.is_local), _followed(folder) if files_are_here else contextlib.nullcontext():
            experiment._wait_for_jobs(jobs=experiment.jobs)
        experiment._waited = True
        return _state(experiment)


def find(name: str | None) -> Any:
    """The experiment of that name, or the last one.

    Raises:
        ConfigError: there is none.
    """
    folders = [folder for folder in _folders() if name is None or folder.name == name]
    if not folders:
        known = ", ".join(folder.name for folder in _folders()[:3]) or "none"
        raise ConfigError(f"no experiment {name or ''} in {_home()}; the last ones are: {known}.".replace("  ", " "))
    return run.Experiment._from_config(str(folders[0]))


def recent() -> list[State]:
    """The last experiments, newest first."""
    return [_state(run.Experiment._from_config(str(folder))) for folder in _folders()[:RECENT]]


def state(name: str | None) -> State:
    """What became of an experiment, or of the last one."""
    return _state(find(name))


def cancel(name: str | None) -> State:
    """End an experiment's job, if it still runs."""
    experiment = find(name)
    experiment.cancel(experiment.jobs[0].id)
    return _state(experiment)


def print_logs(name: str | None) -> None:
    """Print what a job has said so far, every start of it; those of a service are fetched by nemo-run."""
    experiment = find(name)
    paths = _log_files(Path(experiment.jobs[0].executor.job_dir))
    if not paths:
        experiment.logs(experiment.jobs[0].id)
    for path in paths:
        print(f"== {path}")
        print(path.read_text(encoding="utf-8", errors="replace"), end="")


@contextlib.contextmanager
def _staged(job: Job) -> Iterator[Path]:
    """The code that the job takes along, in a folder that lasts until it is submitted."""
    with tempfile.TemporaryDirectory(prefix="r1z_launch_") as folder:
        stage(job, Path(folder))
        yield Path(folder)


@contextlib.contextmanager
def _experiment(job: Job, code: Path) -> Iterator[Any]:
    """An experiment of nemo-run with the job in it."""
    _check_paths(job)
    CONSOLE.quiet = True  # it would tell on standard output, beside ours, how it goes about it
    arguments = job.arguments(code if job.is_local else CODE)
    script = run.Script(path="megatron_r1z", m=True, entrypoint="python", args=arguments)
    executor = make_executor(job, code)
    options = {"log_level": "WARNING", "enable_goodbye_message": False, "skip_status_at_exit": True, "clean_mode": True}
    with run.Experiment(job.name, executor=executor, **options) as experiment:
        experiment.add(script, name=job.name)
        yield experiment


def _check_paths(job: Job) -> None:
    """nemo-run puts a job's folder in the place of every `/nemo_run` in a batch script without a container."""
    if job.launch.executor != "slurm" or job.launch.container is not None:
        return
    for what, path in (("NEMORUN_HOME", str(_home())), ("the folder of the run", str(job.folder))):
        if str(JOB_FOLDER) in path:
            raise ConfigError(f"launch: {what} is {path}, and nemo-run takes {JOB_FOLDER} in a path for the job's folder; choose another.")


def _home() -> Path:
    return Path(get_nemorun_home()) / "experiments"


def _folders() -> list[Path]:
    """Folders of all experiments, newest first."""
    return sorted(_home().glob("*/*_*"), key=lambda folder: folder.name.rpartition("_")[2], reverse=True)


def _state(experiment: Any) -> State:
    (found,) = experiment.status(return_dict=True).values()
    return State(experiment._id, found["executor"], found["status"].name, found["job_id"], Path(found["local_dir"]))


def _reason(error: BaseException) -> str:
    """The last line that a command wrote to its standard error, or else what the error says."""
    result = getattr(error, "result", None)
    lines = str(getattr(result, "stderr", "") or error).strip().splitlines()
    return (lines[-1] if lines else type(error).__name__).rstrip(".")


# ------------------------------------------------------------------------------------------------------------------------ watching


def _log_files(folder: Path) -> list[Path]:
    """What the ranks of a job wrote, oldest first: a file for each start under Slurm, one for a local run."""
    found = [*folder.glob("log-*.out"), *folder.rglob("combined.log")]
    return sorted(found, key=lambda path: path.stat().st_mtime)


@contextlib.contextmanager
def _followed(folder: Path) -> Iterator[None]:
    """Print what the files of a job gain, those of later starts too. nemo-run follows the file of the first start only."""
    done = threading.Event()
    seen: dict[Path, int] = {}

    def print_new() -> None:
        for path in _log_files(folder):
            with path.open("rb") as file:
                file.seek(seen.get(path, 0))
                text = file.read()
            seen[path] = seen.get(path, 0) + len(text)
            print(text.decode(errors="replace"), end="", flush=True)

    def follow() -> None:
        while not done.wait(POLL_S):
            print_new()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        print_new()


@contextlib.contextmanager
def _interrupts(name: str, *, local: bool) -> Iterator[None]:
    """Ctrl-C: a local run is asked to stop; a job elsewhere goes on without a watcher."""

    def stop_local(_number: int, _frame: FrameType | None) -> None:
        os.write(2, b"stopping: the ranks save a checkpoint and end\n")
        for process in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)

    def leave(_number: int, _frame: FrameType | None) -> None:
        os.write(2, f"no longer watching; the job goes on: megatron-r1z launch status {name}\n".encode())
        os._exit(STOPPED)  # threads of nemo-run wait for the job

    previous = {number: signal.signal(number, stop_local if local else leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _children() -> list[int]:
    """Processes that this one started (Linux)."""
    texts = [path.read_text(encoding="ascii") for path in Path("/proc/self/task").glob("*/children")]
    return [int(number) for number in " ".join(texts).split()]
