"""Seconds of the log-prob pass, of forward and backward passes, and of the optimizer.

A step of m micro-batches on p pipeline stages takes m + (p - 1) / v turns of the slowest stage (v model chunks each; Narayanan et al.,
arXiv 2104.04473, section 2.2). A turn is arithmetic at an assumed share of the peak, the collectives of tensor parallelism, and the
exchange with the next stage, one after the other but for what `speed.py` has overlap: an exchange hides behind the arithmetic of a chunk,
the sum of gradients behind the last backward pass of a step, and the fetching of weights behind the first forward pass of the next step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megatron_r1z.config import TrainConfig
from megatron_r1z.cost.assumptions import Assumptions
from megatron_r1z.cost.cluster import Cluster
from megatron_r1z.cost.compute import SampleFlops, Work, sample_flops
from megatron_r1z.cost.formats import FP32_BYTES, policy_format
from megatron_r1z.cost.lengths import Lengths
from megatron_r1z.cost.policy_memory import PolicyMemory
from megatron_r1z.layout.families import ModelShape
from megatron_r1z.layout.topology import Topology

STEP_BYTES = 7 * FP32_BYTES
"""Read and written for one parameter by an optimizer step besides the weight: gradient, master weight and two moments, all but the first
twice."""

BACKWARD_SHARE = 2 / 3
"""Of the arithmetic of a micro-batch."""


class Turn(NamedTuple):
    """Seconds of one micro-batch on one pipeline stage."""

    compute: float
    tensor_parallel: float
    context_parallel: float
    exchange: float

    @property
    def total(self) -> float:
        """One after the other."""
        return sum(self)


class Passes(NamedTuple):
    """Seconds of one step's passes."""

    compute: float
    tensor_parallel: float
    context_parallel: float
    exchange: float
    bubble: float
    """Waiting for the pipeline to fill and drain."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)

    def times(self, count: int) -> Passes:
        """So many of these."""
        return Passes(*(seconds * count for seconds in self))


class _Kind(NamedTuple):
    """What a pass does in one layer and in the head, for one sample."""

    layer: Work
    head: Work
    collectives: int
    """How often a rank's hidden states cross its link."""
    rings: int
    """How often its keys and values go round the context-parallel ranks."""
    is_backward: bool


@dataclass(frozen=True)
class UpdateTime:
    """Seconds of what the policy does in one optimizer step."""

    config: TrainConfig
    shape: ModelShape
    lengths: Lengths
    memory: PolicyMemory
    """For the parameters of each stage."""
    cluster: Cluster
    assumptions: Assumptions

    @property
    def topology(self) -> Topology:
        """Of the policy."""
        return self.config.parallel.topology

    @cached_property
    def _flops(self) -> SampleFlops:
        return sample_flops(self.shape, self.lengths)

    @property
    def _itemsize(self) -> int:
        return policy_format(self.config.precision).itemsize

    @property
    def samples(self) -> float:
        """Samples of one step on one data-parallel rank; all of them, although those without advantage are left out."""
        return self.config.algorithm.train_batch_size / self.topology.dp

    @property
    def micro_batches(self) -> int:
        """Of one step on one data-parallel rank, packed to the budget."""
        parallel = self.config.parallel
        multiple = parallel.pipeline_parallel_size if parallel.virtual_pipeline_size > 1 else 1
        needed = self.samples * self.lengths.total / max(parallel.micro_batch_tokens, self.lengths.total)
        return math.ceil(math.ceil(needed) / multiple) * multiple

    def logprobs(self) -> Passes:
        """The pass that takes old log-probs of one step's samples."""
        return self._passes(_Kind(self._flops.layer, self._flops.head, collectives=4, rings=1, is_backward=False))

    def passes(self) -> Passes:
        """Forward and backward."""
        parallel, flops = self.config.parallel, self._flops
        is_full = parallel.recompute == "full"
        # 2 all-reduces forward and 2 backward, each two crossings; under sequence parallelism the backward pass gathers 2 inputs again
        collectives = 8 + 2 * parallel.sequence_parallel + 4 * is_full
        # keys and values forward, these and their gradients backward
        kind = _Kind(flops.trained_layer(parallel.recompute), flops.trained_head, collectives, rings=3 + is_full, is_backward=True)
        return self._passes(kind)

    def _passes(self, kind: _Kind) -> Passes:
        turns = [self._turn(stage, kind) for stage in range(self.topology.pp)]
        slowest = max(turns, key=lambda turn: turn.total)
        bubble = slowest.total * (self.topology.pp - 1) / self.topology.vpp
        shown = slowest
        if self.memory.speed[0].overlap_p2p_comm:  # while the pipeline fills and drains there is nothing to hide behind
            shown = slowest._replace(exchange=max(0.0, slowest.exchange - slowest.compute))
        compute, tensor, context, exchange = (seconds * self.micro_batches for seconds in shown)
        return Passes(compute, tensor, context, exchange, bubble)

    def _turn(self, stage: int, kind: _Kind) -> Turn:
        topology, cluster = self.topology, self.cluster
        share = self.samples / self.micro_batches / topology.cp  # of a rank
        layers = sum(len(chunk.layers) for chunk in topology.chunks(self.shape.num_layers, stage))
        work = kind.layer.times(layers).plus(kind.head.times(stage == topology.pp - 1)).times(share / topology.tp)
        hidden = share * self.lengths.total * self.shape.hidden_size * self._itemsize
        crossed = layers * kind.collectives * hidden * (topology.tp - 1) / topology.tp
        keys = 2 * share * self.lengths.total * self.shape.num_kv_heads * self.shape.head_dim / topology.tp * self._itemsize
        ring = layers * kind.rings * keys * (topology.cp - 1)
        sent = hidden / (topology.tp if self.config.parallel.sequence_parallel else 1)
        exchange = 0.0
        if topology.pp > 1:  # every chunk sends on and, backwards, back; what is received travels at the same time
            distance = topology.tp * topology.cp * topology.dp
            exchange = topology.vpp * (1 + kind.is_backward) * sent / self._speed(cluster.point_gbs(distance))
        return Turn(
            work.seconds(policy_format(self.config.precision), cluster.gpu, self.assumptions.compute_share),
            crossed / self._speed(cluster.group_gbs(topology.tp)),
            ring / self._speed(cluster.group_gbs(topology.cp, stride=topology.tp)),
            exchange,
        )

    def _speed(self, gbs: float) -> float:
        """Bytes per second of a link."""
        return gbs * 1e9 * self.assumptions.link_share

    def gradient_sum(self) -> float:
        """What a step waits for of it, on average over the steps of an iteration, whose last step hides no weights: a refit follows."""
        there, back = self._ways()
        speed, turn = self.memory.speed[1], self.passes().compute / self.micro_batches
        if not self.config.optimizer.distributed:
            there, back = there + back, 0.0  # one all-reduce
        if speed.overlap_grad_reduce:
            there = max(0.0, there - turn * BACKWARD_SHARE)
        steps = max(1, self.config.rollout.samples_per_iteration // self.config.algorithm.train_batch_size)
        hidden = min(back, turn * (1 - BACKWARD_SHARE)) * (steps - 1) / steps if speed.overlap_param_gather else 0.0
        return there + back - hidden

    def whole_gradient_sum(self) -> float:
        """All of it: gradients over data-parallel and context-parallel ranks, and sums or stepped weights back."""
        return sum(self._ways())

    def _ways(self) -> tuple[float, float]:
        """Float32 gradients there; back comes the other half of an all-reduce or, with the distributed optimizer, new weights."""
        topology, parameters = self.topology, max(item.total for item in self.memory.parameters)
        back = self._itemsize if self.config.optimizer.distributed else FP32_BYTES
        copies = topology.dp * topology.cp
        crossing = parameters * (copies - 1) / copies / self._speed(self.cluster.group_gbs(copies, stride=topology.tp))
        return crossing * FP32_BYTES, crossing * back

    def optimizer(self) -> float:
        """AdamW on the device or, offloaded, the way to the host, the step there and the way back."""
        stepped = max(self.memory.stepped_parameters(stage) for stage in range(self.topology.pp))
        if self.config.optimizer.offload_to_host:
            moved = stepped * (FP32_BYTES + self._itemsize) / self._speed(self.cluster.host_gbs)
            return moved + stepped * self.cluster.gpus_per_node * self.assumptions.host_optimizer_ns * 1e-9
        return stepped * (STEP_BYTES + self._itemsize) / (self.cluster.gpu.hbm_gbs * 1e9 * self.assumptions.memory_share)
