"""`megatron-r1z launch`: from its options to what it prints and its exit status."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_r1z.errors import ConfigError
from megatron_r1z.launch import experiments
from megatron_r1z.launch.experiments import State
from megatron_r1z.launch.job import WORK, Job, make_job, make_jobs
from megatron_r1z.launch.sweep import Cell
from megatron_r1z.record.tables import align


def start(options: argparse.Namespace) -> int:
    """Submit a run, or print what would be submitted.

    Raises:
        UsageError: before anything is submitted.
        LaunchError: the job did not succeed.
    """
    if options.work not in WORK:
        raise ConfigError(f"--command is {options.work}; it must be one of {', '.join(WORK)}.")
    return _start([make_job(options.config, _overrides(options), work=options.work, cluster_path=options.cluster)], options)


def start_cells(cells: Sequence[Cell], options: argparse.Namespace) -> int:
    """Submit runs of a sweep as one experiment, or print what would be submitted.

    Raises:
        UsageError: before anything is submitted.
        LaunchError: a job did not succeed.
    """
    return _start(make_jobs(options.config, cells, _overrides(options), cluster_path=options.cluster), options)


def _overrides(options: argparse.Namespace) -> list[str]:
    return options.overrides if options.executor is None else [*options.overrides, f"launch.executor={options.executor}"]


def _start(jobs: Sequence[Job], options: argparse.Namespace) -> int:
    if options.dry_run:
        print("\n".join(experiments.scripts_of(jobs)))
        return 0
    states = experiments.submit(jobs, detach=options.detach)
    _print(states)
    if not options.detach:
        experiments.check(states)
    return 0


def about(options: argparse.Namespace) -> int:
    """State, logs or end of an experiment."""
    if len(options.overrides) > 1:
        raise ConfigError(f"launch {options.config} takes one experiment, not {len(options.overrides)}.")
    name = options.overrides[0] if options.overrides else None
    if options.config == "logs":
        experiments.print_logs(name)
    elif options.config == "cancel":
        _print(experiments.cancel(name))
    elif name is not None:
        _print(experiments.states(name))
    else:
        rows = [(state.experiment, state.name, state.state, state.executor, state.job or "-") for state in experiments.recent()]
        print("\n".join(align([("experiment", "run", "state", "executor", "job"), *rows])) if rows else "no experiments")
    return 0


def _print(states: Sequence[State]) -> None:
    for state in states:
        run = "" if len(states) == 1 else f" {state.name}"
        print(f"experiment {state.experiment}{run}: {state.state}, job {state.job or '-'} of {state.executor}; files in {state.folder}")
