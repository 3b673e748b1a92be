"""Which matrices go over in FP8, and the layouts of their bytes and of their scales. Standard library only.

A matrix is quantised on the rank that holds it, in blocks of 128 x 128 (`fp8/blocks.py`), and every engine rank gets the bytes and scales
of its share. That is exact where no cut of either side goes through a block: every box of the matrix begins and ends at multiples of
128, in the checkpoint and in the parameter. Then the scales are a matrix of their own, a 128th as large both ways, and all boxes shrink
with it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from megatron_r1z.layout.blocks import Block, Box, Layout
from megatron_r1z.layout.families import BLOCK_FP8, ModelShape, layer_tensors

BLOCK = 128
"""Rows and columns of a weight that share a scale; of activations 1 x 128 do."""
SCALES = "_scale_inv"
"""What vLLM and Hugging Face add to a matrix's name for its scales."""


class Formats(NamedTuple):
    """One layout, by number format."""

    plain: Layout
    """What is not in FP8."""
    data: Layout
    """Matrices in FP8."""
    scales: Layout
    """Their scales, float32."""


def fp8_matrices(shape: ModelShape, layouts: Iterable[Layout], bf16_layers: Collection[int] = ()) -> frozenset[str]:
    """The matrices of the layers that can go over in FP8 between all of these layouts.

    Parameters that are made of several matrices (q, k and v; gate and up) have one format, so one matrix that cannot keeps out the others.
    Mixtures of experts have none.

    Args:
        shape: of the model.
        layouts: both sides.
        bf16_layers: layers that the policy computes in bf16.
    """
    if shape.num_experts:
        return frozenset()
    names = [spec.name for spec in layer_tensors(shape) if len(spec.shape) == 2]
    found = {f"model.layers.{layer}.{name}" for layer in range(shape.num_layers) if layer not in bf16_layers for name in names}
    blocks = [block for layout in layouts for block in layout.blocks if block.tensor in found]
    found -= {block.tensor for block in blocks if not _is_aligned(block)}
    while torn := _torn_parameters(blocks, found):
        found -= {block.tensor for block in blocks if (block.rank, block.parameter) in torn}
    return frozenset(found)


def _is_aligned(block: Block) -> bool:
    return not any(number % BLOCK for number in (*block.start, *block.size, *block.local_start))


def _torn_parameters(blocks: Sequence[Block], found: Collection[str]) -> set[tuple[int, str]]:
    """Parameters of which some matrices are in and some are out."""
    inside, outside = ({(block.rank, block.parameter) for block in blocks if (block.tensor in found) is kept} for kept in (True, False))
    return inside & outside


def by_format(layout: Layout, matrices: Collection[str]) -> Formats:
    """Cut a layout into its number formats; with no matrices everything is plain."""
    inside = tuple(block for block in layout.blocks if block.tensor in matrices)
    outside = tuple(block for block in layout.blocks if block.tensor not in matrices)
    names = {block.parameter for block in inside}
    data = {rank: {name: size for name, size in sizes.items() if name in names} for rank, sizes in layout.parameters.items()}
    plain = {rank: {name: size for name, size in sizes.items() if name not in names} for rank, sizes in layout.parameters.items()}
    scales = {rank: {name + SCALES: _shrunk(size) for name, size in sizes.items()} for rank, sizes in data.items()}
    return Formats(
        Layout(layout.name, outside, plain),
        Layout(f"{layout.name} fp8", inside, data),
        Layout(f"{layout.name} scales", tuple(map(_scales_of, inside)), scales),
    )


def fp8_parameters(layout: Layout, rank: int, matrices: Collection[str]) -> set[str]:
    """The parameters of one rank that go over in FP8."""
    return {block.parameter for block in layout.blocks_of(rank) if block.tensor in matrices}


def _scales_of(block: Block) -> Block:
    return Block(
        block.tensor + SCALES,
        _shrunk(block.start),
        _shrunk(block.size),
        block.rank,
        block.parameter + SCALES,
        _shrunk(block.local_start),
    )


def _shrunk(box: Box) -> Box:
    return tuple(-(-number // BLOCK) for number in box)


def left_out(shape: ModelShape, matrices: Collection[str]) -> list[str]:
    """The matrices of the layers that stay in bf16, for a reader: equal ones of all layers are named once.

    >>> from megatron_r1z.layout.families import ModelShape
    >>> shape = ModelShape("llama", 2, 256, 2, 2, 64, 512, 100, True, False, False, 1e4, None, 1e-6, 128)
    >>> left_out(shape, {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 1)})[:2]
    ['model.layers.*.self_attn.q_proj.weight', 'model.layers.*.self_attn.k_proj.weight']
    """
    names = [spec.name for spec in layer_tensors(shape) if len(spec.shape) == 2]
    found = []
    for name in names:
        layers = [layer for layer in range(shape.num_layers) if f"model.layers.{layer}.{name}" not in matrices]
        found += [f"model.layers.*.{name}"] if len(layers) == shape.num_layers else [f"model.layers.{layer}.{name}" for layer in layers]
    return found


def quantization_config(modules_to_not_convert: Sequence[str]) -> dict[str, object]:
    """Hugging Face's description of a checkpoint of which these linear layers are not in FP8."""
    return {**BLOCK_FP8, "modules_to_not_convert": list(modules_to_not_convert)}


def modules_to_not_convert(shape: ModelShape, matrices: Collection[str]) -> list[str]:
    """The linear layers that are not in FP8, in the words of Hugging Face's `quantization_config`."""
    names = [spec.name for spec in layer_tensors(shape) if len(spec.shape) == 2]
    every = [f"model.layers.{layer}.{name}" for layer in range(shape.num_layers) for name in names]
    return [re.sub(r"\.weight$", "", name) for name in every if name not in matrices] + ["lm_head"]
