"""Digests: the same however a tensor is cut and held, another one for any other bytes or place."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_r1z.layout.blocks import Block
from megatron_r1z.reshard.digest import UNTOUCHED, Ledger, Piece, Place, Places, as_text
from megatron_r1z.reshard.moves import Move, bind

TENSORS = {"a": 0, "b": 1}
CPU = torch.device("cpu")


def no_scratch(_box: Tensor, _dtype: torch.dtype) -> Tensor:
    raise AssertionError("no number format changes")


def digests(pieces: list[tuple[str, tuple[int, ...], Tensor]], skip: int | None = None) -> list[int]:
    """Digest of each tensor after all pieces, but for one, were summed."""
    ledger = Ledger(TENSORS, len(pieces), CPU)
    slots = [ledger.enter(Piece(Place(name, start), 0, 0, None)) for name, start, _ in pieces]
    ledger.close()
    moves = [Move(box, None, slot, None, box.dtype) for (_, _, box), slot in zip(pieces, slots, strict=True)]
    for step in bind([move for index, move in enumerate(moves) if index != skip], no_scratch):
        step()
    found: list[int] = ledger.digests().tolist()
    return found


def rows_of(tensor: Tensor, cuts: list[int]) -> list[tuple[str, tuple[int, ...], Tensor]]:
    edges = [0, *sorted(cuts), tensor.shape[0]]
    return [("a", (first, 0), tensor[first:last]) for first, last in pairwise(edges) if last > first]


@given(
    cuts=st.lists(st.integers(1, 11), unique=True),
    columns=st.integers(1, 9),
    offset=st.integers(0, 3),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.uint8]),
    order=st.randoms(use_true_random=False),
)
def test_where_pieces_lie_and_in_which_order_does_not_matter(
    cuts: list[int], columns: int, offset: int, dtype: torch.dtype, order: object
) -> None:
    tensor = torch.randn(12, columns).mul(50).to(dtype)
    wide = torch.zeros(14, columns + 5, dtype=dtype)  # the same boxes inside of a larger parameter, at any alignment
    inside = wide[2:, offset : offset + columns]
    inside.copy_(tensor)
    pieces = rows_of(tensor, cuts)
    shuffled = rows_of(inside, cuts)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert digests(pieces) == digests(shuffled)


@given(index=st.integers(0, 47), bit=st.integers(0, 7), cuts=st.lists(st.integers(1, 11), unique=True))
def test_one_bit_changes_the_digest(index: int, bit: int, cuts: list[int]) -> None:
    tensor = torch.arange(48, dtype=torch.uint8).view(12, 4)
    before = digests(rows_of(tensor, cuts))
    tensor.view(-1)[index] ^= 1 << bit
    assert digests(rows_of(tensor, cuts)) != before


def test_equal_bytes_at_another_place_have_another_digest() -> None:
    box = torch.ones(2, 8)
    assert digests([("a", (0, 0), box), ("a", (2, 0), 2 * box)]) != digests([("a", (0, 0), 2 * box), ("a", (2, 0), box)])
    assert digests([("a", (0, 0), box)])[0] != digests([("b", (0, 0), box)])[1]
    assert digests([("a", (0, 0), box)]) != digests([("a", (0, 8), box)])


def test_a_piece_that_nobody_summed_is_no_zero() -> None:
    pieces = [("a", (0,), torch.zeros(8)), ("b", (0,), torch.zeros(8))]
    assert digests(pieces) == [0, 0]
    found = digests(pieces, skip=1)
    assert found[0] == 0
    assert found[1] % (1 << 64) == UNTOUCHED * _odd_factor("b") % (1 << 64) != 0


def _odd_factor(tensor: str) -> int:
    one = torch.zeros(8)
    one.view(torch.int64)[0] = 1
    return digests([(tensor, (0,), one)])[TENSORS[tensor]]


def test_clear_forgets() -> None:
    ledger = Ledger(TENSORS, 1, CPU)
    slot = ledger.enter(Piece(Place("a", (0,)), 0, 1, 2))
    ledger.close()
    assert slot is not None
    slot.fill_(7)
    assert ledger.listed()[0][1] != UNTOUCHED
    ledger.clear()
    assert ledger.listed() == [(Piece(Place("a", (0,)), 0, 1, 2), UNTOUCHED)]


def test_what_goes_to_two_ranks_is_summed_once() -> None:
    ledger = Ledger(TENSORS, 3, CPU)
    pieces = [Piece(Place("a", (0, 0)), 0, 1, None), Piece(Place("a", (0, 0)), 0, 2, 4), Piece(Place("a", (0, 0)), 0, 2, 5)]
    slots = [ledger.enter(piece, size) for piece, size in zip(pieces, [(2, 4), (2, 4), (1, 4)], strict=True)]
    ledger.close()
    assert slots[0] is not None
    assert slots[1] is None
    assert slots[2] is not None
    slots[0].fill_(3)
    slots[2].fill_(5)
    assert ledger.listed() == list(zip(pieces, [3, 3, 5], strict=True))
    assert ledger.digests().tolist() == digests([("a", (0, 0), torch.tensor([[3 + 3 + 5]]))])


def test_places_by_the_blocks_of_a_layout() -> None:
    places = Places([Block("q", (64, 0), (8, 4), 0, "qkv", (0, 0)), Block("k", (0, 2), (2, 4), 0, "qkv", (8, 0))])
    assert places.find("qkv", (3, 1)) == Place("q", (67, 1))
    assert places.find("qkv", (9, 0)) == Place("k", (1, 2))
    assert str(places.find("qkv", (9, 0)).below(4)) == "k [5, 2]"
    with pytest.raises(LookupError, match=r"no block of qkv holds \[10, 0\]"):
        places.find("qkv", (10, 0))


def test_text() -> None:
    assert [as_text(number) for number in (0, 255, -1, -(2**63))] == ["0" * 16, "0" * 14 + "ff", "f" * 16, "8" + "0" * 15]
