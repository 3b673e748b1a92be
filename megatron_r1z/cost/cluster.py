"""A cluster as a cost model sees it: devices, nodes and links, read from YAML (`configs/clusters/`)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_r1z.config import LaunchConfig, load_record
from megatron_r1z.errors import ConfigError

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One device; speeds are the vendor's peaks without sparsity."""

    name: str
    memory_gib: float
    """What a process can see of it."""
    hbm_gbs: float
    """GB/s of its memory."""
    bf16_tflops: float
    fp32_tflops: float
    fp8_tflops: float = 0.0
    """0: it has no FP8."""
    compute_capability: tuple[int, int] = (0, 0)
    """CUDA's name for the generation, which decides about recipes of FP8."""

    def __post_init__(self) -> None:
        _check_positive(self, "gpu", but=("name", "fp8_tflops", "compute_capability"))


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal nodes of equal devices.

    Raises:
        ConfigError: a number that is not above 0.
    """

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    node_gbs: float
    """GB/s between a device and the others of its node, each direction."""
    network_gbs: float
    """GB/s between a device and other nodes, each direction."""
    host_gbs: float
    """GB/s between a device and its host's memory, each direction."""
    host_memory_gib: float
    """Of a node."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """How `launch` starts jobs there; `plan` has no use for it."""

    def __post_init__(self) -> None:
        _check_positive(self, "cluster", but=("gpu", "launch"))

    @property
    def num_gpus(self) -> int:
        """Devices of all nodes."""
        return self.nodes * self.gpus_per_node

    def point_gbs(self, distance: int) -> float:
        """Speed between two ranks so far apart, all ranks exchanging at once."""
        return self.node_gbs if distance < self.gpus_per_node else self.network_gbs

    def group_gbs(self, size: int, stride: int = 1) -> float:
        """Speed of each rank in a collective of `size` ranks, `stride` apart, all such groups at once.

        Across nodes a ring uses the adapters of all of its ranks of a node, and no link of a node is faster than it is.
        """
        if size * stride <= self.gpus_per_node:
            return self.node_gbs
        return min(self.node_gbs, self.network_gbs * max(1, self.gpus_per_node // stride))


def load_cluster(path: str | Path) -> Cluster:
    """Read a cluster file; it may build on another one (`base`).

    Raises:
        ConfigError: one sentence with the file and the key.
    """
    return load_record(Cluster, path)


def _check_positive(record: Any, section: str, but: tuple[str, ...]) -> None:
    for item in fields(record):
        if item.name not in but and not getattr(record, item.name) > 0:
            raise ConfigError(f"{section}.{item.name} is {getattr(record, item.name)}; it must be above 0.")
