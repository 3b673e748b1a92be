"""The checks of docs/gpu.md that need one GPU and vLLM: `python -m tests.gpu.runs NAME ARGUMENT ...`, whole runs of the command.

They go on from the folder of `tools/smoke.sh`, which has a task and a base model.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from tests.gpu.checks import Failed, expect, main, record

ONE_RANK = ("parallel.num_ranks=1", "parallel.tensor_parallel_size=1")
ITERATIONS = 4
GRACE_S = 60.0
"""In which a run that was asked to stop has saved and ended."""


def arguments(smoke: Path, folder: Path, *overrides: str) -> list[str]:
    """Of a run of a few iterations; of an older one nothing is left."""
    shutil.rmtree(folder, ignore_errors=True)
    task = (
        f"model.path={smoke / 'base' / 'hf' / 'final'}",
        f"data.train=[{{path: {smoke / 'task' / 'questions.jsonl'}}}]",
        "evaluation.sets=[]",
    )
    length = (f"algorithm.iterations={ITERATIONS}", "checkpoint.every=1", f"logging.folder={folder}")
    return ["train", "configs/quickstart.yaml", *ONE_RANK, "rollout.tensor_parallel_size=1", *task, *length, *overrides]


def start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "megatron_r1z", *command])


def finish(command: Sequence[str]) -> None:
    status = start(command).wait()
    if status:
        raise Failed(f"`megatron-r1z {command[0]}` ended with status {status}")


def lines_of(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def rewards_of(folder: Path) -> dict[int, float]:
    return {row["iteration"]: row["rollout/reward_mean"] for row in lines_of(folder, "metrics.jsonl") if "rollout/reward_mean" in row}


def record_run(folder: Path) -> None:
    """Certificate, rewards, refits."""
    certificate, refits, rewards = (
        json.loads((folder / "certificate.json").read_text()),
        lines_of(folder, "refits.jsonl"),
        rewards_of(folder),
    )
    record(certificate_max=certificate["max_nats"], certificate_mean=certificate["mean_nats"], certificate_tokens=certificate["num_tokens"])
    record(refit_seconds=median(item["seconds"] for item in refits[1:]), refit_mbytes=refits[-1]["bytes"] / 1e6)
    record(first_reward=rewards[min(rewards)], last_reward=rewards[max(rewards)])


def train(precision: str, smoke: str) -> None:
    """A few iterations; the command itself refuses a certificate beyond its limit."""
    record(model="quickstart", precision=precision)
    folder = Path(smoke, f"train-{precision}")
    finish(arguments(Path(smoke), folder, f"precision.policy={precision}", f"precision.engine={precision}"))
    record_run(folder)


def stopped(smoke: str) -> None:
    """A run that was killed, started again, interrupted and started again has the rewards of one that was not; so with either optimizer."""
    record(model="quickstart", precision="fp32")
    unbroken, broken = Path(smoke, "unbroken"), Path(smoke, "broken")
    finish(arguments(Path(smoke), unbroken))
    command = arguments(Path(smoke), broken)
    stop(command, broken, 1, lambda process: process.kill())
    seconds = stop(command, broken, 2, lambda process: process.send_signal(signal.SIGINT))
    finish(command)
    wanted, found = rewards_of(unbroken), rewards_of(broken)
    differences = [abs(found[number] - wanted[number]) for number in wanted]
    expect({"stop_seconds": seconds, "rewards_apart": max(differences)}, stop_seconds=GRACE_S, rewards_apart=0.05)


def stop(command: Sequence[str], folder: Path, iteration: int, end: Callable[[subprocess.Popen[bytes]], None]) -> float:
    """Start, end it once an iteration has its checkpoint; seconds from there to the end of the process."""
    process = start(command)
    while not (folder / "checkpoints" / f"step_{iteration:06d}").exists():
        if process.poll() is not None:
            raise Failed(f"the run ended with status {process.returncode} before checkpoint {iteration}")
        time.sleep(0.1)
    start_s = time.perf_counter()
    end(process)
    process.wait()
    return time.perf_counter() - start_s


def quickstart(folder: str) -> None:
    """The whole of it on one rank: held-out accuracy before and after."""
    record(model="quickstart", precision="fp32")
    task, base, run = (Path(folder, name) for name in ("task", "base", "rl"))
    subprocess.run([sys.executable, "examples/quickstart/make_task.py", task], check=True)
    model = f"model.path={task / 'model'}"
    finish(
        [
            "pretrain",
            "configs/quickstart-pretrain.yaml",
            ONE_RANK[0],
            model,
            f"corpus.sources.0.path={task / 'corpus.jsonl'}",
            f"logging.folder={base}",
        ]
    )
    sets = ", ".join(f"{{path: {task / 'held_out' / f'sum-{digits}.jsonl'}}}" for digits in (4, 5, 6))
    places = (f"model.path={base / 'hf' / 'final'}", f"data.train=[{{path: {task / 'questions.jsonl'}}}]", f"evaluation.sets=[{sets}]")
    finish(["train", "configs/quickstart.yaml", *ONE_RANK, "rollout.tensor_parallel_size=1", *places, f"logging.folder={run}"])
    record_run(run)
    rows = [[value for name, value in row.items() if name.endswith("_accuracy")] for row in lines_of(run, "metrics.jsonl")]
    before, *_, after = [fmean(row) for row in rows if row]
    expect({"accuracy_before": before, "accuracy_after": after, "no_gain": before + 0.2 - after}, no_gain=0.0)


CHECKS: dict[str, Callable[..., None]] = {function.__name__: function for function in (train, stopped, quickstart)}

if __name__ == "__main__":
    sys.exit(main(CHECKS, *sys.argv[1:]))
