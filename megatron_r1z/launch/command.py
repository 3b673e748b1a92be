"""`megatron-r1z launch`: from its options to what it prints and its exit status."""

from __future__ import annotations

import argparse

from megatron_r1z.errors import ConfigError, LaunchError
from megatron_r1z.launch import experiments
from megatron_r1z.launch.experiments import SUCCEEDED, State
from megatron_r1z.launch.job import WORK, make_job
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
    if options.dry_run:
        print(experiments.script_of(job))
        return 0
    state = experiments.submit(job, detach=options.detach)
    print(_line(state))
    if not options.detach and state.state != SUCCEEDED:
        raise LaunchError(
            f"experiment {state.experiment} ended as {state.state}; `megatron-r1z launch logs {state.experiment}` shows what it said, and "
            "the same launch goes on from its last checkpoint."
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
        print(_line(experiments.cancel(name)))
    elif name is not None:
        print(_line(experiments.state(name)))
    else:
        rows = [(state.experiment, state.state, state.executor, state.job or "-") for state in experiments.recent()]
        print("\n".join(align([("experiment", "state", "executor", "job"), *rows])) if rows else "no experiments")
    return 0


def _line(state: State) -> str:
    return f"experiment {state.experiment}: {state.state}, job {state.job or '-'} of {state.executor}; files in {state.folder}"
