"""What `launch` starts: one command of ours on so many nodes, with the code and the configuration as they were at that moment."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_r1z.config import (
    LAUNCH,
    AnalyseConfig,
    AnyConfig,
    EvaluateConfig,
    LaunchConfig,
    PretrainConfig,
    TrainConfig,
    dump_config,
    load_config,
    load_launch,
)
from megatron_r1z.config.yaml_tree import read_tree
from megatron_r1z.cost.cluster import Cluster, load_cluster
from megatron_r1z.errors import ConfigError
from megatron_r1z.launch.sweep import Cell, name_of

Work = Literal["train", "pretrain", "evaluate", "analyse"]
WORK: tuple[Work, ...] = get_args(Work)
KINDS: dict[Work, Any] = {"train": TrainConfig, "pretrain": PretrainConfig, "evaluate": EvaluateConfig, "analyse": AnalyseConfig}

JOB_FOLDER = Path("/nemo_run")
"""Where a job sees its own folder. nemo-run mounts it there in a container and puts the real path in its place without one."""
CODE = JOB_FOLDER / "code"
PACKAGE = Path(__file__).parents[1]
"""Our code, as it is here."""
RUN_FILE = "run.yaml"
"""The resolved configuration, beside the code."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run and the place that it is to be started in."""

    experiment: str
    """What it is submitted as, alone or with others: letters, digits, dots, dashes and underscores."""
    name: str
    """Its own name in the experiment, of the same letters."""
    work: Work
    config: AnyConfig
    launch: LaunchConfig
    nodes: int
    ranks_per_node: int
    gpus_per_node: int | None
    """Devices to ask for on each node; None: a run without GPUs, or one whose executor is asked by `launch.options`."""

    @property
    def folder(self) -> Path:
        """Folder in the job that relative paths of the run start from."""
        return Path(self.launch.folder) if self.launch.folder is not None else Path.cwd()

    @property
    def is_local(self) -> bool:
        """It runs here, with the code and in the environment that are here."""
        return self.launch.executor == "local"

    def arguments(self, code: Path) -> list[str]:
        """What follows `python -m megatron_r1z`; `code` is the folder that the job finds its configuration in."""
        return ["-C", str(self.folder), self.work, str(code / RUN_FILE)]


def make_job(path: str, overrides: Sequence[str] = (), *, work: Work = "train", cluster_path: str | None = None) -> Job:
    """Read a run's file and, where one is given, the cluster's, and check that they go together.

    Raises:
        ConfigError: one sentence, before anything is submitted.
    """
    return place(Path(path).stem, work, load_config(KINDS[work], path, overrides), *_where(path, overrides, cluster_path))


def make_jobs(path: str, cells: Sequence[Cell], overrides: Sequence[str] = (), *, cluster_path: str | None = None) -> list[Job]:
    """Runs of a sweep over `path` as the jobs of one experiment, all in the same place.

    Raises:
        ConfigError: one sentence, before anything is submitted.
    """
    launch, cluster = _where(path, overrides, cluster_path)
    return [dataclasses.replace(place(Path(path).stem, "train", cell.config, launch, cluster), name=cell.name) for cell in cells]


def _where(path: str, overrides: Sequence[str], cluster_path: str | None) -> tuple[LaunchConfig, Cluster | None]:
    """What the files of a run and of a cluster, if one is given, say of the place."""
    if cluster_path is None:
        return load_launch(path, overrides), None
    return load_launch(path, overrides, read_tree(cluster_path).values.get(LAUNCH, {})), load_cluster(cluster_path)


def place(name: str, work: Work, config: AnyConfig, launch: LaunchConfig, cluster: Cluster | None) -> Job:
    """Spread the ranks of a run over equal nodes.

    Raises:
        ConfigError: the ranks do not fill nodes, or the cluster has too few of them.
    """
    ranks = config.parallel.num_ranks
    per_node = launch.ranks_per_node or min(ranks, ranks if cluster is None else cluster.gpus_per_node)
    if cluster is not None and per_node > cluster.gpus_per_node:
        raise ConfigError(f"launch.ranks_per_node is {per_node}, but a node of the cluster has {cluster.gpus_per_node} devices.")
    if ranks % per_node:
        raise ConfigError(
            f"{ranks} ranks do not fill nodes of {per_node}; change parallel.num_ranks to a multiple of it, or launch.ranks_per_node."
        )
    nodes = ranks // per_node
    if cluster is not None and nodes > cluster.nodes:
        raise ConfigError(f"{ranks} ranks, {per_node} on a node, need {nodes} nodes; the cluster has {cluster.nodes}.")
    if launch.executor in ("local", "docker") and nodes > 1:
        raise ConfigError(f"executor {launch.executor} has one node, and {ranks} ranks of {per_node} on a node need {nodes}.")
    gpus = None if cluster is None else per_node
    safe = name_of(name)
    return Job(
        experiment=safe,
        name=safe,
        work=work,
        config=config,
        launch=launch,
        nodes=nodes,
        ranks_per_node=per_node,
        gpus_per_node=gpus,
    )


def stage(job: Job, folder: Path) -> None:
    """Put into an empty folder what a job takes along and runs, also when it is started again: our code and the resolved configuration."""
    if not job.is_local:
        shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / RUN_FILE).write_text(dump_config(job.config), encoding="utf-8")
