"""`launch` with nemo-run's own environment: a local run, and a real Slurm of one node on the loopback interface."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.loop import slurm_cluster
from tests.loop.conftest import HANGS_S, TP2, figures_of, has_iteration, iterations_of

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-launch" / "bin" / "python"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="there is no .venv-launch; run `make launch-env`"),
]


@dataclass
class Launcher:
    """`megatron-r1z launch` in its environment."""

    home: Path
    """Where nemo-run keeps its experiments."""
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "NEMORUN_HOME": str(self.home), "PYTHONPATH": str(ROOT), "COLUMNS": "200"} | self.environment
        command = [str(PYTHON), "-m", "megatron_r1z", "launch", *arguments]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, *arguments: str, status: int = 0) -> str:
        with self.start(*arguments) as process:
            return output_of(process, status)


def output_of(process: subprocess.Popen[str], status: int = 0) -> str:
    """What a command says to its end, which must be with that status."""
    try:
        output, _ = process.communicate(timeout=HANGS_S)
    finally:
        process.kill()
    assert process.returncode == status, output[-8000:]
    return output


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    return Launcher(tmp_path_factory.mktemp("nemo-run"))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[slurm_cluster.Cluster, Launcher]]:
    reason = slurm_cluster.missing()
    if reason is not None:
        pytest.skip(reason)
    with slurm_cluster.started(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster, Launcher(tmp_path_factory.mktemp("nemo-run-slurm"), cluster.environment)


def run_of(training: list[str], folder: Path, *overrides: str) -> list[str]:
    """The run that the fixture `unbroken` is, with checkpoints more often."""
    return [*training, *TP2, "checkpoint.every=2", f"logging.folder={folder}", *overrides]


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANGS_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def names_in(output: str) -> tuple[str, str]:
    """Experiment and job that the last line is about."""
    found = re.search(r"experiment (\S+): \w+, job (\S+) ", output)
    assert found is not None, output
    return found[1], found[2]


def ranks(launcher: Launcher) -> list[psutil.Process]:
    """The processes of the launcher's jobs, rank by rank: their code is in its folder."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if "RANK" in environment and environment.get("PYTHONPATH", "").startswith(str(launcher.home)):
                found.setdefault(int(environment["RANK"]), process)
    return [found[rank] for rank in sorted(found)]


def test_a_local_launch_is_what_train_is(local: Launcher, training: list[str], unbroken: tuple[Path, Any], tmp_path: Path) -> None:
    output = local.run(*run_of(training, tmp_path / "run"), "--executor", "local")
    assert "SUCCEEDED" in output
    assert figures_of(tmp_path / "run") == figures_of(unbroken[0])
    assert "SUCCEEDED" in local.run("status")
    assert "iteration   reward" in local.run("logs")


def test_a_failed_launch_has_a_status_that_says_so(local: Launcher, training: list[str], tmp_path: Path) -> None:
    error = local.run(*run_of(training, tmp_path / "run", "model.path=no/such/model"), "--executor", "local", status=1)
    assert "ended as FAILED" in error
    assert "no/such/model" in local.run("logs")


def test_slurm_runs_a_job_starts_it_again_after_a_failure_and_it_goes_on(
    slurm: tuple[slurm_cluster.Cluster, Launcher], training: list[str], unbroken: tuple[Path, Any], tmp_path: Path
) -> None:
    cluster, launcher = slurm
    folder = tmp_path / "run"
    options = ["--executor", "slurm", "launch.hours=0.1", "launch.restarts=1", "launch.variables.GLOO_SOCKET_IFNAME=lo"]
    with launcher.start(*run_of(training, folder, "algorithm.iterations=24"), *options) as process:
        wait_for(lambda: process.poll() is not None or has_iteration(folder, 3))
        for rank in ranks(launcher)[1:]:
            rank.kill()
        output = output_of(process)
    experiment, job = names_in(output)
    assert cluster.state(job)["Restarts"] == "1"
    assert "SUCCEEDED" in launcher.run("status", experiment)
    first = figures_of(unbroken[0])
    assert figures_of(folder)[: len(first)] == first
    assert [row["iteration"] for row in iterations_of(folder)] == list(range(1, 25))


def test_slurm_ends_a_job_on_request_and_a_failed_one_has_a_status(
    slurm: tuple[slurm_cluster.Cluster, Launcher], training: list[str], tmp_path: Path
) -> None:
    cluster, launcher = slurm
    common = ["--executor", "slurm", "launch.hours=0.1"]
    said = launcher.run(*run_of(training, tmp_path / "run"), *common, "--detach")
    assert "PENDING" in said or "RUNNING" in said or "SUBMITTED" in said
    experiment, job = names_in(said)
    launcher.run("cancel")
    wait_for(lambda: cluster.state(job)["JobState"] == "CANCELLED")
    assert "CANCELLED" in launcher.run("status", experiment)
    error = launcher.run(*run_of(training, tmp_path / "run", "model.path=no/such/model"), *common, status=1)
    assert "ended as FAILED" in error
