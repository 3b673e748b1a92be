"""How much longer wrong responses become under GRPO than under Dr. GRPO: one base model, five objectives, several seeds.

    python examples/length_bias/run.py                # 15 runs, one after the other
    python examples/length_bias/run.py --jobs 4       # on 4 cores
    python examples/length_bias/run.py rollout.max_response_tokens=96 --name budget-96 --objectives grpo drgrpo --seeds 0

The last line is a variation: other settings, results in a folder of their own. What is there is not made again and a run that was stopped
goes on, so the same command can be given again. What a run prints is in `train.log` of its folder.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from results import OBJECTIVES, compare

ROOT = Path(__file__).parents[2]
EXAMPLE = Path("examples/length_bias")
FOLDER = Path("runs/length_bias")
"""As in pretrain.yaml and train.yaml; like every path here relative to the repository."""
LEVELS = ("sum-5", "pick-4", "pick-5", "pick-6")
QUESTIONS = 400
"""Of each level. 100 iterations of 16 ask each of the 1,600 once, so the reward is always that of questions not trained on before."""


def main() -> None:
    """Parse the command line and do what is not done yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="change a value of train.yaml in all runs")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES), help="default: all five")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of sampling and of the questions' order (default: 0 1 2)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs side by side, each on one core (default: %(default)s)")
    parser.add_argument("--name", default="main", help="folder below runs/length_bias (default: %(default)s); one for each variation")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    folder = FOLDER / arguments.name
    runs = [(folder / f"{objective}-{seed}", objective, seed) for seed in arguments.seeds for objective in arguments.objectives]
    with ThreadPoolExecutor(arguments.jobs) as pool:  # Ctrl-C reaches the runs, which write a checkpoint; the pool waits for that
        try:
            pool.submit(make_base).result()
            for outcome in [pool.submit(train, *run, arguments.overrides) for run in runs]:
                outcome.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure or Ctrl-C no other run starts
    print("\n" + compare(folder, FOLDER / "task" / "questions.jsonl", arguments.objectives, arguments.seeds))


def make_base() -> None:
    """Task and base model, the same for all runs."""
    if not is_through(FOLDER / "base"):
        task = ("examples/quickstart/make_task.py", str(FOLDER / "task"), "--levels", *LEVELS)
        call([*task, "--questions", str(QUESTIONS), "--held-out", "0"], FOLDER / "task")
        call(["-m", "megatron_r1z", "pretrain", str(EXAMPLE / "pretrain.yaml")], FOLDER / "base")


def train(folder: Path, objective: str, seed: int, overrides: Sequence[str]) -> None:
    """One run, if it is not through yet."""
    if not is_through(folder):
        settings = (f"algorithm.name={objective}", f"data.seed={seed}", f"rollout.seed={seed}", f"logging.folder={folder}")
        call(["-m", "megatron_r1z", "train", str(EXAMPLE / "train.yaml"), *settings, *overrides], folder)


def is_through(folder: Path) -> bool:
    """Whether a run has left its model."""
    return (folder / "hf" / "final").exists()


def call(arguments: Sequence[str], folder: Path) -> None:
    """Run Python with `arguments`; what it prints goes to `train.log` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "train.log"
    print(f"{folder} ...", flush=True)
    with log.open("a", encoding="utf-8") as stream:
        status = subprocess.run([sys.executable, *arguments], stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        sys.exit(f"{folder} ended with status {status}; {log} says why.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on.")
