"""The loop that copies and sums boxes in a CPU's memory, compiled by numba when it first runs, which takes a second.

Rows are copied in blocks that stay in a core's cache until they have been read back. The functions that touch every word are apart and
take plain arrays, because then they become vector instructions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import carray, int64, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

BLOCK_BYTES = 1 << 16


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba's `njit`, kept on disk where there is a folder to keep it in."""

    def compile_later(function: Callable[..., Any]) -> Any:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's cache can be written
            return njit(**options)(function)

    return compile_later


@_compiled(nogil=True)
def carry_out(table: Any, like: Any) -> None:
    """Carry out moves; other threads of Python run meanwhile.

    Args:
        table: int64 [moves, 8], a `moves._Rows` each.
        like: an array of the words' type.
    """
    for number in range(table.shape[0]):
        source, source_stride, target, target_stride, rows, words, read, written = table[number]
        block = BLOCK_BYTES // like.itemsize
        step = max(1, block // words)
        read_sum = written_sum = int64(0)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            for start in range(0, words, block):
                width = min(block, words - start)
                here = source + first * source_stride + start * like.itemsize
                there = target + first * target_stride + start * like.itemsize
                if target == 0:
                    read_sum += _sum_rows(here, source_stride, count, width, like)
                else:
                    read_sum += _copy_rows(here, source_stride, there, target_stride, count, width, like)
                if written != 0:
                    written_sum += _sum_rows(there, target_stride, count, width, like)
        _store(read, read_sum)
        _store(written, written_sum)


@_compiled()
def _copy_rows(source: Any, source_stride: Any, target: Any, target_stride: Any, rows: Any, words: Any, like: Any) -> Any:
    """Returns the sum of what was read."""
    total = int64(0)
    for row in range(rows):
        values = carray(_pointer(source + row * source_stride), words, like.dtype)
        total += _copy(values, carray(_pointer(target + row * target_stride), words, like.dtype))
    return total


@_compiled()
def _sum_rows(address: Any, stride: Any, rows: Any, words: Any, like: Any) -> Any:
    total = int64(0)
    for row in range(rows):
        total += _sum(carray(_pointer(address + row * stride), words, like.dtype))
    return total


@_compiled()
def _store(address: Any, value: Any) -> None:
    if address != 0:
        carray(_pointer(address), 1, int64)[0] = value


@_compiled(inline="never")
def _copy(source: Any, target: Any) -> Any:
    total = int64(0)
    for index in range(source.size):
        value = source[index]
        target[index] = value
        total += int64(value)
    return total


@_compiled(inline="never")
def _sum(values: Any) -> Any:
    total = int64(0)
    for index in range(values.size):
        total += int64(values[index])
    return total


@intrinsic
def _pointer(_context: Any, address: Any) -> Any:
    """An address as a pointer, for `carray`."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate
