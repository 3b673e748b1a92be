"""`megatron-r1z sweep`: a training run for every combination of some values, such as template x question set, and a table of them.

The runs are those of `train`: each in a folder of its own below that of the file, each goes on where it was stopped, and one that is
through is left alone. Standard library and the YAML reader only.
"""

from __future__ import annotations

import itertools
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from megatron_r1z.config import TrainConfig, load_config
from megatron_r1z.data.changes import MAY_CHANGE_IN_SWEEPS, Difference, changed_inputs, changed_settings, earlier_config
from megatron_r1z.data.inputs import load_inputs, read_inputs
from megatron_r1z.data.questions import load_question_sets, mark_questions
from megatron_r1z.errors import ConfigError, R1ZError
from megatron_r1z.host.rank import STOPPED
from megatron_r1z.record.result_files import read_rows, to_json
from megatron_r1z.record.tables import align

TABLE_FILE = "sweep.md"
FIGURES_FILE = "sweep.json"


@dataclass(frozen=True)
class Axis:
    """Fields that take the same value, and the values that they take in turn."""

    fields: tuple[str, ...]
    values: tuple[Any, ...]

    @property
    def title(self) -> str:
        """The name of the first field, without its section."""
        return self.fields[0].rpartition(".")[2]

    def label(self, value: Any) -> str:
        """A value as part of a folder's name and in the table: of a path its last part, a number with the field's name."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            return f"{self.title}{value}"
        return name_of(Path(value).name if isinstance(value, str) and "/" in value else str(value))

    def overrides(self, value: Any) -> list[str]:
        """What sets the fields to a value."""
        text = yaml.safe_dump(value, default_flow_style=True, width=1_000_000).removesuffix("...\n").strip()
        return [f"{name}={text}" for name in self.fields]


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    labels: tuple[str, ...]
    """Of its value on each axis."""
    config: TrainConfig
    overrides: tuple[str, ...]
    """What `train` is given beside the file."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return "-".join(self.labels)

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return Path(self.config.logging.folder)


@dataclass(frozen=True)
class Score:
    """What came of one run: means over the held-out sets, which count alike."""

    iterations: int
    """Done so far."""
    reward: float | None
    """Of the last iteration."""
    first: float | None
    """Accuracy at the first evaluation, as a rule before the first update."""
    best: float | None
    best_iteration: int | None
    last: float | None


def name_of(text: str) -> str:
    """A text as the name of a folder or a job: letters, digits, dots, dashes and underscores.

    >>> name_of("a run, [1e-6]")
    'a-run-1e-6-'
    """
    return re.sub(r"[^\w.-]+", "-", text)


def parse_axis(text: str) -> Axis:
    """Read `section.field=[value, ...]`; several fields that take the same value are separated by commas.

    Raises:
        ConfigError: it is not of that form, or has fewer than two values or one twice.
    """
    names, separator, values = text.partition("=")
    try:
        parsed = yaml.safe_load(values)
    except yaml.YAMLError:
        parsed = None
    if not separator or not isinstance(parsed, list) or len(parsed) < 2:
        raise ConfigError(f"--over {text}: write section.field=[value, value, ...] with at least two values.")
    axis = Axis(tuple(names.split(",")), tuple(parsed))
    labels = [axis.label(value) for value in axis.values]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"--over {text}: two of its values have the name {max(labels, key=labels.count)}; their folders would collide.")
    return axis


def make_cells(path: str, axes: Sequence[Axis], overrides: Sequence[str] = ()) -> list[Cell]:
    """The runs of a sweep, the last axis fastest; all of them are checked.

    Raises:
        ConfigError: one of them cannot work.
    """
    folder = Path(load_config(TrainConfig, path, [*overrides, *_first_values(axes)]).logging.folder)
    cells = []
    for values in itertools.product(*(axis.values for axis in axes)):
        labels = tuple(axis.label(value) for axis, value in zip(axes, values, strict=True))
        chosen = [text for axis, value in zip(axes, values, strict=True) for text in axis.overrides(value)]
        own = (*overrides, *chosen, f"logging.folder={folder / '-'.join(labels)}")
        cells.append(Cell(labels, load_config(TrainConfig, path, own), own))
    return cells


def sweep_folder(cells: Sequence[Cell]) -> Path:
    """The folder that holds those of the runs, and the table."""
    return cells[0].folder.parent


def run_here(path: str, cells: Sequence[Cell]) -> tuple[list[Cell], bool]:
    """Run `train` for one cell after the other; returns those that failed, and whether a signal stopped the sweep."""
    failed: list[Cell] = []
    for number, cell in enumerate(cells, 1):
        if is_through(cell):
            print(f"== {number}/{len(cells)} {cell.name}: done before", flush=True)
            continue
        print(f"== {number}/{len(cells)} {cell.name}", flush=True)
        status = _run_one([sys.executable, "-m", "megatron_r1z", "train", path, *cell.overrides])
        if status == STOPPED:
            return failed, True
        if status:
            failed.append(cell)
    return failed, False


def _run_one(command: Sequence[str]) -> int:
    """Status of a run. A signal is the run's to obey: it saves a checkpoint and ends."""
    with subprocess.Popen(command) as process:

        def pass_on(number: int, _frame: FrameType | None) -> None:
            if number == signal.SIGTERM:  # Ctrl-C reaches the run by itself
                process.send_signal(number)

        previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return process.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def check_folders(cells: Sequence[Cell]) -> None:
    """Refuse a sweep of which a run's folder holds another run, whose figures would pass for its own.

    Raises:
        ConfigError: names the folder and what differs.
    """
    for cell in cells:
        found = folder_differences(cell)
        if found:
            raise ConfigError(
                f"{cell.folder} holds a run with {'; with '.join(map(str, found))}; choose another logging.folder, or delete that folder "
                "to run it anew."
            )


def folder_differences(cell: Cell) -> list[Difference]:
    """Why what is in a run's folder is not of this run: settings or files that decide its figures. None where there is nothing yet."""
    earlier = earlier_config(TrainConfig, cell.folder)
    if earlier is None:
        return []
    found = changed_settings(earlier, cell.config, MAY_CHANGE_IN_SWEEPS)
    known = load_inputs(cell.folder)
    if known is None or found:
        return found
    try:
        rows = mark_questions(cell.config.data.train, load_question_sets(cell.config.data.train))
        return changed_inputs((earlier, known), (cell.config, read_inputs(cell.config, rows, known)))
    except (OSError, ImportError, R1ZError):  # where jobs are submitted from, files and libraries of the run need not be
        return []


def is_through(cell: Cell) -> bool:
    """Whether a run has nothing left to do; one of which the folder holds another run has everything left."""
    is_long_enough = score(cell).iterations >= cell.config.algorithm.iterations
    is_exported = not cell.config.checkpoint.export or (cell.folder / "hf" / "final").is_dir()
    return is_long_enough and is_exported and not folder_differences(cell)


def score(cell: Cell) -> Score:
    """Read what a run has done so far from its `metrics.jsonl`."""
    rows = read_rows(cell.folder / "metrics.jsonl")
    rewards = [(int(row["iteration"]), row["rollout/reward_mean"]) for row in rows if "rollout/reward_mean" in row]
    points = []
    for row in rows:
        accuracies = [value for name, value in row.items() if re.fullmatch(r"evaluation/.*_accuracy", name) and value is not None]
        if accuracies:
            points.append((int(row["iteration"]), statistics.fmean(accuracies)))
    best = max(points, key=lambda point: point[1], default=None)
    return Score(
        iterations=rewards[-1][0] if rewards else 0,
        reward=rewards[-1][1] if rewards else None,
        first=points[0][1] if points else None,
        best=None if best is None else best[1],
        best_iteration=None if best is None else best[0],
        last=points[-1][1] if points else None,
    )


def render(axes: Sequence[Axis], cells: Sequence[Cell], scores: Sequence[Score]) -> str:
    """A table for a terminal: one row per run, and for two axes the best accuracies as a grid below it."""
    titles = [axis.title for axis in axes]
    rows = [[*titles, "iterations", "reward", "first", "best", "at", "last"]]
    for cell, found in zip(cells, scores, strict=True):
        at = "-" if found.best_iteration is None else str(found.best_iteration)
        progress = f"{found.iterations}/{cell.config.algorithm.iterations}"
        reward = "-" if found.reward is None else f"{found.reward:.3f}"
        rows.append([*cell.labels, progress, reward, _percent(found.first), _percent(found.best), at, _percent(found.last)])
    text = "\n".join(align(rows))
    return f"{text}\n\n{_grid(axes, scores)}" if len(axes) == 2 else text


def write(axes: Sequence[Axis], cells: Sequence[Cell], scores: Sequence[Score]) -> None:
    """Keep table and figures beside the runs."""
    folder = sweep_folder(cells)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TABLE_FILE).write_text(f"```\n{render(axes, cells, scores)}\n```\n", encoding="utf-8")
    figures = [
        {"labels": dict(zip([axis.title for axis in axes], cell.labels, strict=True)), "folder": str(cell.folder), **vars(found)}
        for cell, found in zip(cells, scores, strict=True)
    ]
    (folder / FIGURES_FILE).write_text(to_json(figures, indent=1) + "\n", encoding="utf-8")


def _grid(axes: Sequence[Axis], scores: Sequence[Score]) -> str:
    rows, columns = axes
    table = [["first to best", *map(columns.label, columns.values)]]
    width = len(columns.values)
    for number, value in enumerate(rows.values):
        line = scores[number * width : (number + 1) * width]
        table.append([rows.label(value), *(f"{_percent(found.first)} to {_percent(found.best)}" for found in line)])
    return "\n".join(align(table))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _first_values(axes: Sequence[Axis]) -> list[str]:
    return [text for axis in axes for text in axis.overrides(axis.values[0])]
