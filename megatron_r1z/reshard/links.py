"""How a rank comes by the weights of another: it reads them where they are, or they travel packed through the process group.

The ranks of one machine without GPUs read each other's parameters in place, if those lie in memory that others can map
(`host/shared_memory.py`). All other pairs of ranks use the process group: gloo or NCCL.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1z.host.shared_memory import SharedFile
from megatron_r1z.layout.plan import RankPlan

POLL_S = 20e-6
LOOK_FOR_PEER_S = 0.2
"""A peer that has died does not answer; so often it is looked for."""


class Wire:
    """The way to one other rank through the process group."""

    def __init__(self, peer: int, process_group: dist.ProcessGroup | None) -> None:
        self._peer = peer
        self._group = process_group

    def send(self, packed: Tensor) -> dist.P2POp:
        """The operation that sends `packed`, uint8."""
        return dist.P2POp(dist.isend, packed, self._peer, self._group)

    def receive(self, landing: Tensor) -> dist.P2POp:
        """The operation that receives into `landing`, uint8."""
        return dist.P2POp(dist.irecv, landing, self._peer, self._group)


class Window:
    """What one rank lets others see: where its parameters are, and how many refits it has begun.

    Only its owner writes it. Nobody says when reading is over: a refit ends with a comparison that all ranks take part in, and until then
    no rank changes its weights.
    """

    def __init__(self) -> None:
        self._counts = SharedFile(2 * 8)
        self._begun, self._edition = self._counts.tensor.view(torch.int64).unbind()
        self._addresses: list[int] = []
        self._places = SharedFile(0)

    @property
    def handles(self) -> tuple[str, str]:
        """What another process needs for `Seen`: paths of the counts and of the places."""
        return self._counts.path, self._places.path

    def open(self, parameters: Mapping[str, Tensor]) -> None:
        """From now on others may read `parameters`, until they have been compared.

        Raises:
            RuntimeError: one of them is not in memory that others can map.
        """
        addresses = list(map(Tensor.data_ptr, parameters.values()))
        if addresses != self._addresses:
            self._addresses = addresses
            self._places.write(pickle.dumps({name: _place(tensor) for name, tensor in parameters.items()}))
            self._edition += 1
        self._begun += 1


class Seen:
    """The parameters of one other rank as this one sees them.

    Args:
        handles: of the other's window.
    """

    def __init__(self, handles: tuple[str, str]) -> None:
        self._counts_path, self._places_path = handles
        self._expected = 0
        self._parameters: Mapping[str, Tensor] = {}
        self._read_edition = 0

    def parameters(self, timeout_s: float) -> Mapping[str, Tensor]:
        """Wait until the other has begun one more refit; its parameters, in its number format.

        Raises:
            RuntimeError: it has died, or takes longer than `timeout_s`.
        """
        self._expected += 1
        begun, edition = self._counts
        self._await(begun, timeout_s)
        if edition != self._read_edition:
            self._parameters = self._map()
            self._read_edition = int(edition)
        return self._parameters

    @cached_property
    def _counts(self) -> tuple[Tensor, ...]:
        return torch.from_file(self._counts_path, shared=True, size=2, dtype=torch.int64).unbind()

    def _map(self) -> Mapping[str, Tensor]:
        try:
            places: dict[str, _Place] = pickle.loads(Path(self._places_path).read_bytes())
        except OSError as error:
            raise RuntimeError("its process has ended") from error
        files: dict[str, Tensor] = {}
        return {name: _tensor_at(place, files) for name, place in places.items()}

    def _await(self, begun: Tensor, timeout_s: float) -> None:
        start = looked = time.monotonic()
        while begun < self._expected:
            now = time.monotonic()
            if now - start > timeout_s:
                raise RuntimeError(f"timed out after {timeout_s:g} s")
            if now - looked > LOOK_FOR_PEER_S:
                looked = now
                if not Path(self._counts_path).exists():
                    raise RuntimeError("its process has ended")
            time.sleep(POLL_S)


class Links(NamedTuple):
    """A rank's ways to all ranks that it sends to or receives from."""

    wires: Mapping[int, Wire]
    seen: Mapping[int, Seen]
    """Ranks that read this one's parameters in place and are read in place."""
    window: Window | None
    """What they look through."""


def wires(part: RankPlan, process_group: dist.ProcessGroup | None) -> Links:
    """The process group for every peer of a rank."""
    peers = {peer for exchange in part.exchanges for peer in (*exchange.sends, *exchange.receives)}
    return Links({peer: Wire(peer, process_group) for peer in sorted(peers)}, {}, None)


def connect(part: RankPlan, source: Mapping[str, Tensor], process_group: dist.ProcessGroup | None) -> Links:
    """The best way to every peer; all ranks of the plan call this.

    Args:
        part: this rank's part of the plan.
        source: this rank's parameters.
        process_group: whose members are the plan's ranks.
    """
    links = wires(part, process_group)
    memory = _memory_name()
    window = Window() if all(map(_can_be_mapped, source.values())) else None
    offers: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(offers, (part.rank, memory, window and window.handles), group=process_group)
    seen = {
        peer: Seen(handles)
        for peer, their_memory, handles in offers
        if peer in links.wires and their_memory == memory and handles is not None and window is not None
    }
    return Links({peer: wire for peer, wire in links.wires.items() if peer not in seen}, seen, window if seen else None)


# --- where a parameter is ---


class _Place(NamedTuple):
    """A tensor in a file."""

    path: str
    file_bytes: int
    dtype: torch.dtype
    offset: int
    """In elements, as sizes and strides are."""
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _can_be_mapped(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and _file_of(tensor).startswith("/proc/")


def _file_of(tensor: Tensor) -> str:
    """Empty where it is not in a file."""
    return tensor.untyped_storage().filename or ""


def _place(tensor: Tensor) -> _Place:
    """What another process needs for `_tensor_at`."""
    storage = tensor.untyped_storage()
    if not _can_be_mapped(tensor):
        raise RuntimeError(f"a parameter of shape {list(tensor.shape)} has left the memory that other ranks see")
    return _Place(_file_of(tensor), storage.nbytes(), tensor.dtype, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())


def _tensor_at(place: _Place, files: dict[str, Tensor]) -> Tensor:
    """The tensor of another process; `files` are those mapped so far."""
    if place.path not in files:
        files[place.path] = torch.from_file(place.path, shared=True, size=place.file_bytes, dtype=torch.uint8)
    return files[place.path].view(place.dtype).as_strided(place.size, place.stride, place.offset)


def _memory_name() -> str:
    """Equal on ranks that can map each other's parameters."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()} {os.getuid()}"
