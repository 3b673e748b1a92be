"""The hand-over of the policy's weights to the engine: move, compare digests of both sides, stamp the version."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1z.errors import RefitError
from megatron_r1z.layout.blocks import Box
from megatron_r1z.layout.plan import DEFAULT_ROUND_BYTES, Plan
from megatron_r1z.protocols import Engine
from megatron_r1z.reshard.compare import Compared, compare
from megatron_r1z.reshard.digest import as_text
from megatron_r1z.reshard.execute import DEFAULT_TIMEOUT_S, Executor, Transfer
from megatron_r1z.reshard.links import Links, connect
from megatron_r1z.types import RefitReceipt

ROUND_BYTES = {"cpu": 8 << 20, "cuda": DEFAULT_ROUND_BYTES}
"""Bound of a rank's buffer, by device: on a CPU the rounds that are alive fit the cache."""


class _Part(NamedTuple):
    """The parameters of one number format."""

    executor: Executor
    source: tuple[str, ...]
    destination: tuple[str, ...]
    """Names of this rank's parameters."""


class Refit:
    """Moves the policy's weights into the engine's live parameters; one object per rank, made and called by all ranks of the plan at once.

    Args:
        plans: the number formats of the engine's parameters and the plan of each, between the same ranks.
        rank: this rank.
        source: returns this rank's policy parameters by the names of the plans' source layouts; it is asked at every refit, because an
            optimizer may replace tensors.
        engine: None on a rank without one.
        process_group: whose members are the plans' ranks; by default all.
        timeout_s: limit of each wait.
        links: replaces the ways to other ranks (tests break them).

    Raises:
        RefitError: a parameter is missing, unknown to the layout, or has another shape or number format than planned.
    """

    def __init__(
        self,
        plans: Sequence[tuple[torch.dtype, Plan]],
        rank: int,
        source: Callable[[], Mapping[str, Tensor]],
        engine: Engine | None,
        process_group: dist.ProcessGroup | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        links: Callable[[Links], Links] = lambda links: links,
    ) -> None:
        self._source = source
        self._engine = engine
        weights, live = source(), {} if engine is None else engine.parameters()
        _check_sides(plans, rank, weights, live)
        device = next(iter((*weights.values(), *live.values())), torch.empty(0)).device
        self._parts = []
        for dtype, plan in plans:
            part = plan.of_rank(rank)
            names = tuple(plan.source.parameters.get(rank, ())), tuple(plan.destination.parameters.get(rank, ()))
            found = Links({}, {}, None)
            if dist.is_initialized():
                found = connect(part, {name: weights[name] for name in names[0]}, process_group)
            self._parts.append(_Part(Executor(part, dtype, device, links(found), process_group, timeout_s), *names))

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
        transfers = self._move(weights, {}) if self._engine is None else self._engine.receive(lambda live: self._move(weights, live))
        compared = [compare(part.executor, f"refit {policy_version}") for part in self._parts]
        if self._engine is not None:
            self._engine.accept(policy_version)
        return RefitReceipt(
            policy_version,
            sum(found.nbytes for found in compared),
            time.perf_counter() - start,
            tuple(seconds for transfer in transfers for seconds in transfer.round_seconds),
            self._digests(compared),
            self._nbytes_by_format(compared) if len(compared) > 1 else (),
        )

    def _move(self, weights: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> list[Transfer]:
        return [
            part.executor({name: weights[name] for name in part.source}, {name: live[name] for name in part.destination})
            for part in self._parts
        ]

    def _nbytes_by_format(self, compared: Sequence[Compared]) -> tuple[tuple[str, int], ...]:
        names = [str(part.executor.dtype).removeprefix("torch.") for part in self._parts]
        return tuple((name, found.nbytes) for name, found in zip(names, compared, strict=True))

    def _digests(self, compared: Sequence[Compared]) -> tuple[tuple[str, str], ...]:
        """Of each group of tensors, in all its number formats."""
        totals: Counter[str] = Counter()
        for part, found in zip(self._parts, compared, strict=True):
            for tensor, index in part.executor.tensors.items():
                totals[tensor_group(tensor)] += found.digests[index]
        return tuple((group, as_text(totals[group])) for group in sorted(totals))


def tensor_group(tensor: str) -> str:
    """The group whose digest a receipt gives: a layer, or a tensor outside of layers.

    >>> tensor_group("model.layers.3.mlp.up_proj.weight")
    'model.layers.3'
    """
    parts = tensor.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else tensor


def _check_sides(plans: Sequence[tuple[torch.dtype, Plan]], rank: int, weights: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
    check_parameters("policy", rank, _joined(plan.source.parameters.get(rank, {}) for _, plan in plans), weights)
    check_parameters("engine", rank, _joined(plan.destination.parameters.get(rank, {}) for _, plan in plans), live)
    for dtype, plan in plans:
        for name in plan.destination.parameters.get(rank, ()):
            if name in live and live[name].dtype != dtype:
                raise RefitError(f"rank {rank}: engine parameter {name} is {live[name].dtype}, planned as {dtype}.")


def _joined(parts: Iterable[Mapping[str, Box]]) -> dict[str, Box]:
    return {name: size for part in parts for name, size in part.items()}


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
