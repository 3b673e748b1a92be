"""The loop that copies and sums boxes in a CPU's memory, compiled when it first runs.

Rows are copied in blocks that stay in a core's cache until they have been read back. The functions that touch every word are apart and
take plain arrays, because then they become vector instructions.
"""

from __future__ import annotations

from typing import Any

from numba import carray, int64

from megatron_r1z.host.compiled import compiled, pointer

BLOCK_BYTES = 1 << 16


@compiled(nogil=True)
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


@compiled()
def _copy_rows(source: Any, source_stride: Any, target: Any, target_stride: Any, rows: Any, words: Any, like: Any) -> Any:
    """Returns the sum of what was read."""
    total = int64(0)
    for row in range(rows):
        values = carray(pointer(source + row * source_stride), words, like.dtype)
        total += _copy(values, carray(pointer(target + row * target_stride), words, like.dtype))
    return total


@compiled()
def _sum_rows(address: Any, stride: Any, rows: Any, words: Any, like: Any) -> Any:
    total = int64(0)
    for row in range(rows):
        total += _sum(carray(pointer(address + row * stride), words, like.dtype))
    return total


@compiled()
def _store(address: Any, value: Any) -> None:
    if address != 0:
        carray(pointer(address), 1, int64)[0] = value


@compiled(inline="never")
def _copy(source: Any, target: Any) -> Any:
    total = int64(0)
    for index in range(source.size):
        value = source[index]
        target[index] = value
        total += int64(value)
    return total


@compiled(inline="never")
def _sum(values: Any) -> Any:
    total = int64(0)
    for index in range(values.size):
        total += int64(values[index])
    return total
