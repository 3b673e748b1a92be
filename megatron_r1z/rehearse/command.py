"""`megatron-r1z rehearse CONFIG --cluster FILE`: ranks of a run on this machine, without its devices. Standard library, and processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_r1z.config import TrainConfig, load_config
from megatron_r1z.cost.checks import check_shape
from megatron_r1z.cost.cluster import GIB, Cluster, load_cluster
from megatron_r1z.cost.lengths import Lengths
from megatron_r1z.cost.run_cost import RunCost
from megatron_r1z.errors import ConfigError
from megatron_r1z.layout.known import find_shape
from megatron_r1z.record.tables import align
from megatron_r1z.rehearse.roles import Found, Task, make_task, policy_ranks, rehearse
from megatron_r1z.rehearse.said import unexplained
from megatron_r1z.rehearse.versions import WRITTEN_FOR, check_versions

PROVEN = "shown: names, shapes and formats fit, the libraries take every call, and tensors need this memory"
UNSEEN = "not seen without a device: whether kernels take this and what they compute, time, NCCL, memory that libraries take by themselves"


def rehearse_run(
    config_path: str,
    overrides: Sequence[str],
    cluster_path: str,
    *,
    rank: int | None = None,
    every_role: bool = False,
    tell: Callable[[str], None] = print,
) -> list[Found]:
    """Play roles of a run, one after the other, and tell of each what was found.

    Args:
        config_path: of a training run.
        overrides: `section.field=value`.
        cluster_path: whose device is pretended.
        rank: of the policy, that one alone.
        every_role: the first, a middle and the last pipeline stage, and an engine; otherwise the first stage and an engine.
        tell: takes lines of the report.

    Raises:
        UsageError: what the libraries or this package refuse, in one sentence.
    """
    check_versions(*WRITTEN_FOR)
    config, cluster = load_config(TrainConfig, config_path, overrides), load_cluster(cluster_path)
    _check_room(config, cluster)
    found = []
    for name, module, task in _roles(config, config_path, tuple(overrides), cluster, rank, every_role):
        tell(f"{name}, rank {task.rank} ...")
        found.append(rehearse(module, task))
        for line in render(found[-1]):
            tell(line)
        if found[-1].layout_differences:
            raise ConfigError(
                f"{name} has other parameters than the layout says, the first is {found[-1].layout_differences[0]}; another version of a "
                "library than setup.py pins, or a model that this package does not know: please report it."
            )
    for line in summary(found, cluster):
        tell(line)
    return found


def _check_room(config: TrainConfig, cluster: Cluster) -> None:
    """Refuse what the model cannot be and, by what `plan` says, what does not fit the cluster.

    Raises:
        ConfigError: with the numbers.
    """
    shape = find_shape(config.model.path).shape
    check_shape(config, shape, cluster)
    shortfall = RunCost(config, shape, Lengths.at_most(config), cluster, plans_refit=False).shortfall()
    if shortfall is not None:
        raise ConfigError(f"{shortfall}; `megatron-r1z plan` with the same file and cluster says what would fit.")


def render(found: Found) -> Iterator[str]:
    """The report of one role, line by line."""
    rows = [("GiB of tensors", "at the end", "fullest", "by plan")]
    for phase in found.phases:
        planned = "" if phase.planned is None else f"{phase.planned / GIB:.2f}"
        rows.append((phase.name, f"{phase.kept / GIB:.2f}", f"{phase.most / GIB:.2f}", planned))
    yield from (f"  {line}".rstrip() for line in align(rows))
    yield f"  {found.num_parameters} parameters with the names and shapes of the layout"
    yield from (f"  {line}" for line in _choices(found))
    yield from (f"  WARNING: {text}" for text in unexplained(found.warnings))
    yield f"  {sum(phase.seconds for phase in found.phases):.0f} s"


def _choices(found: Found) -> Iterator[str]:
    """What the libraries took, and with what they were asked."""
    figures = found.figures
    if found.attention:
        yield f"Transformer Engine takes its {', '.join(found.attention)} attention"
        yield f"{figures['micro_batches']} micro-batches of {figures['tokens']} tokens, {figures['responses']} of them of responses"
        return
    yield f"vLLM makes it {figures['model']} in {figures['formats']}"
    caching = "with" if figures["prefix_caching"] else "without"
    yield f"steps of up to {figures['max_num_batched_tokens']} tokens, CUDA graphs {figures['cuda_graphs']}, {caching} prefix caching"
    if not figures["starts_beside_a_full_device"]:
        yield "WARNING: vLLM does not start where a twentieth of the device is free, as beside a policy"


def summary(found: Sequence[Found], cluster: Cluster) -> Iterator[str]:
    """The end of the report: what a device holds of all that was played, and what that proves."""
    engines = [role for role in found if "kv_cache_bytes" in role.figures]
    policies = [role for role in found if role not in engines]
    if engines and policies:
        fullest = max(phase.most for role in policies for phase in role.phases)
        engine, cache = engines[0].phases[-1].kept, engines[0].figures["kv_cache_bytes"]
        yield (
            f"on a device: {fullest / GIB:.1f} GiB of the policy, {engine / GIB:.1f} of the engine and {cache / GIB:.1f} of its cache, "
            f"together {(fullest + engine + cache) / GIB:.1f} of {cluster.gpu.memory_gib:.1f}"
        )
    yield PROVEN
    yield UNSEEN


def _roles(
    config: TrainConfig, path: str, overrides: tuple[str, ...], cluster: Cluster, rank: int | None, every_role: bool
) -> Iterator[tuple[str, str, Task]]:
    gpu, topology = cluster.gpu, config.parallel.topology

    def task(number: int) -> Task:
        return make_task(
            config,
            str(Path(path)),
            overrides,
            number,
            gpu=gpu.name,
            memory_bytes=round(gpu.memory_gib * GIB),
            capability=gpu.compute_capability,
            gpus_per_node=cluster.gpus_per_node,
        )

    if rank is not None:
        place = topology.coordinates(rank)
        yield f"policy, pipeline stage {place.pp_rank} of 0 to {topology.pp - 1}", "policy_role", task(rank)
        return
    policies = policy_ranks(topology)
    for name in policies if every_role else list(policies)[:1]:
        yield name, "policy_role", task(policies[name])
    yield f"engine of {config.rollout.tensor_parallel_size}", "engine_role", task(0)
