"""The commands that are runs: check, then start the ranks of this machine or be one of them; and what a rank does."""

from __future__ import annotations

import argparse
import gc
import os
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from megatron_r1z.config import AnalyseConfig, AnyConfig, EvaluateConfig, ParallelConfig, PretrainConfig, TrainConfig
from megatron_r1z.host.collector import paused_collector
from megatron_r1z.host.rank import STOPPED, is_rank, is_supervised, leftover_notice, rank_entry
from megatron_r1z.host.supervisor import Patience, run_ranks
from megatron_r1z.weights.resume_point import POINTER

if TYPE_CHECKING:
    from megatron_r1z.assemble import Weights
    from megatron_r1z.loop import Run
    from megatron_r1z.pretrain import Pretraining
    from megatron_r1z.weights.convert import Conversion

OneConfig = TypeVar("OneConfig", bound=AnyConfig)
Config = TypeVar("Config", TrainConfig, PretrainConfig)
AnyRun = TypeVar("AnyRun", "Run", "Pretraining")


def run(
    config: OneConfig,
    check: Callable[[OneConfig], None],
    rank_main: Callable[[OneConfig], int],
    options: argparse.Namespace,
    arguments: list[str],
) -> int:
    """A run of which a configuration says everything."""
    folder = Path(config.logging.folder)
    purpose = f"the run folder is {folder}"
    return start_ranks(config.parallel, purpose, folder / "errors", lambda: check(config), lambda: rank_main(config), options, arguments)


def start_ranks(
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


def check_train(config: TrainConfig) -> None:
    """Refuse what cannot be trained; print what looks like a mistake."""
    from megatron_r1z import preflight

    for warning in preflight.check_train(config):
        if not is_rank() or os.environ["RANK"] == "0":  # of torchrun's ranks one is enough
            print(f"warning: {warning}", flush=True)


def check_pretrain(config: PretrainConfig) -> None:
    """Refuse what cannot be trained on text."""
    from megatron_r1z import preflight

    preflight.check_pretrain(config)


def check_evaluate(config: EvaluateConfig) -> None:
    """Refuse what cannot be evaluated."""
    from megatron_r1z import preflight

    preflight.check_evaluate(config)


def check_analyse(config: AnalyseConfig) -> None:
    """Refuse what cannot be analysed."""
    from megatron_r1z import preflight

    preflight.check_analyse(config)


def train_rank(config: TrainConfig) -> int:
    """One rank of a training run; returns its exit status, as all of these do."""
    from megatron_r1z.assemble import made_run
    from megatron_r1z.loop import train

    return _be_rank(config, made_run, train)


def pretrain_rank(config: PretrainConfig) -> int:
    """One rank of next-token training."""
    from megatron_r1z.assemble import made_pretraining
    from megatron_r1z.pretrain import pretrain

    return _be_rank(config, made_pretraining, pretrain)


def evaluate_rank(config: EvaluateConfig) -> int:
    """One rank of an evaluation."""
    from megatron_r1z.assemble import joined_ranks, made_evaluation
    from megatron_r1z.evaluation.evaluate import evaluate

    with joined_ranks(config, Path(config.logging.folder)), made_evaluation(config) as run:
        finished = evaluate(run)
        run.log.say(f"results      {run.folder}")
        if not finished:
            run.log.say("stopped on request; the same command goes on where it was stopped")
    return 0 if finished else STOPPED


def analyse_rank(config: AnalyseConfig) -> int:
    """One rank of an analysis."""
    from megatron_r1z.analysis.analyse import finish, sample
    from megatron_r1z.assemble import joined_ranks, made_analysis

    with joined_ranks(config, Path(config.logging.folder)), made_analysis(config) as run:
        records = sample(run)
    finished = records is not None
    if records is not None and os.environ["RANK"] == "0":  # the engines are gone, so a judge on this machine has their place
        finished = finish(config, records, run.log, run.stop_flag)
        if finished:
            run.log.say(f"report       {config.folder / 'report.md'}")
    if not finished:
        run.log.say("stopped on request; the same command goes on where it was stopped")
    return 0 if finished else STOPPED


def convert_rank(conversion: Conversion) -> int:
    """One rank of a conversion."""
    from megatron_r1z.assemble import joined_ranks, make_policy, plan_weights
    from megatron_r1z.weights.convert import write

    start = time.perf_counter()
    with joined_ranks(conversion, conversion.target.absolute().parent):
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

    with joined_ranks(config, Path(config.logging.folder)):
        weights = plan_weights(config)
        with make(config, weights) as run:
            finished = work(run)
            if finished and config.checkpoint.export:
                export_policy(config, weights, run.policy, run.folder / "hf" / "final")
            _say_where(run.log.say, run.folder, finished, config.checkpoint.export)
    return 0 if finished else STOPPED


def _say_where(say: Callable[[str], None], folder: Path, finished: bool, export: bool) -> None:
    has_checkpoint = (folder / "checkpoints" / POINTER).exists()
    if has_checkpoint:
        say(f"checkpoint   {folder / 'checkpoints'}")
    if finished and export:
        say(f"hugging face {folder / 'hf' / 'final'}")
    say(f"tensorboard  {folder / 'tensorboard'}")
    if not finished and has_checkpoint:
        say("stopped on request; the same command goes on from the last finished iteration")
    elif not finished:
        say("stopped on request; nothing to keep yet, the same command starts from the beginning")
