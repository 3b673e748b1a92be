"""Print held-out accuracy before and after a reinforcement learning run, and where its results are.

python examples/quickstart/report.py runs/quickstart/rl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean


def main() -> None:
    """Read metrics.jsonl of the run folder on the command line."""
    folder = Path(sys.argv[1])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if any(key.startswith("evaluation/") for key in row)]
    names = [key for key in evaluations[0] if key.endswith("_accuracy")]
    before, after = ({name: row[name] for name in names} for row in (evaluations[0], evaluations[-1]))
    print(f"{'questions':12} {'before':>7} {'after':>7} {'gain':>7}")
    for name in names:
        print(_line(name.removeprefix("evaluation/").removesuffix("_accuracy"), before[name], after[name]))
    print(_line("mean", fmean(before.values()), fmean(after.values())))
    print(f"\ncheckpoint   {folder}/checkpoints/{(folder / 'checkpoints' / 'latest').read_text().strip()}")
    print(f"hugging face {folder}/hf/final")
    print(f"tensorboard  .venv/bin/tensorboard --logdir {folder}/tensorboard")


def _line(name: str, before: float, after: float) -> str:
    return f"{name:12} {before:7.3f} {after:7.3f} {after - before:+7.3f}"


if __name__ == "__main__":
    main()
