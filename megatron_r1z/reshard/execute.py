"""Carry out one rank's part of a plan: copies in memory, and rounds of packed bytes to and from ranks whose memory cannot be seen.

Copies in memory are those within the rank and those out of the parameters of ranks that are read in place (`links.py`). What travels was
converted to the destination's number format by the sender while it packed, so it is what will be stored and nothing is rounded twice.
While one round travels, the next is packed: a rank holds at most two rounds of send buffers and two of receive buffers. Every piece is
summed where it was read and again where it was written (`digest.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from itertools import pairwise
from operator import attrgetter
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1z.errors import RefitError
from megatron_r1z.host.shared_memory import aligned
from megatron_r1z.layout.blocks import box_slices
from megatron_r1z.layout.plan import LIVE_ROUNDS, Copy, Exchange, RankPlan
from megatron_r1z.reshard.digest import Ledger, Piece, Places
from megatron_r1z.reshard.links import Links
from megatron_r1z.reshard.moves import Move, Step, bind

DEFAULT_TIMEOUT_S = 600.0
"""A round takes seconds; what takes longer is a peer that has not arrived yet, for example from a checkpoint or a slow rollout."""
PIECE_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
"""What is summed as one, by device: on a CPU threads share pieces out, on a GPU one must be worth a launch."""

_dtype = attrgetter("dtype")
Result = TypeVar("Result")
Parameters = Mapping[str, Tensor]


class Transfer(NamedTuple):
    """What one rank did."""

    nbytes: int
    """Written into this rank's destination parameters."""
    round_seconds: tuple[float, ...]
    """Of the copies in memory, then of each round through the process group that it took part in."""


class _Round(NamedTuple):
    """One exchange, ready to run."""

    exchange: Exchange
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

    tensors: list[tuple[list[int], list[torch.dtype]]]
    """Addresses and number formats of each side: the program is for these and no others."""
    in_memory: list[Step]
    rounds: list[_Round]


class Executor:
    """One rank's part of a plan, to be carried out as often as wanted; every rank of the plan has one.

    Args:
        part: `plan.of_rank(rank)`.
        dtype: number format of the destination and of what travels, the same on every rank.
        device: where the buffers live.
        links: the way to every peer.
        process_group: whose members are the plan's ranks; ranks are global ranks. By default all.
        timeout_s: limit of each wait.
    """

    def __init__(
        self,
        part: RankPlan,
        dtype: torch.dtype,
        device: torch.device,
        links: Links,
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
        self._exchanges = list(_through(part, links))
        self._buffers = [
            [new_bytes(max((_room(side(exchange)) for exchange in self._exchanges), default=0), device) for _ in range(LIVE_ROUNDS)]
            for side in (_sends, _receives)
        ]
        self._scratch = new_bytes(0, device)
        self._source_places = Places(part.source.blocks_of(part.rank))
        self._destination_places = Places(part.destination.blocks_of(part.rank))
        self._program: _Program | None = None
        self.written_bytes = sum(copy.nbytes for copy in _incoming(part))
        """What a transfer writes on this rank."""

    @torch.no_grad()
    def __call__(self, source: Parameters, destination: Parameters) -> Transfer:
        """Write this rank's destination parameters and send what others need of its source parameters; all ranks of the plan call this.

        No rank may change its source parameters before all have compared (`compare.py`): some may still be reading them.

        Args:
            source: this rank's parameters by the names of the source layout, in any number format.
            destination: this rank's parameters by the names of the destination layout, in the plan's number format.

        Raises:
            RefitError: a transfer failed or timed out; names rank, round, block and peer.
        """
        program = self._prepared(source, destination, self._look(source))
        self.read.clear()
        self.written.clear()
        clock = [time.perf_counter()]
        in_flight: _Flight | None = None
        for index in range(len(program.rounds) + 1):
            started = self._start(program.rounds[index]) if index < len(program.rounds) else None
            if in_flight is None:
                _run(program.in_memory)
            else:
                self._finish(in_flight)
            in_flight = started
            clock.append(time.perf_counter())
        return Transfer(self.written_bytes, tuple(after - before for before, after in pairwise(clock)))

    # --- running ---

    def _look(self, source: Parameters) -> dict[int, Parameters]:
        """Let others read this rank's parameters; theirs, as far as this rank reads them in place."""
        window = self._links.window
        if window is not None:
            self._attempt(lambda: window.open(source), f"rank {self.part.rank}: showing its parameters to ranks {list(self._links.seen)}")
        found: dict[int, Parameters] = {}
        for exchange in self.part.exchanges:
            for peer in exchange.receives.keys() & self._links.seen.keys() - found.keys():
                found[peer] = self._attempt(partial(self._links.seen[peer].parameters, self.timeout_s), self._receiving(exchange, peer))
        return found

    def _start(self, work: _Round) -> _Flight:
        """Pack a round and send it off."""
        _run(work.pack)
        wires = self._links.wires
        operations = [(wires[peer].receive(landing), self._receiving(work.exchange, peer)) for peer, landing in work.landings.items()]
        operations += [(wires[peer].send(packed), self._sending(work.exchange, peer)) for peer, packed in work.packed.items()]
        labels = [label for _, label in operations]
        works = self._attempt(lambda: dist.batch_isend_irecv([operation for operation, _ in operations]), "; ".join(labels))
        if len(works) != len(labels):  # NCCL joins a batch into one piece of work
            labels = ["; ".join(labels)] * len(works)
        return _Flight(work, list(zip(works, labels, strict=True)))

    def _finish(self, flight: _Flight) -> None:
        """Wait for a round and write what it brought."""
        limit = timedelta(seconds=self.timeout_s)
        for work, label in flight.pending:
            self._attempt(partial(work.wait, limit), label)
        _run(flight.work.unpack)

    def _receiving(self, exchange: Exchange, peer: int) -> str:
        return f"{self._where(exchange)}: receiving {_named(exchange.receives[peer])} from rank {peer}"

    def _sending(self, exchange: Exchange, peer: int) -> str:
        return f"{self._where(exchange)}: sending {_named(exchange.sends[peer])} to rank {peer}"

    def _where(self, exchange: Exchange) -> str:
        return f"rank {self.part.rank}, round {exchange.number + 1} of {self.part.num_rounds}"

    def _attempt(self, call: Callable[[], Result], what: str) -> Result:
        return attempt(call, what, self.timeout_s)

    # --- getting ready ---

    def _prepared(self, source: Parameters, destination: Parameters, seen: Mapping[int, Parameters]) -> _Program:
        """The program for these tensors: made once, and again when an optimizer or the engine has replaced one."""
        sides = (source, destination, *seen.values())
        tensors = [(list(map(Tensor.data_ptr, side.values())), list(map(_dtype, side.values()))) for side in sides]
        if self._program is None or self._program.tensors != tensors:
            self.read = Ledger(self.tensors, self._count_pieces(_outgoing), self.device)
            self.written = Ledger(self.tensors, self._count_pieces(_incoming), device_of(destination, source))
            in_memory = list(self._moves_in_memory(source, destination, seen))
            rounds = [self._make_round(index, source, destination) for index in range(len(self._exchanges))]
            self._program = _Program(tensors, bind(in_memory, self._scratch_like), rounds)
            self.read.close()
            self.written.close()
        return self._program

    def _count_pieces(self, copies_of: Callable[[RankPlan], Iterator[Copy]]) -> int:
        return sum(len(self._pieces(copy)) for copy in copies_of(self.part))

    def _moves_in_memory(self, source: Parameters, destination: Parameters, seen: Mapping[int, Parameters]) -> Iterator[Move]:
        """Copies within the rank and out of the parameters of others, and a look at what others copy out of this rank's.

        They go by the memory that is read: the ranks of a machine then read the same bytes at about the same time.
        """
        for rank in sorted({self.part.rank, *seen}):
            moves = self._moves_within(source, destination) if rank == self.part.rank else self._moves_from(rank, seen[rank], destination)
            yield from sorted(moves, key=lambda move: move.source.data_ptr())
        for exchange in self.part.exchanges:
            for peer in self._links.seen:
                yield from (move for copy in exchange.sends.get(peer, ()) for move in self._reads(copy, exchange.number, source))

    def _moves_from(self, peer: int, theirs: Parameters, destination: Parameters) -> Iterator[Move]:
        """Copies out of another rank's parameters."""
        for exchange in self.part.exchanges:
            for copy in exchange.receives.get(peer, ()):
                yield from self._writes(copy, exchange.number, _source_box(theirs, copy), destination)

    def _make_round(self, index: int, source: Parameters, destination: Parameters) -> _Round:
        exchange, slot = self._exchanges[index], index % LIVE_ROUNDS
        packed, landings = (
            _messages(side(exchange), buffers[slot]) for side, buffers in zip((_sends, _receives), self._buffers, strict=True)
        )
        pack = [
            move
            for peer, copies in exchange.sends.items()
            for copy, view in zip(copies, self._views(copies, packed[peer]), strict=True)
            for move in self._reads(copy, exchange.number, source, view)
        ]
        unpack = [
            move
            for peer, copies in exchange.receives.items()
            for copy, view in zip(copies, self._views(copies, landings[peer]), strict=True)
            for move in self._writes(copy, exchange.number, view, destination)
        ]
        return _Round(exchange, bind(pack, self._scratch_like), packed, landings, bind(unpack, self._scratch_like))

    def _moves_within(self, source: Parameters, destination: Parameters) -> Iterator[Move]:
        """Copies within the rank."""
        for copy in self.part.local:
            target = _destination_box(destination, copy)
            reads, writes = self._reads(copy, None, source, target), self._writes(copy, None, target, destination)
            for move, written in zip(reads, writes, strict=True):
                yield move._replace(written=written.written)

    def _reads(self, copy: Copy, number: int | None, source: Parameters, target: Tensor | None = None) -> Iterator[Move]:
        """A copy as the reader enters it, piece by piece. What has been read before is only read again to be copied."""
        value = _source_box(source, copy)
        place = self._source_places.find(copy.source_parameter, copy.source_start)
        piece = Piece(place, copy.source_rank, copy.destination_rank, number)
        for rows in self._pieces(copy):
            slot = self.read.enter(piece.below(rows.start), value[rows].shape)
            if slot is not None or target is not None:
                yield Move(value[rows], None if target is None else target[rows], slot, None, self.dtype)

    def _writes(self, copy: Copy, number: int | None, value: Tensor, destination: Parameters) -> Iterator[Move]:
        """A copy as the writer enters it, piece by piece."""
        target = _destination_box(destination, copy)
        place = self._destination_places.find(copy.destination_parameter, copy.destination_start)
        piece = Piece(place, copy.source_rank, copy.destination_rank, number)
        for rows in self._pieces(copy):
            yield Move(value[rows], target[rows], None, self.written.enter(piece.below(rows.start)), self.dtype)

    def _pieces(self, copy: Copy) -> list[slice]:
        """The rows of each piece of a copy, the same for sender and receiver.

        Cuts lie at fixed rows of the source parameter, so that two copies that share rows share pieces, which are summed once.
        """
        first, rows = copy.source_start[0], copy.size[0]
        step = max(1, PIECE_BYTES[self.device.type] * rows // copy.nbytes)
        cuts = [0, *range(step - first % step, rows, step), rows]
        return [slice(begin, end) for begin, end in pairwise(cuts)]

    def _views(self, copies: Sequence[Copy], message: Tensor) -> list[Tensor]:
        """The part of a message that belongs to each copy, in the copy's shape."""
        parts = torch.split(message, [copy.nbytes for copy in copies])
        return [part.view(self.dtype).view(copy.size) for copy, part in zip(copies, parts, strict=True)]

    def _scratch_like(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Room for a piece in another number format; every piece gets the same room."""
        nbytes = value.numel() * dtype.itemsize
        if self._scratch.numel() < nbytes:
            self._scratch = new_bytes(nbytes, self.device)
        return self._scratch[:nbytes].view(dtype).view(value.shape)


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


def _through(part: RankPlan, links: Links) -> Iterator[Exchange]:
    """What goes through the process group."""
    for exchange in part.exchanges:
        sends, receives = ({peer: copies for peer, copies in side(exchange).items() if peer in links.wires} for side in (_sends, _receives))
        if sends or receives:
            yield Exchange(exchange.number, sends, receives)


def _sends(exchange: Exchange) -> Mapping[int, tuple[Copy, ...]]:
    return exchange.sends


def _receives(exchange: Exchange) -> Mapping[int, tuple[Copy, ...]]:
    return exchange.receives


def _room(by_peer: Mapping[int, Sequence[Copy]]) -> int:
    """Bytes of a buffer for all messages of a round."""
    return sum(map(_message_bytes, by_peer.values()))


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


def _source_box(source: Parameters, copy: Copy) -> Tensor:
    return source[copy.source_parameter].detach()[box_slices(copy.source_start, copy.size)]


def _destination_box(destination: Parameters, copy: Copy) -> Tensor:
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
