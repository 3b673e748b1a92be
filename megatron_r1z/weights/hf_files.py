"""The files of a folder in Hugging Face format: where each tensor is, reading in pieces, writing from the first byte to the last.

Nothing here holds a whole file or a whole tensor. What is read are pages of a mapped file, which stay resident until the file is closed:
`TensorReader` opens it again every `PIECE_BYTES`. What is written is appended as it comes, behind a header that says where everything
will be; `TensorWriter.check` reads the file back from the disk and compares.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_r1z.errors import DataError, ExportError
from megatron_r1z.layout.blocks import Box, box_slices
from megatron_r1z.layout.families import TensorSpec
from megatron_r1z.weights.folders import INDEX_FILE, SINGLE_FILE, companions
from megatron_r1z.weights.hf_headers import read_index

PIECE_BYTES = 64 << 20
"""What is read or written at a time: large enough for a disk to be at full speed, small beside a rank's weights."""

FORMATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""Number formats by their names in a safetensors header."""
_NAMES = {dtype: name for name, dtype in FORMATS.items()}


def row_ranges(num_rows: int, row_bytes: int, limit: int) -> Iterator[tuple[int, int]]:
    """First row and number of rows of pieces of at most `limit` bytes, or of one row.

    >>> list(row_ranges(5, 10, 20))
    [(0, 2), (2, 2), (4, 1)]
    """
    step = max(1, limit // row_bytes)
    for first in range(0, num_rows, step):
        yield first, min(step, num_rows - first)


# --- reading ---


def locate_tensors(folder: str | Path) -> dict[str, Path]:
    """The file of every tensor in a folder, by tensor name; opens no weights except a single `model.safetensors`.

    Raises:
        DataError: there is neither an index nor a single file, or it cannot be read.
    """
    index, single = Path(folder) / INDEX_FILE, Path(folder) / SINGLE_FILE
    if index.is_file():
        return read_index(index)
    if not single.is_file():
        raise DataError(
            f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; convert the weights to safetensors or set model.random_init."
        )
    with TensorReader(single) as file:
        return dict.fromkeys(file.names(), single)


class TensorReader:
    """A safetensors file, read box by box; use it as a context.

    Raises:
        DataError: the file cannot be read, or lacks a tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stack = ExitStack()
        self._open()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_error: object) -> None:
        self._close()

    def names(self) -> list[str]:
        """All tensors of the file."""
        return list(self._file.keys())

    def shape(self, name: str) -> Box:
        """Shape of one tensor."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Number format of one tensor."""
        found = self._slice(name).get_dtype()
        if found not in FORMATS:
            raise DataError(f"{self.path}: {name} is stored as {found}; formats that can be read are {', '.join(FORMATS)}.")
        return FORMATS[found]

    def pieces(self, name: str, start: Box, size: Box) -> Iterator[tuple[int, Tensor]]:
        """A box in row pieces, each with its first row counted from `start`; a piece is valid until the next one is asked for."""
        row_bytes = self.dtype(name).itemsize * _row_numel(self.shape(name))  # whole rows, of which a box of columns touches every page
        for first, count in row_ranges(size[0], row_bytes, PIECE_BYTES):
            self._make_room(count * row_bytes)
            yield first, self._slice(name)[box_slices((start[0] + first, *start[1:]), (count, *size[1:]))]

    def _make_room(self, nbytes: int) -> None:
        """Let go of the pages read so far when there are too many."""
        if self._touched and self._touched + nbytes > PIECE_BYTES:
            self._close()
            self._open()
        self._touched += nbytes

    def _open(self) -> None:
        self._touched = 0
        try:
            self._file = self._stack.enter_context(safe_open(self.path, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise DataError(f"cannot read {self.path}: {error}.") from error

    def _close(self) -> None:
        self._stack.close()
        del self._file

    def _slice(self, name: str) -> Any:
        try:
            return self._file.get_slice(name)
        except SafetensorError as error:
            raise DataError(f"{self.path} has no tensor {name}, though the index says so.") from error


def _row_numel(shape: Box) -> int:
    return TensorSpec("", shape[1:]).numel


# --- writing ---


class TensorWriter:
    """A safetensors file to which tensors are appended in order, in as many pieces as one likes."""

    def __init__(self, path: Path, tensors: Sequence[TensorSpec], dtype: torch.dtype) -> None:
        self.path = path
        self._tensors = {spec.name: spec for spec in tensors}
        self._dtype = dtype
        self._sums: dict[str, int] = {}

    @property
    def names(self) -> Iterable[str]:
        """Its tensors, in the order in which they are appended."""
        return self._tensors

    def create(self) -> None:
        """Write the header."""
        self.path.write_bytes(_header(list(self._tensors.values()), self._dtype))

    def append(self, name: str, rows: Tensor) -> None:
        """Write the next rows of a tensor; contiguous, on the host, in the format of the file."""
        data = rows.view(torch.uint8).numpy().data
        self._sums[name] = zlib.crc32(data, self._sums.get(name, 0))
        with self.path.open("ab") as file:
            file.write(data)

    def check(self) -> None:
        """Read the file back from the disk and compare it with what was appended.

        Raises:
            ExportError: names the first tensor that differs.
        """
        sync(self.path)
        try:
            with TensorReader(self.path) as file:
                self._compare(file)
        except DataError as error:
            raise ExportError(f"what was written cannot be read back: {error}") from error

    def _compare(self, file: TensorReader) -> None:
        if set(file.names()) != self._tensors.keys():
            wrong = sorted(set(file.names()) ^ self._tensors.keys())
            raise ExportError(f"{self.path} holds {len(file.names())} tensors where {len(self._tensors)} were written; {wrong[0]} differs.")
        for name, spec in self._tensors.items():
            found, sent = (file.shape(name), file.dtype(name), _sum(file, spec)), (spec.shape, self._dtype, self._sums[name])
            if found != sent:
                raise ExportError(f"{self.path}: {name} reads back as {_describe(*found)}; {_describe(*sent)} was written.")


def sync(path: Path) -> None:
    """Wait until a file is on the disk, and forget what memory has of it, so that the next reader sees the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sync_entries(folder: Path) -> None:
    """Wait until the names in a folder are on the disk: a file's own sync does not see to its name."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _header(tensors: Sequence[TensorSpec], dtype: torch.dtype) -> bytes:
    """Length, then JSON padded with spaces to a multiple of eight bytes: https://huggingface.co/docs/safetensors (format)."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in tensors:
        end = position + spec.numel * dtype.itemsize
        entries[spec.name] = {"dtype": _NAMES[dtype], "shape": spec.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _sum(file: TensorReader, spec: TensorSpec) -> int:
    value = 0
    for _, rows in file.pieces(spec.name, (0,) * len(spec.shape), file.shape(spec.name)):
        value = zlib.crc32(rows.view(torch.uint8).numpy().data, value)
    return value


def _describe(shape: Box, dtype: torch.dtype, checksum: int) -> str:
    return f"{list(shape)} {str(dtype).removeprefix('torch.')} with checksum {checksum:08x}"


# --- the folder around the weights ---


def make_empty(folder: Path) -> None:
    """An empty folder, whatever was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def write_index(folder: Path, files: Mapping[str, str], total_bytes: int) -> None:
    """The file of each tensor, where there is more than one file."""
    if set(files.values()) == {SINGLE_FILE}:
        return
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(files.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_companions(folder: Path, model_folder: Path, dtype: torch.dtype, quantization: Mapping[str, object] | None) -> None:
    """config.json with the number format and quantisation of the files; what goes along with weights, as it is.

    Python files do if a configuration names some in `auto_map`.
    """
    config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]:
        config[key] = name
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in companions(model_folder):
        target = folder / path.relative_to(model_folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


def replace_folder(partial: Path, target: Path) -> None:
    """Give the finished folder its name, its files being on the disk; an older one of that name is set aside first.

    At no time half a folder has the name, and at none both are gone.
    """
    for path in (partial, *partial.rglob("*")):
        if path.is_dir():
            sync_entries(path)
        else:
            sync(path)
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    sync_entries(target.parent)
    shutil.rmtree(old, ignore_errors=True)
