"""Submits jobs, watches them, and finds them again later.

An experiment of nemo-run is one launch, of one job or of all jobs of a sweep.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import nemo_run as run
from nemo_run.config import get_nemorun_home
from nemo_run.core.frontend.console.api import CONSOLE

from megatron_r1z.errors import ConfigError, LaunchError
from megatron_r1z.host.rank import STOPPED
from megatron_r1z.launch.executors import make_executor
from megatron_r1z.launch.job import CODE, JOB_FOLDER, Job, stage

POLL_S = 0.5
RECENT = 20
"""Experiments that `status` lists when it is asked for none in particular."""
SUCCEEDED = "SUCCEEDED"


@dataclass(frozen=True)
class State:
    """What became of one job."""

    experiment: str
    name: str
    executor: str
    state: str
    """nemo-run's word, such as PENDING, RUNNING, SUCCEEDED, FAILED, CANCELLED, UNKNOWN."""
    job: str
    """Number or name that the executor's own tools know it by."""
    folder: Path
    """Logs and scripts."""


def scripts_of(jobs: Sequence[Job]) -> list[str]:
    """What would be submitted: the batch script of each Slurm job, nemo-run's request for other executors.

    Raises:
        ConfigError: nothing could be submitted like this.
    """
    with _experiment(jobs) as experiment:
        folder = Path(experiment._exp_dir)
        try:
            experiment.dryrun(log=False, delete_exp_dir=False)
            scripts = [folder / f"{job.name}_sbatch.sh" for job in jobs]
            return [
                script.read_text(encoding="utf-8") if script.exists() else str(made._dryrun_info)
                for script, made in zip(scripts, experiment.jobs, strict=True)
            ]
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def submit(jobs: Sequence[Job], *, detach: bool = False) -> list[State]:
    """Start jobs, all at once, and, unless `detach`, follow their output to their end.

    A signal while a local job is followed stops the run, which saves a checkpoint; jobs elsewhere go on.

    Raises:
        ConfigError: nothing could be submitted like this.
        LaunchError: the executor did not take them.
    """
    launch = jobs[0].launch
    if detach and launch.executor in ("local", "docker"):
        raise ConfigError(f"executor {launch.executor} ends with this command; leave out --detach.")
    files_are_here = launch.executor in ("local", "slurm") and launch.ssh is None
    with _experiment(jobs) as experiment:
        name = experiment._id
        try:
            experiment.run(detach=detach, tail_logs=not detach and not files_are_here)
        except Exception as error:  # whatever a service, a tool or a connection comes up with
            raise LaunchError(f"{launch.executor} did not take the job: {_reason(error)}.") from error
        if detach:
            return _states(experiment)
        folder = Path(experiment._exp_dir)
        print(f"experiment {name} on {launch.executor}; its files are in {folder}", flush=True)
        with _interrupts(name, local=jobs[0].is_local), _followed(folder) if files_are_here else contextlib.nullcontext():
            experiment._wait_for_jobs(jobs=experiment.jobs)
        experiment._waited = True
        return _states(experiment)


def check(states: Sequence[State]) -> None:
    """Whether all of the jobs that were waited for did what they were to do.

    Raises:
        LaunchError: one did not.
    """
    failed = [state for state in states if state.state != SUCCEEDED]
    if failed:
        which = f"experiment {failed[0].experiment}" + (f", {len(failed)} of {len(states)} jobs," if len(states) > 1 else "")
        raise LaunchError(
            f"{which} ended as {failed[0].state}; `megatron-r1z launch logs {failed[0].experiment}` shows what it said, and the same "
            "launch goes on from its last checkpoint."
        )


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
    """The jobs of the last experiments, newest first."""
    return [found for folder in _folders()[:RECENT] for found in _states(run.Experiment._from_config(str(folder)))]


def states(name: str | None) -> list[State]:
    """What became of the jobs of an experiment, or of the last one."""
    return _states(find(name))


def cancel(name: str | None) -> list[State]:
    """End the jobs of an experiment that still run."""
    experiment = find(name)
    for job in experiment.jobs:
        experiment.cancel(job.id)
    return _states(experiment)


def print_logs(name: str | None) -> None:
    """Print what the jobs have said so far, every start of them; what a service has is fetched by nemo-run."""
    experiment = find(name)
    paths = _log_files(Path(experiment._exp_dir))
    if not paths:
        for job in experiment.jobs:
            experiment.logs(job.id)
    for path in paths:
        print(f"== {path}")
        print(path.read_text(encoding="utf-8", errors="replace"), end="")


@contextlib.contextmanager
def _experiment(jobs: Sequence[Job]) -> Iterator[Any]:
    """An experiment of nemo-run with the jobs in it. What they take along lies in a folder that lasts until they are submitted."""
    CONSOLE.quiet = True  # it would tell on standard output, beside ours, how it goes about it
    options = {"log_level": "WARNING", "enable_goodbye_message": False, "skip_status_at_exit": True, "clean_mode": True}
    with tempfile.TemporaryDirectory(prefix="r1z_launch_") as folder:
        tasks = [(job, *_task(job, Path(folder) / str(number))) for number, job in enumerate(jobs)]
        with run.Experiment(jobs[0].experiment, executor=tasks[0][2], **options) as experiment:
            for job, script, executor in tasks:
                experiment.add(script, executor=executor, name=job.name)
            yield experiment


def _task(job: Job, code: Path) -> tuple[Any, Any]:
    """What nemo-run runs, and where."""
    _check_paths(job)
    code.mkdir()
    stage(job, code)
    arguments = job.arguments(code if job.is_local else CODE)
    return run.Script(path="megatron_r1z", m=True, entrypoint="python", args=arguments), make_executor(job, code)


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


def _states(experiment: Any) -> list[State]:
    found = experiment.status(return_dict=True)
    return [
        State(experiment._id, name, job["executor"], job["status"].name, job["job_id"], Path(job["local_dir"]))
        for name, job in found.items()
    ]


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
    several = sum(path.is_dir() for path in folder.iterdir()) > 1
    seen: dict[Path, int] = {}

    def print_new() -> None:
        for path in _log_files(folder):
            with path.open("rb") as file:
                file.seek(seen.get(path, 0))
                text = file.read()
            seen[path] = seen.get(path, 0) + len(text)
            print(_named(text.decode(errors="replace"), path.relative_to(folder).parts[0] if several else ""), end="", flush=True)

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


def _named(text: str, name: str) -> str:
    """Lines that begin with the name of the job that they are of."""
    return "".join(f"{name}: {line}" for line in text.splitlines(keepends=True)) if name else text


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
