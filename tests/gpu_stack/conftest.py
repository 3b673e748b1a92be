"""Rehearsals, each made once in a session; skipped where the GPU environment is not there."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_r1z.config import TrainConfig, load_config
from megatron_r1z.errors import MissingExtraError
from megatron_r1z.rehearse.roles import Found, make_task, rehearse
from megatron_r1z.rehearse.versions import WRITTEN_FOR, check_versions

H100 = {"gpu": "NVIDIA H100 80GB HBM3", "memory_bytes": 79 << 30, "capability": (9, 0), "gpus_per_node": 8}
B200 = {"gpu": "NVIDIA B200", "memory_bytes": 178 << 30, "capability": (10, 0), "gpus_per_node": 8}
Rehearsed = Callable[..., Found]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    try:
        check_versions(*WRITTEN_FOR)
    except MissingExtraError as error:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=str(error)))


@pytest.fixture(scope="session")
def rehearsed() -> Rehearsed:
    """`rehearsed(module, config, rank, *overrides)` plays a role of a file in configs/, on a B200 if it is called after one, or an H100."""
    known: dict[tuple[str, ...], Found] = {}

    def play(module: str, name: str, rank: int, *overrides: str) -> Found:
        key = (module, name, str(rank), *overrides)
        if key not in known:
            path = f"configs/{name}.yaml"
            device = B200 if "b200" in name else H100
            known[key] = rehearse(module, make_task(load_config(TrainConfig, path, overrides), path, overrides, rank, **device))
        return known[key]

    return play
