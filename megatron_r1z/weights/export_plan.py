"""What an export writes where and when: which rank writes which file, and in which waves the rows come. Pure data, as all plans are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

from megatron_r1z.layout.blocks import Block, Box, Layout, hf_layout
from megatron_r1z.layout.families import ModelShape, TensorSpec, hf_tensors
from megatron_r1z.layout.fp8 import by_format
from megatron_r1z.layout.plan import Plan, make_plan
from megatron_r1z.weights.folders import SINGLE_FILE


class Shard(NamedTuple):
    """One file of an export."""

    writer: int
    file: str
    tensors: tuple[TensorSpec, ...]
    number_format: int
    """Of all its tensors, as an index of `layout.fp8.Formats`."""
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return sum(spec.numel for spec in self.tensors) * self.itemsize


def plan_shards(shape: ModelShape, num_ranks: int, itemsize: int, shard_bytes: int, matrices: Collection[str] = ()) -> list[Shard]:
    """Which rank writes which tensors into which file: no more writers than files are needed, and one number format a file.

    Args:
        shape: of the model.
        num_ranks: that can write.
        itemsize: of everything that is not in FP8.
        shard_bytes: bound of a file.
        matrices: what is written in FP8, with its scales (`layout/fp8.fp8_matrices`).
    """
    total = sum(spec.numel for spec in hf_tensors(shape)) * itemsize
    formats = by_format(hf_layout(shape, min(num_ranks, -(-total // shard_bytes))), matrices)
    return make_shards(formats, (itemsize, 1, 4), shard_bytes)


def make_shards(layouts: Sequence[Layout], itemsizes: Sequence[int], shard_bytes: int) -> list[Shard]:
    """Cut each writer's tensors into files of at most `shard_bytes` (or one tensor); a single file has the plain name."""
    groups = [
        (writer, group, number, itemsize)
        for number, (layout, itemsize) in enumerate(zip(layouts, itemsizes, strict=True))
        for writer, parameters in sorted(layout.parameters.items())
        for group in _bounded(parameters, itemsize, shard_bytes)
    ]
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    return [
        Shard(writer, name if len(groups) > 1 else SINGLE_FILE, tensors, number, itemsize)
        for name, (writer, tensors, number, itemsize) in zip(names, groups, strict=True)
    ]


def _bounded(parameters: Mapping[str, Box], itemsize: int, limit: int) -> Iterator[tuple[TensorSpec, ...]]:
    group: list[TensorSpec] = []
    used = 0
    for spec in (TensorSpec(name, parameters[name]) for name in sorted(parameters)):
        nbytes = spec.numel * itemsize
        if group and used + nbytes > limit:
            yield tuple(group)
            group, used = [], 0
        group.append(spec)
        used += nbytes
    if group:
        yield tuple(group)


class Rows(NamedTuple):
    """Some rows of a checkpoint tensor."""

    tensor: TensorSpec
    first_row: int
    num_rows: int


def cut_waves(tensors: Iterable[TensorSpec], itemsize: int, limit: int) -> Iterator[list[Rows]]:
    """One writer's tensors, in order, in waves of at most `limit` bytes, or of one row."""
    wave: list[Rows] = []
    free = limit
    for tensor in tensors:
        first, row_bytes = 0, tensor.numel // tensor.shape[0] * itemsize
        while first < tensor.shape[0]:
            if wave and row_bytes > free:
                yield wave
                wave, free = [], limit
            count = min(tensor.shape[0] - first, max(1, free // row_bytes))
            wave.append(Rows(tensor, first, count))
            first, free = first + count, free - count * row_bytes
    if wave:
        yield wave


def plan_waves(source: Layout, shards: Sequence[Shard], itemsize: int, wave_bytes: int, ranks_per_node: int) -> Iterator[Plan]:
    """From `source` to the files, a plan at a time; the destination's parameters are rows of tensors, by the tensors' names.

    In a wave each writer receives at most `wave_bytes`, or one row. Rounds are half as large, as two of them are on their way at a time.
    A plan is made from the blocks of its own tensors only, so that all of them together take little longer than one for the whole model.
    `ranks_per_node` consecutive ranks share a node: where one of them has the rows of a writer there, it sends them.

    Raises:
        RefitError: the source lacks part of a tensor.
    """
    blocks_of = _by_tensor(source.blocks)
    tensors: dict[int, list[TensorSpec]] = {}
    for shard in shards:
        tensors.setdefault(shard.writer, []).extend(shard.tensors)
    for waves in zip_longest(*(cut_waves(group, itemsize, wave_bytes) for group in tensors.values()), fillvalue=()):
        destination = _wave_layout(dict(zip(tensors, waves, strict=True)))
        names = dict.fromkeys(block.tensor for block in destination.blocks)
        held = tuple(block for name in names for block in blocks_of.get(name, ()))
        yield make_plan(Layout(source.name, held, source.parameters), destination, itemsize, max(wave_bytes // 2, itemsize), ranks_per_node)


def _by_tensor(blocks: Iterable[Block]) -> dict[str, list[Block]]:
    groups: dict[str, list[Block]] = {}
    for block in blocks:
        groups.setdefault(block.tensor, []).append(block)
    return groups


def _wave_layout(waves: Mapping[int, Sequence[Rows]]) -> Layout:
    sizes = {writer: {rows.tensor.name: (rows.num_rows, *rows.tensor.shape[1:]) for rows in wave} for writer, wave in waves.items()}
    blocks = [_block_of(rows, writer) for writer, wave in waves.items() for rows in wave]
    return Layout("rows of files", tuple(blocks), sizes)


def _block_of(rows: Rows, writer: int) -> Block:
    name, rest = rows.tensor.name, rows.tensor.shape[1:]
    zeros = (0,) * len(rest)
    return Block(name, (rows.first_row, *zeros), (rows.num_rows, *rest), writer, name, (0, *zeros))
