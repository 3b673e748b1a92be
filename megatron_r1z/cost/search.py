"""Layouts of a run that fit its cluster: the fastest ones, and the one nearest to what a configuration asks for.

What is varied: tensor, pipeline and virtual pipeline parallelism of the policy, its context parallelism where nothing else helps,
recomputed activations, micro-batches, the distributed optimizer and its offload, ranks of an engine and its key-value cache. Everything
else, the algorithm above all, stays as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import get_args

from megatron_r1z.config import OptimizerConfig, ParallelConfig, Recompute, RolloutConfig, TrainConfig, to_tree
from megatron_r1z.cost.checks import check_precision
from megatron_r1z.cost.cluster import GIB, Cluster
from megatron_r1z.cost.engine_memory import CACHE_UNIT
from megatron_r1z.cost.run_cost import RunCost
from megatron_r1z.errors import ConfigError
from megatron_r1z.layout.families import ModelShape
from megatron_r1z.layout.topology import nearly_even

SHOWN = 8
MOST_STAGES = 32
CONTEXT_SIZES = (1, 2, 4, 8)
"""Context-parallel sizes for a run that does not fit with its own."""
MOST_RANKS = 4096
"""Where the search for enough ranks ends."""


def search(cost: RunCost) -> list[RunCost]:
    """The fastest layouts that fit, the best first, each with its refit planned; at most one for each split of policy and engine."""
    context = cost.config.parallel.context_parallel_size
    fitting = [item for item in _variants(cost, offload=False, context=context) if item.shortfall() is None]
    fitting.sort(key=lambda item: item.time.total)
    best: dict[tuple[int, ...], RunCost] = {}
    for item in fitting:
        topology = item.policy.topology
        best.setdefault((topology.tp, topology.pp, item.engine.tp), item)
    planned = [dataclasses.replace(item, plans_refit=True) for item in list(best.values())[:SHOWN]]
    return sorted(planned, key=lambda item: item.time.total)


def nearest(cost: RunCost) -> RunCost | None:
    """The layout that fits with the fewest changes, the fastest of those; None where none does."""
    context = cost.config.parallel.context_parallel_size
    for offload in dict.fromkeys((cost.config.optimizer.offload_to_host, True)):
        for size in dict.fromkeys((context, *CONTEXT_SIZES)):
            fitting = [item for item in _variants(cost, offload=offload, context=size) if item.shortfall() is None]
            if fitting:
                return min(fitting, key=lambda item: (len(changes(cost.config, item.config)), item.time.total))
    return None


def enough_ranks(cost: RunCost) -> int | None:
    """The smallest number of ranks, doubled as often as needed, for which some layout fits on so many nodes; None above `MOST_RANKS`."""
    ranks = cost.config.parallel.num_ranks
    while ranks <= MOST_RANKS and cost.cluster is not None:
        nodes = -(-ranks // cost.cluster.gpus_per_node)
        larger = dataclasses.replace(
            cost,
            config=dataclasses.replace(cost.config, parallel=dataclasses.replace(cost.config.parallel, num_ranks=ranks)),
            cluster=dataclasses.replace(cost.cluster, nodes=nodes),
        )
        if nearest(larger) is not None:
            return ranks
        ranks *= 2
    return None


def changes(config: TrainConfig, other: TrainConfig) -> list[str]:
    """What turns one configuration into the other, as overrides of the command line."""
    was, now = to_tree(config), to_tree(other)
    names = [(section, name) for section, fields in now.items() for name in fields if fields[name] != was[section][name]]
    return [f"{section}.{name}={_flow(now[section][name])}" for section, name in names]


def _flow(value: object) -> str:
    text = str(value)
    return text.lower() if isinstance(value, bool) else text.replace(" ", "")


# --- what can be varied ---


def _variants(cost: RunCost, *, offload: bool, context: int) -> Iterator[RunCost]:
    """Every layout that the model can be split by, with as much key-value cache as is of use and fits."""
    for rollout in _rollouts(cost):
        for parallel, optimizer in _policies(cost, offload=offload, context=context):
            config = dataclasses.replace(cost.config, parallel=parallel, optimizer=optimizer, rollout=rollout)
            variant = _with_cache(dataclasses.replace(cost, config=config, plans_refit=False))
            if variant is not None:
                yield variant


def _rollouts(cost: RunCost) -> Iterator[RolloutConfig]:
    shape, config = cost.shape, cost.config
    for tp in _divisors(config.parallel.num_ranks, _node(cost)):
        fits_heads = shape.num_kv_heads % tp == 0 or tp % shape.num_kv_heads == 0
        if shape.num_heads % tp == 0 and shape.ffn_size % tp == 0 and fits_heads:
            yield dataclasses.replace(config.rollout, tensor_parallel_size=tp)


def _policies(cost: RunCost, *, offload: bool, context: int) -> Iterator[tuple[ParallelConfig, OptimizerConfig]]:
    config, shape = cost.config, cost.shape
    optimizer = dataclasses.replace(config.optimizer, distributed=True, offload_to_host=offload)
    keeps = [config.optimizer] if config.optimizer.offload_to_host == offload else []
    if config.parallel.num_ranks % context:
        return
    for tp, pp in _degrees(config.parallel.num_ranks // context, shape, _node(cost), config.algorithm.train_batch_size):
        for vpp in (1, 2) if pp > 1 and shape.num_layers % (2 * pp) == 0 else (1,):
            for recompute in get_args(Recompute):
                for tokens in _budgets(config):
                    parallel = dataclasses.replace(
                        config.parallel,
                        tensor_parallel_size=tp,
                        pipeline_parallel_size=pp,
                        context_parallel_size=context,
                        virtual_pipeline_size=vpp,
                        pipeline_layers=() if shape.num_layers % (pp * vpp) == 0 else nearly_even(shape.num_layers, pp * vpp),
                        sequence_parallel=tp > 1,
                        recompute=recompute,
                        micro_batch_tokens=tokens,
                    )
                    yield from ((parallel, choice) for choice in dict.fromkeys([*keeps, optimizer]))


def _degrees(ranks: int, shape: ModelShape, node: int, batch: int) -> Iterator[tuple[int, int]]:
    """Tensor and pipeline parallel sizes: the former within a node, each data-parallel rank with at least one sample of a step."""
    for tp in _divisors(ranks, node):
        if any(size % tp for size in (shape.num_heads, shape.num_kv_heads, shape.ffn_size)):
            continue
        for pp in _divisors(ranks // tp, min(MOST_STAGES, shape.num_layers)):
            if ranks // (tp * pp) <= batch:
                yield tp, pp


def _budgets(config: TrainConfig) -> list[int]:
    """Tokens of a micro-batch: as configured, and no more than the longest sample."""
    return sorted({config.parallel.micro_batch_tokens, min(config.max_model_tokens, config.parallel.micro_batch_tokens)}, reverse=True)


def _with_cache(cost: RunCost) -> RunCost | None:
    """With the configured key-value cache if it fits, else with what is left, else None; also None where the model cannot be split."""
    try:
        check_precision(cost.config, cost.shape, cost.cluster)
        needed = cost.fullest.peak
    except ConfigError:
        return None
    room = int(_cluster(cost).gpu.memory_gib * GIB) - needed
    if room >= 0:
        return cost
    if cost.config.rollout.kv_cache_bytes == "auto":
        return None  # as small as it can be
    left = (cost.engine.cache_bytes + room) // CACHE_UNIT * CACHE_UNIT
    if left < cost.engine.cache_bytes_per_token * cost.config.max_model_tokens:
        return None
    rollout = dataclasses.replace(cost.config.rollout, kv_cache_bytes=left)
    return dataclasses.replace(cost, config=dataclasses.replace(cost.config, rollout=rollout))


def _divisors(number: int, most: int) -> list[int]:
    return [candidate for candidate in range(1, min(number, most) + 1) if number % candidate == 0]


def _node(cost: RunCost) -> int:
    return _cluster(cost).gpus_per_node


def _cluster(cost: RunCost) -> Cluster:
    if cost.cluster is None:
        raise ConfigError("a search needs a cluster; name one by --cluster.")
    return cost.cluster
