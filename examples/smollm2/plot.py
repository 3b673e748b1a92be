"""Draw a run's reward, response length and held-out accuracy, and print them as a table.

python examples/smollm2/plot.py runs/smollm2/rl examples/smollm2/curve.png

Needs matplotlib (the `dev` extra).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

WINDOW = 10
"""Iterations of the moving mean."""
BLOCK = 30
"""Iterations of a table row."""


def main() -> None:
    """Read metrics.jsonl of the run folder and write the picture."""
    folder, picture = Path(sys.argv[1]), Path(sys.argv[2])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    iterations = [row for row in rows if row.get("rollout/reward_mean") is not None]  # null where nothing was judged
    evaluations = [row for row in rows if any(key.startswith("evaluation/") for key in row)]
    print_table(iterations, evaluations)
    draw(iterations, evaluations, picture)


def print_table(iterations: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> None:
    """Means over blocks of iterations as a Markdown table, then the held-out accuracies."""
    print("| iterations | reward | response length | mixed groups | seconds an iteration |\n|---|---|---|---|---|")
    for start in range(0, len(iterations), BLOCK):
        block = iterations[start : start + BLOCK]
        reward, length, mixed = (fmean(row[f"rollout/{name}"] for row in block) for name in FIGURES)
        seconds = fmean(sum(value for key, value in row.items() if key.startswith("time/")) for row in block)
        print(f"| {start + 1}-{start + len(block)} | {reward:.3f} | {length:.1f} | {mixed:.0%} | {seconds:.1f} |")
    print("\n| iteration | held-out accuracy, greedy |\n|---|---|")
    for row in evaluations:
        print(f"| {row['iteration']} | {_accuracy(row):.1%} |")


FIGURES = ("reward_mean", "length_mean_tokens", "mixed_groups_share")


def draw(iterations: list[dict[str, Any]], evaluations: list[dict[str, Any]], picture: Path) -> None:
    """Three panels over iterations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    numbers = [row["iteration"] for row in iterations]
    for axis, name, title in zip(axes, FIGURES[:2], ("reward (temperature 0.7)", "response length (tokens)"), strict=False):
        values = [row[f"rollout/{name}"] for row in iterations]
        axis.plot(numbers, values, color="#b8c4d6", linewidth=1)
        axis.plot(numbers, [fmean(values[max(0, end - WINDOW) : end]) for end in range(1, len(values) + 1)], color="#1f4e9c")
        axis.set_title(title)
    axes[2].plot([row["iteration"] for row in evaluations], [_accuracy(row) for row in evaluations], "o-", color="#1f4e9c")
    axes[2].set_title("held-out accuracy (greedy, 200 questions)")
    for axis in axes:
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
    figure.savefig(picture, dpi=110)


def _accuracy(row: dict[str, Any]) -> float:
    return next(float(value) for key, value in row.items() if key.endswith("_accuracy"))


if __name__ == "__main__":
    main()
