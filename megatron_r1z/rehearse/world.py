"""Process groups without other processes: this process is one rank of many, and what the others would send has shapes only.

Every group is torch's fake one, gloo's too. Objects that are gathered are this rank's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

_new_group = dist.new_group


def pretend_groups() -> None:
    """All groups made from now on are fake; before Megatron is imported, which takes some of these functions along by name."""
    replacements = {
        "new_group": _fake_group,
        "all_gather_object": _gather_own,
        "broadcast_object_list": _do_nothing,
        "barrier": _do_nothing,
        "_coalescing_manager": _one_by_one,
    }
    for name, function in replacements.items():
        for module in (dist, distributed_c10d):
            setattr(module, name, function)


def start_world(rank: int, num_ranks: int) -> None:
    """Be rank `rank` of `num_ranks` in the default process group; after `pretend_groups`."""
    dist.init_process_group("fake", rank=rank, world_size=num_ranks, store=FakeStore())


def _fake_group(ranks: Any = None, timeout: Any = None, backend: Any = None, **options: Any) -> Any:
    options.pop("pg_options", None)
    return _new_group(ranks, backend="fake", **options)


def _gather_own(gathered: list[Any], mine: Any, group: Any = None) -> None:
    gathered[:] = [mine] * len(gathered)


def _do_nothing(*_arguments: Any, **_options: Any) -> None:
    pass


class _Done:
    """Work that has ended."""

    def wait(self, *_arguments: Any) -> bool:
        return True

    def append(self, *_arguments: Any) -> None:
        pass


@contextlib.contextmanager
def _one_by_one(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[_Done]:
    """torch has no fake kernel of coalesced collectives."""
    yield _Done()
