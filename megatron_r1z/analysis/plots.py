"""The figures as pictures; matplotlib is imported here alone, and without it there are none."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_r1z.analysis.examine import Outcome
from megatron_r1z.analysis.figures import CellFigures, Share, best_cell

COLOURS = ("#1f4e9c", "#d1711f", "#3a8f5c", "#8a4fa3", "#7a7a7a")
"""Of the templates, in the order of the configuration; there are five."""
OUTCOME_COLOURS = {Outcome.RIGHT: "#3a8f5c", Outcome.WRONG: "#c0504d", Outcome.UNFORMATTED: "#e0b84c", Outcome.CUT: "#9aa3ad"}


def draw(figures: Sequence[CellFigures], folder: Path) -> list[str]:
    """Write the pictures into `folder` and return their names; without matplotlib there are none."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    pictures = {"temperatures.png": _draw_temperatures, "endings.png": _draw_endings, "reflection.png": _draw_reflection}
    for name, make in pictures.items():
        make(figures).savefig(folder / name, dpi=110, metadata={"Software": None})
    return list(pictures)


def _draw_temperatures(figures: Sequence[CellFigures]) -> Any:
    """Answering, pass@k and self-reflection over the temperature, one line for each template: section 2 of the paper in three panels."""
    most = max(figures[0].pass_at)
    panels: list[tuple[str, Callable[[CellFigures], Share]]] = [
        (f"responses that answer ({'judge' if figures[0].answering_by_judge else 'form'})", lambda cell: cell.answering),
        ("accuracy" if most == 1 else f"pass@{most}", lambda cell: cell.best_pass),
        (f"questions with self-reflection ({figures[0].detector})", lambda cell: cell.reflection[cell.detector].question_share),
    ]
    figure, axes = _subplots(1, len(panels), 4.2, 3.4)
    for axis, (title, value) in zip(axes[0], panels, strict=True):
        for colour, (template, cells) in zip(COLOURS, _by_template(figures).items(), strict=False):
            _draw_line(axis, cells, value, colour, template)
        axis.set_title(title)
        axis.set_xlabel("temperature")
        axis.set_xticks(sorted({cell.temperature for cell in figures}))
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter(_percent_format())
        axis.grid(alpha=0.3)
    axes[0][0].legend(frameon=False)
    return figure


def _draw_line(axis: Any, cells: Sequence[CellFigures], value: Callable[[CellFigures], Share], colour: str, label: str) -> None:
    points = sorted(((cell.temperature, value(cell)) for cell in cells), key=lambda point: point[0])
    temperatures = [temperature for temperature, _ in points]
    axis.plot(temperatures, [share.value for _, share in points], "o-", color=colour, label=label, markersize=4)
    low, high = [share.low for _, share in points], [share.high for _, share in points]
    axis.fill_between(temperatures, low, high, color=colour, alpha=0.15, linewidth=0)


def _draw_endings(figures: Sequence[CellFigures]) -> Any:
    """How responses end and how long they are, by level where there are levels, each template at its best temperature: appendix D."""
    best = [best_cell(cells) for cells in _by_template(figures).values()]
    figure, axes = _subplots(2, len(best), 3.4, 2.8, share="row")
    for column, cell in enumerate(best):
        groups = {name: level.outcomes for name, level in cell.levels.items()} or {"all": cell.outcomes}
        _draw_shares(axes[0][column], groups)
        _draw_lengths(axes[1][column], groups)
        axes[0][column].set_title(f"{cell.template}, temperature {cell.temperature:g}")
        axes[1][column].set_xlabel("level" if cell.levels else "")
    axes[0][0].set_ylabel("responses")
    axes[1][0].set_ylabel("mean length (tokens)")
    axes[0][-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _draw_shares(axis: Any, groups: dict[str, Any]) -> None:
    bottom = [0.0] * len(groups)
    for outcome, colour in OUTCOME_COLOURS.items():
        shares = [outcomes[outcome.value].share for outcomes in groups.values()]
        axis.bar(list(groups), shares, bottom=bottom, color=colour, label=outcome.value, width=0.7)
        bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    axis.set_ylim(0, 1)
    axis.yaxis.set_major_formatter(_percent_format())


def _draw_lengths(axis: Any, groups: dict[str, Any]) -> None:
    for outcome, colour in OUTCOME_COLOURS.items():
        means = {name: outcomes[outcome.value].mean_tokens for name, outcomes in groups.items()}
        known = {name: mean for name, mean in means.items() if mean is not None}
        places = [list(groups).index(name) for name in known]
        axis.plot(places, list(known.values()), "o-", color=colour, label=outcome.value, markersize=4)
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)


def _draw_reflection(figures: Sequence[CellFigures]) -> Any:
    """How often each keyword occurs, and accuracy with minus without self-reflection by question."""
    figure, axes = _subplots(1, 2, 5.4, 3.6)
    counts = sum((Counter(cell.keyword_counts) for cell in figures), Counter[str]()).most_common()
    axes[0][0].barh([keyword for keyword, _ in reversed(counts)], [count for _, count in reversed(counts)], color=COLOURS[0])
    axes[0][0].set_title("responses with each keyword")
    boxes = {f"{cell.template} {cell.temperature:g}": cell.effect.differences for cell in figures if cell.effect.differences}
    axes[0][1].axhline(0, color="#9aa3ad", linewidth=1)
    if boxes:
        axes[0][1].boxplot(list(boxes.values()), tick_labels=list(boxes), whis=(0, 100), showmeans=True)
        axes[0][1].tick_params(axis="x", rotation=90 if len(boxes) > 4 else 0)
    axes[0][1].set_title("accuracy with minus without self-reflection, by question")
    for axis, found in ((axes[0][0], counts), (axes[0][1], boxes)):
        if not found:
            axis.text(0.5, 0.5, "none", ha="center", va="center", transform=axis.transAxes)
            axis.set_xticks([])
            axis.set_yticks([])
    return figure


def _subplots(rows: int, columns: int, width: float, height: float, share: Literal["none", "row"] = "none") -> tuple[Any, Any]:
    """A figure and its axes as a table, each of so many inches; `share`: `row` where those of a row have one vertical scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=share)


def _percent_format() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1, decimals=None)


def _by_template(figures: Sequence[CellFigures]) -> dict[str, list[CellFigures]]:
    return {name: [cell for cell in figures if cell.template == name] for name in dict.fromkeys(cell.template for cell in figures)}
