"""Which network ranks of other nodes are reached by."""

from __future__ import annotations

import os
import socket
from typing import Any

import psutil
import pytest

pytest.importorskip("megatron.core")

from megatron_r1z.policy import parallel
from megatron_r1z.policy.parallel import INTERFACE, interface_to

ADDRESSES = {"lo": ["127.0.0.1", "127.0.1.1"], "eth0": ["10.0.0.7"], "ib0": ["10.9.0.7"]}
ROUTES = {"localhost": "127.0.0.1", "own-name": "127.0.1.1", "head-node": "10.9.0.7", parallel.ELSEWHERE: "10.0.0.7"}


class Probe:
    """A socket that knows by which address packets would leave."""

    def __init__(self, *_arguments: Any) -> None: ...
    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_error: object) -> None: ...
    def connect(self, address: tuple[str, int]) -> None:
        if address[0] not in ROUTES:
            raise OSError(f"no way to {address[0]}")
        self.own = ROUTES[address[0]]

    def getsockname(self) -> tuple[str, int]:
        return self.own, 12345


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    known = {name: [type("Address", (), {"address": text})() for text in texts] for name, texts in ADDRESSES.items()}
    monkeypatch.setattr(socket, "socket", Probe)
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: known)
    monkeypatch.setenv(INTERFACE, "")  # so that it is put back
    monkeypatch.delenv(INTERFACE)
    return monkeypatch


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize(("host", "name"), [("head-node", "ib0"), ("own-name", "eth0"), ("localhost", "eth0"), ("unknown", "eth0")])
def test_the_way_to_the_first_rank_or_out_of_this_machine(host: str, name: str) -> None:
    """On the first rank's own node its name may stand for this machine alone."""
    assert interface_to(host) == name


@pytest.mark.parametrize(
    ("local", "world", "before", "after"), [("8", "16", None, "ib0"), ("8", "8", None, None), ("8", "16", "bond0", "bond0")]
)
def test_gloo_is_told_where_there_are_other_nodes_and_the_user_has_not(
    network: pytest.MonkeyPatch, local: str, world: str, before: str | None, after: str | None
) -> None:
    for name, value in {"LOCAL_WORLD_SIZE": local, "WORLD_SIZE": world, "MASTER_ADDR": "head-node", INTERFACE: before}.items():
        if value is not None:
            network.setenv(name, value)
    parallel._name_interface()
    assert os.environ.get(INTERFACE) == after


def test_a_machine_without_a_network_has_no_interface(network: pytest.MonkeyPatch) -> None:
    network.setattr(parallel, "ELSEWHERE", "unknown")
    assert interface_to("localhost", "nowhere") is None


def test_all_ranks_take_part_in_the_first_operation_of_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """On its own device, which is chosen before."""
    done: list[object] = []
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setattr(parallel.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(parallel.torch.cuda, "set_device", lambda device: done.append(("device", device.index)))
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda backend, **_options: done.append(backend))
    monkeypatch.setattr(parallel.torch, "zeros", lambda *_size, device: ("zeros", device.index))
    monkeypatch.setattr(parallel.dist, "all_reduce", done.append)
    parallel.start_process_group()
    assert done == [("device", 5), "cpu:gloo,cuda:nccl", ("zeros", 5)]
