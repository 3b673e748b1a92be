"""Weights from and to a folder in Hugging Face format, by the same layouts that describe policy and engine.

Import: a rank reads the boxes that its blocks name, in pieces, and nothing else. Export: each writer takes its tensors in waves of a few
rows; all ranks carry out one plan per wave, from the policy's layout to these rows, and the writer appends them to its file. So neither a
model nor a tensor has to fit anywhere: beside its parameters a rank holds what a wave stages, sends and receives, `PIECE_BYTES` of each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1z.errors import DataError, ExportError
from megatron_r1z.layout.blocks import Block, Box, Layout, box_slices, covered
from megatron_r1z.layout.families import ModelShape, hf_tensors
from megatron_r1z.layout.fp8 import BLOCK, SCALES, by_format, fp8_matrices, fp8_parameters, modules_to_not_convert, quantization_config
from megatron_r1z.ranks import any_rank, gather, per_node
from megatron_r1z.reshard.once import execute
from megatron_r1z.reshard.quantise import QuantisedSource, dtypes_by_format
from megatron_r1z.weights.export_plan import Shard, plan_shards, plan_waves
from megatron_r1z.weights.hf_files import (
    PIECE_BYTES,
    TensorReader,
    TensorWriter,
    locate_tensors,
    make_empty,
    replace_folder,
    write_companions,
    write_index,
)

SHARD_BYTES = 5_000_000_000
"""Bound of one file; transformers has used 5 GB for years and every loader accepts it."""


@torch.no_grad()
def load_hf_weights(folder: str | Path, shape: ModelShape, layout: Layout, rank: int, parameters: Mapping[str, Tensor]) -> None:
    """Fill one rank's parameters from a folder; padding becomes zero, numbers are converted to each parameter's format.

    Args:
        folder: Hugging Face folder with safetensors.
        shape: `load_shape(folder)`.
        layout: for example `megatron_layout(shape, topology)`; `parameters` goes by its names.
        rank: the rank of the layout whose parameters these are.
        parameters: written in place.

    Raises:
        DataError: a tensor is missing, has another shape than `shape` says, or a file cannot be read.
    """
    files = locate_tensors(folder)
    blocks = layout.blocks_of(rank)
    _check_present(blocks, files, Path(folder))
    _zero_padding(blocks, layout.parameters[rank], parameters)
    shapes = {spec.name: spec.shape for spec in hf_tensors(shape)}
    by_file: dict[Path, list[Block]] = {}
    for block in blocks:
        by_file.setdefault(files[block.tensor], []).append(block)
    for path, group in by_file.items():
        with TensorReader(path) as file:
            _load_blocks(file, group, shapes, parameters, functools.partial(_load_scales, files))


def save_hf(
    folder: str | Path,
    model_folder: str | Path,
    shape: ModelShape,
    layout: Layout,
    parameters: Mapping[str, Tensor],
    rank: int,
    num_ranks: int,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
    wave_bytes: int = PIECE_BYTES,
    *,
    fp8: bool = False,
) -> None:
    """Write the model in Hugging Face format and read it back; all ranks of `layout`, which are those of the default group, call this.

    The folder appears under its name only when it is complete and reads back as it was sent; an older one of that name is then replaced.

    Args:
        folder: to be written.
        model_folder: where config.json, tokenizer and chat template are copied from.
        shape: shape of the model.
        layout: layout of `parameters`.
        parameters: this rank's, in any number format.
        rank: this rank.
        num_ranks: ranks of `layout`.
        dtype: number format of the files, also written into config.json.
        shard_bytes: bound of one file.
        wave_bytes: bound of what one writer takes at a time.
        fp8: write the matrices of the layers in blocks of FP8 with their scales, as far as `layout` can be cut into them, and say so in
            config.json (`quantization_config`).

    Raises:
        ExportError: on every rank, when one of them could not write or did not read back what it wrote.
        RefitError: a transfer failed or timed out.
    """
    target = Path(folder)
    partial = target.with_name(f"{target.name}.partial")
    matrices = fp8_matrices(shape, [layout]) if fp8 else frozenset()
    shards = plan_shards(shape, num_ranks, dtype.itemsize, shard_bytes, matrices)
    dtypes, formats = dtypes_by_format(dtype), by_format(layout, matrices)
    files = [TensorWriter(partial / shard.file, shard.tensors, dtypes[shard.number_format]) for shard in shards if shard.writer == rank]
    together = _Together(partial, sum(shard.nbytes for shard in shards))
    together(lambda: make_empty(partial), rank == 0)
    together(lambda: _each(files, TensorWriter.create))
    buffer = torch.empty(wave_bytes if files else 0, dtype=torch.uint8)
    source = QuantisedSource(lambda: parameters, fp8_parameters(layout, rank, matrices))()
    for number, (number_format, part) in enumerate(zip(dtypes, formats, strict=True)):
        written = [shard for shard in shards if shard.number_format == number]
        for wave in plan_waves(part, written, number_format.itemsize, wave_bytes, per_node()):
            staged = _staged(wave.destination.parameters.get(rank, {}), buffer, number_format)
            mine = {name: source[name] for name in part.parameters[rank]}
            execute(wave.of_rank(rank), mine, staged, dtype=number_format, device=_buffer_device(parameters))
            together(functools.partial(_append, files, staged))
    together(lambda: _each(files, TensorWriter.check))
    kept = modules_to_not_convert(shape, matrices) if fp8 else None
    together(lambda: _complete(partial, target, Path(model_folder), dtype, shards, kept), rank == 0)


# --- reading ---


def _check_present(blocks: Sequence[Block], files: Mapping[str, Path], folder: Path) -> None:
    for block in blocks:
        if block.tensor not in files:
            raise DataError(f"{folder} has no tensor {block.tensor}, which {block.parameter} of rank {block.rank} needs.")


def _zero_padding(blocks: Sequence[Block], shapes: Mapping[str, Sequence[int]], parameters: Mapping[str, Tensor]) -> None:
    filled = covered(blocks)
    for name, size in shapes.items():
        if filled.get(name, 0) < math.prod(size):
            parameters[name].detach().zero_()


def _load_blocks(
    file: TensorReader,
    blocks: Sequence[Block],
    shapes: Mapping[str, Box],
    parameters: Mapping[str, Tensor],
    load_scales: Callable[[str], Tensor],
) -> None:
    for block in blocks:
        found = file.shape(block.tensor)
        if found != shapes[block.tensor]:
            raise DataError(f"{file.path}: {block.tensor} has shape {list(found)}; config.json says {list(shapes[block.tensor])}.")
        scales = load_scales(block.tensor) if file.dtype(block.tensor) is torch.float8_e4m3fn else None
        target = parameters[block.parameter].detach()[box_slices(block.local_start, block.size)]
        for first, rows in file.pieces(block.tensor, block.start, block.size):
            start = (block.start[0] + first, *block.start[1:])
            target[first : first + len(rows)].copy_(rows if scales is None else _dequantised(rows, scales, start))


def _load_scales(files: Mapping[str, Path], tensor: str) -> Tensor:
    """All scales of a matrix in FP8."""
    name = tensor + SCALES
    if name not in files:
        raise DataError(f"{files[tensor]}: {tensor} is in FP8, but there is no {name}; only blocks of {BLOCK} x {BLOCK} can be read.")
    with TensorReader(files[name]) as file:
        size = file.shape(name)
        return torch.cat([rows.clone() for _, rows in file.pieces(name, (0,) * len(size), size)])


def _dequantised(rows: Tensor, scales: Tensor, start: Box) -> Tensor:
    """A box of a matrix in FP8, whose first element is `start`."""
    down, across = ((torch.arange(count) + first) // BLOCK for count, first in zip(rows.shape, start, strict=True))
    return rows.float() * scales[down][:, across]


# --- writing ---


class _Together:
    """Work of this rank on the folder, after which all ranks go on or none: no rank waits for one that could not write."""

    def __init__(self, folder: Path, total_bytes: int) -> None:
        self._folder = folder
        self._total_bytes = total_bytes

    def __call__(self, work: Callable[[], None], mine: bool = True) -> None:
        failure = self._attempt(work) if mine else None
        sentences = [] if failure is None else [str(failure)]
        if dist.is_initialized():
            sentences = gather(sentences) if any_rank(failure is not None) else []
        if sentences:
            raise failure or ExportError(sentences[0])

    def _attempt(self, work: Callable[[], None]) -> ExportError | None:
        try:
            work()
        except ExportError as error:
            return error
        except OSError as error:
            failure = ExportError(
                f"cannot write {self._folder}: {error.strerror}; name a folder that can be written and has {self._total_bytes} bytes free."
            )
            failure.__cause__ = error
            return failure
        return None


def _each(files: Sequence[TensorWriter], do: Callable[[TensorWriter], None]) -> None:
    for file in files:
        do(file)


def _staged(sizes: Mapping[str, Box], buffer: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Where a wave's rows are put, one tensor after the other: in the buffer that all waves share, unless a single row exceeds it."""
    lengths = [math.prod(size) for size in sizes.values()]
    nbytes = sum(lengths) * dtype.itemsize
    space = buffer if nbytes <= len(buffer) else buffer.new_empty(nbytes)
    parts = torch.split(space[:nbytes].view(dtype), lengths)
    return {name: part.view(size) for (name, size), part in zip(sizes.items(), parts, strict=True)}


def _append(files: Sequence[TensorWriter], staged: Mapping[str, Tensor]) -> None:
    """A wave's rows into their files; a wave lists tensors in the order of the files."""
    file_of = {name: file for file in files for name in file.names}
    for name, rows in staged.items():
        file_of[name].append(name, rows)


def _complete(
    partial: Path, target: Path, model_folder: Path, dtype: torch.dtype, shards: Sequence[Shard], not_in_fp8: Sequence[str] | None
) -> None:
    write_companions(partial, model_folder, dtype, None if not_in_fp8 is None else quantization_config(not_in_fp8))
    write_index(partial, {spec.name: shard.file for shard in shards for spec in shard.tensors}, sum(shard.nbytes for shard in shards))
    replace_folder(partial, target)


def _buffer_device(parameters: Mapping[str, Tensor]) -> torch.device:
    return next(iter(parameters.values())).device
