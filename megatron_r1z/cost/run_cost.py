"""The cost of a run: memory, refit and seconds put together, and whether it fits its cluster."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from megatron_r1z.config import TrainConfig
from megatron_r1z.cost.activations import BatchSize
from megatron_r1z.cost.assumptions import DEFAULT, Assumptions
from megatron_r1z.cost.cluster import GIB, Cluster
from megatron_r1z.cost.compute import sample_flops
from megatron_r1z.cost.critic import CriticMemory, flops_shape
from megatron_r1z.cost.engine_memory import EngineMemory
from megatron_r1z.cost.formats import FP32_BYTES, engine_format, fp8_share, policy_format
from megatron_r1z.cost.lengths import Lengths
from megatron_r1z.cost.memory import RankMemory, rank_memory
from megatron_r1z.cost.policy_memory import PolicyMemory
from megatron_r1z.cost.refit_report import Machine, PlanReport, add_up
from megatron_r1z.cost.rollout_time import Rollout, RolloutTime
from megatron_r1z.cost.update_time import Passes, UpdateTime
from megatron_r1z.errors import ConfigError
from megatron_r1z.layout.blocks import POLICY_VOCAB_MULTIPLE, Layout, engine_layout, megatron_layout
from megatron_r1z.layout.families import ModelShape
from megatron_r1z.layout.fp8 import by_format, fp8_matrices
from megatron_r1z.layout.plan import DEFAULT_RANKS_PER_NODE, DEFAULT_ROUND_BYTES, LIVE_ROUNDS, Edge, make_plan
from megatron_r1z.speed import CPU_CACHE_BYTES, GPU_MACHINE, EngineSpeed, batched_tokens, engine_speed

Memory = TypeVar("Memory", PolicyMemory, CriticMemory)

MAX_BUFFER_BYTES = 2 * LIVE_ROUNDS * DEFAULT_ROUND_BYTES
"""Refit buffers are never larger (`RankPlan.buffer_bytes`)."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of the phases of an iteration."""

    rollout: Rollout
    logprobs: Passes | None
    """None: an iteration of one optimizer step needs no old log-probs."""
    passes: Passes
    """Forward and backward of all steps."""
    gradient_sum: float
    optimizer: float
    critic: float
    """Its values, passes, gradient sum and optimizer; 0 without one."""
    refit: float

    @property
    def update(self) -> float:
        """Passes, gradient sum and optimizer of all steps of the policy."""
        return self.passes.total + self.gradient_sum + self.optimizer

    @property
    def total(self) -> float:
        """All phases, one after the other."""
        return self.rollout.total + (self.logprobs.total if self.logprobs else 0.0) + self.update + self.critic + self.refit


@dataclass(frozen=True)
class RefitCost:
    """A refit's plans: one, or in FP8 those of what is not, of the matrices, and of their scales, one after the other."""

    parts: tuple[PlanReport, ...]

    def nbytes(self, edge: Edge) -> int:
        """Bytes that cross one kind of edge, over all ranks."""
        return sum(part.edges[edge].total for part in self.parts)

    @property
    def num_rounds(self) -> int:
        """Of all parts."""
        return sum(part.num_rounds for part in self.parts)

    @property
    def buffer_bytes(self) -> int:
        """Of the rank that needs most; every part has its own."""
        return sum(part.buffer_bytes for part in self.parts)

    @property
    def seconds(self) -> float:
        """As estimated, digests apart."""
        return sum(part.estimated_s for part in self.parts)


@dataclass(frozen=True)
class RunCost:
    """What a run costs on each rank.

    Raises:
        ConfigError: the model cannot be split as the configuration says, when a figure is asked for.
    """

    config: TrainConfig
    shape: ModelShape
    lengths: Lengths
    cluster: Cluster | None = None
    assumptions: Assumptions = DEFAULT
    plans_refit: bool = True
    """Whether the refit is planned box by box; without, its buffers are their bound and its seconds a rough estimate."""

    # --- memory ---

    @cached_property
    def policy(self) -> PolicyMemory:
        """Memory of the policy, for a pipeline that is full and the longest sample, which travels alone where it exceeds the budget."""
        return self._memory_of(PolicyMemory)

    @cached_property
    def critic(self) -> CriticMemory | None:
        """Memory of the critic in the same micro-batches; None without one."""
        return self._memory_of(CriticMemory) if self.config.algorithm.has_critic else None

    def _memory_of(self, kind: type[Memory]) -> Memory:
        config = self.config
        together = max(config.parallel.micro_batch_tokens, config.max_model_tokens)
        tokens = math.ceil(together / config.parallel.context_parallel_size)
        batch = BatchSize(tokens, responses=tokens, micro_batches=config.parallel.num_chunks)
        return kind(self.shape, config.parallel, config.optimizer, policy_format(config.precision), batch)

    @cached_property
    def engine(self) -> EngineMemory:
        """Memory of the engine; without a cluster there is no memory to fill, and `auto` is what a CPU gets."""
        asked = self.config.rollout.kv_cache_bytes
        if asked != "auto":
            return self._engine(asked)
        return self._engine(CPU_CACHE_BYTES if self.cluster is None else self.cache_beside(round(self.cluster.gpu.memory_gib * GIB)))

    def cache_beside(self, device_bytes: int, outside_bytes: int = 0) -> int:
        """The key-value cache that the fullest moment of an iteration leaves of a device.

        Args:
            device_bytes: of its memory.
            outside_bytes: of them, what no tensor of ours takes; where it is more than what is reserved for that, it counts instead.
        """
        reserved = max(int(self.assumptions.reserved_gib * GIB), outside_bytes)
        engine = self._engine(0)
        ranks = rank_memory(self.policy, self.critic, engine, self.fp8_share, self._most_buffer_bytes, self._graph_bytes, reserved)
        return engine.cache_for(device_bytes - max(rank.peak for rank in ranks))

    def _engine(self, cache_bytes: int) -> EngineMemory:
        form = engine_format(self.config.precision, self.fp8_share)
        tokens = batched_tokens(self.config.rollout, self.cluster.gpu.memory_gib if self.cluster is not None else math.inf)
        return EngineMemory(self.shape, self.config.rollout, form, self.config.max_model_tokens, cache_bytes, tokens)

    @property
    def engine_speed(self) -> EngineSpeed:
        """What is on in the engine."""
        return engine_speed(self.config.rollout, self.config.max_model_tokens, GPU_MACHINE)

    @property
    def _graph_bytes(self) -> int:
        return int(self.assumptions.cuda_graphs_gib * GIB) if self.engine_speed.cuda_graphs else 0

    @property
    def _most_buffer_bytes(self) -> int:
        return MAX_BUFFER_BYTES * (3 if self.config.precision.engine == "fp8" else 1)

    @cached_property
    def fp8_share(self) -> float:
        """Share of the layers' matrices that an FP8 engine gets in FP8; 0 where the engine is not in FP8."""
        config = self.config
        if config.precision.engine != "fp8":
            return 0.0
        bf16_layers = config.precision.bf16_layers(self.shape.num_layers)
        return fp8_share(self.shape, config.parallel.tensor_parallel_size, config.rollout.tensor_parallel_size, bf16_layers)

    @cached_property
    def ranks(self) -> tuple[RankMemory, ...]:
        """Memory of a rank of each pipeline stage."""
        buffers = self.refit.buffer_bytes if self.plans_refit else self._most_buffer_bytes
        reserved = int(self.assumptions.reserved_gib * GIB)
        return rank_memory(self.policy, self.critic, self.engine, self.fp8_share, buffers, self._graph_bytes, reserved)

    @property
    def fullest(self) -> RankMemory:
        """The stage that needs most."""
        return max(self.ranks, key=lambda rank: rank.peak)

    @property
    def host_bytes(self) -> int:
        """Of a node's memory, for optimizer state and reference model."""
        per_node = self.cluster.gpus_per_node if self.cluster else DEFAULT_RANKS_PER_NODE
        return max(self._rank_host_bytes(stage) for stage in range(self.policy.topology.pp)) * per_node

    @property
    def host_uses(self) -> str:
        """The settings that put something there."""
        uses = {"optimizer.offload_to_host": self.config.optimizer.offload_to_host, "algorithm.kl_coef": self.config.algorithm.kl_coef}
        return " with ".join(name for name, is_on in uses.items() if is_on)

    def _rank_host_bytes(self, stage: int) -> int:
        reference = self.policy.weights(stage) if self.config.algorithm.kl_coef else 0
        return self.policy.host_state(stage) + reference + (self.critic.host_state(stage) if self.critic else 0)

    # --- refit ---

    @cached_property
    def refit(self) -> RefitCost:
        """The hand-over of weights, planned."""
        config, parallel = self.config, self.config.parallel
        source = megatron_layout(self.shape, parallel.topology, POLICY_VOCAB_MULTIPLE["te"], "te")
        destination = engine_layout(self.shape, parallel.num_ranks, config.rollout.tensor_parallel_size)
        matrices: frozenset[str] = frozenset()
        if self.engine.form.is_fp8:
            matrices = fp8_matrices(self.shape, (source, destination), config.precision.bf16_layers(self.shape.num_layers))
        sizes = (self.engine.form.itemsize, 1, FP32_BYTES)
        parts = zip(by_format(source, matrices), by_format(destination, matrices), sizes, strict=True)
        return RefitCost(tuple(self._planned(*part) for part in parts if part[0].blocks))

    def _planned(self, source: Layout, destination: Layout, itemsize: int) -> PlanReport:
        machine = self._machine
        plan = make_plan(source, destination, itemsize, machine.round_bytes, machine.ranks_per_node)
        return add_up(self.config.model.path, source.name, destination.name, plan, machine, 0.0)

    @property
    def _machine(self) -> Machine:
        if self.cluster is None:
            return Machine()
        gpu, assumed = self.cluster.gpu, self.assumptions
        return Machine(
            ranks_per_node=self.cluster.gpus_per_node,
            local_gbs=gpu.hbm_gbs / 2 * assumed.memory_share,  # read and written
            node_gbs=self.cluster.node_gbs * assumed.link_share,
            network_gbs=self.cluster.network_gbs * assumed.link_share,
        )

    # --- time ---

    @property
    def steps(self) -> int:
        """Optimizer steps of an iteration."""
        return self.config.rollout.samples_per_iteration // self.config.algorithm.train_batch_size

    @property
    def logprob_passes(self) -> int:
        """Over all samples of an iteration: of the old policy, unless a single step needs none, and those for a KL term."""
        algorithm = self.config.algorithm
        return (self.steps > 1) + algorithm.kl_is_in("loss") + 2 * algorithm.kl_is_in("reward")

    @cached_property
    def update_time(self) -> UpdateTime:
        """Seconds of one optimizer step, by part."""
        return UpdateTime(self.config, self.shape, self.lengths, self.policy, self._cluster, self.assumptions)

    @cached_property
    def time(self) -> StepTime:
        """Seconds of an iteration; needs a cluster."""
        rollout = RolloutTime(self.config, self.shape, self.lengths, self.engine, self._cluster, self.assumptions)
        update = self.update_time
        return StepTime(
            rollout=rollout.rollout(),
            logprobs=update.logprobs().times(self.steps * self.logprob_passes) if self.logprob_passes else None,
            passes=update.passes().times(self.steps),
            gradient_sum=update.gradient_sum() * self.steps,
            optimizer=update.optimizer() * self.steps,
            critic=self._critic_seconds,
            refit=self._refit_seconds,
        )

    @property
    def _critic_seconds(self) -> float:
        """A pass for the values of all samples, then as many steps as the policy takes."""
        if self.critic is None:
            return 0.0
        each = UpdateTime(self.config, flops_shape(self.shape), self.lengths, self.critic, self._cluster, self.assumptions)
        return self.steps * (each.logprobs().total + each.passes().total + each.gradient_sum() + each.optimizer())

    @property
    def _refit_seconds(self) -> float:
        """Copies and transfers, and the digests of both sides, which read every byte once each."""
        digests = 2 * self.engine.weights / (self._cluster.gpu.hbm_gbs * 1e9 * self.assumptions.memory_share)
        return digests + (self.refit.seconds if self.plans_refit else self._rough_refit)

    @property
    def _rough_refit(self) -> float:
        """What a rank holds itself, what its node holds of the rest, and what comes over the network, the last two at once.

        Layers of other pipeline stages are never at hand, and slices of another tensor-parallel size are not on some rank.
        """
        topology, machine = self.policy.topology, self._machine
        own = 1 / topology.pp if topology.tp in (1, self.engine.tp) else 0.0
        stages_in_node = max(1.0, machine.ranks_per_node * topology.pp / topology.num_ranks)
        in_node = min(1.0, stages_in_node / topology.pp)
        travelling = max((in_node - own) / machine.node_gbs, (1 - in_node) / machine.network_gbs)
        return self.engine.weights * (own / machine.local_gbs + travelling) / 1e9

    @property
    def _cluster(self) -> Cluster:
        if self.cluster is None:
            raise ConfigError("seconds need a cluster; name one by --cluster.")
        return self.cluster

    @property
    def tokens(self) -> float:
        """Tokens of an iteration, prompts included."""
        return self.config.rollout.samples_per_iteration * self.lengths.total

    @property
    def tokens_per_gpu_second(self) -> float:
        """Of the whole iteration."""
        return self.tokens / self.time.total / self.config.parallel.num_ranks

    @property
    def mfu(self) -> float:
        """The model's own arithmetic in the update over the peak of the policy's format."""
        model = sample_flops(self.shape, self.lengths).model(self.shape.num_layers) * self.config.rollout.samples_per_iteration
        peak = policy_format(self.config.precision).matrix_tflops(self._cluster.gpu) * 1e12 * self.config.parallel.num_ranks
        return model / peak / self.time.update

    # --- does it fit ---

    def shortfall(self) -> str | None:
        """Why it does not fit the cluster, in words with numbers; None where it does."""
        cluster, fullest = self._cluster, self.fullest
        phase, limit = fullest.fullest, cluster.gpu.memory_gib
        if self.config.parallel.num_ranks > cluster.num_gpus:
            gpus = f"{cluster.nodes} x {cluster.gpus_per_node} GPUs"
            return f"parallel.num_ranks is {self.config.parallel.num_ranks}, but the cluster has {gpus}"
        if fullest.peak > limit * GIB:
            largest = fullest.largest(phase)
            return (
                f"a rank of pipeline stage {fullest.stage} needs {fullest.peak / GIB:.1f} GiB in the {phase.value} phase, the largest part "
                f"{largest.nbytes / GIB:.1f} GiB for {largest.name}, and a {cluster.gpu.name} has {limit:.1f}"
            )
        if self.host_bytes > cluster.host_memory_gib * GIB:
            needed = f"{self.host_bytes / GIB:.0f} GiB of a node's memory"
            return f"{self.host_uses} needs {needed}, which has {cluster.host_memory_gib:.0f}"
        return None
