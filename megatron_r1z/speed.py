"""What is on of the settings that make a run faster, and why not: the one place that decides what `auto` means.

Standard library and configuration only: `plan` and `doctor` ask where there is no torch. That an option is possible follows from the
sources of megatron-core 0.16.1 and 0.19, Transformer Engine 2.20 and vLLM 0.33, named beside each.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_r1z.config import OptimizerConfig, ParallelConfig, RolloutConfig, Toggle
from megatron_r1z.errors import ConfigError

CPU_CACHE_BYTES = 256 << 20
"""The key-value cache where there is no GPU whose memory it could fill."""
CPU_BATCHED_TOKENS = 32768
SMALL_GIB = 70.0
BATCHED_TOKENS, SMALL_BATCHED_TOKENS = 16384, 8192
"""What vLLM computes in one step at most, on a GPU of `SMALL_GIB` or more and on a smaller one (`EngineArgs`, usage `LLM_CLASS`)."""

CONDITIONS = {
    "overlap_p2p_comm": "with parallel.virtual_pipeline_size above 1",
    "overlap_grad_reduce": "with several data-parallel ranks",
    "overlap_param_gather": "with optimizer.distributed and several data-parallel ranks",
}
"""What a configuration must have besides, for `auto` to turn it on."""


@dataclass(frozen=True)
class Machine:
    """What decides besides the configuration."""

    has_gpu: bool
    has_transformer_engine: bool
    """Its layers can be built, so there is a GPU too."""


GPU_MACHINE = Machine(has_gpu=True, has_transformer_engine=True)
"""What `plan` takes for granted."""


@dataclass(frozen=True)
class Choice:
    """Whether an option is on."""

    is_on: bool
    reason: str
    """Of its being on or off, as the rest of a sentence."""

    def __bool__(self) -> bool:
        return self.is_on


@dataclass(frozen=True)
class ModelSpeed:
    """Of building a model."""

    overlap_p2p_comm: Choice
    swiglu_fusion: Choice


@dataclass(frozen=True)
class GradientSpeed:
    """Of its gradients and of its optimizer."""

    overlap_grad_reduce: Choice
    overlap_param_gather: Choice
    gradient_accumulation_fusion: Choice


@dataclass(frozen=True)
class EngineSpeed:
    """Of the engine."""

    cuda_graphs: Choice
    prefix_caching: Choice
    max_num_batched_tokens: int | None
    """None: vLLM chooses."""


def model_speed(parallel: ParallelConfig, machine: Machine) -> ModelSpeed:
    """What a model is built with.

    Raises:
        ConfigError: a setting is true and cannot be.
    """
    no_gpu = None if machine.has_gpu else "there is no GPU"
    return ModelSpeed(
        # `schedules.forward_backward_pipelining_without_interleaving` refuses it
        overlap_p2p_comm=_choose(
            "overlap_p2p_comm",
            parallel.speed.overlap_p2p_comm,
            impossible="parallel.virtual_pipeline_size is 1" if parallel.virtual_pipeline_size == 1 else None,
            useless=no_gpu,
        ),
        # `fusions.fused_bias_swiglu` compiles with torch.compile
        swiglu_fusion=_choose("swiglu_fusion", parallel.speed.swiglu_fusion, useless=no_gpu),
    )


def gradient_speed(parallel: ParallelConfig, optimizer: OptimizerConfig, machine: Machine) -> GradientSpeed:
    """What gradients are summed and weights are fetched with.

    Raises:
        ConfigError: a setting is true and cannot be.
    """
    no_gpu = None if machine.has_gpu else "there is no GPU"
    copies = parallel.num_ranks // (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
    alone = "no other rank has the same weights" if copies == 1 else None
    reduce = _choose("overlap_grad_reduce", parallel.speed.overlap_grad_reduce, useless=no_gpu or alone)
    obstacle = None
    if not optimizer.distributed:
        obstacle = "optimizer.distributed is false"
    elif not reduce:  # buckets are made for it (`DistributedDataParallel.__init__`)
        obstacle = "parallel.speed.overlap_grad_reduce is off"
    return GradientSpeed(
        overlap_grad_reduce=reduce,
        overlap_param_gather=_choose(
            "overlap_param_gather", parallel.speed.overlap_param_gather, impossible=obstacle, useless=no_gpu or alone
        ),
        # `fuse_wgrad_accumulation` of Transformer Engine's modules, which needs no apex
        gradient_accumulation_fusion=_choose(
            "gradient_accumulation_fusion",
            parallel.speed.gradient_accumulation_fusion,
            impossible=None if machine.has_transformer_engine else "there are no layers of Transformer Engine, which do it",
        ),
    )


def engine_speed(rollout: RolloutConfig, max_model_tokens: int, machine: Machine) -> EngineSpeed:
    """What an engine is built with, whose sequences have at most `max_model_tokens`.

    Raises:
        ConfigError: a setting asks for what cannot be.
    """
    if rollout.enforce_eager is False and not machine.has_gpu:
        raise ConfigError("rollout.enforce_eager is false, but CUDA graphs need a GPU and there is none; set it to auto or true.")
    eager = rollout.enforce_eager is True or not machine.has_gpu
    why = "rollout.enforce_eager is true" if machine.has_gpu else "there is no GPU"
    shares = rollout.enable_prefix_caching is not False
    return EngineSpeed(
        cuda_graphs=Choice(not eager, why if eager else "a decode step is one launch"),
        prefix_caching=Choice(shares, "a group shares its prompt" if shares else "rollout.enable_prefix_caching is false"),
        max_num_batched_tokens=_batched_tokens(rollout, max_model_tokens, machine),
    )


def batched_tokens(rollout: RolloutConfig, memory_gib: float) -> int:
    """What a GPU of so much memory computes in one step at most."""
    if rollout.max_num_batched_tokens != "auto":
        return rollout.max_num_batched_tokens
    return SMALL_BATCHED_TOKENS if memory_gib < SMALL_GIB else BATCHED_TOKENS


def _batched_tokens(rollout: RolloutConfig, max_model_tokens: int, machine: Machine) -> int | None:
    """On a CPU a prompt is computed in one piece: chunked prefill and seeds of requests do not go together there."""
    asked = rollout.max_num_batched_tokens
    if machine.has_gpu:
        return None if asked == "auto" else asked
    if asked == "auto":
        return max(max_model_tokens, CPU_BATCHED_TOKENS)
    if asked < max_model_tokens:
        raise ConfigError(
            f"rollout.max_num_batched_tokens is {asked}, but without a GPU a sequence of {max_model_tokens} tokens is computed in one "
            f"piece; raise it to at least {max_model_tokens}, or set it to auto."
        )
    return asked


def choices(*records: ModelSpeed | GradientSpeed | EngineSpeed) -> dict[str, Choice]:
    """The options of some records by their names."""
    pairs = [(item.name, getattr(record, item.name)) for record in records for item in fields(record)]
    return {name: value for name, value in pairs if isinstance(value, Choice)}


def _choose(name: str, asked: Toggle, *, impossible: str | None = None, useless: str | None = None) -> Choice:
    """`auto` is on unless something is in the way; what is useless can be asked for all the same."""
    if asked is False:
        return Choice(False, f"parallel.speed.{name} is false")
    if impossible is not None and asked is True:
        raise ConfigError(f"parallel.speed.{name} is true, but {impossible}; set it to auto or false.")
    hindrance = impossible or useless
    if hindrance is not None and asked == "auto":
        return Choice(False, hindrance)
    return Choice(True, "possible" if asked == "auto" else f"parallel.speed.{name} is true")
