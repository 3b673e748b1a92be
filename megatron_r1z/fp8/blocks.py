"""Block quantisation to float8_e4m3fn by the rule of Transformer Engine's `Float8BlockScaling`, in torch.

A tensor is cut into blocks: 128 x 128 for a weight, 1 x 128 along the last dimension for activations and gradients. Each has one float32
scale, so that its largest magnitude comes near 448, the largest number of e4m3:

    data = round(values * scale)        to nearest, ties to even
    values ~ data * scale_inv           scale_inv = 1 / scale, which is what Transformer Engine and vLLM both keep

By default scales are powers of two: then the product is exact, only the rounding loses something, and a value that has been quantised
once is quantised to itself again. Blocks at the edge may be smaller: they count as filled up with zeros.

Bit for bit the result of the kernels of Transformer Engine (2.3 to 2.20, `transformer_engine/common/`: `recipe/recipe_common.cuh`,
`transpose/quantize_transpose_square_blockwise.cu`, `transpose/quantize_transpose_vector_blockwise.cu`) apart from the sign bit of a
not-a-number. Their special cases: a block of zeros has scale 1; so has one with an infinity, which becomes 448; a not-a-number does
not count for the scale and stays one; where 448 / maximum is beyond float32, the largest number of the source's type takes its place.

Shapes: N rows, K columns of a weight; the last dimension of a matrix product is always K.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128
"""Columns of every block, rows of a weight's."""
E4M3_MAX = 448.0
EXPONENT_BITS = -0x800000
"""Sign and exponent of a float32, as an int32 mask: what is left of a number under it is the power of two below."""
TILE_ELEMENTS = 1 << 19
"""Elements that are worked on at a time, so that they stay in a CPU's cache: 5 times as fast as all at once."""


class Quantised(NamedTuple):
    """A tensor in FP8. `quantise_weight` on [576, 1536] gives data [576, 1536] and scale_inv [5, 12]."""

    data: Tensor
    """float8_e4m3fn, in the shape of the source."""
    scale_inv: Tensor
    """float32: a weight's [ceil(N / 128), ceil(K / 128)], rows' [..., ceil(K / 128)]."""


def quantise_weight(weight_NK: Tensor, *, power_of_two: bool = True) -> Quantised:
    """In blocks of 128 x 128; float32, bfloat16 or float16. `power_of_two=False`: scales are 448 / maximum in float32."""
    return _quantise(weight_NK, BLOCK, power_of_two)


def quantise_rows(values: Tensor, *, power_of_two: bool = True) -> Quantised:
    """In blocks of 1 x 128 along the last dimension: activations and gradients, of any number of dimensions."""
    data_RK, scale_inv = _quantise(values.reshape(-1, values.shape[-1]), 1, power_of_two)
    return Quantised(data_RK.view(values.shape), scale_inv.view(*values.shape[:-1], scale_inv.shape[-1]))


def dequantise(quantised: Quantised, dtype: torch.dtype = torch.float32) -> Tensor:
    """data * scale_inv, computed in float32 and then rounded to `dtype`; of a weight or of rows."""
    data, scale_inv = quantised
    scales = scale_inv.repeat_interleave(BLOCK, dim=-1)[..., : data.shape[-1]]
    if scale_inv.shape[:-1] != data.shape[:-1]:
        scales = scales.repeat_interleave(BLOCK, dim=0)[: data.shape[0]]
    return (data.float() * scales).to(dtype)


def scale_shape(num_rows: int, num_columns: int) -> tuple[int, int]:
    """Of a weight's scales.

    >>> scale_shape(576, 1536)
    (5, 12)
    """
    return math.ceil(num_rows / BLOCK), math.ceil(num_columns / BLOCK)


def scale_of_maximum(maximum: Tensor, source: torch.dtype, *, power_of_two: bool) -> Tensor:
    """Scale of blocks with these largest magnitudes, float32 (`compute_scale_from_amax` with epsilon 0, as every recipe sets it)."""
    scale = torch.full_like(maximum, E4M3_MAX).div_(maximum)  # `448 / maximum` would multiply by a rounded reciprocal
    scale = torch.where(scale.isinf(), torch.finfo(source).max, scale)
    if power_of_two:
        scale = scale.view(torch.int32).bitwise_and(EXPONENT_BITS).view(torch.float32)
    return torch.where((maximum == 0) | ~maximum.isfinite(), 1.0, scale)


def _quantise(values_RK: Tensor, block_rows: int, power_of_two: bool) -> Quantised:
    num_rows, num_columns = values_RK.shape
    padding = (-num_columns % BLOCK, -num_rows % block_rows)
    if any(padding):
        values_RK = torch.nn.functional.pad(values_RK, (0, padding[0], 0, padding[1]))
    tiles = values_RK.reshape(values_RK.shape[0] // block_rows, block_rows, values_RK.shape[1] // BLOCK, BLOCK)
    data = torch.empty(tiles.shape, dtype=torch.float8_e4m3fn, device=tiles.device)
    scales = torch.empty(tiles.shape[0], tiles.shape[2], dtype=torch.float32, device=tiles.device)
    step = max(1, TILE_ELEMENTS // max(1, tiles[:1].numel()))
    for first in range(0, tiles.shape[0], step):
        part = slice(first, first + step)
        _quantise_tiles(tiles[part], data[part], scales[part], power_of_two)
    return Quantised(data.view(values_RK.shape)[:num_rows, :num_columns].contiguous(), scales.reciprocal_())


def _quantise_tiles(tiles: Tensor, data: Tensor, scales: Tensor, power_of_two: bool) -> None:
    """Tiles [b, rows, k, 128] into data of the same shape and scales [b, k]."""
    maximum = tiles.abs().amax(dim=-1).amax(dim=1).float()
    is_usual = bool(maximum.isfinite().all())
    if not is_usual:
        maximum = tiles.abs().nan_to_num(nan=0.0, posinf=math.inf).amax(dim=(1, 3)).float()
    scales.copy_(scale_of_maximum(maximum, tiles.dtype, power_of_two=power_of_two))
    scaled = tiles.float() * scales[:, None, :, None]
    data.copy_(scaled if is_usual else scaled.clamp_(-E4M3_MAX, E4M3_MAX))
