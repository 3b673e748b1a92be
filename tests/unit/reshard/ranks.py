"""One rank of `test_execute.py`: `ranks.py RANK NUM_RANKS CASE FOLDER`. Asserts on its own share and ends with status 0."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1z.errors import RefitError
from megatron_r1z.export import load_hf_weights, save_hf
from megatron_r1z.layout.blocks import Layout, engine_layout, megatron_layout
from megatron_r1z.layout.families import ModelShape, hf_tensors, load_shape
from megatron_r1z.layout.plan import make_plan
from megatron_r1z.layout.topology import Topology
from megatron_r1z.reshard.execute import execute
from megatron_r1z.reshard.refit import Refit

SHAPE = ModelShape("qwen2", 4, 16, 4, 2, 4, 24, 311, True, True, False, 1e4, None, 1e-6, 128)
ROUND_BYTES = 4000


def checkpoint() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {spec.name: torch.randn(spec.shape, generator=generator) for spec in hf_tensors(SHAPE)}


def parameters(layout: Layout, rank: int, dtype: torch.dtype, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """This rank's parameters: padding and everything not in `tensors` is -7."""
    made = {name: torch.full(size, -7.0, dtype=dtype) for name, size in layout.parameters[rank].items()}
    for block in layout.blocks_of(rank) if tensors else ():
        here = tuple(slice(first, first + count) for first, count in zip(block.local_start, block.size, strict=True))
        there = tuple(slice(first, first + count) for first, count in zip(block.start, block.size, strict=True))
        made[block.parameter][here] = tensors[block.tensor][there].to(dtype)
    return made


class ArrayEngine:
    """The part of an engine that a refit touches."""

    def __init__(self, live: dict[str, Tensor]) -> None:
        self.live, self.version = live, -1

    def parameters(self) -> Mapping[str, Tensor]:
        return self.live

    def set_version(self, policy_version: int) -> None:
        self.version = policy_version


def reshard(source: Layout, destination: Layout, rank: int, wire: torch.dtype) -> None:
    """From fp32 weights to `wire`; bits must be those of one rounding."""
    plan = make_plan(source, destination, wire.itemsize, ROUND_BYTES)
    found = parameters(destination, rank, wire)
    written = execute(plan.of_rank(rank), parameters(source, rank, torch.float32, checkpoint()), found, dtype=wire, timeout_s=60)
    expected = parameters(destination, rank, wire, checkpoint())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert written == sum(math.prod(block.size) for block in destination.blocks_of(rank)) * wire.itemsize


def case_execute(rank: int, num_ranks: int, folder: Path) -> None:
    for wire in (torch.float32, torch.bfloat16):
        reshard(megatron_layout(SHAPE, Topology(4, 2, 2), 8), engine_layout(SHAPE, 4, 1), rank, wire)
        reshard(megatron_layout(SHAPE, Topology(4, 2), 32), engine_layout(SHAPE, 4, 2), rank, wire)
    reshard(megatron_layout(SHAPE, Topology(4, 1, 2, 2), 1), engine_layout(SHAPE, 4, 4), rank, torch.bfloat16)


def case_refit(rank: int, num_ranks: int, folder: Path) -> None:
    source, destination = megatron_layout(SHAPE, Topology(4, 2, 2), 8), engine_layout(SHAPE, 4, 1)
    plan = make_plan(source, destination, 2, ROUND_BYTES)
    weights = parameters(source, rank, torch.float32, checkpoint())
    engine = ArrayEngine(parameters(destination, rank, torch.bfloat16))
    refit = Refit(plan, rank, lambda: weights, engine, torch.bfloat16, timeout_s=60)
    receipt = refit(policy_version=5)
    assert (receipt.policy_version, receipt.nbytes, engine.version) == (5, plan.nbytes, 5)
    for tensor in weights.values():
        tensor.mul_(2)
    refit(policy_version=6)
    expected = parameters(destination, rank, torch.bfloat16, {name: 2 * tensor for name, tensor in checkpoint().items()})
    assert all(torch.equal(engine.live[name], expected[name]) for name in expected)
    assert engine.version == 6


def case_export(rank: int, num_ranks: int, folder: Path) -> None:
    source = megatron_layout(SHAPE, Topology(4, 2, 2), 8)
    weights = parameters(source, rank, torch.float32, checkpoint())
    save_hf(folder / "export", folder / "model", SHAPE, source, weights, rank, 4, torch.float32, shard_bytes=8000)
    found = parameters(source, rank, torch.float32)
    load_hf_weights(folder / "export", load_shape(folder / "export"), source, rank, found)
    padding_is_zero = {name: tensor.masked_fill(tensor == -7, 0) for name, tensor in weights.items()}
    assert all(torch.equal(found[name], padding_is_zero[name]) for name in weights)


def case_late(rank: int, num_ranks: int, folder: Path) -> None:
    """Rank 1 stays away."""
    plan = make_plan(megatron_layout(SHAPE, Topology(2, 1, 2), 8), engine_layout(SHAPE, 2, 1), 4, ROUND_BYTES)
    if rank == 1:
        deadline = time.monotonic() + 30
        while not (folder / "done").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return
    source = parameters(plan.source, rank, torch.float32, checkpoint())
    found = parameters(plan.destination, rank, torch.float32)
    with pytest.raises(RefitError) as caught:
        execute(plan.of_rank(rank), source, found, dtype=torch.float32, timeout_s=1)
    assert f"rank 0, round 1 of {len(plan.rounds)}: receiving from rank 1" in str(caught.value)
    assert "more than 1 s" in str(caught.value)
    (folder / "done").touch()


CASES: Mapping[str, Callable[[int, int, Path], None]] = {
    "execute": case_execute,
    "refit": case_refit,
    "export": case_export,
    "late": case_late,
}


def main(rank: int, num_ranks: int, names: str, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=60))
    for name in names.split(","):
        CASES[name](rank, num_ranks, folder)
    if names != "late":
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
