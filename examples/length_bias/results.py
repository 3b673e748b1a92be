"""Tables and picture of the runs in a folder: metrics.jsonl of every objective and seed, as moving means over iterations.

Needs matplotlib (the `dev` extra).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

Row = Mapping[str, Any]
"""One iteration in metrics.jsonl."""
Runs = Mapping[str, Sequence[Sequence[Row]]]
"""The iterations of each seed, by objective."""

OBJECTIVES = {
    "grpo": ("GRPO", "#c0392b"),
    "grpo_remove_std_bias": ("GRPO without 1/std", "#e59866"),
    "grpo_remove_len_bias": ("GRPO without 1/length", "#1e8449"),
    "token_mean": ("token mean", "#8e44ad"),
    "drgrpo": ("Dr. GRPO", "#1f4e9c"),
}
"""Label and colour by `algorithm.name`."""
WINDOW = 10
"""Iterations of a moving mean."""
MILESTONES = (10, 25, 50, 75, 100)
"""Iterations of the second table's columns."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """A figure of metrics.jsonl."""

    name: str
    label: str
    share: Callable[[Row], float] = lambda _row: 1.0
    """Of an iteration's responses, those that the figure is a mean over."""

    def mean(self, rows: Sequence[Row]) -> float:
        """Over the responses of all `rows`; an iteration without such a response counts nothing.

        >>> RIGHT.mean([{"rollout/length_right_tokens": 20.0, "grading/correct_share": 0.5}, {"grading/correct_share": 0.0}])
        20.0
        """
        present = [row for row in rows if row.get(self.name) is not None]
        weight = sum(map(self.share, present))
        return sum(row[self.name] * self.share(row) for row in present) / weight if weight else float("nan")

    def curve(self, rows: Sequence[Row]) -> list[float]:
        """After each iteration, the mean over the last `WINDOW`."""
        return [self.mean(rows[max(0, end - WINDOW) : end]) for end in range(1, len(rows) + 1)]


REWARD = Quantity("rollout/reward_mean", "reward")
LENGTH = Quantity("rollout/length_mean_tokens", "response length (tokens)")
RIGHT = Quantity("rollout/length_right_tokens", "length of right responses (tokens)", lambda row: row["grading/correct_share"])
WRONG = Quantity("rollout/length_wrong_tokens", "length of wrong responses (tokens)", lambda row: 1.0 - row["grading/correct_share"])
CUT = Quantity("rollout/truncated_share", "share cut off")


def compare(folder: Path, questions: Path, objectives: Sequence[str], seeds: Sequence[int]) -> str:
    """Write `table.md` and `figure.png` of the runs `<objective>-<seed>` in `folder`, all on `questions`; returns the tables."""
    folders = {objective: [folder / f"{objective}-{seed}" for seed in seeds] for objective in objectives}
    runs = {objective: list(map(load_iterations, of_seeds)) for objective, of_seeds in folders.items()}
    levels = [json.loads(line)["level"] for line in questions.read_text(encoding="utf-8").splitlines()]
    responses = {objective: [item for run in of_seeds for item in load_responses(run, levels)] for objective, of_seeds in folders.items()}
    parts = [end_table(runs), level_table(responses)]
    if {"grpo", "drgrpo"} <= runs.keys():
        parts += [ratio_table(runs["grpo"], runs["drgrpo"], seeds), verdict(runs["grpo"], runs["drgrpo"])]
    text = "\n\n".join(parts) + "\n"
    (folder / "table.md").write_text(text, encoding="utf-8")
    draw(runs, folder / "figure.png")
    return f"{text}\n{folder}/table.md, {folder}/figure.png"


def load_iterations(folder: Path) -> list[Row]:
    """The iterations of a run; rows of evaluations, checkpoints and steps are left out."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row for row in rows if REWARD.name in row]


@dataclass(frozen=True, slots=True)
class Answered:
    """What counts of a response here."""

    level: str
    right: bool
    num_tokens: int


def load_responses(folder: Path, levels: Sequence[str]) -> Iterator[Answered]:
    """The responses of the last `WINDOW` iterations of a run; `levels` by row of the question file."""
    import zstandard

    for path in sorted((folder / "rollouts").glob("iter_*.jsonl.zst"))[-WINDOW:]:
        for row in map(json.loads, zstandard.decompress(path.read_bytes()).splitlines()):
            question = int(row["prompt_id"].rpartition("/")[2])
            yield Answered(levels[question], row["verdict"] == "correct", len(row["response_token_ids"]))


def end_table(runs: Runs) -> str:
    """Every objective over its last `WINDOW` iterations: mean over seeds, and the smallest and largest seed."""
    last = min(len(rows) for seeds in runs.values() for rows in seeds)
    first = max(0, last - WINDOW)
    lines = [
        f"| iterations {first + 1}-{last} | reward | length | of right ones | of wrong ones | cut off |",
        "|---|---|---|---|---|---|",
    ]
    formats = ((REWARD, ".3f"), (LENGTH, ".1f"), (RIGHT, ".1f"), (WRONG, ".1f"), (CUT, ".1%"))
    for objective, seeds in runs.items():
        cells = [spread([quantity.mean(rows[first:last]) for rows in seeds], form) for quantity, form in formats]
        lines.append(f"| {OBJECTIVES[objective][0]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def level_table(responses: Mapping[str, Sequence[Answered]]) -> str:
    """Share of right responses and mean length of the wrong ones, by objective and level, over all seeds."""
    levels = list(dict.fromkeys(item.level for items in responses.values() for item in items))
    levels.sort(key=lambda level: (not level.startswith("sum"), level))
    lines = [f"| right, and length of wrong ones | {' | '.join(levels)} |", "|---|" + "---|" * len(levels)]
    for objective, items in responses.items():
        of_level = defaultdict(list)
        for item in items:
            of_level[item.level].append(item)
        lines.append(f"| {OBJECTIVES[objective][0]} | {' | '.join(_level_cell(of_level[level]) for level in levels)} |")
    return "\n".join(lines)


def _level_cell(items: Sequence[Answered]) -> str:
    wrong = [item.num_tokens for item in items if not item.right]
    return f"{fmean(item.right for item in items):.0%}, {fmean(wrong):.1f}" if wrong else "100%"


def ratio_table(grpo: Sequence[Sequence[Row]], drgrpo: Sequence[Sequence[Row]], seeds: Sequence[int]) -> str:
    """Length of wrong responses under GRPO over that under Dr. GRPO, seed by seed, on the way."""
    ratios = [ratio_curve(*pair) for pair in zip(grpo, drgrpo, strict=True)]
    ends = [end for end in MILESTONES if end <= min(map(len, ratios))]
    lines = [f"| wrong responses, GRPO / Dr. GRPO, iteration | {' | '.join(map(str, ends))} |", "|---|" + "---|" * len(ends)]
    lines += [f"| seed {seed} | {' | '.join(f'{ratio[end - 1]:.2f}' for end in ends)} |" for seed, ratio in zip(seeds, ratios, strict=True)]
    return "\n".join(lines)


def ratio_curve(grpo: Sequence[Row], drgrpo: Sequence[Row]) -> list[float]:
    """After each iteration of two runs."""
    return [above / below for above, below in zip(WRONG.curve(grpo), WRONG.curve(drgrpo), strict=False)]


def verdict(grpo: Sequence[Sequence[Row]], drgrpo: Sequence[Sequence[Row]]) -> str:
    """One sentence: the ratio of the wrong lengths, and the difference of the rewards beside its standard error over seeds."""
    ratios = [ratio_curve(*pair)[-1] for pair in zip(grpo, drgrpo, strict=True)]
    gaps = [REWARD.curve(above)[-1] - REWARD.curve(below)[-1] for above, below in zip(grpo, drgrpo, strict=True)]
    error = f" (standard error {stdev(gaps) / len(gaps) ** 0.5:.3f})" if len(gaps) > 1 else ""
    return (
        f"Wrong responses under GRPO are {spread(ratios, '.2f')} times as long as under Dr. GRPO; "
        f"the reward differs by {fmean(gaps):+.3f}{error}."
    )


def spread(values: Sequence[float], form: str) -> str:
    """Mean, and the range where there are several.

    >>> spread([1.0, 2.0, 6.0], ".1f")
    '3.0 (1.0 to 6.0)'
    """
    text = format(fmean(values), form)
    return text if len(values) == 1 else f"{text} ({min(values):{form}} to {max(values):{form}})"


def draw(runs: Runs, picture: Path) -> None:
    """Four panels over iterations: a line for the mean over seeds, a band from the smallest to the largest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9.6, 6.2), sharex=True, layout="constrained")
    for axis, quantity in zip(axes.flat, (REWARD, LENGTH, WRONG, RIGHT), strict=True):
        for objective, seeds in runs.items():
            label, colour = OBJECTIVES[objective]
            values = list(zip(*map(quantity.curve, seeds), strict=False))
            numbers = range(1, len(values) + 1)
            axis.fill_between(numbers, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.18, linewidth=0)
            axis.plot(numbers, list(map(fmean, values)), color=colour, linewidth=1.8, label=label)
        axis.set_title(quantity.label, fontsize=11)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1, 1].set_ylim(axes[1, 0].get_ylim())  # right and wrong on one scale
    for axis in axes[1]:
        axis.set_xlabel("iteration")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(runs), frameon=False)
    figure.savefig(picture, dpi=100)
    pyplot.close(figure)
