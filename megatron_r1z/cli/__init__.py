"""The command line.

Exit status: 0 success, 1 a run that failed, 2 a mistake that the user can put right, 3 training that came to nothing, which another start
alone would not change, 130 stopped by a signal.

A command that only prints ends with 141 when the reader of its output has gone, as other tools do; one that runs something goes on.

`train`, `pretrain`, `evaluate`, `analyse` and `convert` start their ranks themselves; under torchrun the same command is one rank.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from megatron_r1z.config import (
    ITEMSIZE,
    AnalyseConfig,
    AnyConfig,
    EvaluateConfig,
    GradingConfig,
    GradingMode,
    ParallelConfig,
    PretrainConfig,
    RewardForm,
    TrainConfig,
    load_config,
)
from megatron_r1z.cost.plan_run import PROMPT_TOKENS, RESPONSE_SHARE, plan_run
from megatron_r1z.cost.refit_report import ENGINE_KEYS, POLICY_KEYS, Machine, PlanReport, make_plan_report, render_plan
from megatron_r1z.cost.report import Report, refusal, render, render_search
from megatron_r1z.cost.search import enough_ranks, nearest, search
from megatron_r1z.errors import ConfigError, MissingExtraError, R1ZError
from megatron_r1z.host.collector import paused_collector
from megatron_r1z.host.streams import READER_GONE, lead_nowhere, outlive_readers, reader_is_gone
from megatron_r1z.host.supervisor import STOPPED, Patience, is_rank, is_supervised, leftover_notice, rank_entry, run_ranks
from megatron_r1z.launch import sweep
from megatron_r1z.record.result_files import to_json
from megatron_r1z.rehearse.command import rehearse_run
from megatron_r1z.weights.folders import Kind

if TYPE_CHECKING:
    from megatron_r1z.assemble import Weights
    from megatron_r1z.data.report import DataReport
    from megatron_r1z.loop import Run
    from megatron_r1z.pretrain import Pretraining
    from megatron_r1z.weights.convert import Conversion

Config = TypeVar("Config", TrainConfig, PretrainConfig)
AnyRun = TypeVar("AnyRun", "Run", "Pretraining")

KINDS: dict[Kind, str] = {"hf": "a Hugging Face folder", "megatron": "a Megatron checkpoint"}
EXAMPLES = {
    "train": "megatron-r1z train configs/quickstart.yaml optimizer.lr=1e-4 logging.folder=runs/try",
    "pretrain": "megatron-r1z pretrain configs/quickstart-pretrain.yaml corpus.steps=200",
    "evaluate": "megatron-r1z evaluate configs/quickstart.yaml model.path=runs/quickstart/rl/hf/final logging.folder=runs/try",
    "analyse": "megatron-r1z analyse configs/analyse-smollm2.yaml analysis.questions.limit=100 analysis.judge.url=http://localhost:8000/v1",
    "data": "megatron-r1z data configs/quickstart.yaml",
    "convert": "megatron-r1z convert runs/quickstart/rl/checkpoints/step_000016 exported --dtype bf16",
    "grade": "megatron-r1z grade --mode strict < answers.jsonl > verdicts.jsonl",
    "doctor": "megatron-r1z doctor",
    "sweep": (
        "megatron-r1z sweep configs/template-x-questions-1.5b.yaml --over 'data.template=[r1, qwen_math, \"no\"]'\n"
        "         megatron-r1z sweep configs/quickstart.yaml --over algorithm.name=[drgrpo,grpo] --over data.seed,rollout.seed=[0,1,2]"
    ),
    "launch": (
        "megatron-r1z launch configs/quickstart.yaml --executor local\n"
        "         megatron-r1z launch configs/qwen2.5-7b-h100.yaml --cluster my-cluster.yaml launch.hours=12 launch.restarts=3\n"
        "         megatron-r1z launch status"
    ),
    "rehearse": "megatron-r1z rehearse configs/llama3.1-70b-h100.yaml --cluster configs/clusters/h100-64.yaml --every-role",
    "plan": (
        "megatron-r1z plan configs/qwen2.5-7b-h100.yaml --cluster configs/clusters/h100-8.yaml\n"
        "         megatron-r1z plan --model models/Llama-3-70B --from tp=8,pp=4,vpp=2 --to tp=8"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    try:
        try:
            return _main(sys.argv[1:] if argv is None else list(argv))
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        if not reader_is_gone():
            raise
        lead_nowhere(1)  # what is left in the buffer, which the interpreter flushes at its end
        return READER_GONE


def _main(arguments: list[str]) -> int:
    options = _parse(arguments)
    if options.command not in (_grade, _data, _plan, _doctor) or None in (sys.stdout, sys.stderr):
        outlive_readers()  # a run is not lost because a pager was closed
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal cannot show is no reason to fail
    if options.folder is not None:
        os.chdir(options.folder)
        arguments = arguments[2 if arguments[0] == "-C" else 1 :]  # for ranks, which are started in that folder
    command: Callable[[argparse.Namespace, list[str]], int] = options.command
    try:
        return command(options, arguments)
    except R1ZError as error:
        if options.debug:
            raise
        print(f"megatron-r1z: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        if options.debug:
            raise
        return STOPPED
    except ModuleNotFoundError as error:  # a base installation, asked for more than planning
        module = error.name or ""
        if options.debug or module.split(".")[0] == "megatron_r1z":
            raise
        print(f"megatron-r1z: {MissingExtraError.of(module)}", file=sys.stderr)
        return 2


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; overrides may also stand after options, where argparse leaves them over."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    strange = [text for text in rest if text.startswith("-") or "overrides" not in options]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-r1z", description="Dr. GRPO on a Megatron-core policy, with rollouts by vLLM.")
    parser.add_argument("-C", dest="folder", metavar="FOLDER", type=_folder, help="work in FOLDER instead of the current one")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, command, text in (
        ("train", _train, "reinforcement learning by Dr. GRPO from a run's YAML"),
        ("pretrain", _pretrain, "next-token training on text from a run's YAML"),
        ("evaluate", _evaluate, "accuracy of a model folder or checkpoint on question files; goes on where it was stopped"),
        ("analyse", _analyse, "what a base model can do under several templates and temperatures; goes on where it was stopped"),
        ("data", _data, "what is in the question files of a run, and whether training holds evaluation questions"),
    ):
        sub = _add_command(commands, name, command, text)
        sub.add_argument("config", help="YAML file, see configs/ and docs/configuration.md")
        sub.add_argument("overrides", nargs="*", metavar="section.field=value", help="change a value of the file")
        if name == "data":
            sub.add_argument("--json", metavar="FILE", help="write the report to FILE as well")
    _add_convert(commands)
    _add_grade(commands)
    _add_plan(commands)
    _add_rehearse(commands)
    _add_sweep(commands)
    _add_launch(commands)
    text = "what this machine can do: libraries, what takes the place of missing ones, FP8 recipes; always ends with status 0"
    _add_command(commands, "doctor", _doctor, text)
    return parser


def _add_command(commands: Any, name: str, command: Callable[[argparse.Namespace, list[str]], int], text: str) -> argparse.ArgumentParser:
    sub: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"example: {EXAMPLES[name]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("--debug", action="store_true", help="show tracebacks")
    sub.set_defaults(command=command)
    return sub


def _add_convert(commands: Any) -> None:
    text = "the weights of a checkpoint as a Hugging Face folder, or the other way round; the optimizer's state is left behind"
    sub = _add_command(commands, "convert", _convert, text)
    sub.add_argument("source", type=Path, metavar="SOURCE", help="model folder, or checkpoint of a run or of an earlier conversion")
    sub.add_argument("target", type=Path, metavar="TARGET", help="folder to write; appears when it is complete")
    sub.add_argument("--to", choices=get_args(Kind), help="what to write (default: the kind that SOURCE is not)")
    sub.add_argument("--model", type=Path, metavar="FOLDER", help="config.json and tokenizer (default: what SOURCE was made with)")
    sub.add_argument(
        "--dtype", choices=("bf16", "fp32", "fp8"), help="number format to write (default: that of SOURCE); fp8: blocks and scales"
    )
    sub.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel size")
    sub.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline-parallel size")
    sub.add_argument("--num-ranks", type=int, metavar="N", help="processes that share the work (default: tp x pp)")
    sub.add_argument("--shard-gb", type=float, metavar="GB", help="bound of a safetensors file (default: 5)")
    sub.add_argument("--overwrite", action="store_true", help="replace TARGET if it holds weights")


def _add_grade(commands: Any) -> None:
    text = (
        "verdicts on JSONL from standard input: each row has 'answer', or a 'response' with the answer in it, and 'reference'; "
        "the rows come out with 'verdict' and 'reward'"
    )
    sub = _add_command(commands, "grade", _grade, text)
    sub.add_argument("--mode", choices=get_args(GradingMode), default="strict", help="how answers are compared (docs/grading.md)")
    forms = [form for form in get_args(RewardForm) if form != "auto"]
    sub.add_argument("--reward", choices=forms, default="boxed", help="where a response has its answer")
    sub.add_argument("--workers", type=int, default=1, help="processes that compare")
    sub.add_argument("--timeout", type=float, default=GradingConfig.timeout_s, metavar="SECONDS", help="limit of one comparison")


def _add_plan(commands: Any) -> None:
    text = (
        "what a run costs on a cluster before it is started: memory of each rank, seconds of each phase, GPU-hours; exit status 2 if it "
        "does not fit. With --model: what a refit between two layouts moves. Needs neither ranks nor weights nor a GPU"
    )
    sub = _add_command(commands, "plan", _plan, text)
    sub.add_argument("config", nargs="?", help="YAML file of a training run")
    sub.add_argument("overrides", nargs="*", metavar="section.field=value", help="change a value of the file")
    sub.add_argument("--json", metavar="FILE", help="write the report to FILE as well")
    run = sub.add_argument_group("of a run")
    run.add_argument("--cluster", metavar="FILE", help="YAML file of devices, nodes and links (configs/clusters/); without it: memory only")
    run.add_argument("--search", action="store_true", help="list the fastest layouts of the run that fit the cluster")
    run.add_argument("--prompt-tokens", type=float, metavar="N", help=f"assumed mean of a prompt (default: {PROMPT_TOKENS}, or less)")
    run.add_argument(
        "--response-tokens", type=float, metavar="N", help=f"assumed mean of a response (default: the budget over {RESPONSE_SHARE})"
    )
    refit = sub.add_argument_group("of a refit alone")
    refit.add_argument("--model", metavar="FOLDER", help="model folder, or its config.json alone")
    refit.add_argument("--from", dest="source", metavar="POLICY", help=f"degrees of the policy; keys: {', '.join(POLICY_KEYS)}")
    refit.add_argument(
        "--to",
        dest="destination",
        metavar="ENGINES",
        help=f"degrees of the engines; keys: {', '.join(ENGINE_KEYS)} (so many on ranks of their own; without it, on the policy's ranks)",
    )
    refit.add_argument("--dtype", choices=ITEMSIZE, default="bf16", help="number format of the engines")
    for option, kind, default, help_text in (
        ("--ranks-per-node", int, Machine.ranks_per_node, "consecutive ranks that share a node"),
        ("--round-mb", int, Machine.round_bytes >> 20, "MiB that a rank sends and receives at most in one round"),
        ("--local-gbs", float, Machine.local_gbs, "assumed GB/s of copies within a rank"),
        ("--node-gbs", float, Machine.node_gbs, "assumed GB/s of a rank within its node, each direction"),
        ("--network-gbs", float, Machine.network_gbs, "assumed GB/s of a rank between nodes, each direction"),
    ):
        refit.add_argument(option, type=kind, default=default, metavar="N", help=f"{help_text} (default: {default:g})")


def _add_launch(commands: Any) -> None:
    text = (
        "start a run as a job, here or on a cluster, by nemo-run: ranks under torchrun, code and configuration as they are now; exit "
        "status 0 only if the job succeeded. `launch status|logs|cancel [EXPERIMENT]` is about one that was started (default: the last)"
    )
    sub = _add_command(commands, "launch", _launch, text)
    sub.add_argument("config", metavar="CONFIG|status|logs|cancel", help="YAML file of a run, or what to do with an experiment")
    sub.add_argument("overrides", nargs="*", metavar="section.field=value", help="change a value of the file; its section launch says how")
    sub.add_argument("--command", dest="work", default="train", metavar="COMMAND", help="train (default), pretrain, evaluate or analyse")
    _add_place(sub)


def _add_rehearse(commands: Any) -> None:
    text = "a rank of a run on a machine without a GPU: whole steps by the real libraries without their kernels, memory beside `plan`"
    sub = _add_command(commands, "rehearse", _rehearse, text)
    sub.add_argument("config", help="YAML file of a training run")
    sub.add_argument("overrides", nargs="*", metavar="section.field=value", help="change a value of the file")
    sub.add_argument("--cluster", required=True, metavar="FILE", help="whose device is pretended, see configs/clusters/")
    which = sub.add_mutually_exclusive_group()
    which.add_argument("--rank", type=int, metavar="N", help="this rank of the policy alone; default: the first stage, and an engine")
    which.add_argument("--every-role", action="store_true", help="first, middle and last stage, and an engine")


def _add_sweep(commands: Any) -> None:
    text = (
        "train once for every combination of some values, in folders below that of the file, and print a table; goes on where it "
        "was stopped. One run after the other on this machine, or with --executor all of them as jobs of one experiment (docs/launch.md)"
    )
    sub = _add_command(commands, "sweep", _sweep, text)
    sub.add_argument("config", help="YAML file of a training run")
    sub.add_argument("overrides", nargs="*", metavar="section.field=value", help="change a value of the file for all runs")
    sub.add_argument(
        "--over",
        action="append",
        required=True,
        metavar="FIELD=[VALUE,...]",
        help="values of a field in turn, or of several (FIELD,FIELD=...) that take the same; once for each axis",
    )
    sub.add_argument("--table", action="store_true", help="print the table of what there is, and run nothing")
    _add_place(sub)


def _add_place(sub: argparse.ArgumentParser) -> None:
    """Options of the commands that submit jobs."""
    sub.add_argument(
        "--cluster", metavar="FILE", help="YAML file of devices and nodes (configs/clusters/), with a section launch of its own"
    )
    sub.add_argument("--executor", metavar="NAME", help="short for launch.executor=NAME")
    sub.add_argument("--dry-run", action="store_true", help="print what would be submitted")
    sub.add_argument("--detach", action="store_true", help="do not wait for the end of the job")


def _folder(text: str) -> str:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    return text


def _train(options: argparse.Namespace, arguments: list[str]) -> int:
    config = load_config(TrainConfig, options.config, options.overrides)
    return _run(config, lambda: _check_train(config), lambda: _train_rank(config), options, arguments)


def _pretrain(options: argparse.Namespace, arguments: list[str]) -> int:
    config = load_config(PretrainConfig, options.config, options.overrides)
    return _run(config, lambda: _check_pretrain(config), lambda: _pretrain_rank(config), options, arguments)


def _evaluate(options: argparse.Namespace, arguments: list[str]) -> int:
    config = load_config(EvaluateConfig, options.config, options.overrides)
    return _run(config, lambda: _check_evaluate(config), lambda: _evaluate_rank(config), options, arguments)


def _analyse(options: argparse.Namespace, arguments: list[str]) -> int:
    config = load_config(AnalyseConfig, options.config, options.overrides)
    return _run(config, lambda: _check_analyse(config), lambda: _analyse_rank(config), options, arguments)


def _convert(options: argparse.Namespace, arguments: list[str]) -> int:
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
    return _start_ranks(
        parallel,
        f"{options.source} becomes {KINDS[conversion.kind]} of {options.dtype or conversion.precision.policy} in {options.target}",
        None,
        lambda: check_target(conversion, overwrite=options.overwrite),
        lambda: _convert_rank(conversion),
        options,
        arguments,
    )


def _data(options: argparse.Namespace, _arguments: list[str]) -> int:
    from megatron_r1z.data.report import make_report, render

    report = make_report(load_config(TrainConfig, options.config, options.overrides))
    _write_json(options.json, report)
    print(render(report))
    return 0


def _write_json(path: str | None, report: DataReport | PlanReport | Report) -> None:
    """Write a report where `--json` asks for it; before it is printed, since the reader of standard output may go away."""
    if path is not None:
        Path(path).write_text(to_json(report.to_tree(), indent=1) + "\n", encoding="utf-8")


def _grade(options: argparse.Namespace, _arguments: list[str]) -> int:
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


def _plan(options: argparse.Namespace, _arguments: list[str]) -> int:
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


def _doctor(_options: argparse.Namespace, _arguments: list[str]) -> int:
    from megatron_r1z.doctor import diagnose, probe, render

    print(render(diagnose(probe())))
    return 0


def _launch(options: argparse.Namespace, _arguments: list[str]) -> int:
    from megatron_r1z.launch.command import about, start

    return about(options) if options.config in ("status", "logs", "cancel") else start(options)


def _sweep(options: argparse.Namespace, _arguments: list[str]) -> int:
    if options.executor is None and (options.dry_run or options.detach or options.cluster):
        raise ConfigError("--dry-run, --detach and --cluster are about jobs; say with --executor where they are to run.")
    axes = [sweep.parse_axis(text) for text in options.over]
    cells = sweep.make_cells(options.config, axes, options.overrides)
    sweep.check_folders(cells)
    failed: list[sweep.Cell] = []
    stopped = False
    try:
        if options.executor is not None and not options.table:
            _launch_sweep(options, [cell for cell in cells if not sweep.is_through(cell)])
        elif not options.table:
            failed, stopped = sweep.run_here(options.config, cells)
    finally:
        if not options.dry_run:
            scores = [sweep.score(cell) for cell in cells]
            sweep.write(axes, cells, scores)
            print(f"\n{sweep.render(axes, cells, scores)}\n\ntable        {sweep.sweep_folder(cells) / sweep.TABLE_FILE}")
    if failed:
        raise R1ZError(f"{len(failed)} of {len(cells)} runs failed, the first is {failed[0].name}; the same command tries them again.")
    return STOPPED if stopped else 0


def _launch_sweep(options: argparse.Namespace, cells: list[sweep.Cell]) -> None:
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


def _rehearse(options: argparse.Namespace, _arguments: list[str]) -> int:
    rehearse_run(options.config, options.overrides, options.cluster, rank=options.rank, every_role=options.every_role)
    return 0


def _run(
    config: AnyConfig,
    check: Callable[[], None],
    rank_main: Callable[[], int],
    options: argparse.Namespace,
    arguments: list[str],
) -> int:
    """A run of which a configuration says everything."""
    folder = Path(config.logging.folder)
    return _start_ranks(config.parallel, f"the run folder is {folder}", folder / "errors", check, rank_main, options, arguments)


def _start_ranks(
    parallel: ParallelConfig,
    purpose: str,
    error_folder: Path | None,
    check: Callable[[], None],
    rank_main: Callable[[], int],
    options: argparse.Namespace,
    arguments: list[str],
) -> int:
    """Check, then be one rank (the environment says so) or start all of them."""
    if not is_supervised():
        check()
    if is_rank():
        # Of Megatron and vLLM about libraries that this machine does not need, such as apex; of torch about names that Megatron calls.
        own = r"megatron\.core|torch\.overrides|torch\.distributed\.c10d_logger|megatron_r1z\.policy\.cpu|vllm"
        warnings.filterwarnings("ignore", module=f"({own})")
        return rank_entry(lambda: _load_and(rank_main), debug=options.debug)
    notice = leftover_notice()
    if notice is not None:
        print(notice, flush=True)
    print(f"starting {parallel.num_ranks} ranks of {parallel.threads_per_rank} thread(s); {purpose}", flush=True)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of vLLM's memory binding; read when a rank imports torch
    patience = Patience(after_stop_s=parallel.grace_s)
    return run_ranks(parallel.num_ranks, parallel.threads_per_rank, arguments, error_folder=error_folder, patience=patience)


def _load_and(rank_main: Callable[[], int]) -> int:
    with paused_collector():
        import megatron_r1z.assemble  # noqa: F401  # and by it what every rank needs
    try:
        return rank_main()
    finally:
        gc.unfreeze()  # for the interpreter's shutdown, where there is one


def _check_train(config: TrainConfig) -> None:
    from megatron_r1z.preflight import check_train

    for warning in check_train(config):
        if not is_rank() or os.environ["RANK"] == "0":  # of torchrun's ranks one is enough
            print(f"warning: {warning}", flush=True)


def _check_pretrain(config: PretrainConfig) -> None:
    from megatron_r1z.preflight import check_pretrain

    check_pretrain(config)


def _check_evaluate(config: EvaluateConfig) -> None:
    from megatron_r1z.preflight import check_evaluate

    check_evaluate(config)


def _check_analyse(config: AnalyseConfig) -> None:
    from megatron_r1z.preflight import check_analyse

    check_analyse(config)


def _train_rank(config: TrainConfig) -> int:
    from megatron_r1z.assemble import made_run
    from megatron_r1z.loop import train

    return _be_rank(config, made_run, train)


def _pretrain_rank(config: PretrainConfig) -> int:
    from megatron_r1z.assemble import made_pretraining
    from megatron_r1z.pretrain import pretrain

    return _be_rank(config, made_pretraining, pretrain)


def _evaluate_rank(config: EvaluateConfig) -> int:
    from megatron_r1z.assemble import joined_ranks, made_evaluation
    from megatron_r1z.evaluation.evaluate import evaluate

    with joined_ranks(config), made_evaluation(config) as run:
        finished = evaluate(run)
        run.log.say(f"results      {run.folder}")
        if not finished:
            run.log.say("stopped on request; the same command goes on where it was stopped")
    return 0 if finished else STOPPED


def _analyse_rank(config: AnalyseConfig) -> int:
    from megatron_r1z.analysis.analyse import finish, sample
    from megatron_r1z.assemble import joined_ranks, made_analysis

    with joined_ranks(config), made_analysis(config) as run:
        records = sample(run)
    finished = records is not None
    if records is not None and os.environ["RANK"] == "0":  # the engines are gone, so a judge on this machine has their place
        finished = finish(config, records, run.log, run.stop_flag)
        if finished:
            run.log.say(f"report       {config.folder / 'report.md'}")
    if not finished:
        run.log.say("stopped on request; the same command goes on where it was stopped")
    return 0 if finished else STOPPED


def _convert_rank(conversion: Conversion) -> int:
    from megatron_r1z.assemble import joined_ranks, make_policy, plan_weights
    from megatron_r1z.weights.convert import write

    start = time.perf_counter()
    with joined_ranks(conversion):
        weights = plan_weights(conversion)
        policy = make_policy(conversion, weights)
        done = write(conversion, weights.shape, weights.layout, policy, start)
    if os.environ["RANK"] == "0":
        print(
            f"wrote {conversion.target}: {done.num_tensors} tensors, {done.num_bytes} bytes in {done.num_files} files, "
            f"{done.seconds:.1f} s, {done.peak_bytes / 1e9:.2f} GB of memory in the rank that needed most"
        )
    return 0


def _be_rank(config: Config, make: Callable[[Config, Weights], AbstractContextManager[AnyRun]], work: Callable[[AnyRun], bool]) -> int:
    """Build the run's parts, do its work, export what came of it and say where it is."""
    from megatron_r1z.assemble import export_policy, joined_ranks, plan_weights

    with joined_ranks(config):
        weights = plan_weights(config)
        with make(config, weights) as run:
            finished = work(run)
            if finished and config.checkpoint.export:
                export_policy(config, weights, run.policy, run.folder / "hf" / "final")
            _say_where(run.log.say, run.folder, finished, config.checkpoint.export)
    return 0 if finished else STOPPED


def _say_where(say: Callable[[str], None], folder: Path, finished: bool, export: bool) -> None:
    has_checkpoint = (folder / "checkpoints" / "latest").exists()
    if has_checkpoint:
        say(f"checkpoint   {folder / 'checkpoints'}")
    if finished and export:
        say(f"hugging face {folder / 'hf' / 'final'}")
    say(f"tensorboard  {folder / 'tensorboard'}")
    if not finished and has_checkpoint:
        say("stopped on request; the same command goes on from the last finished iteration")
    elif not finished:
        say("stopped on request; nothing to keep yet, the same command starts from the beginning")
