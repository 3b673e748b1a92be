"""How packed bytes get from one rank to another: through the process group, or through memory that both ranks can see.

On a CPU the ranks of one machine share memory; on GPUs two ranks share memory only where they share a GPU, which NCCL cannot connect
(CUDA IPC; **not run on a GPU**). All other pairs of ranks use the process group: gloo or NCCL.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from megatron_r1z.layout.plan import LIVE_ROUNDS, Plan, RankPlan

POLL_S = 20e-6
LOOK_FOR_PEER_S = 0.2
"""A peer that has died does not answer; so often it is looked for."""


class Link(Protocol):
    """The way to one other rank. All calls that wait raise RuntimeError when the peer dies or takes longer than `timeout_s`."""

    def landing(self, number: int, spare: Tensor) -> Tensor:
        """Where the bytes of round `number` will be when they have arrived; `spare` is room of this rank's own."""
        ...

    def send(self, packed: Tensor) -> dist.P2POp | None:
        """Hand `packed` over, or return the operation that does."""
        ...

    def receive(self, landing: Tensor) -> dist.P2POp | None:
        """The operation that brings the bytes to `landing`, if it takes one."""
        ...

    def await_arrival(self, timeout_s: float) -> None:
        """Wait for the bytes of one more round, unless the operation of `receive` does."""
        ...

    def release(self) -> None:
        """Tell the sender that the bytes that arrived last have been taken out."""
        ...

    def await_release(self, timeout_s: float) -> None:
        """Wait until the receiver has taken out one more round of bytes."""
        ...


class Wire:
    """Bytes travel through the process group."""

    def __init__(self, peer: int, process_group: dist.ProcessGroup | None) -> None:
        self._peer = peer
        self._group = process_group

    def landing(self, number: int, spare: Tensor) -> Tensor:  # noqa: D102
        return spare

    def send(self, packed: Tensor) -> dist.P2POp:  # noqa: D102
        return dist.P2POp(dist.isend, packed, self._peer, self._group)

    def receive(self, landing: Tensor) -> dist.P2POp:  # noqa: D102
        return dist.P2POp(dist.irecv, landing, self._peer, self._group)

    def await_arrival(self, timeout_s: float) -> None:
        """The operation is waited for."""

    def release(self) -> None:
        """Nobody waits for this rank's own room."""

    def await_release(self, timeout_s: float) -> None:
        """The operation is waited for."""


class Mailbox:
    """What one rank shares with those that see its memory: send buffers, and how many messages it has sent to and taken from each.

    Only its owner writes it. The counts are in host memory, so a GPU's work must have ended before one is raised.
    """

    def __init__(self, nbytes: int, num_ranks: int, device: torch.device) -> None:
        self.buffers = [_shared_bytes(nbytes, device) for _ in range(LIVE_ROUNDS)]
        self._counts = _shared_bytes(num_ranks * 2 * 8, torch.device("cpu"))
        self.sent, self.taken = self._counts.tensor.view(torch.int64).view(2, num_ranks)

    def handles(self) -> tuple[list[Any], Any]:
        """What another process needs for `open_mailbox`."""
        return [buffer.handle for buffer in self.buffers], self._counts.handle


class Mapped:
    """Bytes stay where the sender packed them; counts in both mailboxes say what has been sent and taken.

    Args:
        rank: this rank.
        peer: the other.
        own: this rank's mailbox.
        handles: of the peer's.
        addresses: where the peer packs for this rank, by round.
    """

    def __init__(self, rank: int, peer: int, own: Mailbox, handles: tuple[list[Any], Any], addresses: Mapping[int, Address]) -> None:
        self._rank = rank
        self._peer = peer
        self._own = own
        self._buffers = [_open(handle) for handle in handles[0]]
        self._counts_path = handles[1][0]
        self._their_sent, self._their_taken = _open(handles[1]).view(torch.int64).view(2, -1)
        self._addresses = addresses
        self._released = 0

    def landing(self, number: int, spare: Tensor) -> Tensor:  # noqa: D102
        slot, offset = self._addresses[number]
        return self._buffers[slot][offset : offset + spare.numel()]

    def send(self, packed: Tensor) -> None:  # noqa: D102
        self._settle()
        self._own.sent[self._peer] += 1

    def receive(self, landing: Tensor) -> None:
        """Nothing is brought: the bytes are read where they are."""

    def await_arrival(self, timeout_s: float) -> None:  # noqa: D102
        wanted = self._own.taken[self._peer] + 1
        self._poll(lambda: self._their_sent[self._rank] >= wanted, timeout_s)

    def release(self) -> None:  # noqa: D102
        self._settle()
        self._own.taken[self._peer] += 1

    def await_release(self, timeout_s: float) -> None:  # noqa: D102
        self._released += 1
        self._poll(lambda: self._their_taken[self._rank] >= self._released, timeout_s)

    def _settle(self) -> None:
        """Let the copies that were queued on a GPU end, since the other process does not see this one's stream."""
        if self._buffers[0].is_cuda:
            torch.cuda.synchronize()

    def _poll(self, is_done: Callable[[], object], timeout_s: float) -> None:
        start = looked = time.monotonic()
        while not is_done():
            now = time.monotonic()
            if now - start > timeout_s:
                raise RuntimeError(f"timed out after {timeout_s:g} s")
            if now - looked > LOOK_FOR_PEER_S:
                looked = now
                if not Path(self._counts_path).exists():
                    raise RuntimeError("its process has ended")
            time.sleep(POLL_S)


class Address(NamedTuple):
    """Where a sender packs a round's bytes."""

    slot: int
    offset: int


def wires(part: RankPlan, process_group: dist.ProcessGroup | None) -> dict[int, Link]:
    """A link through the process group to every peer of a rank."""
    peers = {peer for exchange in part.exchanges for peer in (*exchange.sends, *exchange.receives)}
    return {peer: Wire(peer, process_group) for peer in sorted(peers)}


def connect(plan: Plan, part: RankPlan, mailbox: Mailbox, process_group: dist.ProcessGroup | None) -> dict[int, Link]:
    """The best link to every peer; all ranks of the plan call this.

    Args:
        plan: the whole plan, for where other ranks pack what they send to this one.
        part: this rank's part of it.
        mailbox: this rank's.
        process_group: whose members are the plan's ranks.
    """
    links = wires(part, process_group)
    memory = _memory_name(mailbox.buffers[0].tensor.device)
    offers: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(offers, (part.rank, memory, mailbox.handles()), group=process_group)
    for peer, their_memory, handles in offers:
        if peer in links and their_memory == memory:
            links[peer] = Mapped(part.rank, peer, mailbox, handles, _addresses(plan, peer, part.rank))
    return links


def _addresses(plan: Plan, sender: int, receiver: int) -> dict[int, Address]:
    """Where `sender` packs for `receiver`, by round; `Executor` packs the peers of a round one after the other."""
    found = {}
    for index, exchange in enumerate(plan.of_rank(sender).exchanges):
        offset = 0
        for peer, copies in exchange.sends.items():
            if peer == receiver:
                found[exchange.number] = Address(index % LIVE_ROUNDS, offset)
            offset += aligned(sum(copy.nbytes for copy in copies))
    return found


def aligned(nbytes: int) -> int:
    """Room for a message, so that the next one begins where any number format may."""
    return -(-nbytes // 16) * 16


# --- memory that another process can map ---


class _SharedBytes(NamedTuple):
    tensor: Tensor
    """uint8."""
    handle: Any


def _shared_bytes(nbytes: int, device: torch.device) -> _SharedBytes:
    """An anonymous file on a CPU, which is gone with the last process that has it; device memory on a GPU."""
    if device.type == "cuda":
        tensor = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        return _SharedBytes(tensor, reduce_tensor(tensor))  # type: ignore[no-untyped-call]
    file = os.memfd_create("megatron-r1z-refit")
    os.ftruncate(file, nbytes)
    handle = f"/proc/{os.getpid()}/fd/{file}", nbytes
    return _SharedBytes(_open(handle), handle)


def _open(handle: Any) -> Tensor:
    """The bytes behind the handle of another process, uint8."""
    first, second = handle
    if callable(first):
        rebuilt: Tensor = first(*second)
        return rebuilt
    return torch.from_file(first, shared=True, size=second, dtype=torch.uint8)


def _memory_name(device: torch.device) -> str:
    """Equal on ranks that can map each other's buffers."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).uuid)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()} {os.getuid()}"
