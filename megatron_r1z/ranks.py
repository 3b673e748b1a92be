"""What ranks tell each other outside of tensors: few, small messages over the default process group."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

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


def any_rank(flag: bool) -> bool:
    """True on every rank when it is true on one of them."""
    value = torch.tensor(int(flag))
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)


def per_node() -> int:
    """Consecutive ranks that share a node, as torchrun and `train` say; without them all ranks do."""
    everyone = dist.get_world_size() if dist.is_initialized() else 1
    return int(os.environ.get("LOCAL_WORLD_SIZE", everyone))
