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

from megatron_r1z.layout.fp8 import BLOCK

E4M3_MAX = 448.0
EXPONENT_BITS = -0x800000
"""Sign and exponent of a float32, as an int32 mask: what is left of a number under it is the power of two below."""
SMALLEST_NORMAL = 2.0**-6
"""Of e4m3. Above it two neighbours are 2^-3 of their power of two apart, below it 2^-9."""
HALF_INTEGER = 1.5 * 2.0**20
"""What added to a float32 and taken away again rounds it to 3 bits after the leading one, in units of its power of two."""
ROUNDABLE = 2.0**100
"""Between this and its inverse a block's maximum neither lets that sum overflow nor makes its smaller numbers subnormal in float32."""
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


def round_weight(weight_NK: Tensor) -> Tensor:
    """What is left of a weight in FP8: `dequantise(quantise_weight(weight))` in its own type and half the time."""
    return _round(weight_NK, BLOCK, BLOCK)


def round_rows(values_TK: Tensor) -> Tensor:
    """What is left of a matrix in blocks of 1 x 128, for products along K."""
    return _round(values_TK, 1, BLOCK)


def round_columns(values_TK: Tensor) -> Tensor:
    """What is left of a matrix in blocks of 128 x 1, for products along T."""
    return _round(values_TK, BLOCK, 1)


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


def _round(values_RC: Tensor, block_rows: int, block_columns: int) -> Tensor:
    """Each block rounded as FP8 with a scale of its own that is a power of two."""
    num_rows, num_columns = values_RC.shape
    padded_RC = torch.nn.functional.pad(values_RC, (0, -num_columns % block_columns)).contiguous()
    rounded_RC = torch.empty_like(padded_RC)
    whole = num_rows // block_rows * block_rows
    step = max(1, TILE_ELEMENTS // max(1, padded_RC.shape[1] * block_rows)) * block_rows
    parts = [(first, min(first + step, whole), block_rows) for first in range(0, whole, step)]
    if whole < num_rows:
        parts.append((whole, num_rows, num_rows - whole))
    for first, last, rows in parts:
        shape = ((last - first) // rows, rows, padded_RC.shape[1] // block_columns, block_columns)
        _round_tiles(padded_RC[first:last].view(shape), rounded_RC[first:last].view(shape))
    return rounded_RC[:, :num_columns]


def _round_tiles(tiles: Tensor, rounded: Tensor) -> None:
    """Tiles [b, rows, k, columns] into `rounded`, without the bytes between: a sum is rounded to nearest, ties to even, as a cast is."""
    values = tiles.float()
    maximum = values.abs().amax(dim=-1, keepdim=True).amax(dim=1, keepdim=True)
    scale = scale_of_maximum(maximum, tiles.dtype, power_of_two=True)
    if not bool(((maximum < ROUNDABLE) & (maximum > 1 / ROUNDABLE) | (maximum == 0)).all()):
        rounded.copy_(_round_unusual(values, tiles.dtype))
        return
    power = values.view(torch.int32).bitwise_and(EXPONENT_BITS & 0x7FFFFFFF).view(torch.float32)
    offset = torch.maximum(power, SMALLEST_NORMAL / scale, out=power).mul_(HALF_INTEGER)
    rounded.copy_(values.add(offset).sub_(offset))


def _round_unusual(values: Tensor, source: torch.dtype) -> Tensor:
    """Tiles with infinities, what is not a number, very large or very small maxima, by way of the bytes."""
    maximum = values.abs().nan_to_num(nan=0.0, posinf=math.inf).amax(dim=(1, 3), keepdim=True)
    scale = scale_of_maximum(maximum, source, power_of_two=True)
    return (values * scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() / scale
