"""Carry out one rank's part of a plan: copies within the rank, then rounds of packed bytes to and from others.

The sender converts to the destination's number format while it packs, so what travels is what will be stored and nothing is rounded
twice. While one round travels, the next is packed: a rank holds at most two rounds of send buffers and two of receive buffers. Every piece
is summed where it was packed and again where it was written (`digest.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1z.errors import RefitError
from megatron_r1z.layout.blocks import box_slices
from megatron_r1z.layout.plan import LIVE_ROUNDS, Copy, Exchange, RankPlan
from megatron_r1z.reshard.digest import Ledger, Piece, Places
from megatron_r1z.reshard.links import Link, aligned

DEFAULT_TIMEOUT_S = 600.0
"""A round takes seconds; what takes longer is a peer that has not arrived yet, for example from a checkpoint or a slow rollout."""
PIECE_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
"""What is copied and summed in one go, by device: on a CPU it must stay in the cache, on a GPU it must be worth a launch."""

Result = TypeVar("Result")
Step = Callable[[], object]


class Transfer(NamedTuple):
    """What one rank did."""

    nbytes: int
    """Written into this rank's destination parameters."""
    round_seconds: tuple[float, ...]
    """Of the copies within the rank, then of each round that it took part in."""


class _Round(NamedTuple):
    """One exchange, ready to run."""

    exchange: Exchange
    slot: int
    """Of the send buffers."""
    pack: list[Step]
    packed: dict[int, Tensor]
    """Bytes for each receiver."""
    landings: dict[int, Tensor]
    """Bytes from each sender."""
    unpack: list[Step]


class _Flight(NamedTuple):
    """A round that was sent off."""

    work: _Round
    pending: list[tuple[dist.Work, str]]
    """What to wait for, and what to call it."""


class _Program(NamedTuple):
    """Everything to do for one set of tensors."""

    tensors: tuple[tuple[int, torch.dtype], ...]
    """Address and number format of each: the program is for these and no others."""
    local: list[Step]
    rounds: list[_Round]


class Executor:
    """One rank's part of a plan, to be carried out as often as wanted; every rank of the plan has one.

    Args:
        part: `plan.of_rank(rank)`.
        dtype: number format of the destination and of the wire, the same on every rank.
        device: where the buffers live.
        links: the way to every peer.
        send_buffers: uint8, `LIVE_ROUNDS` of `send_buffer_bytes(part)`.
        process_group: whose members are the plan's ranks; ranks are global ranks. By default all.
        timeout_s: limit of each wait.
    """

    def __init__(
        self,
        part: RankPlan,
        dtype: torch.dtype,
        device: torch.device,
        links: Mapping[int, Link],
        send_buffers: Sequence[Tensor],
        process_group: dist.ProcessGroup | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self.tensors = {name: index for index, name in enumerate(sorted({block.tensor for block in part.destination.blocks}))}
        """The index of every checkpoint tensor in a vector of digests, the same on all ranks."""
        self.read = self.written = Ledger(self.tensors, 0, device)
        self.part = part
        self.dtype = dtype
        self.device = device
        self.process_group = process_group
        self.timeout_s = timeout_s
        self._links = links
        self._buffers = (send_buffers, [new_bytes(receive_buffer_bytes(part), device) for _ in range(LIVE_ROUNDS)])
        self._scratch = new_bytes(0, device)
        self._source_places = Places(part.source.blocks_of(part.rank))
        self._destination_places = Places(part.destination.blocks_of(part.rank))
        self._program: _Program | None = None
        self.written_bytes = sum(copy.nbytes for copy in _incoming(part))
        """What a transfer writes on this rank."""

    @torch.no_grad()
    def __call__(self, source: Mapping[str, Tensor], destination: Mapping[str, Tensor]) -> Transfer:
        """Write this rank's destination parameters and send what others need of its source parameters; all ranks of the plan call this.

        Args:
            source: this rank's parameters by the names of the source layout, in any number format.
            destination: this rank's parameters by the names of the destination layout, in the plan's number format.

        Raises:
            RefitError: a transfer failed or timed out; names rank, round, block and peer.
        """
        program = self._prepared(source, destination)
        self.read.clear()
        self.written.clear()
        clock = [time.perf_counter()]
        unreleased: list[list[int]] = [[] for _ in range(LIVE_ROUNDS)]
        in_flight: _Flight | None = None
        for index in range(len(program.rounds) + 1):
            started = self._start(program.rounds[index], unreleased) if index < len(program.rounds) else None
            if in_flight is None:
                _run(program.local)
            else:
                self._finish(in_flight)
            in_flight = started
            clock.append(time.perf_counter())
        for peers in unreleased:
            self._await_releases(peers, f"rank {self.part.rank}, after the last round")
        return Transfer(self.written_bytes, tuple(after - before for before, after in pairwise(clock)))

    # --- running ---

    def _start(self, work: _Round, unreleased: list[list[int]]) -> _Flight:
        """Pack a round and send it off."""
        self._await_releases(unreleased[work.slot], self._where(work.exchange))
        _run(work.pack)
        unreleased[work.slot] = list(work.packed)
        operations = [(self._links[peer].receive(landing), self._receiving(work, peer)) for peer, landing in work.landings.items()]
        operations += [(self._links[peer].send(packed), self._sending(work, peer)) for peer, packed in work.packed.items()]
        return _Flight(work, self._post([(operation, label) for operation, label in operations if operation is not None]))

    def _post(self, operations: Sequence[tuple[dist.P2POp, str]]) -> list[tuple[dist.Work, str]]:
        if not operations:
            return []
        labels = [label for _, label in operations]
        works = self._attempt(lambda: dist.batch_isend_irecv([operation for operation, _ in operations]), "; ".join(labels))
        if len(works) != len(labels):  # NCCL joins a batch into one piece of work
            labels = ["; ".join(labels)] * len(works)
        return list(zip(works, labels, strict=True))

    def _finish(self, flight: _Flight) -> None:
        """Wait for a round and write what it brought."""
        limit = timedelta(seconds=self.timeout_s)
        for work, label in flight.pending:
            self._attempt(partial(work.wait, limit), label)
        for peer in flight.work.landings:
            self._attempt(partial(self._links[peer].await_arrival, self.timeout_s), self._receiving(flight.work, peer))
        _run(flight.work.unpack)
        for peer in flight.work.landings:
            self._links[peer].release()

    def _await_releases(self, peers: list[int], where: str) -> None:
        for peer in peers:
            self._attempt(
                partial(self._links[peer].await_release, self.timeout_s), f"{where}: waiting for rank {peer} to take earlier bytes"
            )
        peers.clear()

    def _receiving(self, work: _Round, peer: int) -> str:
        return f"{self._where(work.exchange)}: receiving {_named(work.exchange.receives[peer])} from rank {peer}"

    def _sending(self, work: _Round, peer: int) -> str:
        return f"{self._where(work.exchange)}: sending {_named(work.exchange.sends[peer])} to rank {peer}"

    def _where(self, exchange: Exchange) -> str:
        return f"rank {self.part.rank}, round {exchange.number + 1} of {self.part.num_rounds}"

    def _attempt(self, call: Callable[[], Result], what: str) -> Result:
        return attempt(call, what, self.timeout_s)

    # --- getting ready ---

    def _prepared(self, source: Mapping[str, Tensor], destination: Mapping[str, Tensor]) -> _Program:
        """The program for these tensors: made once, and again when an optimizer or the engine has replaced one."""
        tensors = tuple((tensor.data_ptr(), tensor.dtype) for side in (source, destination) for tensor in side.values())
        if self._program is None or self._program.tensors != tensors:
            self.read = Ledger(self.tensors, self._count_pieces(_outgoing), self.device)
            self.written = Ledger(self.tensors, self._count_pieces(_incoming), device_of(destination, source))
            local = [step for copy in self.part.local for step in self._local_steps(copy, source, destination)]
            rounds = [self._make_round(index, source, destination) for index in range(len(self.part.exchanges))]
            self._program = _Program(tensors, local, rounds)
            self.read.close()
            self.written.close()
        return self._program

    def _count_pieces(self, copies_of: Callable[[RankPlan], Iterator[Copy]]) -> int:
        return sum(len(self._pieces(copy)) for copy in copies_of(self.part))

    def _local_steps(self, copy: Copy, source: Mapping[str, Tensor], destination: Mapping[str, Tensor]) -> Iterator[Step]:
        value, target = _source_box(source, copy), _destination_box(destination, copy)
        read, written = self._begun_at_source(copy, None), self._begun_at_destination(copy, None)
        for rows in self._pieces(copy):
            part = value[rows]
            if part.dtype is not self.dtype:
                scratch = self._scratch_like(part)
                yield partial(scratch.copy_, part)
                part = scratch
            yield self.read.summing(read.below(rows.start), part)
            yield partial(target[rows].copy_, part)
            yield self.written.summing(written.below(rows.start), target[rows])

    def _make_round(self, index: int, source: Mapping[str, Tensor], destination: Mapping[str, Tensor]) -> _Round:
        exchange, slot = self.part.exchanges[index], index % LIVE_ROUNDS
        packed = _messages(exchange.sends, self._buffers[0][slot])
        spare = _messages(exchange.receives, self._buffers[1][slot])
        landings = {peer: self._links[peer].landing(exchange.number, room) for peer, room in spare.items()}
        pack = [
            step
            for peer, copies in exchange.sends.items()
            for copy, view in zip(copies, self._views(copies, packed[peer]), strict=True)
            for step in self._pack_steps(copy, view, source, exchange.number)
        ]
        unpack = [
            step
            for peer, copies in exchange.receives.items()
            for copy, view in zip(copies, self._views(copies, landings[peer]), strict=True)
            for step in self._unpack_steps(copy, view, destination, exchange.number)
        ]
        return _Round(exchange, slot, pack, packed, landings, unpack)

    def _pack_steps(self, copy: Copy, view: Tensor, source: Mapping[str, Tensor], number: int) -> Iterator[Step]:
        value, read = _source_box(source, copy), self._begun_at_source(copy, number)
        for rows in self._pieces(copy):
            yield partial(view[rows].copy_, value[rows])
            yield self.read.summing(read.below(rows.start), view[rows])

    def _unpack_steps(self, copy: Copy, view: Tensor, destination: Mapping[str, Tensor], number: int) -> Iterator[Step]:
        target, written = _destination_box(destination, copy), self._begun_at_destination(copy, number)
        for rows in self._pieces(copy):
            yield partial(target[rows].copy_, view[rows])
            yield self.written.summing(written.below(rows.start), target[rows])

    def _pieces(self, copy: Copy) -> list[slice]:
        """The rows of each piece of a copy, the same for sender and receiver."""
        rows = copy.size[0]
        step = max(1, PIECE_BYTES[self.device.type] * rows // copy.nbytes)
        return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]

    def _begun_at_source(self, copy: Copy, number: int | None) -> Piece:
        """A copy as the reader enters it, from its first row on."""
        return Piece(self._source_places.find(copy.source_parameter, copy.source_start), copy.source_rank, copy.destination_rank, number)

    def _begun_at_destination(self, copy: Copy, number: int | None) -> Piece:
        """A copy as the writer enters it, from its first row on."""
        place = self._destination_places.find(copy.destination_parameter, copy.destination_start)
        return Piece(place, copy.source_rank, copy.destination_rank, number)

    def _views(self, copies: Sequence[Copy], message: Tensor) -> list[Tensor]:
        """The part of a message that belongs to each copy, in the copy's shape."""
        parts = torch.split(message, [copy.nbytes for copy in copies])
        return [part.view(self.dtype).view(copy.size) for copy, part in zip(copies, parts, strict=True)]

    def _scratch_like(self, value: Tensor) -> Tensor:
        """Room for a piece in the number format of the destination; every piece gets the same room."""
        nbytes = value.numel() * self.dtype.itemsize
        if self._scratch.numel() < nbytes:
            self._scratch = new_bytes(nbytes, self.device)
        return self._scratch[:nbytes].view(self.dtype).view(value.shape)


def attempt(call: Callable[[], Result], what: str, timeout_s: float) -> Result:
    """Run a call of torch.distributed.

    Raises:
        RefitError: it failed in any way; `what` and the limit in one sentence.
    """
    try:
        return call()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise RefitError(f"refit: {what} failed or took more than {timeout_s:g} s ({reason}); restart from the last checkpoint.") from error


def send_buffer_bytes(part: RankPlan) -> int:
    """Size of a rank's send buffer for one round."""
    return max((sum(map(_message_bytes, exchange.sends.values())) for exchange in part.exchanges), default=0)


def receive_buffer_bytes(part: RankPlan) -> int:
    """Size of a rank's receive buffer for one round."""
    return max((sum(map(_message_bytes, exchange.receives.values())) for exchange in part.exchanges), default=0)


def _message_bytes(copies: Sequence[Copy]) -> int:
    return aligned(sum(copy.nbytes for copy in copies))


def _messages(by_peer: Mapping[int, Sequence[Copy]], buffer: Tensor) -> dict[int, Tensor]:
    """The part of a round's buffer that belongs to each peer."""
    messages, offset = {}, 0
    for peer, copies in by_peer.items():
        messages[peer] = buffer[offset : offset + sum(copy.nbytes for copy in copies)]
        offset += _message_bytes(copies)
    return messages


def _run(steps: Sequence[Step]) -> None:
    for step in steps:
        step()


def _named(copies: Sequence[Copy]) -> str:
    more = f" and {len(copies) - 1} more blocks" if len(copies) > 1 else ""
    return f"{copies[0].tensor}{more}"


def _outgoing(part: RankPlan) -> Iterator[Copy]:
    """What a rank reads: its own copies and what it sends."""
    yield from part.local
    yield from (copy for exchange in part.exchanges for copies in exchange.sends.values() for copy in copies)


def _incoming(part: RankPlan) -> Iterator[Copy]:
    """What a rank writes: its own copies and what it receives."""
    yield from part.local
    yield from (copy for exchange in part.exchanges for copies in exchange.receives.values() for copy in copies)


def _source_box(source: Mapping[str, Tensor], copy: Copy) -> Tensor:
    return source[copy.source_parameter].detach()[box_slices(copy.source_start, copy.size)]


def _destination_box(destination: Mapping[str, Tensor], copy: Copy) -> Tensor:
    return destination[copy.destination_parameter].detach()[box_slices(copy.destination_start, copy.size)]


def new_bytes(count: int, device: torch.device) -> Tensor:
    """Room, with nothing in it yet."""
    return torch.empty(count, dtype=torch.uint8, device=device)


def device_of(*sides: Mapping[str, Tensor]) -> torch.device:
    """Where the first parameter is; the host where there is none."""
    for parameters in sides:
        for tensor in parameters.values():
            return tensor.device
    return torch.device("cpu")
