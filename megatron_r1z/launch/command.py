"""`megatron-r1z launch`: from its options to what it prints and its exit status."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_r1z.errors import ConfigError, LaunchError
from megatron_r1z.launch import experiments
from megatron_r1z.launch.experiments import SUCCEEDED, State
from megatron_r1z.launch.job import WORK, Job, make_job
from megatron_r1z.tables import align


def start(options: argparse.Namespace) -> int:
    """Submit a run, or print what would be submitted.

    Raises:
        UsageError: before anything is submitted.
        LaunchError: the job did not succeed.
    """
    if options.work not in WORK:
        raise ConfigError(f"--command is {options.work}; it must be one of {', '.join(WORK)}.")
    chosen = [] if options.executor is None else [f"launch.executor={options.executor}"]
    job = make_job(options.config, [*options.overrides, *chosen], work=options.work, cluster_path=options.cluster)
    return start_jobs([job], options)


def start_jobs(jobs: Sequence[Job], options: argparse.Namespace) -> int:
    """Submit jobs as one experiment, or print what would be submitted.

    Raises:
        UsageError: before anything is submitted.
        LaunchError: a job did not succeed.
    """
    if options.dry_run:
        print("\n".join(experiments.scripts_of(jobs)))
        return 0
    states = experiments.submit(jobs, detach=options.detach)
    _print(states)
    failed = [state for state in states if state.state != SUCCEEDED]
    if failed and not options.detach:
        which = f"experiment {failed[0].experiment}" + (f", {len(failed)} of {len(states)} jobs," if len(states) > 1 else "")
        raise LaunchError(
            f"{which} ended as {failed[0].state}; `megatron-r1z launch logs {failed[0].experiment}` shows what it said, and the same "
            "launch goes on from its last checkpoint."
        )
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
