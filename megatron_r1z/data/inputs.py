"""What a run reads besides its configuration, by contents: kept as `inputs.json` beside `config.yaml`, compared when the run goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_r1z.config import AnyConfig, leaves
from megatron_r1z.data.fingerprint import FileMark, Marks, Part, RowsMark, code_parts, mark_all, settings_parts, weights_parts
from megatron_r1z.errors import DataError
from megatron_r1z.record.result_files import replace_text

INPUTS_FILE = "inputs.json"
SHOTS = "shots"
"""The name of the shots file among the marks, wherever it lies."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run was made of."""

    settings: Marks
    """config.json and the tokenizer's files of `model.path`."""
    weights: Marks
    """Those that the configuration names: of `model.checkpoint`, else of `model.path`; empty where they are random."""
    rewards: Marks
    """The user's own reward functions, by path."""
    shots: Marks
    """Of the template `few_shot`."""
    rows: tuple[RowsMark, ...] = ()
    """The sources of training, in order; an evaluation has none."""


def read_inputs(config: AnyConfig, rows: Sequence[RowsMark] = (), known: Inputs | None = None, *, weights: bool = True) -> Inputs:
    """The inputs of `config` as they are now; files that are as they were in `known` are not read.

    Args:
        config: names the files.
        rows: marks of what is trained on, which the caller has read.
        known: an earlier record of the same run.
        weights: whether to look at them; else those of `known`.
    """
    values, model = leaves(config), config.model
    functions = [values.get("grading.function"), *(item["function"] for item in values.get("grading.extra", ()))]
    rewards = {part.path.as_posix(): part for name in functions if name is not None for part in code_parts(name).values()}
    shots_path = values.get("data.shots_path") or values.get("analysis.shots_path")
    before = known or Inputs({}, {}, {}, {})
    parts = weights_parts(model.path, model.checkpoint) if weights and not model.random_init else {}
    return Inputs(
        settings=mark_all(settings_parts(model.path), before.settings),
        weights=mark_all(parts, before.weights) if weights else before.weights,
        rewards=mark_all(rewards, before.rewards),
        shots=mark_all({SHOTS: Part(Path(shots_path))} if shots_path else {}, before.shots),
        rows=tuple(rows),
    )


def save_inputs(folder: Path, inputs: Inputs) -> None:
    """Write the record into a run folder, whole."""
    replace_text(folder / INPUTS_FILE, json.dumps(asdict(inputs), indent=1) + "\n")


def load_inputs(folder: Path) -> Inputs | None:
    """The record of a run folder; None where an earlier version of this package wrote none.

    Raises:
        DataError: it cannot be read.
    """
    path = folder / INPUTS_FILE
    if not path.exists():
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(RowsMark(**row) for row in tree.pop("rows"))
        return Inputs(**{name: _to_marks(files) for name, files in tree.items()}, rows=rows)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); delete it to go on without comparing what the run was made of.") from error


def _to_marks(tree: dict[str, Any]) -> Marks:
    return {name: FileMark(**mark) for name, mark in tree.items()}
