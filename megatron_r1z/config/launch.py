"""Where `launch` starts a run, and how."""

# Without `from __future__ import annotations`: the command line of nemo-run reads the types of fields, not their names.
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_r1z.config.checks import check_not_negative, check_positive
from megatron_r1z.config.sources import Scalar
from megatron_r1z.errors import ConfigError

Executor = Literal["local", "slurm", "docker", "skypilot", "skypilot_jobs", "dgxcloud", "kubeflow", "lepton"]


@dataclass(frozen=True, kw_only=True)
class SshConfig:
    """A login node that `launch` submits from; its folder must be seen by the nodes of the job."""

    host: str
    """Name of the login node."""
    user: str
    """User there."""
    folder: str
    """Folder there for the files of jobs."""
    identity: str | None = None
    """Private key; without it nemo-run asks for a password."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Where `launch` starts a run, and how. A cluster file may have this section too; what the run's file says goes before it."""

    executor: Executor = "local"
    """`local`: torchrun on this machine; the others are nemo-run's executors of that name."""
    ranks_per_node: int | None = None
    """Default: the devices of a node of the cluster file; without one, all ranks are on one node."""
    hours: float = 4.0
    """Time limit of a Slurm job. `lead_s` before it, the ranks are told to save a checkpoint and end."""
    lead_s: float | None = None
    """Seconds before the time limit; default: `parallel.grace_s`, at most a quarter of `hours`."""
    restarts: int = 0
    """How often the job is started again after it failed or came to its time limit; it goes on from its last checkpoint. A run that ended
    with status 3 is not started again."""
    folder: str | None = None
    """Folder of the job that the run's relative paths start from; default: the current one."""
    environment: str | None = None
    """Virtual environment of the job; default: `.venv` of the current folder, where there is one and no container."""
    container: str | None = None
    """Image of the job, which then brings the libraries along. Slurm needs pyxis for it."""
    mounts: tuple[str, ...] = ()
    """What the container sees of the machine, as `/outside:/inside`."""
    variables: Mapping[str, Scalar] = field(default_factory=dict)
    """Environment variables of the job."""
    setup: tuple[str, ...] = ()
    """Shell lines that come before the ranks, such as `module load cuda`. Slurm and SkyPilot have a place for them."""
    ssh: SshConfig | None = None
    """Submit to Slurm on another machine."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of nemo-run's executor by its own names, such as `{account: me, partition: h100}` for Slurm."""

    def __post_init__(self) -> None:
        check_positive(self, "hours")
        check_not_negative(self, "restarts")
        if self.lead_s is not None and not 0 < self.lead_s < self.hours * 3600:
            raise ConfigError(
                f"launch.lead_s is {self.lead_s:g}; it must be above 0 and below the {self.hours * 3600:g} s of launch.hours."
            )
        if self.ranks_per_node is not None:
            check_positive(self, "ranks_per_node")
        if self.executor == "local":
            self._refuse("container", "mounts", "setup", why="a local run has the environment that it is started in")
        if self.container is None:
            self._refuse("mounts", why="there is no container")
        elif self.environment is not None:
            raise ConfigError("launch: environment and container are two places for the libraries to come from; set one.")
        if self.executor != "slurm":
            self._refuse("ssh", why=f"executor {self.executor} has no login node")

    def _refuse(self, *names: str, why: str) -> None:
        for name in names:
            if getattr(self, name):
                raise ConfigError(f"launch.{name} is set, but {why}; remove it, or choose another launch.executor.")


LAUNCH = "launch"
"""The section of a file that only `launch` reads."""
