"""Rows of JSONL and Parquet files, each with the place it came from for messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1z.errors import DataError, MissingExtraError


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file."""

    index: int
    """From 0, in file order."""
    where: str
    """`file:line` (JSONL, from 1) or `file: row n` (Parquet, from 0)."""
    values: dict[str, Any]

    def get(self, column: str) -> Any:
        """The value of `column`.

        Raises:
            DataError: there is no such column; the message lists those there are.
        """
        if column not in self.values:
            raise DataError(f"{self.where}: no column '{column}'; the columns are {', '.join(map(repr, self.values)) or 'none'}.")
        return self.values[column]

    def get_text(self, column: str) -> str:
        """The value of `column` as non-empty text.

        Raises:
            DataError: the column is missing, not text, or blank.
        """
        value = self.get(column)
        if not isinstance(value, str):
            raise DataError(f"{self.where}: '{column}' must be text, not {value!r}.")
        if not value.strip():
            raise DataError(f"{self.where}: '{column}' is empty; remove the row or fill it in.")
        return value


def iterate_rows(path: str | Path) -> Iterator[Row]:
    """The rows of `path`, read as they are asked for; blank lines of JSONL are skipped.

    Raises:
        DataError: the file is missing, of another kind, or malformed.
    """
    path = Path(path)
    readers = {".jsonl": _iterate_jsonl, ".parquet": _iterate_parquet}
    if path.suffix not in readers:
        raise DataError(f"cannot tell the format of {path}; use a file that ends in {' or '.join(readers)}.")
    if not path.is_file():
        raise DataError(f"there is no file {path}.")
    yield from readers[path.suffix](path)


def _iterate_jsonl(path: Path) -> Iterator[Row]:
    index = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield Row(index, f"{path}:{number}", _parse(line, f"{path}:{number}"))
                index += 1


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start} of the line).") from error
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: each line must be a JSON object, not {type(value).__name__}.")
    return value


def _iterate_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError(f"reading {path} needs pyarrow; run `pip install pyarrow` or convert the file to JSONL.") from error
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable Parquet file ({' '.join(str(error).split())}).") from error
    for index, values in enumerate(rows):
        yield Row(index, f"{path}: row {index}", values)
