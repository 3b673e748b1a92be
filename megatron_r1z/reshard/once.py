"""Carry a plan out once, and compare: what import, export and whole tensors need."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1z.layout.plan import RankPlan
from megatron_r1z.reshard.compare import compare
from megatron_r1z.reshard.execute import DEFAULT_TIMEOUT_S, Executor, Transfer, device_of
from megatron_r1z.reshard.links import wires


def execute(
    part: RankPlan,
    source: Mapping[str, Tensor],
    destination: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
    process_group: dist.ProcessGroup | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Transfer:
    """Carry a plan out through the process group and compare both sides; all ranks of the plan call this.

    For the arguments see `Executor`; buffers are by default where the parameters are.

    Raises:
        RefitError: a transfer failed or timed out, or what was written is not what was read.
    """
    where = device_of(source, destination) if device is None else device
    executor = Executor(part, dtype, where, wires(part, process_group), process_group, timeout_s)
    done = executor(source, destination)
    compare(executor, "the transfer")
    return done
