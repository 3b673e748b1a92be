"""What safetensors files say about themselves: names, formats and shapes, without a byte of the weights. Standard library only.

A header is some hundred kilobytes, so a folder of 70 billion parameters is known within a second.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_r1z.errors import DataError
from megatron_r1z.weights.folders import INDEX_FILE, SINGLE_FILE

HEADER_LIMIT = 100_000_000
"""Bytes; that of the safetensors library."""
_ITEM_BITS = {
    **{"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16},
    **{"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8},
}
"""Of the formats whose size is checked."""
_LFS = b"version https://git-lfs"
"""What the small file begins with that git leaves where the weights were not downloaded."""


class Stored(NamedTuple):
    """A tensor in a file."""

    path: Path
    dtype: str
    """By its name in the header: `BF16`, `F8_E4M3`."""
    shape: tuple[int, ...]


def read_headers(folder: str | Path) -> dict[str, Stored]:
    """Every tensor of a model folder by name, in whichever file it is.

    Raises:
        DataError: there are no weights, a file is missing, cut off, no safetensors file or outside the folder, or the files and their
            index do not say the same.
    """
    index, single = Path(folder) / INDEX_FILE, Path(folder) / SINGLE_FILE
    if not index.is_file():
        if not single.is_file():
            raise DataError(
                f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; convert the weights to safetensors or set model.random_init."
            )
        return read_header(single)
    listed = read_index(index)
    if single.is_file() and single not in listed.values():
        raise DataError(
            f"{folder} holds {SINGLE_FILE} and {INDEX_FILE}, which does not list it: transformers reads the former and others the latter; "
            "delete the one that is not the model."
        )
    return _merge(index, listed)


def read_index(path: Path) -> dict[str, Path]:
    """The file of every tensor that an index lists.

    Raises:
        DataError: the index is malformed, or names a file that is not beside it.
    """
    try:
        names: Mapping[str, object] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {str(tensor): str(file) for tensor, file in names.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path} is not the index of a safetensors checkpoint: {error!r}.") from error
    for tensor, file in files.items():
        if not file or Path(file).name != file:
            raise DataError(f"{path} says that {tensor} is in {file!r}; the files of a model must lie beside its index.")
    return {tensor: path.parent / file for tensor, file in files.items()}


def _merge(index: Path, listed: Mapping[str, Path]) -> dict[str, Stored]:
    """The tensors of all files of an index; loaders read whole files, so what the index leaves out counts too."""
    found: dict[str, Stored] = {}
    for path in sorted(set(listed.values())):
        for name, stored in read_header(path).items():
            if name in found:
                raise DataError(f"{name} is in {found[name].path} and in {path}; a model has each tensor once.")
            found[name] = stored
    for name, path in listed.items():
        if name not in found or found[name].path != path:
            elsewhere = f"; it is in {found[name].path}" if name in found else ""
            raise DataError(f"{path} has no tensor {name}, though {index.name} says so{elsewhere}.")
    unlisted = next((name for name in found if name not in listed), None)
    if unlisted is not None:
        raise DataError(f"{found[unlisted].path} has a tensor {unlisted}, which {index.name} does not list; make the two agree.")
    return found


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of one file, by name.

    Raises:
        DataError: the file is missing, no safetensors file, or shorter or longer than its header says.
    """
    try:
        with path.open("rb") as file:
            entries, start = _parse(path, file)
            size = path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; copy the file again.") from error
    try:
        return _check_entries(path, entries, size - start)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not a safetensors file: its header is malformed ({error!r}); copy the file again.") from error


def _parse(path: Path, file: Any) -> tuple[dict[str, Any], int]:
    """The header's entries and where the numbers begin."""
    first = file.read(len(_LFS))
    if first == _LFS:
        raise DataError(f"{path} is a pointer of Git LFS, not the weights; run `git lfs pull` in that folder.")
    length = int.from_bytes(first[:8], "little")
    if len(first) < 8 or length > HEADER_LIMIT:
        raise DataError(f"{path} is not a safetensors file: it does not begin with the length of a header; copy the file again.")
    file.seek(8)
    text = file.read(length)
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not a safetensors file: its header is no JSON; copy the file again.") from error
    if not isinstance(entries, dict):
        raise DataError(f"{path} is not a safetensors file: its header is no JSON object; copy the file again.")
    entries.pop("__metadata__", None)
    return entries, 8 + length


def _check_entries(path: Path, entries: Mapping[str, Any], num_bytes: int) -> dict[str, Stored]:
    end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    if end != num_bytes:
        what = "cut off" if num_bytes < end else "longer than it should be"
        raise DataError(f"{path} is {what}: its header announces {end} bytes of weights and {num_bytes} are there; copy the file again.")
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        bits = _ITEM_BITS.get(entry["dtype"])
        start, stop = entry["data_offsets"]
        if start != position:
            raise ValueError(f"{name} begins at {start}, and what is before it ends at {position}")
        position = stop
        if bits is not None and stop - start != math.prod(entry["shape"]) * bits // 8:
            raise ValueError(f"{name} has {stop - start} bytes, not those of {entry['shape']} {entry['dtype']}")
    return {name: Stored(path, str(entry["dtype"]), tuple(entry["shape"])) for name, entry in entries.items()}
