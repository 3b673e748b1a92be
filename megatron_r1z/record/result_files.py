"""How results are written: rows that are there once they were added, and files that are whole or not there. Standard library only."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any


def to_json(value: Any, *, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """JSON text, where null stands for a number that is not finite: JSON has no NaN and no Infinity, and strict readers refuse them.

    >>> to_json({"loss": float("nan"), "rounds": [1.5, float("inf")]})
    '{"loss": null, "rounds": [1.5, null]}'
    """
    try:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)
    except ValueError:
        return json.dumps(_without_nan(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list | tuple) else value


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a JSONL file, which is made if need be; they are on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write("".join(f"{to_json(row)}\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, none where there is no such file; one that the end of its process cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def keep_rows(path: Path, is_kept: Callable[[Mapping[str, Any]], bool]) -> None:
    """Take all other rows out of a JSONL file, and a row that was cut off."""
    replace_text(path, "".join(f"{to_json(row)}\n" for row in read_rows(path) if is_kept(row)))


def replace_text(path: Path, text: str) -> None:
    """Write a file under a name of its own first, so that whoever reads it has the old text or the new one."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)


def keep_earlier(path: Path, text: str) -> None:
    """Copy a file that says something else than `text` to the next free number: `config.yaml` to `config.1.yaml`."""
    if path.exists() and path.read_text(encoding="utf-8") != text:
        numbered = (path.with_suffix(f".{number}{path.suffix}") for number in count(1))
        shutil.copyfile(path, next(other for other in numbered if not other.exists()))
