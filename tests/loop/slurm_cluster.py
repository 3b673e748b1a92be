"""A real Slurm cluster of one node on the loopback interface, for a test: Debian's munge and slurm-wlm, every file of theirs in one folder.

Accounting needs a database; in its place a `sacct` of three lines says what the controller knows, in the form that nemo-run reads.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
PARTITION = "loopback"
START_S = 60.0

SACCT = """\
#!/bin/sh
# sacct --parsable2 -j JOB, from what the controller knows
echo "JobID|JobName|State"
scontrol -o show job "$3" |
sed -n 's/COMPLETING/RUNNING/; s/^JobId=\\([0-9]*\\) JobName=\\([^ ]*\\) .*JobState=\\([A-Z]*\\) .*/\\1|\\2|\\3/p'
"""


def missing() -> str | None:
    """Why there can be no such cluster here; None: there can."""
    absent = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if absent:
        return f"Slurm is not installed: no {', '.join(absent)} (Debian: apt install slurm-wlm munge)"
    if os.getuid() != 0:
        return "slurmd starts jobs for users, which takes root"
    return None


@dataclass(frozen=True)
class Cluster:
    """How to talk to the cluster."""

    environment: dict[str, str]
    """Of a process that submits jobs."""

    def state(self, job: str) -> dict[str, str]:
        """What the controller knows of a job, by its names."""
        text = self.run("scontrol", "-o", "show", "job", job)
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    def run(self, *command: str) -> str:
        """Output of one of Slurm's commands."""
        done = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Cluster]:
    """Start the three services, and end them and their jobs again."""
    binaries = folder / "bin"
    binaries.mkdir(parents=True)
    (binaries / "sacct").write_text(SACCT)
    (binaries / "sacct").chmod(0o755)
    munge, config = _munge(folder), folder / "slurm.conf"
    config.write_text(_slurm_conf(folder))
    environment = {"SLURM_CONF": str(config), "PATH": f"{binaries}:{os.environ['PATH']}:/usr/sbin"}
    cluster = Cluster(environment)
    services = [munge]
    try:
        commands = {"slurmctld": ["slurmctld", "-D", "-c"], "slurmd": [*_with_own_shared_memory(), "slurmd", "-D", "-c", "-N", _node()]}
        for name, command in commands.items():
            with (folder / f"{name}.out").open("w") as output:
                services.append(subprocess.Popen(command, env=os.environ | environment, stdout=output, stderr=output))
        _wait(
            lambda: (
                "idle" in subprocess.run(["sinfo", "-h", "-o", "%t"], env=os.environ | environment, capture_output=True, text=True).stdout
            )
        )
        yield cluster
    finally:
        subprocess.run(["scancel", "--full", "-p", PARTITION], env=os.environ | environment, capture_output=True, check=False)
        with contextlib.suppress(AssertionError):
            _wait(lambda: not subprocess.run(["squeue", "-h"], env=os.environ | environment, capture_output=True, text=True).stdout.strip())
        for service in reversed(services):
            service.terminate()
            try:
                service.wait(10)
            except subprocess.TimeoutExpired:
                service.kill()
                service.wait()


def _munge(folder: Path) -> subprocess.Popen[bytes]:
    """The service that signs messages between the others, with a key of its own."""
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    files = [f"--{name}={folder / f'munge.{end}'}" for name, end in (("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"))]
    command = ["munged", "--foreground", "--force", f"--socket={_socket(folder)}", f"--key-file={key}", *files]
    with (folder / "munged.out").open("w") as output:
        service = subprocess.Popen(command, env=os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin"}, stdout=output, stderr=output)
    _wait(_socket(folder).exists)
    return service


def _slurm_conf(folder: Path) -> str:
    control, daemon = _free_port(), _free_port()
    return f"""\
ClusterName=loopback
SlurmctldHost={_node()}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={_socket(folder)},cred_expire=5
CredType=cred/munge
SlurmctldPort={control}
SlurmdPort={daemon}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MailProg=/bin/true
ReturnToService=2
KillWait=5
NodeName={_node()} NodeAddr=127.0.0.1 CPUs={os.cpu_count() or 1} State=UNKNOWN
PartitionName={PARTITION} Nodes={_node()} Default=YES MaxTime=INFINITE State=UP
"""


def _with_own_shared_memory() -> list[str]:
    """What comes before a command, where the system allows it: jobs that are killed leave segments, and tests beside them look for such."""
    allowed = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0
    return ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"] if allowed else []


def _node() -> str:
    return socket.gethostname().split(".")[0]


def _socket(folder: Path) -> Path:
    return folder / "munge.socket"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(holds: object) -> None:
    deadline = time.monotonic() + START_S
    while not holds():
        assert time.monotonic() < deadline, "Slurm did not get there in time"
        time.sleep(0.2)
