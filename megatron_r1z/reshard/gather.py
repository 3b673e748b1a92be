"""The other way to hand weights over: whole checkpoint tensors on every rank, which vLLM's own loader cuts and fuses.

It knows nothing of the engine's layout and moves every byte to every rank, so it is slow and safe: what other frameworks do, the
reference of `benchmarks/refit.py`, and the way out (`rollout.refit: gathered`) should an engine keep weights in a form that the planned way
does not know.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1z import ranks
from megatron_r1z.layout.blocks import Block, Layout
from megatron_r1z.layout.families import ModelShape, TensorSpec, hf_tensors
from megatron_r1z.layout.plan import make_plan
from megatron_r1z.protocols import Engine
from megatron_r1z.reshard.execute import DEFAULT_TIMEOUT_S
from megatron_r1z.reshard.once import execute
from megatron_r1z.reshard.refit import tensor_group
from megatron_r1z.types import RefitReceipt


class WholeTensors:
    """The policy's weights by checkpoint name; all ranks iterate at the same time, and each pass gathers them anew, a layer at a time.

    Args:
        shape: shape of the model.
        source: layout of the policy.
        rank: this rank.
        weights: returns this rank's parameters by the names of `source`.
        dtype: number format of what is yielded.
        timeout_s: limit of each wait.
    """

    def __init__(
        self,
        shape: ModelShape,
        source: Layout,
        rank: int,
        weights: Callable[[], Mapping[str, Tensor]],
        dtype: torch.dtype,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self.specs = hf_tensors(shape)
        self.dtype = dtype
        self._weights = weights
        self._rank = rank
        self._timeout_s = timeout_s
        everyone, per_node = sorted(source.parameters), ranks.per_node()
        self._groups = [list(group) for _, group in groupby(self.specs, key=lambda spec: tensor_group(spec.name))]
        plans = (make_plan(source, _whole(group, everyone), dtype.itemsize, ranks_per_node=per_node) for group in self._groups)
        self._parts = [plan.of_rank(rank) for plan in plans]

    @property
    def nbytes(self) -> int:
        """Bytes that one rank gets."""
        return sum(spec.numel for spec in self.specs) * self.dtype.itemsize

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        weights = self._weights()
        device = next(iter(weights.values())).device
        for group, part in zip(self._groups, self._parts, strict=True):
            tensors = {spec.name: torch.empty(spec.shape, dtype=self.dtype, device=device) for spec in group}
            execute(part, weights, tensors, dtype=self.dtype, timeout_s=self._timeout_s)
            yield from tensors.items()


class GatheredRefit:
    """Hands weights over as whole tensors; takes the place of `Refit`. The receipt has no digests: the engine cannot be read back."""

    def __init__(self, tensors: WholeTensors, engine: Engine) -> None:
        self._tensors = tensors
        self._engine = engine

    def __call__(self, policy_version: int) -> RefitReceipt:
        """Hand over the current weights as `policy_version`; all ranks call this.

        Raises:
            RefitError: a transfer failed or timed out.
        """
        start = time.perf_counter()
        self._engine.receive_whole(self._tensors)
        self._engine.accept(policy_version)
        nbytes = self._tensors.nbytes * (dist.get_world_size() if dist.is_initialized() else 1)
        return RefitReceipt(policy_version, nbytes, time.perf_counter() - start, (), ())


def _whole(specs: Sequence[TensorSpec], ranks: Sequence[int]) -> Layout:
    """Every tensor on every rank."""
    blocks = [
        Block(spec.name, (0,) * len(spec.shape), spec.shape, rank, spec.name, (0,) * len(spec.shape)) for rank in ranks for spec in specs
    ]
    shapes = {spec.name: spec.shape for spec in specs}
    return Layout("whole tensors", tuple(blocks), dict.fromkeys(ranks, shapes))
