"""A run over hosts that are namespaces of this machine: it is the run of one host, and hosts that do not fit together are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.loop.conftest import CommandLine, figures_of
from tests.loop.hosts import Hosts, made_hosts, missing

LAYOUT = ("parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=1", "rollout.tensor_parallel_size=1")
SHORT = ("algorithm.iterations=2", "checkpoint.every=1", "evaluation.sets=[]")
REASON = missing()

pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")


@pytest.fixture
def two_hosts() -> Iterator[Hosts]:
    with made_hosts(2) as hosts:
        yield hosts


def test_a_run_over_two_hosts_is_the_run_of_one(training: list[str], cli: CommandLine, two_hosts: Hosts, tmp_path: Path) -> None:
    arguments = [*training, *LAYOUT, *SHORT]
    alone = cli.run("train", *arguments, f"logging.folder={tmp_path / 'alone'}")
    together = two_hosts.run("train", *arguments, f"logging.folder={tmp_path / 'together'}")
    assert alone.status == 0, alone.stderr
    assert [ended.status for ended in together] == [0, 0], together
    assert figures_of(tmp_path / "together") == figures_of(tmp_path / "alone")
    assert (tmp_path / "together" / "checkpoints" / "latest").read_text() == "step_000002"


def test_hosts_with_a_run_folder_each_are_refused_before_the_run(training: list[str], two_hosts: Hosts, tmp_path: Path) -> None:
    """Else each would keep its own half of a checkpoint, and the first would call it complete."""
    folder = tmp_path / "runs"
    folder.mkdir()
    mounts = f"mount -t tmpfs tmpfs {folder}"
    ended = two_hosts.run("train", *training, *LAYOUT, *SHORT, f"logging.folder={folder / 'run'}", mounts=mounts)
    for host in ended:
        assert host.status == 1, host.output
        assert f"the folder {folder / 'run'} of h1 (rank 0) is not that of h2 (rank 1)" in host.output


def test_hosts_with_different_settings_are_refused_by_the_field(training: list[str], two_hosts: Hosts, tmp_path: Path) -> None:
    arguments = [*training, *LAYOUT, *SHORT, f"logging.folder={tmp_path / 'run'}"]
    for host in two_hosts.run("train", *arguments, per_host=["optimizer.lr=3e-5", "optimizer.lr=4e-5"]):
        assert host.status == 1, host.output
        assert "optimizer.lr is not the same on all ranks: 3e-05 on h1 (rank 0), 4e-05 on h2 (rank 1)" in host.output
    assert not (tmp_path / "run").exists()
