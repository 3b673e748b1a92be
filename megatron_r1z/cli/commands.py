"""What each command does: a function of its options and of the command line as it was given, which returns the exit status."""

from __future__ import annotations

import argparse
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_r1z.cli.runs import (
    analyse_rank,
    check_analyse,
    check_evaluate,
    check_pretrain,
    check_train,
    convert_rank,
    evaluate_rank,
    pretrain_rank,
    run,
    start_ranks,
    train_rank,
)
from megatron_r1z.config import (
    ITEMSIZE,
    AnalyseConfig,
    EvaluateConfig,
    GradingConfig,
    ParallelConfig,
    PretrainConfig,
    TrainConfig,
    load_config,
)
from megatron_r1z.cost.plan_run import plan_run
from megatron_r1z.cost.refit_report import Machine, PlanReport, make_plan_report, render_plan
from megatron_r1z.cost.report import Report, refusal, render, render_search
from megatron_r1z.cost.search import enough_ranks, nearest, search
from megatron_r1z.errors import ConfigError, R1ZError
from megatron_r1z.host.rank import STOPPED
from megatron_r1z.launch import sweep as sweeps
from megatron_r1z.record.result_files import to_json
from megatron_r1z.rehearse.command import rehearse_run
from megatron_r1z.weights.folders import Kind

if TYPE_CHECKING:
    from megatron_r1z.data.report import DataReport

KINDS: dict[Kind, str] = {"hf": "a Hugging Face folder", "megatron": "a Megatron checkpoint"}


def train(options: argparse.Namespace, arguments: list[str]) -> int:
    """Reinforcement learning by Dr. GRPO."""
    config = load_config(TrainConfig, options.config, options.overrides)
    return run(config, check_train, train_rank, options, arguments)


def pretrain(options: argparse.Namespace, arguments: list[str]) -> int:
    """Next-token training on text."""
    config = load_config(PretrainConfig, options.config, options.overrides)
    return run(config, check_pretrain, pretrain_rank, options, arguments)


def evaluate(options: argparse.Namespace, arguments: list[str]) -> int:
    """Accuracy on question files."""
    config = load_config(EvaluateConfig, options.config, options.overrides)
    return run(config, check_evaluate, evaluate_rank, options, arguments)


def analyse(options: argparse.Namespace, arguments: list[str]) -> int:
    """What a base model can do."""
    config = load_config(AnalyseConfig, options.config, options.overrides)
    return run(config, check_analyse, analyse_rank, options, arguments)


def convert(options: argparse.Namespace, arguments: list[str]) -> int:
    """Weights from one kind of folder to the other."""
    from megatron_r1z.weights.convert import check_target, plan_conversion

    num_ranks = options.tp * options.pp if options.num_ranks is None else options.num_ranks
    parallel = ParallelConfig(num_ranks=num_ranks, tensor_parallel_size=options.tp, pipeline_parallel_size=options.pp)
    conversion = plan_conversion(
        options.source,
        options.target,
        parallel,
        kind=options.to,
        model=options.model,
        dtype=options.dtype,
        shard_gb=options.shard_gb,
    )
    return start_ranks(
        parallel,
        f"{options.source} becomes {KINDS[conversion.kind]} of {options.dtype or conversion.precision.policy} in {options.target}",
        None,
        lambda: check_target(conversion, overwrite=options.overwrite),
        lambda: convert_rank(conversion),
        options,
        arguments,
    )


def data(options: argparse.Namespace, _arguments: list[str]) -> int:
    """What is in the question files of a run."""
    from megatron_r1z.data.report import make_report, render

    report = make_report(load_config(TrainConfig, options.config, options.overrides))
    _write_json(options.json, report)
    print(render(report))
    return 0


def _write_json(path: str | None, report: DataReport | PlanReport | Report) -> None:
    """Write a report where `--json` asks for it; before it is printed, since the reader of standard output may go away."""
    if path is not None:
        Path(path).write_text(to_json(report.to_tree(), indent=1) + "\n", encoding="utf-8")


def grade(options: argparse.Namespace, _arguments: list[str]) -> int:
    """Verdicts on rows from standard input."""
    from megatron_r1z.grading.command import grade_lines
    from megatron_r1z.grading.comparer import Comparer
    from megatron_r1z.grading.grader import EXTRACTORS

    settings = GradingConfig(mode=options.mode, workers=options.workers, timeout_s=options.timeout)
    comparer = Comparer(settings.mode, settings.workers, settings.timeout_s)
    try:
        comparer.self_test()
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # which JSON is in, whatever the terminal's language
        counts = grade_lines(sys.stdin.buffer, sys.stdout, comparer, EXTRACTORS[options.reward])
    finally:
        comparer.close()
    print(", ".join(f"{count} {kind.value}" for kind, count in counts.items() if count) or "no rows", file=sys.stderr)
    return 0


def plan(options: argparse.Namespace, _arguments: list[str]) -> int:
    """What a run costs, or what a refit moves."""
    if options.config is not None:
        return _plan_run(options)
    if None in (options.model, options.source, options.destination):
        raise ConfigError("plan needs the YAML file of a run, or --model, --from and --to for a refit alone; see megatron-r1z plan --help.")
    machine = Machine(
        ranks_per_node=options.ranks_per_node,
        round_bytes=options.round_mb << 20,
        local_gbs=options.local_gbs,
        node_gbs=options.node_gbs,
        network_gbs=options.network_gbs,
    )
    report = make_plan_report(options.model, options.source, options.destination, ITEMSIZE[options.dtype], machine)
    _write_json(options.json, report)
    print(render_plan(report))
    return 0


def doctor(_options: argparse.Namespace, _arguments: list[str]) -> int:
    """What this machine can do."""
    from megatron_r1z.doctor import diagnose, probe, render

    print(render(diagnose(probe())))
    return 0


def launch(options: argparse.Namespace, _arguments: list[str]) -> int:
    """A run as a job, or what became of one."""
    from megatron_r1z.launch.command import about, start

    return about(options) if options.config in ("status", "logs", "cancel") else start(options)


def sweep(options: argparse.Namespace, _arguments: list[str]) -> int:
    """A run for each combination of values, and their table."""
    if options.executor is None and (options.dry_run or options.detach or options.cluster):
        raise ConfigError("--dry-run, --detach and --cluster are about jobs; say with --executor where they are to run.")
    axes = [sweeps.parse_axis(text) for text in options.over]
    cells = sweeps.make_cells(options.config, axes, options.overrides)
    sweeps.check_folders(cells)
    failed: list[sweeps.Cell] = []
    stopped = False
    try:
        if options.executor is not None and not options.table:
            _launch_sweep(options, [cell for cell in cells if not sweeps.is_through(cell)])
        elif not options.table:
            failed, stopped = sweeps.run_here(options.config, cells)
    finally:
        if not options.dry_run:
            scores = [sweeps.score(cell) for cell in cells]
            sweeps.write(axes, cells, scores)
            print(f"\n{sweeps.render(axes, cells, scores)}\n\ntable        {sweeps.sweep_folder(cells) / sweeps.TABLE_FILE}")
    if failed:
        raise R1ZError(f"{len(failed)} of {len(cells)} runs failed, the first is {failed[0].name}; the same command tries them again.")
    return STOPPED if stopped else 0


def _launch_sweep(options: argparse.Namespace, cells: list[sweeps.Cell]) -> None:
    from megatron_r1z.launch.command import start_cells

    if options.executor == "local":
        raise ConfigError("sweep runs on this machine by itself, one run after the other; leave out --executor local.")
    if cells:
        start_cells(cells, options)


def _plan_run(options: argparse.Namespace) -> int:
    report = plan_run(options.config, options.overrides, options.cluster, options.prompt_tokens, options.response_tokens)
    cost = report.cost
    _write_json(options.json, report)
    if options.search:
        found = search(cost)
        if found:
            print(render_search(found, cost))
    else:
        found = []
        print(render(report))
    if cost.cluster is not None and not found and cost.shortfall() is not None:
        near = nearest(cost)
        raise ConfigError(refusal(cost, near, enough_ranks(cost) if near is None else None))
    return 0


def rehearse(options: argparse.Namespace, _arguments: list[str]) -> int:
    """Ranks of a run without a GPU."""
    rehearse_run(options.config, options.overrides, options.cluster, rank=options.rank, every_role=options.every_role)
    return 0


PRINTING = (grade, data, plan, doctor)
"""Those that only print, so that they end with the reader of their output."""
