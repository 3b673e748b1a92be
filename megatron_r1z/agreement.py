"""What the ranks of a run must have alike, compared when it starts: of hosts that differ, a run computes something else or loses files."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_r1z.config import ModelConfig, leaves
from megatron_r1z.data.fingerprint import new_digest, settings_parts, weights_parts
from megatron_r1z.errors import ConfigError, DataError
from megatron_r1z.ranks import any_rank, broadcast, decide, gather
from megatron_r1z.record.versions import LIBRARIES, library_versions

if TYPE_CHECKING:
    from megatron_r1z.policy.trained import Settings

SEEN_S = 60.0
"""A network file system shows a new file to another host within this time; NFS looks again after 30 to 60 seconds."""
_POLL_S = 0.5


@dataclass(frozen=True)
class Statement:
    """What one rank has."""

    rank: int
    host: str
    values: Mapping[str, str]
    """By the name that a message calls it; what a rank does not say is not compared."""


def check_start(config: Settings, folder: Path) -> None:
    """All ranks call this before anything of the run is read or written, each with the configuration that it has resolved itself.

    Raises:
        ConfigError: on every rank, with hosts and values, where versions, configuration or model differ or each has its own `folder`.
        DataError: on every rank, when rank 0 cannot write into `folder`.
    """
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    check_alike(_files_of_host(config) if is_first else {})  # the others of a host have the same
    check_alike({name: str(value) for name, value in leaves(config).items()})
    check_shared(folder)


def _files_of_host(config: Settings) -> dict[str, str]:
    """Versions, those of libraries that are not there too, and the model folder."""
    versions = dict.fromkeys(LIBRARIES, "") | library_versions()
    del versions["device"]
    return versions | {f"the model folder {config.model.path}": _mark_model(config.model)}


def check_alike(values: Mapping[str, str]) -> None:
    """Refuse ranks that have something else than rank 0; all ranks call this.

    Raises:
        ConfigError: on every rank, about the first value that is not the same on all of them.
    """
    (of_rank_0,) = broadcast([values])
    if any_rank(any(of_rank_0.get(name, value) != value for name, value in values.items())):
        difference = find_difference(gather([Statement(dist.get_rank(), socket.gethostname(), values)]))
        raise ConfigError(difference or "")


def find_difference(statements: Sequence[Statement]) -> str | None:
    """One sentence about the first thing of which ranks have different values; None where they agree.

    >>> old, new = {"torch": "2.8"}, {"torch": "2.9"}
    >>> print(find_difference([Statement(0, "a", new), Statement(1, "b", old), Statement(2, "b", old)]))
    torch is not the same on all ranks: 2.9 on a (rank 0), 2.8 on b (ranks 1-2); make it the same on every host.
    """
    names = dict.fromkeys(name for statement in statements for name in statement.values)
    for name in names:
        groups: dict[str, list[Statement]] = {}
        for statement in statements:
            if name in statement.values:
                groups.setdefault(statement.values[name], []).append(statement)
        if len(groups) > 1:
            told = ", ".join(f"{value or 'none'} on {_where(group)}" for value, group in groups.items())
            return f"{name} is not the same on all ranks: {told}; make it the same on every host."
    return None


def check_shared(folder: Path, patience_s: float = SEEN_S) -> None:
    """Refuse a folder that is not one and the same for all ranks; it is made if it is not there. All ranks call this.

    Raises:
        ConfigError: on every rank, with the hosts that have another one.
        DataError: on every rank, when rank 0 cannot write there.
    """
    sign, host_of_0 = decide(lambda: (_write_sign(folder), socket.gethostname()))
    seen = _wait_for(lambda: _is_listed(folder, sign), patience_s)
    rank = dist.get_rank()
    blind = gather([] if seen else [Statement(rank, socket.gethostname(), {})])
    if rank == 0:
        (folder / sign).unlink(missing_ok=True)
    if blind:
        raise ConfigError(
            f"the folder {folder} of {host_of_0} (rank 0) is not that of {_where(blind)}: a checkpoint needs the files of all hosts in "
            "one place; name a folder that they share."
        )


def _write_sign(folder: Path) -> str:
    """The name of an empty file that nobody else makes."""
    name = f".shared-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error.strerror or error}); give the run another logging.folder.") from error
    return name


def _is_listed(folder: Path, name: str) -> bool:
    """Listed: a look at the name alone may be answered from what a host remembers."""
    try:
        return name in os.listdir(folder)  # noqa: PTH208 - names, of which there may be many
    except OSError:
        return False


def _wait_for(is_true: Callable[[], bool], patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while not is_true():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _where(statements: Sequence[Statement]) -> str:
    """Hosts with their ranks: `h1 (ranks 0-7), h2 (rank 8)`."""
    hosts: dict[str, list[int]] = {}
    for statement in statements:
        hosts.setdefault(statement.host, []).append(statement.rank)
    return " and ".join(f"{host} (rank{'s' if len(ranks) > 1 else ''} {_ranges(ranks)})" for host, ranks in hosts.items())


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3, 6` for 0, 1, 2, 3, 6."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _mark_model(model: ModelConfig) -> str:
    """Of the settings, and of what the weights are called and how long they are: their bytes are looked at elsewhere, by one rank."""
    digest = new_digest()
    for name, part in sorted(settings_parts(model.path).items()):
        digest.update(f"{name} {part.mark(None).digest}\n".encode())
    for name, part in sorted(weights_parts(model.path, model.checkpoint).items()):
        digest.update(f"{name} {part.path.stat().st_size if part.path.exists() else 'missing'}\n".encode())
    return str(digest.hexdigest())[:12]
