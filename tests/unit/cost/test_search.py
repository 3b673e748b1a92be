"""Layouts that are found fit, can be started, and are what the overrides say."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_r1z.config import TrainConfig, dump_config, load_config
from megatron_r1z.cost.checks import check_shape
from megatron_r1z.cost.run_cost import RunCost
from megatron_r1z.cost.search import changes, enough_ranks, nearest, search
from megatron_r1z.layout.known import find_shape
from tests.unit.cost.runs import SHAPE, cluster, cost

TIGHT = cluster(memory_gib=5.6)


@pytest.fixture(scope="module")
def tight() -> RunCost:
    """A run that fits with little room."""
    return cost(on=TIGHT)


@pytest.fixture(scope="module")
def found(tight: RunCost) -> list[RunCost]:
    """What the search finds for it."""
    return search(tight)


def applied(run: RunCost, found: RunCost, folder: Path) -> RunCost:
    """The run with the overrides that a user would copy from the screen."""
    path = folder / "run.yaml"
    path.write_text(dump_config(run.config))
    return dataclasses.replace(run, config=load_config(TrainConfig, path, changes(run.config, found.config)))


def test_what_is_found_fits_and_can_be_started(found: list[RunCost]) -> None:
    assert found
    for item in found:
        assert item.shortfall() is None
        check_shape(item.config, SHAPE)
    assert all(one.time.total <= other.time.total for one, other in pairwise(found))


def test_the_best_is_no_slower_than_a_run_that_fits(found: list[RunCost]) -> None:
    run = cost(on=TIGHT, parallel={"tensor_parallel_size": 2, "pipeline_parallel_size": 2})
    assert run.shortfall() is None
    assert found[0].time.total <= run.time.total


def test_the_overrides_make_the_layout(tight: RunCost, found: list[RunCost], tmp_path: Path) -> None:
    for item in [*found, nearest(tight)]:
        assert item is not None
        assert applied(tight, item, tmp_path).config == item.config


def test_the_nearest_changes_as_little_as_it_can() -> None:
    run = cost(on=TIGHT, parallel={"micro_batch_tokens": 8192})
    assert run.shortfall() is not None
    near = nearest(run)
    assert near is not None
    assert near.shortfall() is None
    assert len(changes(run.config, near.config)) == 1


def test_nothing_fits_until_there_are_enough_ranks() -> None:
    run = cost(find_shape("Llama-3.1-70B").shape, on=cluster(memory_gib=79.6, host_memory_gib=100.0))
    assert nearest(run) is None
    assert search(run) == []
    assert enough_ranks(run) == 32  # 16 ranks: 18 bytes a parameter are 74 GiB on each, before the engine


def test_no_number_of_ranks_is_enough_for_a_device_without_memory() -> None:
    assert enough_ranks(cost(on=cluster(memory_gib=4.0))) is None


def test_layers_that_do_not_divide_are_spread() -> None:
    shape = dataclasses.replace(SHAPE, num_layers=7)
    splits = [item.config.parallel.pipeline_layers for item in search(cost(shape, on=TIGHT))]
    assert (4, 3) in splits
    assert all(sum(split) in (0, 7) for split in splits)
