"""The plan that turns one layout into another: pure data, the same on every rank that computes it.

Every destination block is intersected with the source blocks of its tensor. An overlap that the destination rank holds itself is a local
copy; otherwise it comes from a holder on the same node, otherwise from any holder, in both cases from the one that sends least so far.
Copies between ranks are cut and packed into rounds in which no rank sends or receives more than a given number of bytes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from heapq import heapreplace
from itertools import groupby
from typing import NamedTuple

from megatron_r1z.errors import ConfigError, RefitError
from megatron_r1z.layout.blocks import Block, Box, Layout

DEFAULT_ROUND_BYTES = 64 << 20
"""Buffer bound: a millisecond of a 400 Gbit/s network, so start-up of a transfer hardly counts; small beside a rank's weights."""
DEFAULT_RANKS_PER_NODE = 8
LIVE_ROUNDS = 2
"""Rounds that have buffers at the same time: one is packed or unpacked while the next travels."""


class Edge(Enum):
    """What a copy crosses."""

    LOCAL = "local"
    NODE = "in a node"
    NETWORK = "across nodes"


class Copy(NamedTuple):
    """One box that moves from a parameter of one rank to a parameter of another, or of the same one."""

    tensor: str
    """Checkpoint tensor, for messages."""
    source_rank: int
    source_parameter: str
    source_start: Box
    destination_rank: int
    destination_parameter: str
    destination_start: Box
    size: Box
    nbytes: int
    """Size at the destination, which is what travels."""

    def edge(self, ranks_per_node: int) -> Edge:
        """What lies between both ranks, where consecutive ranks share a node."""
        if self.source_rank == self.destination_rank:
            return Edge.LOCAL
        return Edge.NODE if self.source_rank // ranks_per_node == self.destination_rank // ranks_per_node else Edge.NETWORK


class Exchange(NamedTuple):
    """What one rank sends and receives in one round, by peer; both ends list the copies in the same order."""

    number: int
    sends: Mapping[int, tuple[Copy, ...]]
    receives: Mapping[int, tuple[Copy, ...]]

    @property
    def sent_bytes(self) -> int:
        """Bytes that the rank sends in this round."""
        return sum(copy.nbytes for copies in self.sends.values() for copy in copies)

    @property
    def received_bytes(self) -> int:
        """Bytes that the rank receives in this round."""
        return sum(copy.nbytes for copies in self.receives.values() for copy in copies)


@dataclass(frozen=True)
class RankPlan:
    """The part of a plan that one rank carries out."""

    rank: int
    source: Layout
    destination: Layout
    local: tuple[Copy, ...]
    exchanges: tuple[Exchange, ...]
    """Only the rounds in which the rank takes part, by number."""
    num_rounds: int
    """Rounds of the whole plan."""

    @property
    def buffer_bytes(self) -> int:
        """Bytes of its buffers: `LIVE_ROUNDS` for sending and as many for receiving, each large enough for every round.

        Never above `2 * LIVE_ROUNDS` times the bound of a round.
        """
        most_sent = max((exchange.sent_bytes for exchange in self.exchanges), default=0)
        most_received = max((exchange.received_bytes for exchange in self.exchanges), default=0)
        return LIVE_ROUNDS * (most_sent + most_received)


@dataclass(frozen=True)
class Plan:
    """Local copies, then rounds of copies between ranks."""

    source: Layout
    destination: Layout
    itemsize: int
    """Bytes of one element at the destination."""
    local: tuple[Copy, ...]
    rounds: tuple[tuple[Copy, ...], ...]

    @property
    def nbytes(self) -> int:
        """Bytes written into destination parameters, over all ranks."""
        return sum(copy.nbytes for copy in self.local) + self.sent_bytes

    @cached_property
    def sent_bytes(self) -> int:
        """Bytes that travel between ranks."""
        return sum(copy.nbytes for copies in self.rounds for copy in copies)

    def of_rank(self, rank: int) -> RankPlan:
        """What `rank` copies, sends and receives."""
        exchanges = [
            Exchange(
                number,
                _by_peer(copies, lambda copy: copy.source_rank == rank, lambda copy: copy.destination_rank),
                _by_peer(copies, lambda copy: copy.destination_rank == rank, lambda copy: copy.source_rank),
            )
            for number, copies in enumerate(self.rounds)
        ]
        return RankPlan(
            rank,
            self.source,
            self.destination,
            tuple(copy for copy in self.local if copy.destination_rank == rank),
            tuple(exchange for exchange in exchanges if exchange.sends or exchange.receives),
            len(self.rounds),
        )


def _by_peer(copies: Sequence[Copy], mine: Callable[[Copy], bool], peer: Callable[[Copy], int]) -> dict[int, tuple[Copy, ...]]:
    groups: dict[int, list[Copy]] = {}
    for copy in filter(mine, copies):
        groups.setdefault(peer(copy), []).append(copy)
    return {rank: tuple(groups[rank]) for rank in sorted(groups)}


def make_plan(
    source: Layout,
    destination: Layout,
    itemsize: int,
    round_bytes: int = DEFAULT_ROUND_BYTES,
    ranks_per_node: int = DEFAULT_RANKS_PER_NODE,
) -> Plan:
    """Plan how every element of every destination block is written exactly once.

    Returns:
        The plan. Bytes sent are as few as can be: only what a destination rank does not hold itself.

    Raises:
        RefitError: the source lacks part of a destination block, or holds it in boxes that overlap without being equal.
        ConfigError: `round_bytes` is smaller than one element.
    """
    if round_bytes < itemsize:
        raise ConfigError(f"round_bytes is {round_bytes}; it must be at least the {itemsize} bytes of one element.")
    regions = _regions(source.blocks)
    choose = _HolderChoice(ranks_per_node)
    local: list[Copy] = []
    remote: list[Copy] = []
    for block in destination.blocks:
        for copy in _copies_into(block, regions, choose, itemsize, source.name):
            (local if copy.source_rank == copy.destination_rank else remote).append(copy)
    return Plan(source, destination, itemsize, tuple(local), _make_rounds(remote, itemsize, round_bytes))


# --- which overlaps ---

_EVERYWHERE = -1
"""Key of all holders of a region, beside those of each node."""


class _Region(NamedTuple):
    """A box of a tensor and the blocks, on different ranks or twice on one, that hold exactly it."""

    start: Box
    size: Box
    holders: dict[int, Block]
    by_node: dict[int, tuple[int, ...]]


class _TensorRegions:
    """The regions of one tensor, sorted along the dimension in which they differ, so that overlaps are found by bisection."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        by_box: dict[tuple[Box, Box], dict[int, Block]] = {}
        for block in blocks:
            by_box.setdefault((block.start, block.size), {}).setdefault(block.rank, block)
        dims = range(len(blocks[0].start))
        self._dim = max(dims, key=lambda dim: len({start[dim] for start, _ in by_box}))
        boxes = sorted(by_box.items(), key=lambda item: item[0][0][self._dim])
        self._regions = [_Region(start, size, holders, {}) for (start, size), holders in boxes]
        self._starts = [region.start[self._dim] for region in self._regions]
        self._longest = max(region.size[self._dim] for region in self._regions)

    def near(self, block: Block) -> Sequence[_Region]:
        """All regions that overlap `block` along the sorted dimension, and perhaps a few more."""
        first = block.start[self._dim]
        low = bisect_left(self._starts, first - self._longest + 1)
        high = bisect_left(self._starts, first + block.size[self._dim], low)
        return self._regions[low:high]


def _regions(blocks: Sequence[Block]) -> dict[str, _TensorRegions]:
    by_tensor: dict[str, list[Block]] = defaultdict(list)
    for block in blocks:
        by_tensor[block.tensor].append(block)
    return {tensor: _TensorRegions(group) for tensor, group in by_tensor.items()}


class _HolderChoice:
    """Picks the sender of an overlap and remembers how much each rank sends."""

    def __init__(self, ranks_per_node: int) -> None:
        self._ranks_per_node = ranks_per_node
        self._sent: dict[int, int] = defaultdict(int)
        self._queues: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        """By the ranks to choose from, a heap of what each had sent when it was last looked at, and its number."""

    def __call__(self, region: _Region, rank: int, nbytes: int) -> Block:
        own = region.holders.get(rank)
        if own is not None:
            return own
        sender = self._least_loaded(self._candidates(region, rank))
        self._sent[sender] += nbytes
        return region.holders[sender]

    def _candidates(self, region: _Region, rank: int) -> tuple[int, ...]:
        """Holders on the node of `rank`, or all of them."""
        if not region.by_node:
            holders = sorted(region.holders)
            region.by_node[_EVERYWHERE] = tuple(holders)
            for node, ranks in groupby(holders, key=lambda holder: holder // self._ranks_per_node):
                region.by_node[node] = tuple(ranks)
        return region.by_node.get(rank // self._ranks_per_node) or region.by_node[_EVERYWHERE]

    def _least_loaded(self, ranks: tuple[int, ...]) -> int:
        """The one that sends least so far, of equal ones the first: sent bytes only grow, so a first entry that still holds is it."""
        if len(ranks) == 1:
            return ranks[0]
        if ranks not in self._queues:
            self._queues[ranks] = sorted((self._sent[rank], rank) for rank in ranks)
        queue = self._queues[ranks]
        while queue[0][0] != self._sent[queue[0][1]]:
            heapreplace(queue, (self._sent[queue[0][1]], queue[0][1]))
        return queue[0][1]


def _copies_into(
    block: Block, regions: dict[str, _TensorRegions], choose: _HolderChoice, itemsize: int, source_name: str
) -> Iterator[Copy]:
    """The copies that fill one destination block."""
    found = 0
    for region in regions[block.tensor].near(block) if block.tensor in regions else ():
        start = tuple(map(max, block.start, region.start))
        size = tuple(min(a + m, b + n) - s for a, m, b, n, s in zip(block.start, block.size, region.start, region.size, start, strict=True))
        if min(size) <= 0:
            continue
        numel = math.prod(size)
        found += numel
        held = choose(region, block.rank, numel * itemsize)
        yield Copy(
            block.tensor,
            held.rank,
            held.parameter,
            _shifted(held.local_start, start, held.start),
            block.rank,
            block.parameter,
            _shifted(block.local_start, start, block.start),
            size,
            numel * itemsize,
        )
    if found != math.prod(block.size):
        wrong = "lacks part of" if found < math.prod(block.size) else "has overlapping boxes of"
        raise RefitError(
            f"layout '{source_name}' {wrong} tensor {block.tensor} {list(block.start)} + {list(block.size)}, "
            f"which rank {block.rank} needs for {block.parameter}."
        )


def _shifted(local_start: Box, start: Box, origin: Box) -> Box:
    return tuple(a + b - c for a, b, c in zip(local_start, start, origin, strict=True))


# --- rounds ---


def _make_rounds(copies: Sequence[Copy], itemsize: int, round_bytes: int) -> tuple[tuple[Copy, ...], ...]:
    """First fit: each piece goes to the earliest round in which its sender and its receiver still have room."""
    sending: dict[int, _Usage] = defaultdict(lambda: _Usage(round_bytes))
    receiving: dict[int, _Usage] = defaultdict(lambda: _Usage(round_bytes))
    rounds: list[list[Copy]] = []
    for copy in copies:
        for piece in _pieces(copy, itemsize, round_bytes):
            sent, received = sending[piece.source_rank], receiving[piece.destination_rank]
            number = max(sent.first_room(piece.nbytes), received.first_room(piece.nbytes))
            while not (sent.has_room(number, piece.nbytes) and received.has_room(number, piece.nbytes)):
                number += 1
            sent.take(number, piece.nbytes)
            received.take(number, piece.nbytes)
            while len(rounds) <= number:
                rounds.append([])
            rounds[number].append(piece)
    return tuple(tuple(group) for group in rounds if group)


class _Usage:
    """Bytes that one rank sends (or receives) in each round."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used: list[int] = []
        self._first: dict[int, int] = {}
        """By size of a piece, the first round that has room for one; it can only become later."""

    def first_room(self, nbytes: int) -> int:
        """The first round with room for so many bytes."""
        number, used, most = self._first.get(nbytes, 0), self._used, self._limit - nbytes
        while number < len(used) and used[number] > most:
            number += 1
        self._first[nbytes] = number
        return number

    def has_room(self, number: int, nbytes: int) -> bool:
        return number >= len(self._used) or self._used[number] + nbytes <= self._limit

    def take(self, number: int, nbytes: int) -> None:
        self._used += [0] * (number + 1 - len(self._used))
        self._used[number] += nbytes


def _pieces(copy: Copy, itemsize: int, limit: int) -> Iterator[Copy]:
    """Cut a copy into pieces of at most `limit` bytes, along dimension 0 and further in only where a single row exceeds it."""
    if copy.nbytes <= limit:
        yield copy
        return
    dim = next(dim for dim in range(len(copy.size)) if copy.size[dim] > 1)
    count = copy.size[dim]
    step = max(1, limit // (copy.nbytes // count))
    for offset in range(0, count, step):
        yield from _pieces(_slice(copy, dim, offset, min(step, count - offset), itemsize), itemsize, limit)


def _slice(copy: Copy, dim: int, offset: int, count: int, itemsize: int) -> Copy:
    def moved(start: Box) -> Box:
        return (*start[:dim], start[dim] + offset, *start[dim + 1 :])

    size = (*copy.size[:dim], count, *copy.size[dim + 1 :])
    return copy._replace(
        source_start=moved(copy.source_start),
        destination_start=moved(copy.destination_start),
        size=size,
        nbytes=math.prod(size) * itemsize,
    )
