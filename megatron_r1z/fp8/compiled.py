"""Block quantisation of a weight in one pass over a CPU's memory: `blocks.quantise_weight` for usual numbers, three times as fast.

Rounding to nearest, ties to even, is done by adding a number to a float32 and taking it away again (`blocks.HALF_INTEGER`), so the loop
has no branch and becomes vector instructions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from megatron_r1z.fp8 import blocks
from megatron_r1z.host.compiled import compiled, pointer
from megatron_r1z.layout.fp8 import BLOCK

EXPONENT = np.int32(0x7F800000)
MAGNITUDE = np.int32(0x7FFFFFFF)
SIGN = np.int32(0x80)
SMALLEST_NORMAL = np.float32(blocks.SMALLEST_NORMAL)
STEPS = np.float32(2.0**9)
"""Numbers of e4m3 below the smallest normal one are multiples of 2^-9."""
HALF_INTEGER = np.float32(blocks.HALF_INTEGER)
TWENTY, TWENTY_FOUR = np.int32(20), np.int32(24)
BIAS = np.int32(960)
"""Between the upper 11 bits of a float32 (bias 127) and the 7 bits of a normal e4m3 (bias 7), both without sign."""


@compiled(nogil=True)
def quantise_blocks(source: Any, shift: Any, data: Any, scale_inv: Any) -> bool:
    """Quantise blocks of 128 x 128 with power-of-two scales.

    Args:
        source: bits of a float32 matrix as int32 [N, K], or of a bfloat16 matrix as int16 [N, K].
        shift: 0 or 16: how far its bits lie from those of a float32.
        data: uint8 [N, K], written: bits of float8_e4m3fn.
        scale_inv: float32 [ceil(N / 128), ceil(K / 128)], written.

    Returns:
        False where a block's largest magnitude is not usual (no number, infinite, or beyond 2^100 either way): then nothing counts.
    """
    num_rows, num_columns = source.shape
    for row in range(scale_inv.shape[0]):
        first, end = row * BLOCK, min(row * BLOCK + BLOCK, num_rows)
        for column in range(scale_inv.shape[1]):
            left, right = column * BLOCK, min(column * BLOCK + BLOCK, num_columns)
            largest = np.int32(0)
            for index in range(first, end):
                largest = max(largest, _largest(_part(source, index, left, right), shift))
            exponent = largest >> 23
            if largest != 0 and (exponent < 27 or exponent > 227):
                return False
            power = 0 if largest == 0 else _log2_scale(largest)
            scale_inv[row, column] = _power_of_two(-power)
            for index in range(first, end):
                _quantise(_part(source, index, left, right), shift, _power_of_two(power), _part(data, index, left, right))
    return True


@compiled()
def _part(matrix: Any, row: Any, left: Any, right: Any) -> Any:
    """Some columns of a row."""
    first = (row * matrix.shape[1] + left) * matrix.itemsize
    return carray(pointer(matrix.ctypes.data + first), right - left, matrix.dtype)


@compiled()
def _log2_scale(largest: Any) -> Any:
    """log2 of the largest power of two that takes a magnitude to at most 448 = 1.75 * 2^8."""
    exponent = (largest >> 23) - 127
    return 8 - exponent if (largest & 0x7FFFFF) <= 0x600000 else 7 - exponent


@compiled()
def _power_of_two(power: Any) -> Any:
    return np.int32((power + 127) << 23).view(np.float32)


@compiled(inline="never")
def _largest(bits: Any, shift: Any) -> Any:
    """Magnitudes compare as their bits do."""
    largest = np.int32(0)
    for index in range(bits.size):
        largest = max(largest, np.int32(np.int32(np.int32(bits[index]) << shift) & MAGNITUDE))
    return largest


@compiled(inline="never")
def _quantise(bits: Any, shift: Any, scale: Any, data: Any) -> None:
    for index in range(bits.size):
        word = np.int32(np.int32(bits[index]) << shift)
        value = np.float32(np.int32(word & MAGNITUDE).view(np.float32) * scale)
        power = np.int32(value.view(np.int32) & EXPONENT).view(np.float32)
        offset = np.float32(max(power, SMALLEST_NORMAL) * HALF_INTEGER)
        rounded = np.float32(np.float32(value + offset) - offset)
        normal = np.int32(np.int32(rounded.view(np.int32) >> TWENTY) - BIAS)
        below = np.int32(rounded * STEPS)
        code = normal if rounded >= SMALLEST_NORMAL else below
        data[index] = np.uint8(code | np.int32(np.int32(word >> TWENTY_FOUR) & SIGN))
