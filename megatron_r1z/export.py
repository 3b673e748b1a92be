"""Weights from and to a folder in Hugging Face format, by the same layouts that describe policy and engine.

Import: a rank reads the boxes that its blocks name, and nothing else. Export: a plan from the policy's layout to whole tensors that are
spread over writers, then one or more safetensors files per writer.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_r1z.errors import DataError
from megatron_r1z.layout.blocks import Block, Layout, box_slices, covered, hf_layout
from megatron_r1z.layout.families import ModelShape, hf_tensors
from megatron_r1z.layout.plan import make_plan
from megatron_r1z.reshard.execute import execute

SHARD_BYTES = 5_000_000_000
"""Bound of one file; transformers has used 5 GB for years and every loader accepts it."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
    "*.jinja",
    "chat_template*",
    "generation_config.json",
)
"""Files that go along with the weights, as patterns in the model's folder."""


def locate_tensors(folder: str | Path) -> dict[str, Path]:
    """The file of every tensor in a folder, by tensor name; opens no weights except a single `model.safetensors`.

    Raises:
        DataError: there is neither an index nor a single file, or it cannot be read.
    """
    index, single = Path(folder) / _INDEX, Path(folder) / _SINGLE
    if index.is_file():
        return _read_index(index)
    if not single.is_file():
        raise DataError(f"{folder} holds neither {_SINGLE} nor {_INDEX}; convert the weights to safetensors or set model.random_init.")
    with ExitStack() as stack:
        return dict.fromkeys(_open(single, stack).keys(), single)


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
        with ExitStack() as stack:
            _load_blocks(_open(path, stack), path, group, shapes, parameters)


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
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Write the model in Hugging Face format; all ranks of `layout` call this.

    The folder appears under its name only when it is complete; an older one of that name is replaced.

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
        process_group: the group whose members are the layout's ranks.

    Raises:
        RefitError: a transfer failed or timed out.
    """
    target = Path(folder)
    partial = target.with_name(f"{target.name}.partial")
    destination, shards = _plan_files(shape, num_ranks, dtype, shard_bytes)
    owned = {
        name: torch.empty(size, dtype=dtype) for name, size in destination.parameters.get(rank, {}).items()
    }  # on the host: the model need not fit on the device twice
    part = make_plan(layout, destination, dtype.itemsize).of_rank(rank)
    execute(part, parameters, owned, dtype=dtype, device=_buffer_device(parameters), process_group=process_group)
    if rank == 0:
        _make_empty(partial)
    _barrier(process_group)
    for shard in shards:
        if shard.writer == rank:
            save_file({name: owned[name] for name in shard.tensors}, partial / shard.file, metadata={"format": "pt"})
    _barrier(process_group)
    if rank == 0:
        _write_companions(partial, Path(model_folder), dtype)
        _write_index(partial, shards, shape, dtype.itemsize)
        _replace(partial, target)
    _barrier(process_group)


class Shard(NamedTuple):
    """One file of an export."""

    writer: int
    file: str
    tensors: tuple[str, ...]


def _plan_files(shape: ModelShape, num_ranks: int, dtype: torch.dtype, shard_bytes: int) -> tuple[Layout, list[Shard]]:
    """Which rank writes which tensors into which file: no more writers than files are needed."""
    total = sum(spec.numel for spec in hf_tensors(shape)) * dtype.itemsize
    destination = hf_layout(shape, min(num_ranks, -(-total // shard_bytes)))
    return destination, make_shards(destination, dtype.itemsize, shard_bytes)


def make_shards(layout: Layout, itemsize: int, shard_bytes: int) -> list[Shard]:
    """Cut each writer's tensors into files of at most `shard_bytes` (or one tensor); a single file has the plain name."""
    groups = [
        (writer, group) for writer, parameters in sorted(layout.parameters.items()) for group in _bounded(parameters, itemsize, shard_bytes)
    ]
    if len(groups) == 1:
        return [Shard(groups[0][0], _SINGLE, groups[0][1])]
    return [
        Shard(writer, f"model-{number:05d}-of-{len(groups):05d}.safetensors", names)
        for number, (writer, names) in enumerate(groups, start=1)
    ]


def _bounded(parameters: Mapping[str, Sequence[int]], itemsize: int, limit: int) -> Iterator[tuple[str, ...]]:
    group: list[str] = []
    used = 0
    for name in sorted(parameters):
        nbytes = math.prod(parameters[name]) * itemsize
        if group and used + nbytes > limit:
            yield tuple(group)
            group, used = [], 0
        group.append(name)
        used += nbytes
    if group:
        yield tuple(group)


# --- reading ---


def _read_index(path: Path) -> dict[str, Path]:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(tensor): path.parent / str(file) for tensor, file in names.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path} is not the index of a safetensors checkpoint: {error!r}.") from error


def _open(path: Path, stack: ExitStack) -> Any:
    """An open safetensors file, closed with `stack`."""
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read {path}: {error}.") from error


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
    file: Any, path: Path, blocks: Sequence[Block], shapes: Mapping[str, tuple[int, ...]], parameters: Mapping[str, Tensor]
) -> None:
    for block in blocks:
        try:
            tensor = file.get_slice(block.tensor)
        except SafetensorError as error:
            raise DataError(f"{path} has no tensor {block.tensor}, though the index says so.") from error
        if tuple(tensor.get_shape()) != shapes[block.tensor]:
            raise DataError(f"{path}: {block.tensor} has shape {tensor.get_shape()}; config.json says {list(shapes[block.tensor])}.")
        target = parameters[block.parameter].detach()[box_slices(block.local_start, block.size)]
        target.copy_(tensor[box_slices(block.start, block.size)])


# --- writing ---


def _buffer_device(parameters: Mapping[str, Tensor]) -> torch.device:
    return next(iter(parameters.values())).device


def _barrier(process_group: dist.ProcessGroup | None) -> None:
    if dist.is_initialized():
        dist.barrier(group=process_group)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_companions(folder: Path, model_folder: Path, dtype: torch.dtype) -> None:
    """config.json with the number format of the files, and the tokenizer's files as they are."""
    config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]:
        config[key] = name
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for pattern in _COMPANIONS:
        for path in sorted(model_folder.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def _write_index(folder: Path, shards: Sequence[Shard], shape: ModelShape, itemsize: int) -> None:
    if len(shards) == 1:
        return
    files = {name: shard.file for shard in shards for name in shard.tensors}
    total = sum(spec.numel for spec in hf_tensors(shape)) * itemsize
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _replace(partial: Path, target: Path) -> None:
    """Give the finished folder its name; an older one is set aside first, so that at no time half a folder has the name."""
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)
