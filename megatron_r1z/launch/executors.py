"""The `launch` section as one of nemo-run's executors (nemo_run/core/execution/, 0.11.1).

What all of them have in common goes by our names and is translated by one table; the rest is given to them as it is (`launch.options`).
Slurm and local runs were tried for real; the others only as far as nemo-run builds them without their service.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nemo_run as run
from nemo_run.core.execution.launcher import Torchrun

from megatron_r1z.config import LaunchConfig, SshConfig
from megatron_r1z.errors import ConfigError
from megatron_r1z.launch.job import CODE, JOB_FOLDER, PACKAGE, Job

PORT = "R1Z_RENDEZVOUS_PORT"
SLURM_LINES = (
    # Of every job another one, and below the ports that a system gives to anybody: nemo-run's own is the same for all jobs.
    f"export {PORT}=$((20000 + SLURM_JOB_ID % 12768))",
    # A rank whose run is not to be started again writes this file, and the requeue at the end of nemo-run's script is left out: torchrun
    # hands no rank's exit status on. In a container the job's folder has another name than here, where Slurm knows it.
    f"export R1Z_FINAL_FILE={JOB_FOLDER}/final_$SLURM_JOB_ID",
    """r1z_final=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *StdOut=\\(.*\\)/[^/]*$|\\1|p')/final_$SLURM_JOB_ID""",
    """scontrol() { if [ "$1" = requeue ] && [ -e "$r1z_final" ]; then cat "$r1z_final"; else command scontrol "$@"; fi; }""",
)


@dataclass(frozen=True, kw_only=True)
class Target:
    """The name of an executor in nemo-run and those of its fields that mean the same in all of them; None: it has no such field."""

    kind: str
    nodes: str | None
    ranks: str
    gpus: str | None = None
    container: str | None = None
    mounts: str | None = None
    setup: str | None = None
    extra: str | None = None
    """What nemo-run needs for it beyond its own installation."""


SKYPILOT = Target(
    kind="SkypilotExecutor",
    nodes="num_nodes",
    ranks="torchrun_nproc_per_node",
    gpus="gpus_per_node",
    container="container_image",
    setup="setup",
    extra="nemo-run[skypilot]",
)
TARGETS = {
    "local": Target(kind="LocalExecutor", nodes="nodes", ranks="ntasks_per_node"),
    "slurm": Target(
        kind="SlurmExecutor",
        nodes="nodes",
        ranks="ntasks_per_node",
        gpus="gpus_per_node",
        container="container_image",
        mounts="container_mounts",
        setup="setup_lines",
    ),
    "docker": Target(
        kind="DockerExecutor", nodes=None, ranks="ntasks_per_node", gpus="num_gpus", container="container_image", mounts="volumes"
    ),
    "skypilot": SKYPILOT,
    "skypilot_jobs": dataclasses.replace(SKYPILOT, kind="SkypilotJobsExecutor"),
    "dgxcloud": Target(kind="DGXCloudExecutor", nodes="nodes", ranks="nprocs_per_node", gpus="gpus_per_node", container="container_image"),
    "kubeflow": Target(
        kind="KubeflowExecutor",
        nodes="num_nodes",
        ranks="nprocs_per_node",
        gpus="gpus_per_node",
        container="image",
        extra="nemo-run[kubeflow]",
    ),
    "lepton": Target(kind="LeptonExecutor", nodes="nodes", ranks="nprocs_per_node", gpus="gpus_per_node", container="container_image"),
}


def make_executor(job: Job, code: Path) -> run.Executor:
    """The executor of a job; `code` is the folder that it takes along.

    Raises:
        ConfigError: a field that this executor does not have, a combination that it refuses, or no torchrun for a local run.
    """
    name = job.launch.executor
    target = TARGETS[name]
    kind = getattr(run, target.kind)
    fields = {item.name for item in dataclasses.fields(kind) if item.init}
    values = _common(job, target) | _special(job) | dict(job.launch.options)
    if not job.is_local:
        values["packager"] = _packager(name, code)
    for key in job.launch.options:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown key 'launch.options.{key}' for executor {name}; did you mean 'launch.options.{near}'?")
    try:
        return kind(**values)
    except (TypeError, AssertionError, ImportError, ValueError) as error:
        wanted = f" It needs: pip install '{target.extra}'." if target.extra else ""
        raise ConfigError(f"launch: nemo-run refuses the executor {name}: {' '.join(str(error).split())}.{wanted}") from error


def _common(job: Job, target: Target) -> dict[str, Any]:
    """What goes by the table."""
    launch = job.launch
    wanted = (
        ("container", target.container, launch.container),
        ("mounts", target.mounts, list(launch.mounts)),
        ("setup", target.setup, "\n".join(launch.setup)),
    )
    for ours, theirs, value in wanted:
        if value and theirs is None:
            raise ConfigError(f"launch.{ours} is set, but executor {launch.executor} has no field of that kind; use launch.options.")
    values: dict[str, Any] = {theirs: value for _, theirs, value in wanted if value and theirs is not None}
    if target.gpus is not None and job.gpus_per_node is not None:
        values[target.gpus] = job.gpus_per_node
    if target.nodes is not None:
        values[target.nodes] = job.nodes
    return values | {
        target.ranks: job.ranks_per_node,
        "env_vars": _variables(job),
        "retries": launch.restarts,
        "launcher": Torchrun(),
    }


def _special(job: Job) -> dict[str, Any]:
    """What only Slurm has."""
    launch = job.launch
    if launch.executor != "slurm":
        return {}
    for key, ours in (("time", "launch.hours"), ("nodes", "parallel.num_ranks and launch.ranks_per_node"), ("signal", "launch.hours")):
        if key in launch.options:
            raise ConfigError(f"launch.options.{key} follows from {ours}; set that instead.")
    seconds = round(launch.hours * 3600)
    return {
        "account": None,  # nemo-run demands it, Slurm need not
        "job_name_prefix": "r1z.",
        "time": f"{seconds // 3600:02}:{seconds % 3600 // 60:02}:{seconds % 60:02}",
        "signal": f"TERM@{_lead(job)}",
        "launcher": Torchrun(rdzv_port=f"${PORT}"),
        "setup_lines": "\n".join((*SLURM_LINES, *_exports(launch), *launch.setup)),
        "tunnel": _tunnel(launch.ssh),
    }


def _lead(job: Job) -> int:
    """Seconds before the time limit at which the ranks are told to stop."""
    lead = job.launch.lead_s
    return math.ceil(min(job.config.parallel.grace_s, job.launch.hours * 900) if lead is None else lead)


def _tunnel(ssh: SshConfig | None) -> Any:
    if ssh is None:
        return run.LocalTunnel(job_dir="")  # any other folder, and nemo-run submits a script that it did not put there
    return run.SSHTunnel(host=ssh.host, user=ssh.user, job_dir=ssh.folder, identity=ssh.identity)


def _variables(job: Job) -> dict[str, str]:
    """The environment of the ranks: what the supervisor gives to those of one machine, and what the user asks for."""
    variables = {
        "OMP_NUM_THREADS": str(job.config.parallel.threads_per_rank),
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "LOGLEVEL": "WARNING",  # of torchrun
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(math.ceil(job.config.parallel.grace_s)),  # torch/distributed/launcher/api.py
        "PYTHONUNBUFFERED": "1",
    }
    if job.is_local:
        variables["GLOO_SOCKET_IFNAME"] = "lo"  # one machine, whose name need not resolve
    variables["PYTHONPATH"] = str(PACKAGE.parent if job.is_local else CODE)
    environment = _environment(job.launch)
    if environment is not None:
        path = os.environ.get("PATH", "") if job.is_local else "$PATH"
        variables["PATH"] = f"{environment / 'bin'}:{path}"
    return variables if job.launch.executor == "slurm" else variables | _asked_for(job.launch)


def _asked_for(launch: LaunchConfig) -> dict[str, str]:
    return {name: str(value) for name, value in launch.variables.items()}


def _exports(launch: LaunchConfig) -> list[str]:
    """The user's variables as lines of a batch script: nemo-run would write the names in capitals and the values without quotes."""
    return [f"export {name}={shlex.quote(value)}" for name, value in _asked_for(launch).items()]


def _environment(launch: LaunchConfig) -> Path | None:
    """The virtual environment that brings torchrun and the libraries; None where the job has them anyway."""
    if launch.container is not None:
        return None
    found = Path(launch.environment or ".venv").absolute()
    if launch.ssh is not None:
        return None if launch.environment is None else Path(launch.environment)
    if (found / "bin" / "torchrun").exists():
        return found
    if launch.environment is not None:
        raise ConfigError(f"launch.environment {found} has no bin/torchrun; name the virtual environment that `make env` made.")
    if launch.executor == "local" and shutil.which("torchrun") is None:
        raise ConfigError("there is no torchrun here, neither on PATH nor in .venv; run `make env`, or set launch.environment.")
    return None


def _packager(name: str, code: Path) -> Any:
    """Takes the staged code along. SkyPilot's executors insist on git, which sees committed files only."""
    if name.startswith("skypilot"):
        return run.GitArchivePackager(include_pattern=str(code / "*"), include_pattern_relative_path=str(code))
    return run.PatternPackager(include_pattern=str(code / "*"), relative_path=str(code))
