"""Rows of question files, corpora and datasets, each with the place it came from for messages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from megatron_r1z.config import RowSource, Scalar
from megatron_r1z.errors import DataError, MissingExtraError


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file or a dataset."""

    index: int
    """From 0, in the order of the file."""
    where: str
    """`file:line` (JSONL, from 1), or `file: row n` (Parquet and datasets, from 0)."""
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


@dataclass(frozen=True, slots=True)
class MalformedRow(Row):
    """A line that cannot be read; whoever asks for a column gets the reason."""

    fault: str

    def get(self, column: str) -> NoReturn:
        """Raise the reason.

        Raises:
            DataError: always.
        """
        raise DataError(self.fault)


def chosen_rows(source: RowSource) -> Iterator[Row]:
    """The rows that `where`, `offset` and `limit` of a source choose, read as they are asked for.

    Raises:
        DataError: the file or the dataset cannot be read, or a row up to the last chosen one is malformed or lacks a column of `where`.
    """
    kept = (row for row in map(_checked, scan_rows(source)) if matches(row, source.where))
    return islice(kept, source.offset, None if source.limit is None else source.offset + source.limit)


def _checked(row: Row) -> Row:
    if isinstance(row, MalformedRow):
        raise DataError(row.fault)
    return row


def matches(row: Row, where: Mapping[str, Sequence[Scalar]]) -> bool:
    """Whether each column of `where` has one of its values."""
    return all(is_one_of(row.get(column), values) for column, values in where.items())


def is_one_of(value: Any, allowed: Sequence[Scalar]) -> bool:
    """Whether a value is allowed: 3 is 3.0, but true is not 1."""
    return any(value == entry and isinstance(value, bool) == isinstance(entry, bool) for entry in allowed)


def scan_rows(source: RowSource) -> Iterator[Row]:
    """The rows of a source; one that cannot be read is a `MalformedRow`, and the next one follows.

    Raises:
        DataError: the file or the dataset as a whole cannot be read.
    """
    return _scan_dataset(source) if source.path is None else _scan_file(Path(source.path))


def _scan_file(path: Path) -> Iterator[Row]:
    readers = {".jsonl": _scan_jsonl, ".parquet": _scan_parquet}
    if path.suffix not in readers:
        raise DataError(f"cannot tell the format of {path}; use a file that ends in {' or '.join(readers)}.")
    if not path.is_file():
        raise DataError(f"there is no file {path}.")
    yield from readers[path.suffix](path)


def _scan_jsonl(path: Path) -> Iterator[Row]:
    index = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield read_row(index, f"{path}:{number}", line)
                index += 1


def read_row(index: int, where: str, line: bytes) -> Row:
    """A line of JSONL; one that is no JSON object is a `MalformedRow`."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return MalformedRow(index, where, {}, f"{where}: not UTF-8 text ({error.reason} at byte {error.start} of the line).")
    except ValueError as error:
        return MalformedRow(index, where, {}, f"{where}: not valid JSON ({error}).")
    if not isinstance(value, dict):
        return MalformedRow(index, where, {}, f"{where}: each line must be a JSON object, not {type(value).__name__}.")
    return Row(index, where, value)


def _scan_parquet(path: Path) -> Iterator[Row]:
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


def _scan_dataset(source: RowSource) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            f"reading the dataset {source.label} needs datasets; run `pip install datasets` or give a file as path."
        ) from error
    try:
        rows = _load_saved(source) or datasets.load_dataset(source.dataset, source.subset, split=source.split)
    except DataError:
        raise
    except Exception as error:  # the library raises a dozen types of its own and of the libraries below it
        raise DataError(f"cannot load the dataset {source.label}: {_explain(error, source.dataset or '')}.") from error
    for index, values in enumerate(rows):
        yield Row(index, f"{source.label}: row {index}", values)


def _load_saved(source: RowSource) -> Any:
    """The rows of a folder that `save_to_disk` wrote: one split, or several by name. None for any other folder or name."""
    import datasets

    folder = Path(source.dataset or "")
    if (folder / "state.json").is_file():
        return datasets.load_from_disk(str(folder))
    if not (folder / "dataset_dict.json").is_file():
        return None
    splits = datasets.load_from_disk(str(folder))
    if source.split not in splits:
        raise DataError(f"the dataset {source.dataset} has no split '{source.split}'; its splits are {', '.join(map(repr, splits))}.")
    return splits[source.split]


def _explain(error: Exception, dataset: str) -> str:
    """What went wrong, in the words of the library, and what to do."""
    cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error  # it hides the reason
    lines = [line.strip().rstrip(".") for line in str(cause).splitlines() if line.strip()]
    if isinstance(error, ConnectionError):
        advice = "load it once where there is a network, or copy it here and give its folder"
    elif Path(dataset).is_dir():
        advice = "check subset, split and the files of the folder"
    elif isinstance(error, FileNotFoundError):
        advice = "check the name; a private dataset needs `hf auth login`"
    else:
        advice = "check name, subset and split"
    return f"{', '.join(lines[:2]) or type(cause).__name__}; {advice}"  # what follows is how to call the library
