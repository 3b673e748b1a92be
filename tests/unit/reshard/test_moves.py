"""Moves: the same bytes and sums by torch and by the compiled loop, whatever is moved."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_r1z.reshard import moves
from megatron_r1z.reshard.moves import Move, bind

FORMATS = {2: torch.bfloat16, 4: torch.float32, 1: torch.uint8}


def slot() -> Tensor:
    return torch.zeros((), dtype=torch.int64)


def scratch(box: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(box.shape, dtype=dtype)


def carry_out(steps: Sequence[moves.Step]) -> None:
    for step in steps:
        step()


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    margin=st.sampled_from([0, 3, 8]),
    itemsize=st.sampled_from([1, 2, 4]),
    num_threads=st.sampled_from([1, 2]),
    wanted=st.sampled_from([(True, True), (True, False), (False, True)]),
)
def test_compiled_and_torch_agree(rows: int, columns: int, margin: int, itemsize: int, num_threads: int, wanted: tuple[bool, bool]) -> None:
    dtype = FORMATS[itemsize]
    source = torch.randint(0, 256, (rows + margin, columns + margin), dtype=torch.uint8).to(dtype)[margin:, margin:]
    threads_before = torch.get_num_threads()
    found = []
    try:
        torch.set_num_threads(num_threads)
        for steps_of in (lambda move: bind([move], scratch), lambda move: list(moves._torch_steps(move, scratch))):
            around = torch.zeros(rows + 2 * margin, columns + margin, dtype=dtype)
            read, written = (slot() if want else None for want in wanted)
            carry_out(steps_of(Move(source, around[margin : margin + rows, :columns], read, written, dtype)))
            assert torch.equal(around[margin : margin + rows, :columns], source)
            assert around.double().sum() == source.double().sum()  # nothing beside the box was written
            found.append([None if box is None else int(box) for box in (read, written)])
    finally:
        torch.set_num_threads(threads_before)
    assert found[0] == found[1]
    assert not (wanted[0] and wanted[1]) or found[0][0] == found[0][1]


def test_rows_longer_than_a_block_and_tables_of_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    source = torch.randn(5, 100_000)
    target = torch.zeros(5, 100_001)[:, :100_000]
    slots = [(slot(), slot()) for _ in range(5)]
    carry_out(bind([Move(source[row], target[row], *slots[row], source.dtype) for row in range(5)], scratch))
    assert torch.equal(source, target)
    expected = source.view(torch.int64).sum(dim=1).tolist()
    assert [int(read) for read, _ in slots] == [int(written) for _, written in slots] == expected


def test_what_was_written_is_read_back_from_the_target() -> None:
    """Two sources for one target: the second wins, and only its sum is that of what is there."""
    target = torch.zeros(16)
    sources = [torch.full((16,), 1.0), torch.full((16,), 2.0)]
    slots = [slot(), slot()]
    carry_out(bind([Move(source, target, None, written, target.dtype) for source, written in zip(sources, slots, strict=True)], scratch))
    assert int(slots[1]) == int(target.view(torch.int64).sum()) != int(slots[0])


def test_formats_change_once_and_sums_are_of_the_new_format() -> None:
    source, target = torch.randn(6, 8), torch.zeros(6, 8, dtype=torch.bfloat16)
    read, written, only_read = slot(), slot(), slot()
    carry_out(bind([Move(source, target, read, written, target.dtype), Move(source, None, only_read, None, target.dtype)], scratch))
    assert torch.equal(target, source.bfloat16())
    assert int(read) == int(written) == int(only_read) == int(target.view(torch.int64).sum())
