"""Copies of boxes, with the sums of what was read and of what was written.

On a CPU one compiled loop carries out all moves that do not change the number format: it sums words while it copies them and reads back
what it wrote while that is still in the cache, so that proving a copy costs little more than the copy. Everything else takes a few calls
of torch a move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

Step = Callable[[], object]
WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


class Move(NamedTuple):
    """A box to copy, or only to read; rows (the last dimension) are contiguous on both sides."""

    source: Tensor
    target: Tensor | None
    """In `dtype`; None: the source is only summed."""
    read: Tensor | None
    """Where the sum of what was read goes, as it is in `dtype`: int64, no dimensions. None: it is not wanted."""
    written: Tensor | None
    """Where the sum of what the target then holds goes."""
    dtype: torch.dtype


def word(box: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The widest integers that a row can be cut into; it depends on size and format alone, because both sides must take the same."""
    return next(integer for integer in WORDS if box.shape[-1] * dtype.itemsize % integer.itemsize == 0)


def bind(moves: Sequence[Move], scratch: Callable[[Tensor, torch.dtype], Tensor]) -> list[Step]:
    """What carries out the moves; steps may run in any order, one after the other.

    `scratch` gives room for a box in another number format; all moves may get the same.
    """
    compiled = [move for move in moves if _can_be_compiled(move)]
    others = [move for move in moves if not _can_be_compiled(move)]
    return [*_compiled_steps(compiled), *(step for move in others for step in _torch_steps(move, scratch))]


# --- by torch ---


def _torch_steps(move: Move, scratch: Callable[[Tensor, torch.dtype], Tensor]) -> Iterator[Step]:
    value = move.source
    if move.read is not None:
        if value.dtype is not move.dtype:
            value = scratch(value, move.dtype)
            yield partial(value.copy_, move.source)
        yield _summing(value, move.read)
    if move.target is not None:
        yield partial(move.target.copy_, value)
        if move.written is not None:
            yield _summing(move.target, move.written)


def _summing(box: Tensor, slot: Tensor) -> Step:
    dims, integer = list(range(box.dim())), word(box, box.dtype)
    try:
        return partial(torch.sum, box.view(integer), dim=dims, dtype=torch.int64, out=slot)
    except RuntimeError:  # rows do not begin at multiples of the width
        return lambda: torch.sum(_aligned(box).view(integer), dim=dims, dtype=torch.int64, out=slot)


def _aligned(box: Tensor) -> Tensor:
    """A copy of which every row begins where any number format may."""
    return box.clone(memory_format=torch.contiguous_format)


# --- compiled ---


class _Rows(NamedTuple):
    """One move for `compiled.carry_out`: addresses and strides in bytes, 0 for what is not wanted."""

    source: int
    source_stride: int
    target: int
    target_stride: int
    rows: int
    words: int
    """In a row."""
    read: int
    written: int


def _width(move: Move) -> int:
    return word(move.source, move.dtype).itemsize


def _boxes(move: Move) -> list[Tensor]:
    return [move.source] if move.target is None else [move.source, move.target]


def _can_be_compiled(move: Move) -> bool:
    """Whether it stays on the CPU, changes no format, and is a vector or a matrix whose rows begin at multiples of the width."""
    width = _width(move)
    return all(
        box.device.type == "cpu" and box.dtype is move.dtype and box.dim() <= 2 and not (box.data_ptr() | _stride(box)) % width
        for box in _boxes(move)
    )


def _stride(box: Tensor) -> int:
    return box.stride(0) * box.itemsize if box.dim() == 2 else 0


def _as_rows(move: Move) -> _Rows:
    source, target, width = move.source, move.target, _width(move)
    rows = 1 if all(box.is_contiguous() for box in _boxes(move)) else source.shape[0]
    return _Rows(
        source.data_ptr(),
        _stride(source),
        0 if target is None else target.data_ptr(),
        0 if target is None else _stride(target),
        rows,
        source.nbytes // rows // width,
        0 if move.read is None else move.read.data_ptr(),
        0 if move.written is None or target is None else move.written.data_ptr(),
    )


def _compiled_steps(moves: Sequence[Move]) -> Iterator[Step]:
    """One step for each width of word: nearly always there is one, 8 bytes."""
    for _, group in groupby(sorted(moves, key=_width), _width):
        members = tuple(group)
        tables = [torch.tensor([_as_rows(move) for move in share], dtype=torch.int64).numpy() for share in _shares(members)]
        yield partial(_run, tables, torch.empty(0, dtype=word(members[0].source, members[0].dtype)).numpy(), members)


def _shares(moves: Sequence[Move]) -> list[list[Move]]:
    """Of about equal bytes, one for each thread."""
    ends = list(accumulate(move.source.nbytes for move in moves))
    shares: list[list[Move]] = [[] for _ in range(torch.get_num_threads())]
    for move, end in zip(moves, ends, strict=True):
        shares[(end - 1) * len(shares) // ends[-1]].append(move)
    return [share for share in shares if share]


def _run(tables: Sequence[Any], like: Any, _alive: Sequence[Move]) -> None:
    """`_alive` are the moves of the tables: the loop knows nothing but addresses, so their memory must not be freed."""
    from megatron_r1z.reshard.compiled import carry_out

    if len(tables) == 1:
        carry_out(tables[0], like)
        return
    with ThreadPoolExecutor(len(tables)) as threads:
        list(threads.map(carry_out, tables, [like] * len(tables)))
