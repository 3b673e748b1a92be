"""Carry out one rank's part of a plan with batched point-to-point transfers (gloo or NCCL).

The sender converts to the destination's number format while it packs, so the wire carries what will be stored and nothing is rounded
twice. One buffer per peer and round: a rank holds at most `round_bytes` of send buffers and as much of receive buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1z.errors import RefitError
from megatron_r1z.layout.blocks import Box, box_slices
from megatron_r1z.layout.plan import Copy, Exchange, RankPlan

DEFAULT_TIMEOUT_S = 600.0
"""A round takes seconds; what takes longer is a peer that has not arrived yet, for example from a checkpoint or a slow rollout."""

Result = TypeVar("Result")


@torch.no_grad()
def execute(
    part: RankPlan,
    source: Mapping[str, Tensor],
    destination: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
    process_group: dist.ProcessGroup | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> int:
    """Write this rank's destination parameters and send what others need of its source parameters; all ranks of the plan call this.

    Args:
        part: `plan.of_rank(rank)`.
        source: this rank's parameters by the names of the plan's source layout, in any number format.
        destination: this rank's parameters by the names of the destination layout, in `dtype`.
        dtype: number format of the destination and of the wire, the same on every rank.
        device: where the buffers live; by default where the rank's parameters are.
        process_group: the group whose members are the plan's ranks; ranks are global ranks. By default all.
        timeout_s: limit of each wait.

    Returns:
        Bytes written into this rank's destination parameters.

    Raises:
        RefitError: a transfer failed or timed out; names rank, round and peer.
    """
    for copy in part.local:
        _destination_box(destination, copy).copy_(_source_box(source, copy))
    written = sum(copy.nbytes for copy in part.local)
    if device is None:
        device = _device_of(source, destination)
    for exchange in part.exchanges:
        written += _exchange(exchange, part, source, destination, dtype, device, process_group, timeout_s)
    return written


def _exchange(
    exchange: Exchange,
    part: RankPlan,
    source: Mapping[str, Tensor],
    destination: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    process_group: dist.ProcessGroup | None,
    timeout_s: float,
) -> int:
    """One round; returns the bytes received."""
    incoming = {peer: _buffer(copies, dtype, device) for peer, copies in exchange.receives.items()}
    outgoing = {peer: _pack(copies, source, dtype, device) for peer, copies in exchange.sends.items()}
    operations = [dist.P2POp(dist.irecv, buffer, peer, process_group) for peer, buffer in incoming.items()]
    operations += [dist.P2POp(dist.isend, buffer, peer, process_group) for peer, buffer in outgoing.items()]
    labels = [f"receiving from rank {peer}" for peer in incoming] + [f"sending to rank {peer}" for peer in outgoing]
    where = f"rank {part.rank}, round {exchange.number + 1} of {part.num_rounds}"
    works = _attempt(lambda: dist.batch_isend_irecv(operations), f"{where}: {', '.join(labels)}", timeout_s)
    if len(works) != len(labels):  # NCCL joins a batch into one piece of work
        labels = [", ".join(labels)] * len(works)
    for work, label in zip(works, labels, strict=True):
        _wait(work, f"{where}: {label}", timeout_s)
    for peer, copies in exchange.receives.items():
        _unpack(copies, incoming[peer], destination)
    return sum(buffer.nbytes for buffer in incoming.values())


def _wait(work: dist.Work, what: str, timeout_s: float) -> None:
    _attempt(lambda: work.wait(timedelta(seconds=timeout_s)), what, timeout_s)


def _attempt(call: Callable[[], Result], what: str, timeout_s: float) -> Result:
    """Run a call of torch.distributed; a failure of any kind becomes one sentence."""
    try:
        return call()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise RefitError(f"refit: {what} failed or took more than {timeout_s:g} s ({reason}); restart from the last checkpoint.") from error


def _buffer(copies: Sequence[Copy], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(sum(copy.nbytes for copy in copies) // dtype.itemsize, dtype=dtype, device=device)


def _pack(copies: Sequence[Copy], source: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    buffer = _buffer(copies, dtype, device)
    for copy, view in zip(copies, _views(copies, buffer), strict=True):
        view.copy_(_source_box(source, copy))
    return buffer


def _unpack(copies: Sequence[Copy], buffer: Tensor, destination: Mapping[str, Tensor]) -> None:
    for copy, view in zip(copies, _views(copies, buffer), strict=True):
        _destination_box(destination, copy).copy_(view)


def _views(copies: Sequence[Copy], buffer: Tensor) -> list[Tensor]:
    """The part of a packed buffer that belongs to each copy, in the copy's shape."""
    lengths = [copy.nbytes // buffer.itemsize for copy in copies]
    return [part.view(copy.size) for copy, part in zip(copies, torch.split(buffer, lengths), strict=True)]


def _source_box(source: Mapping[str, Tensor], copy: Copy) -> Tensor:
    return _box(source[copy.source_parameter], copy.source_start, copy.size)


def _destination_box(destination: Mapping[str, Tensor], copy: Copy) -> Tensor:
    return _box(destination[copy.destination_parameter], copy.destination_start, copy.size)


def _box(tensor: Tensor, start: Box, size: Box) -> Tensor:
    return tensor.detach()[box_slices(start, size)]


def _device_of(source: Mapping[str, Tensor], destination: Mapping[str, Tensor]) -> torch.device:
    for parameters in (source, destination):
        for tensor in parameters.values():
            return tensor.device
    return torch.device("cpu")
