"""What the command line takes: a subparser for each command, with an example."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from megatron_r1z.cli import commands
from megatron_r1z.config import ITEMSIZE, GradingConfig, GradingMode, RewardForm
from megatron_r1z.cost.plan_run import PROMPT_TOKENS, RESPONSE_SHARE
from megatron_r1z.cost.refit_report import ENGINE_KEYS, POLICY_KEYS, Machine
from megatron_r1z.weights.folders import Kind

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


def parse(arguments: list[str]) -> argparse.Namespace:
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
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for name, command, text in (
        ("train", commands.train, "reinforcement learning by Dr. GRPO from a run's YAML"),
        ("pretrain", commands.pretrain, "next-token training on text from a run's YAML"),
        ("evaluate", commands.evaluate, "accuracy of a model folder or checkpoint on question files; goes on where it was stopped"),
        ("analyse", commands.analyse, "what a base model can do under several templates and temperatures; goes on where it was stopped"),
        ("data", commands.data, "what is in the question files of a run, and whether training holds evaluation questions"),
    ):
        sub = _add_command(subparsers, name, command, text)
        sub.add_argument("config", help="YAML file, see configs/ and docs/configuration.md")
        sub.add_argument("overrides", nargs="*", metavar="section.field=value", help="change a value of the file")
        if name == "data":
            sub.add_argument("--json", metavar="FILE", help="write the report to FILE as well")
    _add_convert(subparsers)
    _add_grade(subparsers)
    _add_plan(subparsers)
    _add_rehearse(subparsers)
    _add_sweep(subparsers)
    _add_launch(subparsers)
    text = "what this machine can do: libraries, what takes the place of missing ones, FP8 recipes; always ends with status 0"
    _add_command(subparsers, "doctor", commands.doctor, text)
    return parser


def _add_command(subparsers: Any, name: str, command: Callable[[argparse.Namespace, list[str]], int], text: str) -> argparse.ArgumentParser:
    sub: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"example: {EXAMPLES[name]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("--debug", action="store_true", help="show tracebacks")
    sub.set_defaults(command=command)
    return sub


def _add_convert(subparsers: Any) -> None:
    text = "the weights of a checkpoint as a Hugging Face folder, or the other way round; the optimizer's state is left behind"
    sub = _add_command(subparsers, "convert", commands.convert, text)
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


def _add_grade(subparsers: Any) -> None:
    text = (
        "verdicts on JSONL from standard input: each row has 'answer', or a 'response' with the answer in it, and 'reference'; "
        "the rows come out with 'verdict' and 'reward'"
    )
    sub = _add_command(subparsers, "grade", commands.grade, text)
    sub.add_argument("--mode", choices=get_args(GradingMode), default="strict", help="how answers are compared (docs/grading.md)")
    forms = [form for form in get_args(RewardForm) if form != "auto"]
    sub.add_argument("--reward", choices=forms, default="boxed", help="where a response has its answer")
    sub.add_argument("--workers", type=int, default=1, help="processes that compare")
    sub.add_argument("--timeout", type=float, default=GradingConfig.timeout_s, metavar="SECONDS", help="limit of one comparison")


def _add_plan(subparsers: Any) -> None:
    text = (
        "what a run costs on a cluster before it is started: memory of each rank, seconds of each phase, GPU-hours; exit status 2 if it "
        "does not fit. With --model: what a refit between two layouts moves. Needs neither ranks nor weights nor a GPU"
    )
    sub = _add_command(subparsers, "plan", commands.plan, text)
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


def _add_launch(subparsers: Any) -> None:
    text = (
        "start a run as a job, here or on a cluster, by nemo-run: ranks under torchrun, code and configuration as they are now; exit "
        "status 0 only if the job succeeded. `launch status|logs|cancel [EXPERIMENT]` is about one that was started (default: the last)"
    )
    sub = _add_command(subparsers, "launch", commands.launch, text)
    sub.add_argument("config", metavar="CONFIG|status|logs|cancel", help="YAML file of a run, or what to do with an experiment")
    sub.add_argument("overrides", nargs="*", metavar="section.field=value", help="change a value of the file; its section launch says how")
    sub.add_argument("--command", dest="work", default="train", metavar="COMMAND", help="train (default), pretrain, evaluate or analyse")
    _add_place(sub)


def _add_rehearse(subparsers: Any) -> None:
    text = "a rank of a run on a machine without a GPU: whole steps by the real libraries without their kernels, memory beside `plan`"
    sub = _add_command(subparsers, "rehearse", commands.rehearse, text)
    sub.add_argument("config", help="YAML file of a training run")
    sub.add_argument("overrides", nargs="*", metavar="section.field=value", help="change a value of the file")
    sub.add_argument("--cluster", required=True, metavar="FILE", help="whose device is pretended, see configs/clusters/")
    which = sub.add_mutually_exclusive_group()
    which.add_argument("--rank", type=int, metavar="N", help="this rank of the policy alone; default: the first stage, and an engine")
    which.add_argument("--every-role", action="store_true", help="first, middle and last stage, and an engine")


def _add_sweep(subparsers: Any) -> None:
    text = (
        "train once for every combination of some values, in folders below that of the file, and print a table; goes on where it "
        "was stopped. One run after the other on this machine, or with --executor all of them as jobs of one experiment (docs/launch.md)"
    )
    sub = _add_command(subparsers, "sweep", commands.sweep, text)
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
