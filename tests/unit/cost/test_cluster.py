"""Cluster files: all of the repository's, what is refused, and the speed of links."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1z.cost.cluster import load_cluster
from megatron_r1z.errors import ConfigError
from tests.unit.cost.runs import cluster

CLUSTERS = Path(__file__).parents[3] / "configs" / "clusters"


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_name_of_a_cluster_file_says_how_many_devices_it_has(path: Path) -> None:
    found = load_cluster(path)
    model, number = path.stem.split("-")[0], path.stem.rsplit("-", 1)[1]
    assert found.num_gpus == int(number)
    assert model in found.gpu.name.lower()


def test_only_the_first_file_of_a_device_has_its_numbers() -> None:
    """One place for each number: the others say how many nodes there are."""
    for path in CLUSTERS.glob("*.yaml"):
        if not path.stem.endswith("-8"):
            lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
            assert [line.partition(":")[0] for line in lines] == ["base", "nodes"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nodes: 0", "cluster.nodes is 0; it must be above 0."),
        ("node: 2", "unknown key 'node'; did you mean 'nodes'?"),
        ("gpu: {hbm_gbs: -1}", "gpu.hbm_gbs is -1.0; it must be above 0."),
        ("network_gbs: fast", "network_gbs must be of type float, not 'fast'."),
    ],
)
def test_a_mistake_is_told_with_its_file(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: {CLUSTERS / 'h100-8.yaml'}\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        load_cluster(path)
    assert str(caught.value).endswith(f": {sentence}")
    assert str(path) in str(caught.value)


def test_the_speed_of_links() -> None:
    machine = cluster(nodes=4)
    assert [machine.point_gbs(distance) for distance in (1, 7, 8)] == [400.0, 400.0, 50.0]
    assert machine.group_gbs(8) == 400.0  # inside a node
    assert machine.group_gbs(2, stride=8) == 50.0  # one rank of each node, each with its adapter
    assert machine.group_gbs(16) == 400.0  # eight adapters carry a ring over two nodes
    assert machine.group_gbs(8, stride=2) == 200.0
