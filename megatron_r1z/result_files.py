"""How results are written: rows that are there once they were added, and files that are whole or not there. Standard library only."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a JSONL file, which is made if need be; they are on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write("".join(f"{json.dumps(row)}\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())


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
