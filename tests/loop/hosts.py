"""Hosts made of Linux namespaces: each has its own network, mounts, name, process ids and shared memory; folders are the machine's."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.loop.conftest import ENVIRONMENT, HANGS_S, ROOT

PORT = 29511
ENTER = """
mount -t tmpfs -o size=2g tmpfs /dev/shm
hostname {name}
mount --bind {names} /etc/hosts
{mounts}
exec "$@"
"""


def missing() -> str | None:
    """Why there can be no such hosts here; None: there can."""
    absent = [name for name in ("ip", "unshare") if shutil.which(name) is None]
    if absent:
        return f"hosts are made by {', '.join(absent)}, which is not installed (Debian: apt install iproute2 util-linux)"
    if os.getuid() != 0:
        return "namespaces of a network take root"
    name = f"r1z-{uuid.uuid4().hex[:8]}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"this machine makes no network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=False)
    return None


@dataclass(frozen=True)
class Host:
    """One of them, joined to the others by a bridge."""

    name: str
    namespace: str
    address: str


@dataclass(frozen=True)
class Ended:
    """How the command of a host ended, and what it printed."""

    status: int
    output: str


class Hosts:
    """So many hosts; the first is where torchrun's ranks meet."""

    def __init__(self, hosts: Sequence[Host], names: Path) -> None:
        self.hosts, self._names = hosts, names
        self._running: list[subprocess.Popen[str]] = []

    def run(self, *arguments: str, per_host: Sequence[str] = (), mounts: str = "") -> list[Ended]:
        """`megatron-r1z` with one rank on each host by torchrun, until all have ended.

        Args:
            arguments: of the command.
            per_host: one more argument for each host.
            mounts: shell commands with which a host gets folders of its own.
        """
        commands = [self._start(node, [*arguments, *per_host[node : node + 1]], mounts) for node in range(len(self.hosts))]
        return [Ended(command.wait(), output) for command in commands for output in [command.communicate(timeout=HANGS_S)[0]]]

    def _start(self, node: int, arguments: Sequence[str], mounts: str) -> subprocess.Popen[str]:
        host = self.hosts[node]
        place = [f"--nnodes={len(self.hosts)}", "--nproc-per-node=1", f"--node-rank={node}", "--rdzv-backend=c10d", "--rdzv-id=hosts"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", *place, f"--rdzv-endpoint={self.hosts[0].address}:{PORT}"]
        unshare = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        script = ENTER.format(name=host.name, names=self._names, mounts=mounts)
        command = [*unshare, "bash", "-ec", script, "--", *torchrun, "-m", "megatron_r1z", *arguments]
        environment = {name: value for name, value in ENVIRONMENT.items() if name != "GLOO_SOCKET_IFNAME"}
        started = subprocess.Popen(
            ["ip", "netns", "exec", host.namespace, *command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._running.append(started)
        return started

    def end(self) -> None:
        """Kill what is left; the processes of a host end with the one that its process ids began with."""
        for process in self._running:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextlib.contextmanager
def made_hosts(num_hosts: int) -> Iterator[Hosts]:
    """Hosts `h1`, `h2` ... on a network of their own, which is gone at the end."""
    tag = uuid.uuid4().hex[:6]
    network, bridge = int(tag[:2], 16), f"r1z{tag}"
    hosts = [Host(f"h{number + 1}", f"{bridge}-{number}", f"10.77.{network}.{number + 1}") for number in range(num_hosts)]
    with tempfile.TemporaryDirectory() as folder:
        names = Path(folder) / "hosts"
        names.write_text("127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in hosts))
        made = Hosts(hosts, names)
        try:
            _ip("link", "add", bridge, "type", "bridge")
            _ip("link", "set", bridge, "up")
            for number, host in enumerate(hosts):
                _join(host, bridge, f"{bridge}{number}")
            yield made
        finally:
            made.end()
            for host in hosts:
                _ip("netns", "delete", host.namespace, check=False)
            _ip("link", "delete", bridge, check=False)


def _join(host: Host, bridge: str, cable: str) -> None:
    _ip("netns", "add", host.namespace)
    _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
    _ip("link", "set", cable, "master", bridge, "up")
    _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
    for name in ("lo", "eth0"):
        _ip("-n", host.namespace, "link", "set", name, "up")


def _ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=not check)
