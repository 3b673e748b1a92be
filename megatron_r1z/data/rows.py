"""Rows of question files, corpora and datasets, each with the place it came from for messages."""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import math
import reprlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from megatron_r1z.config import RowSource, Scalar
from megatron_r1z.errors import DataError, MissingExtraError

COMPRESSED = ".gz"
"""Suffix of a file that is read through gzip; the one before it tells its format."""
_MISSING = object()
_ROWS_AT_ONCE = 1000
"""Rows of a table that become Python objects together: one by one takes four times as long."""
_CSV_FIELD = 1 << 30
"""Longest value in characters; the library's own limit is meant for untrusted uploads."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file or a dataset."""

    index: int
    """From 0, in the order of the file."""
    where: str
    """`file:line` (JSONL and CSV, from 1), or `file: row n` (JSON lists, Parquet and datasets, from 0)."""
    values: dict[str, Any]

    def has(self, column: str) -> bool:
        """Whether there is such a column."""
        return find(self.values, column) is not _MISSING

    def get(self, column: str) -> Any:
        """The value of `column`; `a.b` is a column of that name, or else `b` inside the column `a`.

        Raises:
            DataError: there is no such column (the message lists those there are), or a text in it cannot be written as UTF-8.
        """
        value = find(self.values, column)
        if value is _MISSING:
            names = ", ".join(map(repr, name_columns(self.values)))
            raise DataError(f"{self.where}: no column '{column}'; the columns are {names or 'none'}.")
        if has_lone_surrogate(value):
            raise DataError(
                f"{self.where}: '{column}' holds half of a character, or a byte that is not UTF-8 ({reprlib.repr(value)}); repair the row."
            )
        return value

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


def find(values: Mapping[str, Any], column: str) -> Any:
    """The value under a name with dots, of which the longest beginning that is a key is taken; `_MISSING` where there is none.

    >>> find({"a.b": 1, "a": {"b": 2, "c": {"d": 3}}}, "a.b"), find({"a": {"c": {"d": 3}}}, "a.c.d")
    (1, 3)
    """
    if column in values:
        return values[column]
    parts = column.split(".")
    for length in range(len(parts) - 1, 0, -1):
        inner = values.get(".".join(parts[:length]))
        if isinstance(inner, Mapping) and (value := find(inner, ".".join(parts[length:]))) is not _MISSING:
            return value
    return _MISSING


def name_columns(values: Mapping[str, Any]) -> list[str]:
    """The columns, nested ones by their dotted names.

    >>> name_columns({"prompt": "?", "reward_model": {"style": "rule", "ground_truth": "7"}})
    ['prompt', 'reward_model.style', 'reward_model.ground_truth']
    """
    names: list[str] = []
    for name, value in values.items():
        names += [f"{name}.{inner}" for inner in name_columns(value)] if isinstance(value, Mapping) and value else [name]
    return names


def has_lone_surrogate(value: Any) -> bool:
    """Whether a text in `value` has half of a surrogate pair, which JSON can escape and neither UTF-8 nor a tokenizer can take."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return True
        return False
    if isinstance(value, Mapping):
        return any(map(has_lone_surrogate, (*value, *value.values())))
    return isinstance(value, list) and any(map(has_lone_surrogate, value))


def parse_answers(value: Any, where: str, column: str) -> tuple[str, ...]:
    """What counts as right: text, a number, or a list of them; numbers as they are written in Python.

    Raises:
        DataError: anything else, and what no answer can equal: nothing, blank text, an empty list, a number that is not finite.
    """
    answers = tuple(_parse_answer(entry, where, column) for entry in (value if isinstance(value, list) else [value]))
    if not answers:
        raise DataError(f"{where}: '{column}' is an empty list; remove the row or fill it in.")
    return answers


def _parse_answer(value: Any, where: str, column: str) -> str:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float | Decimal) and math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, str | float | Decimal):
        raise DataError(f"{where}: '{column}' has no answer ({value!r}); remove the row or fill it in.")
    raise DataError(f"{where}: '{column}' must be text, a number or a list of them, not {reprlib.repr(value)}.")


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


def split_suffixes(path: str | Path) -> tuple[str, str, bool]:
    """A file's path without its suffixes, its format's suffix in lower case, and whether it is compressed.

    >>> split_suffixes("data/Train.v2.JSONL.gz")
    ('data/Train.v2', '.jsonl', True)
    """
    path = Path(path)
    compressed = path.suffix.lower() == COMPRESSED
    inner = path.with_suffix("") if compressed else path
    return str(inner.with_suffix("")), inner.suffix.lower(), compressed


def _scan_file(path: Path) -> Iterator[Row]:
    _, suffix, compressed = split_suffixes(path)
    if suffix not in _READERS or (compressed and suffix == ".parquet"):
        raise DataError(
            f"cannot tell the format of {path}; use a file that ends in {', '.join(_READERS)} (all but .parquet also with {COMPRESSED}), "
            "or convert it as docs/data.md shows."
        )
    if not path.is_file():
        raise DataError(f"there is no file {path}.")
    try:
        # gzip.open gives a BinaryIO in all but name
        with cast(BinaryIO, gzip.open(path)) if compressed else path.open("rb") as stream:
            yield from _READERS[suffix](stream, path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read to its end ({str(error).rstrip('.') or type(error).__name__}); copy it anew, or let it be read."
        ) from error


def _scan_jsonl(stream: BinaryIO, path: Path) -> Iterator[Row]:
    index = 0
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield read_row(index, f"{path}:{number}", line)
            index += 1


def read_row(index: int, where: str, line: bytes) -> Row:
    """A line of JSONL; one that is no JSON object is a `MalformedRow`."""
    try:
        return _make_row(index, where, _read_json(line, where, "line"), "line")
    except DataError as error:
        return MalformedRow(index, where, {}, str(error))


def _make_row(index: int, where: str, value: Any, unit: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: each {unit} must be a JSON object, not {type(value).__name__}.")
    return Row(index, where, value)


def _read_json(text: bytes, where: str, whole: str) -> Any:
    """The value of a JSON text; `whole` is what messages call all of it.

    Raises:
        DataError: it is not UTF-8, not JSON, names a key twice or has a number or a depth that Python does not read.
    """
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_make_object)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start} of the {whole}).") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error}).") from error
    except RecursionError as error:
        raise DataError(f"{where}: lists or objects in one another more deeply than can be read; flatten them.") from error
    except KeyError as error:
        raise DataError(f"{where}: the key '{error.args[0]}' is there twice; keep one of them.") from error
    except ValueError as error:  # Python's limit on the digits of a whole number
        raise DataError(f"{where}: a whole number is too long to be read; write it as text, in quotation marks.") from error


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON whose keys are all different; raises `KeyError` with one that is not."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeyError(next(name for name in names if names.count(name) > 1))
    return made


def _scan_json(stream: BinaryIO, path: Path) -> Iterator[Row]:
    """A list of objects or, since many files of that name are JSONL, an object on each line."""
    text = stream.read()
    content = text.removeprefix(codecs.BOM_UTF8).lstrip()
    if content.partition(b"\n")[0].strip() == b"{":
        raise DataError(
            f"{path} is one JSON object over several lines; write the list of its rows alone, or each row on a line of its own."
        )
    if not content.startswith(b"["):
        yield from _scan_jsonl(BytesIO(text), path)
        return
    for index, value in enumerate(_read_json(text, str(path), "file")):
        where = f"{path}: row {index}"
        try:
            yield _make_row(index, where, value, "entry")
        except DataError as error:
            yield MalformedRow(index, where, {}, str(error))


def _scan_csv(stream: BinaryIO, path: Path) -> Iterator[Row]:
    """Values are text, whatever they look like. Bytes that are not UTF-8 become lone surrogates, which `Row.get` refuses."""
    lines = (line.decode("utf-8-sig" if number == 0 else "utf-8", errors="surrogateescape") for number, line in enumerate(stream))
    reader = csv.reader(lines, strict=True)
    csv.field_size_limit(_CSV_FIELD)
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise DataError(f"{path}:1: the column '{next(name for name in names if names.count(name) > 1)}' is there twice; rename one.")
        index, line = 0, reader.line_num + 1
        for cells in reader:
            where = f"{path}:{line}"
            line = reader.line_num + 1
            if not cells:
                continue
            if len(cells) == len(names):
                yield Row(index, where, dict(zip(names, cells, strict=True)))
            else:
                yield MalformedRow(
                    index, where, {}, f"{where}: {len(cells)} values for {len(names)} columns; quote values with a comma in."
                )
            index += 1
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not valid CSV ({error}).") from error


def _scan_parquet(_stream: BinaryIO, path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError(f"reading {path} needs pyarrow; run `pip install pyarrow` or convert the file to JSONL.") from error
    try:
        table = pyarrow.parquet.ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file ({' '.join(str(error).split())}).") from error
    names = table.column_names
    if len(set(names)) < len(names):
        raise DataError(f"{path}: the column '{next(name for name in names if names.count(name) > 1)}' is there twice; rename one.")
    for start in range(0, len(table), _ROWS_AT_ONCE):
        yield from _read_slice(table.slice(start, _ROWS_AT_ONCE), start, path)


def _read_slice(table: Any, start: int, path: Path) -> Iterator[Row]:
    """The rows of a table, all at once, or one by one where not all of them can be read."""
    where = f"{path}: row {start}"
    try:
        rows = table.to_pylist()
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, dates beyond Python's
        if len(table) == 1:
            yield MalformedRow(start, where, {}, f"{where}: a value cannot be read ({' '.join(str(error).split())}); repair the row.")
            return
        for offset in range(len(table)):
            yield from _read_slice(table.slice(offset, 1), start + offset, path)
        return
    for index, values in enumerate(rows, start=start):
        yield Row(index, f"{path}: row {index}", values)


_READERS: dict[str, Callable[[BinaryIO, Path], Iterator[Row]]] = {
    ".jsonl": _scan_jsonl,
    ".json": _scan_json,
    ".csv": _scan_csv,
    ".parquet": _scan_parquet,
}
"""By suffix, in lower case."""


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


def explain_filter(source: RowSource, at_most: int = 10) -> str:
    """For a source of which `where` leaves nothing: the column that never matches and values that it has."""
    rows = list(scan_rows(source))
    for column, allowed in source.where.items():
        if not any(is_one_of(row.get(column), allowed) for row in rows):
            found = sorted({reprlib.repr(row.get(column)) for row in rows})
            more = ", ..." if len(found) > at_most else ""
            return f": where allows {', '.join(map(repr, allowed))} and '{column}' is {', '.join(found[:at_most])}{more}"
    return f": no row has all that where asks for ({', '.join(source.where)})"
