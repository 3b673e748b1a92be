"""Digests of weights: each side of a refit computes them from its own memory, and they must be equal.

A *piece* is a box of one checkpoint tensor that is copied in one go. Its digest is the sum of its bytes, taken as 64-bit integers modulo
2**64, times an odd factor that stands for tensor and place. The reader derives the place from the source layout and the writer from the
destination layout, so a plan that takes a box from the wrong place, or puts it there, does not pass either. Digests of pieces add up to
the digest of a tensor in any order, on any number of ranks.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_r1z.layout.blocks import Block, Box

UNTOUCHED = -0x61C8864680B583EB
"""Stands for the sum of a piece that has not been looked at; that weights have this sum has a chance of 2**-64."""


class Place(NamedTuple):
    """Where in the checkpoint a piece begins."""

    tensor: str
    start: Box

    def below(self, rows: int) -> Place:
        """The place that many rows further down."""
        return Place(self.tensor, (self.start[0] + rows, *self.start[1:]))

    def __str__(self) -> str:
        return f"{self.tensor} {list(self.start)}"


class Places:
    """The places of one rank's parameters, by the blocks of its layout."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks: dict[str, list[Block]] = defaultdict(list)
        for block in blocks:
            self._blocks[block.parameter].append(block)

    def find(self, parameter: str, local_start: Box) -> Place:
        """The place of one element.

        Raises:
            LookupError: the element is padding, or the parameter is unknown.
        """
        for block in self._blocks[parameter]:
            offset = tuple(a - b for a, b in zip(local_start, block.local_start, strict=True))
            if all(0 <= distance < extent for distance, extent in zip(offset, block.size, strict=True)):
                return Place(block.tensor, tuple(a + b for a, b in zip(block.start, offset, strict=True)))
        raise LookupError(f"no block of {parameter} holds {list(local_start)}")


class Piece(NamedTuple):
    """What went from one rank to another in one go."""

    place: Place
    source_rank: int
    destination_rank: int
    round_number: int | None
    """None where source and destination are on one rank."""

    def below(self, rows: int) -> Piece:
        """The piece that begins that many rows further down."""
        return self._replace(place=self.place.below(rows))


class Ledger:
    """The pieces that this rank has read as a source, or written as a destination, and the sum of each.

    Args:
        tensors: the index of every checkpoint tensor.
        capacity: how many pieces can be entered.
        device: where the sums are kept.
    """

    def __init__(self, tensors: Mapping[str, int], capacity: int, device: torch.device) -> None:
        self.pieces: list[Piece] = []
        self._tensors = tensors
        self._device = device
        self._sums = torch.full((capacity,), UNTOUCHED, dtype=torch.int64, device=device)
        self._slots = self._sums.unbind()
        self._slot_of: list[int] = []
        self._by_box: dict[tuple[Place, Box], int] = {}
        self._factors = self._index = self._which = torch.empty(0, dtype=torch.int64)

    def enter(self, piece: Piece, size: Box | None = None) -> Tensor | None:
        """Enter a piece.

        Args:
            piece: from where to where.
            size: of its box. Where it is given, one sum serves all pieces of the same box: what goes to several ranks is read once.

        Returns:
            Where the sum of its words goes, int64 without dimensions; None where it is there already.
        """
        slot = len(self.pieces)
        if size is not None:
            slot = self._by_box.setdefault((piece.place, tuple(size)), slot)
        self.pieces.append(piece)
        self._slot_of.append(slot)
        return self._slots[slot] if slot == len(self.pieces) - 1 else None

    def close(self) -> None:
        """No more pieces will be entered."""
        self._factors = self._tensor([_factor(piece.place) for piece in self.pieces])
        self._index = self._tensor([self._tensors[piece.place.tensor] for piece in self.pieces])
        self._which = self._tensor(self._slot_of)

    def clear(self) -> None:
        """Forget the sums of the last refit."""
        self._sums.fill_(UNTOUCHED)

    def digests(self) -> Tensor:
        """int64 [tensors]: the digest of this rank's pieces of each tensor."""
        zeros = torch.zeros(len(self._tensors), dtype=torch.int64, device=self._device)
        return zeros.index_add_(0, self._index, self._sums[self._which] * self._factors)

    def listed(self) -> list[tuple[Piece, int]]:
        """Every piece with its sum."""
        return list(zip(self.pieces, self._sums[self._which].tolist(), strict=True))

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)


def as_text(digest: int) -> str:
    """A digest as 16 hexadecimal digits.

    >>> as_text(-1)
    'ffffffffffffffff'
    """
    return f"{digest & (1 << 64) - 1:016x}"


def _factor(place: Place) -> int:
    digest = hashlib.blake2b(str(place).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True) | 1
