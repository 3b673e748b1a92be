"""`megatron-r1z rehearse CONFIG --cluster FILE`: ranks of a run on this machine, without its devices. Standard library, and processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_r1z.config import TrainConfig, load_config
from megatron_r1z.cost.checks import check_shape
from megatron_r1z.cost.cluster import GIB, Cluster, load_cluster
from megatron_r1z.errors import ConfigError
from megatron_r1z.layout.known import find_shape
from megatron_r1z.record.tables import align
from megatron_r1z.rehearse.roles import Found, Task, make_task, policy_ranks, rehearse
from megatron_r1z.rehearse.said import unexplained
from megatron_r1z.rehearse.versions import WRITTEN_FOR, check_versions

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
    check_shape(config, find_shape(config.model.path).shape, cluster)
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
    tell(UNSEEN)
    return found


def render(found: Found) -> Iterator[str]:
    """The report of one role, line by line."""
    rows = [("GiB", "kept", "fullest", "plan")]
    for phase in found.phases:
        planned = "" if phase.planned is None else f"{phase.planned / GIB:.2f}"
        rows.append((phase.name, f"{phase.kept / GIB:.2f}", f"{phase.most / GIB:.2f}", planned))
    yield from (f"  {line}" for line in align(rows))
    yield f"  {found.num_parameters} parameters as the layout has them"
    if found.attention:
        yield f"  attention: {', '.join(found.attention)}"
    for name, value in found.figures.items():
        yield f"  {name.replace('_', ' ')}: {value}"
    yield from (f"  WARNING: {text}" for text in unexplained(found.warnings))
    yield f"  {sum(phase.seconds for phase in found.phases):.0f} s"


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
        yield f"policy, stage {place.pp_rank} of {topology.pp}", "policy_role", task(rank)
        return
    policies = policy_ranks(topology)
    for name in policies if every_role else list(policies)[:1]:
        yield name, "policy_role", task(policies[name])
    yield f"engine of {config.rollout.tensor_parallel_size}", "engine_role", task(0)
