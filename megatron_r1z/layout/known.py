"""Shapes of public models, so that a run can be planned before its model is downloaded.

`known_models.json` has, by name on the Hugging Face Hub, what is read of each model's public `config.json`.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from megatron_r1z.errors import DataError
from megatron_r1z.layout.families import ModelShape, load_shape, make_shape


class FoundShape(NamedTuple):
    """A shape, and where it comes from."""

    shape: ModelShape
    source: str
    """The folder, or the name on the Hub."""
    is_local: bool


def find_shape(path: str) -> FoundShape:
    """The shape of the model in a folder or, where there is none, of the public model of that name.

    A name is that of the Hub, or its last part alone: `models/Qwen2.5-7B` is `Qwen/Qwen2.5-7B` until it is there.

    Raises:
        DataError: the folder cannot be used, or there is none and the name is not known.
    """
    if Path(path).exists():
        return FoundShape(load_shape(path), path, is_local=True)
    name = next((name for name in known_models() if path == name or Path(path).name == Path(name).name), None)
    if name is None:
        known = ", ".join(Path(name).name for name in known_models())
        raise DataError(f"there is no model folder {path}, and its name is not one that is known without it; known are {known}.")
    return FoundShape(make_shape(known_models()[name], name), name, is_local=False)


@cache
def known_models() -> dict[str, dict[str, Any]]:
    """The table, by name on the Hub."""
    text = resources.files("megatron_r1z.layout").joinpath("known_models.json").read_text(encoding="utf-8")
    table: dict[str, dict[str, Any]] = json.loads(text)
    return table
