"""What `plan` refuses before it computes anything: what `train` would refuse, as far as shape and cluster tell."""

from __future__ import annotations

from megatron_r1z.config import TrainConfig
from megatron_r1z.config.model_checks import check_dense, check_layers, check_lengths
from megatron_r1z.cost.cluster import GIB, Cluster
from megatron_r1z.cost.engine_memory import EngineMemory
from megatron_r1z.cost.formats import fp8_share
from megatron_r1z.errors import ConfigError
from megatron_r1z.fp8.recipes import GRADIENT_FREE_CHECKPOINTS, NEEDS, Facts, check_policy
from megatron_r1z.layout.blocks import engine_layout, megatron_layout
from megatron_r1z.layout.families import ModelShape
from megatron_r1z.layout.fp8 import BLOCK
from megatron_r1z.layout.topology import Topology


def check_shape(config: TrainConfig, shape: ModelShape, cluster: Cluster | None = None) -> None:
    """Refuse what the model cannot be: what `train` refuses before it starts, as far as shape and cluster tell.

    Raises:
        ConfigError: with the numbers.
    """
    check_dense(config.model.path, shape)
    check_layers(config.parallel, shape.num_layers)
    topology = config.parallel.topology
    one_copy = Topology(topology.tp * topology.pp, topology.tp, topology.pp, topology.vpp, chunk_layers=topology.chunk_layers)
    megatron_layout(shape, one_copy, 1)
    engine_layout(shape, config.rollout.tensor_parallel_size, config.rollout.tensor_parallel_size)
    check_lengths(config, shape)
    check_precision(config, shape, cluster)


def check_precision(config: TrainConfig, shape: ModelShape, cluster: Cluster | None = None) -> None:
    """Refuse FP8 as preflight does, for a machine of which the cluster file tells the GPU, and which has the libraries that are needed.

    Raises:
        ConfigError: with the numbers.
    """
    if cluster is not None and "fp8" in (config.precision.policy, config.precision.engine) and not cluster.gpu.fp8_tflops:
        raise ConfigError(f"a {cluster.gpu.name} has no FP8; set precision.policy=bf16 and precision.engine=bf16.")
    parallel, rollout = config.parallel, config.rollout
    if config.precision.engine == "fp8" and not fp8_share(shape, parallel.tensor_parallel_size, rollout.tensor_parallel_size):
        raise ConfigError(
            f"precision.engine is fp8, but under parallel.tensor_parallel_size {parallel.tensor_parallel_size} and "
            f"rollout.tensor_parallel_size {rollout.tensor_parallel_size} no matrix can be cut into blocks of {BLOCK} x {BLOCK}; set "
            "precision.engine=bf16."
        )
    if config.precision.policy != "fp8":
        return
    fp8, needs = config.precision.fp8, NEEDS[config.precision.fp8.recipe]
    capability = cluster.gpu.compute_capability if cluster is not None else needs.capability
    facts = Facts(capability, needs.cuda, GRADIENT_FREE_CHECKPOINTS)
    check_policy(fp8, shape, config.parallel, facts)


def check_engine_room(engine: EngineMemory, free_bytes: int) -> None:
    """Refuse an engine whose weights and cache alone do not fit beside what is on the device already.

    Args:
        engine: the engine of one rank.
        free_bytes: of its device, with policy and optimizer in place.

    Raises:
        ConfigError: with the figures of both.
    """
    cache = engine.cache_bytes
    needed = engine.weights + engine.staging + cache
    if needed <= free_bytes:
        return
    remedy = (
        f"lower rollout.kv_cache_bytes to at most {free_bytes - needed + cache}"
        if needed - cache < free_bytes and engine.rollout.kv_cache_bytes != "auto"
        else "raise rollout.tensor_parallel_size, or split the policy over more ranks"
    )
    raise ConfigError(
        f"an engine takes {needed / GIB:.1f} GiB of each rank, {cache / GIB:.1f} of them for its cache, and the device has "
        f"{free_bytes / GIB:.1f} GiB left; {remedy} (`megatron-r1z plan` shows what takes how much)."
    )
