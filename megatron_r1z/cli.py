"""The command line. Exit status: 0 success, 1 a run that failed, 2 a mistake that the user can put right, 130 stopped by a signal.

`train`, `pretrain` and `evaluate` start their ranks themselves; under torchrun the same command is one rank.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from megatron_r1z.config import AnyConfig, EvaluateConfig, GradingConfig, GradingMode, PretrainConfig, RewardForm, TrainConfig, load_config
from megatron_r1z.errors import R1ZError, UsageError
from megatron_r1z.supervisor import STOPPED, is_supervised, rank_entry, run_ranks

if TYPE_CHECKING:
    from megatron_r1z.assemble import Weights
    from megatron_r1z.loop import Run
    from megatron_r1z.pretrain import Pretraining

Config = TypeVar("Config", TrainConfig, PretrainConfig)
AnyRun = TypeVar("AnyRun", "Run", "Pretraining")

EXAMPLES = {
    "train": "megatron-r1z train configs/quickstart.yaml optimizer.lr=1e-4 logging.folder=runs/try",
    "pretrain": "megatron-r1z pretrain configs/quickstart-pretrain.yaml corpus.steps=200",
    "evaluate": "megatron-r1z evaluate configs/quickstart.yaml model.path=runs/quickstart/rl/hf/final logging.folder=runs/try",
    "data": "megatron-r1z data configs/quickstart.yaml",
    "grade": "megatron-r1z grade --mode strict < answers.jsonl > verdicts.jsonl",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace, list[str]], int] = options.command
    try:
        return command(options, arguments)
    except R1ZError as error:
        if options.debug:
            raise
        print(f"megatron-r1z: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-r1z", description="Dr. GRPO on a Megatron-core policy, with rollouts by vLLM.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, command, text in (
        ("train", _train, "reinforcement learning by Dr. GRPO from a run's YAML"),
        ("pretrain", _pretrain, "next-token training on text from a run's YAML"),
        ("evaluate", _evaluate, "accuracy of a model folder or checkpoint on question files; goes on where it was stopped"),
        ("data", _data, "what is in the question files of a run, and whether training holds evaluation questions"),
    ):
        sub = _add_command(commands, name, command, text)
        sub.add_argument("config", help="YAML file, see configs/ and docs/configuration.md")
        sub.add_argument("overrides", nargs="*", metavar="section.field=value", help="change a value of the file")
        if name == "data":
            sub.add_argument("--json", metavar="FILE", help="write the report to FILE as well")
    _add_grade(commands)
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


def _train(options: argparse.Namespace, arguments: list[str]) -> int:
    config = load_config(TrainConfig, options.config, options.overrides)
    return _run(config, lambda: _check_train(config), lambda: _train_rank(config), options, arguments)


def _pretrain(options: argparse.Namespace, arguments: list[str]) -> int:
    config = load_config(PretrainConfig, options.config, options.overrides)
    return _run(config, lambda: _check_pretrain(config), lambda: _pretrain_rank(config), options, arguments)


def _evaluate(options: argparse.Namespace, arguments: list[str]) -> int:
    config = load_config(EvaluateConfig, options.config, options.overrides)
    return _run(config, lambda: _check_evaluate(config), lambda: _evaluate_rank(config), options, arguments)


def _data(options: argparse.Namespace, _arguments: list[str]) -> int:
    from megatron_r1z.data_report import make_report, render

    report = make_report(load_config(TrainConfig, options.config, options.overrides))
    print(render(report))
    if options.json is not None:
        Path(options.json).write_text(json.dumps(report.to_tree(), indent=1) + "\n", encoding="utf-8")
    return 0


def _grade(options: argparse.Namespace, _arguments: list[str]) -> int:
    from megatron_r1z.grade import grade_lines
    from megatron_r1z.grading.comparer import Comparer
    from megatron_r1z.grading.grader import EXTRACTORS

    settings = GradingConfig(mode=options.mode, workers=options.workers, timeout_s=options.timeout)
    comparer = Comparer(settings.mode, settings.workers, settings.timeout_s)
    try:
        comparer.self_test()
        counts = grade_lines(sys.stdin, sys.stdout, comparer, EXTRACTORS[options.reward])
    finally:
        comparer.close()
    print(", ".join(f"{count} {kind.value}" for kind, count in counts.items() if count) or "no rows", file=sys.stderr)
    return 0


def _run(
    config: AnyConfig,
    check: Callable[[], None],
    rank_main: Callable[[], int],
    options: argparse.Namespace,
    arguments: list[str],
) -> int:
    """Check, then be one rank (the environment says so) or start all of them."""
    if not is_supervised():
        check()
    if "RANK" in os.environ:
        # Of Megatron and vLLM about libraries that this machine does not need, such as apex.
        warnings.filterwarnings("ignore", module=r"(megatron\.core|torch\.overrides|megatron_r1z\.policy\.cpu|vllm)")
        return rank_entry(rank_main, debug=options.debug)
    parallel, folder = config.parallel, Path(config.logging.folder)
    print(f"starting {parallel.num_ranks} ranks of {parallel.threads_per_rank} thread(s); the run folder is {folder}", flush=True)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of vLLM's memory binding; read when a rank imports torch
    return run_ranks(parallel.num_ranks, parallel.threads_per_rank, arguments, error_folder=folder / "errors")


def _check_train(config: TrainConfig) -> None:
    from megatron_r1z.preflight import check_train

    for warning in check_train(config):
        if os.environ.get("RANK", "0") == "0":  # of torchrun's ranks one is enough
            print(f"warning: {warning}", flush=True)


def _check_pretrain(config: PretrainConfig) -> None:
    from megatron_r1z.preflight import check_pretrain

    check_pretrain(config)


def _check_evaluate(config: EvaluateConfig) -> None:
    from megatron_r1z.preflight import check_evaluate

    check_evaluate(config)


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
    from megatron_r1z.evaluate import evaluate

    with joined_ranks(config), made_evaluation(config) as run:
        finished = evaluate(run)
        run.log.say(f"results      {run.folder}")
        if not finished:
            run.log.say("stopped on request; the same command goes on where it was stopped")
    return 0 if finished else STOPPED


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
    say(f"checkpoint   {folder / 'checkpoints'}")
    if finished and export:
        say(f"hugging face {folder / 'hf' / 'final'}")
    say(f"tensorboard  {folder / 'tensorboard'}")
    if not finished:
        say("stopped on request; the same command goes on from the last finished iteration")
