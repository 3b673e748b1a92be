"""The hand-over of the policy's weights to the engine: move, compare digests of both sides, stamp the version."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1z.errors import RefitError
from megatron_r1z.layout.blocks import Box
from megatron_r1z.layout.plan import DEFAULT_ROUND_BYTES, Plan
from megatron_r1z.protocols import Engine
from megatron_r1z.reshard.compare import compare
from megatron_r1z.reshard.digest import as_text
from megatron_r1z.reshard.execute import DEFAULT_TIMEOUT_S, Executor
from megatron_r1z.reshard.links import Links, connect
from megatron_r1z.types import RefitReceipt

ROUND_BYTES = {"cpu": 8 << 20, "cuda": DEFAULT_ROUND_BYTES}
"""Bound of a rank's buffer, by device: on a CPU the rounds that are alive fit the cache."""


class Refit:
    """Moves the policy's weights into the engine's live parameters; one object per rank, made and called by all ranks of the plan at once.

    `source` returns this rank's policy parameters by the names of the plan's source layout; it is asked at every refit, because an
    optimizer may replace tensors. `engine` is None on a rank without one. `links` replaces the ways to other ranks (tests break them).

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
        links: Callable[[Links], Links] = lambda links: links,
    ) -> None:
        self._source = source
        self._engine = engine
        weights, live = source(), {} if engine is None else engine.parameters()
        _check_sides(plan, rank, weights, live, dtype)
        device = next(iter((*weights.values(), *live.values())), torch.empty(0)).device
        part = plan.of_rank(rank)
        found = connect(part, weights, process_group) if dist.is_initialized() else Links({}, {}, None)
        self._executor = Executor(part, dtype, device, links(found), process_group, timeout_s)
        self._groups = _grouped(self._executor.tensors)

    def __call__(self, policy_version: int) -> RefitReceipt:
        """Hand over the current weights as `policy_version`.

        Returns:
            The receipt; bytes are summed over all ranks, seconds are this rank's.

        Raises:
            RefitError: a transfer failed or timed out, or what some rank wrote is not what was read; names block and ranks. From the
                first byte to the end of a refit, and after one that failed, the engine refuses to generate.
        """
        start = time.perf_counter()
        weights = self._source()
        transfer = self._executor(weights, {}) if self._engine is None else self._engine.receive(lambda live: self._executor(weights, live))
        nbytes, found = compare(self._executor, f"refit {policy_version}")
        if self._engine is not None:
            self._engine.accept(policy_version)
        digests = tuple((group, as_text(sum(found[index] for index in members))) for group, members in self._groups)
        return RefitReceipt(policy_version, nbytes, time.perf_counter() - start, transfer.round_seconds, digests)


def tensor_group(tensor: str) -> str:
    """The group whose digest a receipt gives: a layer, or a tensor outside of layers.

    >>> tensor_group("model.layers.3.mlp.up_proj.weight")
    'model.layers.3'
    """
    parts = tensor.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else tensor


def _grouped(tensors: Mapping[str, int]) -> list[tuple[str, list[int]]]:
    """The indices of each group's tensors."""
    names = sorted(tensors, key=tensor_group)
    return [(group, [tensors[name] for name in members]) for group, members in groupby(names, key=tensor_group)]


def _check_sides(plan: Plan, rank: int, weights: Mapping[str, Tensor], live: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    check_parameters("policy", rank, plan.source.parameters.get(rank, {}), weights)
    check_parameters("engine", rank, plan.destination.parameters.get(rank, {}), live)
    for name, tensor in live.items():
        if tensor.dtype != dtype:
            raise RefitError(f"rank {rank}: engine parameter {name} is {tensor.dtype}, planned as {dtype}.")


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
