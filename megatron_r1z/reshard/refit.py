"""The hand-over of the policy's weights to the engine: check, move, account for every byte, stamp the version."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1z.errors import RefitError
from megatron_r1z.layout.blocks import Box
from megatron_r1z.layout.plan import Plan
from megatron_r1z.protocols import Engine
from megatron_r1z.reshard.execute import DEFAULT_TIMEOUT_S, execute
from megatron_r1z.types import RefitReceipt


class Refit:
    """Moves the policy's weights into the engine's live parameters; one object per rank, called by all ranks of the plan at once.

    `source` returns this rank's policy parameters by the names of the plan's source layout; it is asked at every refit, because an
    optimizer may replace tensors. `engine` is None on a rank without one.

    Raises:
        RefitError: a parameter is missing, unknown to the layout, or has another shape or number format than planned.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        source: Callable[[], Mapping[str, Tensor]],
        engine: Engine | None,
        dtype: torch.dtype,
        process_group: dist.ProcessGroup | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self._plan = plan
        self._part = plan.of_rank(rank)
        self._source = source
        self._engine = engine
        self._dtype = dtype
        self._process_group = process_group
        self._timeout_s = timeout_s
        self._check(source())

    def __call__(self, policy_version: int) -> RefitReceipt:
        """Hand over the current weights as `policy_version`.

        Returns:
            The receipt; bytes are summed over all ranks, seconds are this rank's.

        Raises:
            RefitError: a transfer failed or timed out, or some rank wrote fewer bytes than planned. The engine keeps its old version.
        """
        start = time.perf_counter()
        source = self._source()
        written = execute(
            self._part,
            source,
            self._destination(),
            dtype=self._dtype,
            process_group=self._process_group,
            timeout_s=self._timeout_s,
        )
        total = self._sum_over_ranks(written, source)
        if total != self._plan.nbytes:
            raise RefitError(f"refit {policy_version} wrote {total} of {self._plan.nbytes} bytes; the engine must not generate.")
        if self._engine is not None:
            self._engine.set_version(policy_version)
        return RefitReceipt(policy_version, total, time.perf_counter() - start)

    def _destination(self) -> Mapping[str, Tensor]:
        return {} if self._engine is None else self._engine.parameters()

    def _check(self, source: Mapping[str, Tensor]) -> None:
        rank, destination = self._part.rank, self._destination()
        check_parameters("policy", rank, self._plan.source.parameters.get(rank, {}), source)
        check_parameters("engine", rank, self._plan.destination.parameters.get(rank, {}), destination)
        for name, tensor in destination.items():
            if tensor.dtype != self._dtype:
                raise RefitError(f"rank {rank}: engine parameter {name} is {tensor.dtype}, planned as {self._dtype}.")

    def _sum_over_ranks(self, written: int, source: Mapping[str, Tensor]) -> int:
        if not dist.is_initialized():
            return written
        device = next(iter(source.values()), torch.empty(0)).device
        total = torch.tensor(written, dtype=torch.int64, device=device)
        dist.all_reduce(total, group=self._process_group)
        return int(total)


def check_parameters(side: str, rank: int, planned: Mapping[str, Box], actual: Mapping[str, Tensor]) -> None:
    """Compare names and shapes of live parameters with a layout.

    Raises:
        RefitError: names the first parameter that is missing, too many, or of another shape.
    """
    for name, shape in planned.items():
        if name not in actual:
            raise RefitError(f"rank {rank}: the {side} has no parameter {name}, which the layout gives the shape {list(shape)}.")
        if tuple(actual[name].shape) != shape:
            raise RefitError(f"rank {rank}: {side} parameter {name} has shape {list(actual[name].shape)}; the layout says {list(shape)}.")
    for name in actual:
        if name not in planned:
            raise RefitError(f"rank {rank}: {side} parameter {name} is not in the layout, so no refit would cover it.")
