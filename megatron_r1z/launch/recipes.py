"""Runs as nemo-run's configurations, for those who write Python: `recipe` is a `run.Partial` whose every field can be changed.

    import nemo_run as run
    from megatron_r1z.launch.recipes import recipe

    task = recipe("configs/qwen2.5-7b-h100.yaml", cluster="configs/clusters/h100-8.yaml")
    task.config.optimizer.lr = 2e-6
    task.launch.executor = "slurm"
    run.run(task, direct=True)

`direct`, because `start` itself submits the job: nemo-run cannot be in the environment of the ranks, where it would have to unpack the
configuration, so what is submitted is `python -m megatron_r1z train` with the configuration as YAML. The file of recipes with a command
line is examples/recipes.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nemo_run as run

from megatron_r1z.config import LaunchConfig, TrainConfig
from megatron_r1z.cost.cluster import Cluster, load_cluster
from megatron_r1z.launch.experiments import State, check, submit
from megatron_r1z.launch.job import make_job, place


def start(name: str, config: TrainConfig, launch: LaunchConfig, cluster: Cluster | None = None, detach: bool = False) -> State:
    """Submit a training run and, unless `detach`, follow it to its end.

    Raises:
        ConfigError: nothing could be submitted like this.
        LaunchError: the job did not succeed.
    """
    (state,) = submit([place(name, "train", config, launch, cluster)], detach=detach)
    if not detach:
        check([state])
    return state


def recipe(path: str | Path, *overrides: str, cluster: str | Path | None = None) -> run.Partial:
    """A training run's file as a task of nemo-run, which starts it as a job.

    Raises:
        ConfigError: one sentence with the file and the key.
    """
    job = make_job(str(path), overrides, cluster_path=None if cluster is None else str(cluster))
    place_of_work = None if cluster is None else _configurable(load_cluster(cluster))
    return run.Partial(start, name=job.name, config=_configurable(job.config), launch=_configurable(job.launch), cluster=place_of_work)


def _configurable(value: Any) -> Any:
    """A record and those in it as `run.Config`; building it checks everything again."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return run.Config(type(value), **{item.name: _configurable(getattr(value, item.name)) for item in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {name: _configurable(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_configurable(item) for item in value)
    return value
