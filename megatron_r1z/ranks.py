"""What ranks tell each other outside of tensors: few, small messages over the default process group."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_r1z.errors import Interrupted, R1ZError
from megatron_r1z.host.rank import StopFlag

Item = TypeVar("Item")


def gather(items: Sequence[Item]) -> list[Item]:
    """The items of all ranks on every rank, in rank order."""
    parts: list[list[Item]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


def broadcast(items: Sequence[Item]) -> list[Item]:
    """Rank 0's items on every rank; what the others pass is not looked at."""
    box = [list(items)]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def decide(make: Callable[[], Item]) -> Item:
    """What `make` returns on rank 0, on every rank; what it raises there, every rank raises."""
    outcome: list[Item | R1ZError] = []
    if dist.get_rank() == 0:
        try:
            outcome.append(make())
        except R1ZError as error:
            outcome.append(error)
    (found,) = broadcast(outcome)
    if isinstance(found, R1ZError):
        raise found
    return found


def unless_stopped(work: Callable[[], Item], flag: StopFlag) -> Item | None:
    """What `work` returns; None on every rank where one of them was asked to stop meanwhile, whether `work` came to its end or not."""
    result = unless_interrupted(work)
    return None if any_rank(flag.requested) else result


def unless_interrupted(work: Callable[[], Item]) -> Item | None:
    """What `work` returns; None where it was given up on this rank, of which the others do not know yet."""
    with suppress(Interrupted):
        return work()
    return None


def any_rank(flag: bool) -> bool:
    """True on every rank when it is true on one of them."""
    value = torch.tensor(int(flag))
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)


def per_node() -> int:
    """Consecutive ranks that share a node, as torchrun and `train` say; without them all ranks do."""
    everyone = dist.get_world_size() if dist.is_initialized() else 1
    return int(os.environ.get("LOCAL_WORLD_SIZE", everyone))
