"""One rank of `test_execute.py`: `ranks.py RANK NUM_RANKS CASE FOLDER`. Asserts on its own share and ends with status 0."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
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
from megatron_r1z.host.shared_memory import SharedCopies
from megatron_r1z.layout.blocks import Layout, engine_layout, megatron_layout
from megatron_r1z.layout.families import ModelShape, hf_tensors, load_shape
from megatron_r1z.layout.plan import make_plan
from megatron_r1z.layout.topology import Topology
from megatron_r1z.protocols import Result
from megatron_r1z.reshard.links import Links, Seen, Wire
from megatron_r1z.reshard.once import execute
from megatron_r1z.reshard.refit import Refit
from megatron_r1z.weights.export import load_hf_weights, save_hf

Replace = Callable[[Links], Links]
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
    """The part of an engine that a refit touches; `version` is None while it would refuse to generate."""

    def __init__(self, live: dict[str, Tensor]) -> None:
        self.live: dict[str, Tensor] = live
        self.version: int | None = None

    def parameters(self) -> Mapping[str, Tensor]:
        return self.live

    def receive(self, write: Callable[[Mapping[str, Tensor]], Result]) -> Result:
        self.version = None
        return write(self.live)

    def accept(self, policy_version: int) -> None:
        self.version = policy_version


def reshard(source: Layout, destination: Layout, rank: int, wire: torch.dtype) -> None:
    """From fp32 weights to `wire`; bits must be those of one rounding."""
    plan = make_plan(source, destination, wire.itemsize, ROUND_BYTES)
    found = parameters(destination, rank, wire)
    done = execute(plan.of_rank(rank), parameters(source, rank, torch.float32, checkpoint()), found, dtype=wire, timeout_s=600)
    expected = parameters(destination, rank, wire, checkpoint())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert done.nbytes == sum(math.prod(block.size) for block in destination.blocks_of(rank)) * wire.itemsize


def case_execute(rank: int, num_ranks: int, folder: Path) -> None:
    for wire in (torch.float32, torch.bfloat16):
        reshard(megatron_layout(SHAPE, Topology(4, 2, 2), 8), engine_layout(SHAPE, 4, 1), rank, wire)
        reshard(megatron_layout(SHAPE, Topology(4, 2), 32), engine_layout(SHAPE, 4, 2), rank, wire)
    reshard(megatron_layout(SHAPE, Topology(4, 1, 2, 2), 1), engine_layout(SHAPE, 4, 4), rank, torch.bfloat16)


def unchanged(links: Links) -> Links:
    return links


def make_refit(
    rank: int, num_ranks: int, links: Replace = unchanged, timeout_s: float = 600, policy: torch.dtype = torch.float32
) -> tuple[Refit, ArrayEngine, dict[str, Tensor]]:
    """Tensor and pipeline parallel policy in memory that all ranks see, engines of one rank, rounds of a few kilobytes."""
    source = megatron_layout(SHAPE, Topology(num_ranks, 2, num_ranks // 2), 8)
    destination = engine_layout(SHAPE, num_ranks, 1)
    shared = SharedCopies(parameters(source, rank, policy, checkpoint()))
    KEPT.append(shared)
    engine = ArrayEngine(parameters(destination, rank, torch.bfloat16))
    plan = make_plan(source, destination, 2, ROUND_BYTES)
    return Refit([(torch.bfloat16, plan)], rank, lambda: shared.tensors, engine, timeout_s=timeout_s, links=links), engine, shared.tensors


KEPT: list[SharedCopies] = []
"""Others see what is in here."""


def through_wires(links: Links) -> Links:
    assert not links.wires  # ranks of one machine see each other's memory
    return Links({peer: Wire(peer, None) for peer in links.seen}, {}, None)


def case_refit(rank: int, num_ranks: int, folder: Path) -> None:
    receipts = []
    for links, policy in itertools.product((unchanged, through_wires), (torch.float32, torch.bfloat16)):
        refit, engine, weights = make_refit(rank, num_ranks, links, policy=policy)
        for policy_version, factor in ((5, 1), (6, 2)):
            for tensor in weights.values() if factor == 2 else ():
                tensor.mul_(2)
            receipt = refit(policy_version)
            scaled = {name: factor * tensor for name, tensor in checkpoint().items()}
            expected = parameters(engine_layout(SHAPE, num_ranks, 1), rank, torch.bfloat16, scaled)
            assert all(torch.equal(engine.live[name], expected[name]) for name in expected)
            assert (receipt.policy_version, engine.version) == (policy_version, policy_version)
            assert receipt.nbytes == num_ranks * 2 * sum(spec.numel for spec in hf_tensors(SHAPE))
            assert len(receipt.round_seconds) > 2 if links is through_wires else len(receipt.round_seconds) == 1
            assert min(receipt.round_seconds) >= 0
            receipts.append(receipt)
    assert all(receipt.digests == receipts[index % 2].digests for index, receipt in enumerate(receipts))
    assert receipts[0].digests != receipts[1].digests
    assert [group for group, _ in receipts[0].digests] == [
        "model.embed_tokens.weight",
        *(f"model.layers.{layer}" for layer in range(SHAPE.num_layers)),
        "model.norm.weight",
    ]


# --- what can go wrong ---


class Broken:
    """A wire that does something wrong when it has sent `good` messages."""

    def __init__(self, wire: Wire, fault: Callable[[Tensor], None], good: int = 0) -> None:
        self._wire, self._fault, self._good = wire, fault, good
        self.receive = wire.receive

    def send(self, packed: Tensor) -> dist.P2POp:
        if self._good == 0:
            self._fault(packed)
        self._good -= 1
        return self._wire.send(packed)


class BrokenView:
    """Another rank's parameters, of which one is not seen as it is."""

    def __init__(self, seen: Seen, fault: Callable[[Tensor], None]) -> None:
        self._seen, self._fault = seen, fault

    def parameters(self, timeout_s: float) -> Mapping[str, Tensor]:
        found = dict(self._seen.parameters(timeout_s))
        name = next(name for name in found if name.endswith("mlp.linear_fc2.weight"))
        found[name] = found[name].clone()
        self._fault(found[name].view(torch.uint8).view(-1))
        return found


def flip(content: Tensor) -> None:
    content[content.numel() // 2] ^= 16


def broken(rank: int, fault: Callable[[Tensor], None], good: int = 1) -> Replace:
    """Rank 1's wire to rank 0 breaks at its second message."""

    def replace(links: Links) -> Links:
        links = through_wires(links)
        if rank != 1:
            return links
        return links._replace(wires={**links.wires, 0: Broken(links.wires[0], fault, good)})  # type: ignore[dict-item]

    return replace


def misseen(rank: int, fault: Callable[[Tensor], None]) -> Replace:
    """Rank 0 sees something else than rank 1 has."""

    def replace(links: Links) -> Links:
        return links if rank != 0 else links._replace(seen={**links.seen, 1: BrokenView(links.seen[1], fault)})  # type: ignore[dict-item]

    return replace


def case_flipped(rank: int, num_ranks: int, folder: Path) -> None:
    for fault in (broken(rank, flip), misseen(rank, flip)):
        refit, engine, _ = make_refit(rank, num_ranks, fault, policy=torch.bfloat16)
        with pytest.raises(RefitError) as caught:
            refit(policy_version=5)
        sentence = (
            r"refit 5: model\.\S+ \[.*\] of rank 1 \(sum \w{16}\) arrived on rank 0 in round \d+ of \d+ as model\.\S+ \[.*\] "
            r"\(sum \w{16}\); 1 of \d+ tensors differ from the source's. Restart from the last checkpoint"
        )
        assert re.search(sentence, str(caught.value)), caught.value
        assert engine.version is None


def case_dropped(rank: int, num_ranks: int, folder: Path) -> None:
    """A rank leaves out one step of writing what arrived; then a plan that lacks a block on both sides."""
    refit, engine, _ = make_refit(rank, num_ranks, through_wires)
    refit(policy_version=1)
    if rank == 1:
        refit._parts[0].executor._program.rounds[-1].unpack.clear()
    with pytest.raises(RefitError, match=r"arrived on rank 1 in round \d+ of \d+ as .*; \d+ of \d+ tensors differ"):
        refit(policy_version=2)
    assert engine.version is None
    plan = make_plan(megatron_layout(SHAPE, Topology(num_ranks, 2, num_ranks // 2), 8), engine_layout(SHAPE, num_ranks, 1), 2, ROUND_BYTES)
    short = dataclasses.replace(plan, rounds=(*plan.rounds[:-1], plan.rounds[-1][1:]))
    refit = Refit(
        [(torch.bfloat16, short)], rank, lambda: parameters(plan.source, rank, torch.bfloat16, checkpoint()), engine, timeout_s=60
    )
    with pytest.raises(RefitError, match=r"refit 3 wrote \d+ of \d+ bytes; restart from the last checkpoint"):
        refit(policy_version=3)


def case_misplaced(rank: int, num_ranks: int, folder: Path) -> None:
    """A plan that takes a block from the wrong place, and the same on its way in: sender and receiver agree, the layouts do not."""
    _, engine, weights = make_refit(rank, num_ranks)
    plan = make_plan(megatron_layout(SHAPE, Topology(num_ranks, 2, num_ranks // 2), 8), engine_layout(SHAPE, num_ranks, 1), 2, ROUND_BYTES)
    name = "model.layers.0.self_attn.k_proj.bias"
    for change in (lambda copy: {"source_start": (copy.source_start[0] - 4,)}, lambda copy: {"destination_start": (0,)}):
        rounds = tuple(tuple(copy._replace(**change(copy)) if copy.tensor == name else copy for copy in copies) for copies in plan.rounds)
        assert rounds != plan.rounds
        wrong = Refit([(torch.bfloat16, dataclasses.replace(plan, rounds=rounds))], rank, lambda: weights, engine, timeout_s=600)
        with pytest.raises(
            RefitError, match=r"model.layers.0.self_attn.\w_proj.bias \[\d+\] of rank \d .* arrived on rank \d .* as model.layers.0"
        ):
            wrong(policy_version=1)
        assert engine.version is None


def case_dead(rank: int, num_ranks: int, folder: Path) -> None:
    """Rank 1 ends in the middle; whoever waits for it says so at once: there is no time to wait for more than it."""
    fail_in_the_middle(rank, num_ranks, lambda: os._exit(0), timeout_s=7200, sentence=r"rank \d[,:] (round \d+ of \d+)?.*more than 7200 s")


def case_slow(rank: int, num_ranks: int, folder: Path) -> None:
    """Rank 1 falls asleep in the middle until the others have given up."""

    def sleep() -> None:
        while not (folder / "done").exists():
            time.sleep(0.05)
        os._exit(0)

    sentence = r"rank 0, round \d+ of \d+: receiving model\.\S+( and \d+ more blocks)? from rank 1 failed or took more than 1 s"
    fail_in_the_middle(rank, num_ranks, sleep, timeout_s=1, sentence=sentence if rank == 0 else "")
    (folder / "done").touch()


def fail_in_the_middle(rank: int, num_ranks: int, fault: Callable[[], None], timeout_s: float, sentence: str) -> None:
    """Two ranks fail at a message, four before they show their parameters."""
    links = broken(rank, lambda packed: fault()) if num_ranks == 2 else unchanged
    refit, engine, _ = make_refit(rank, num_ranks, links, timeout_s=timeout_s)
    if num_ranks == 4 and rank == 1:
        refit._parts[0].executor._links.window.open = lambda parameters: fault()  # type: ignore[union-attr,method-assign,assignment]
    with pytest.raises(RefitError) as caught:
        refit(policy_version=5)
    assert re.search(f"refit: {sentence}", str(caught.value)), caught.value
    assert engine.version is None


def case_export(rank: int, num_ranks: int, folder: Path) -> None:
    source = megatron_layout(SHAPE, Topology(4, 2, 2), 8)
    weights = parameters(source, rank, torch.float32, checkpoint())
    save_hf(folder / "export", folder / "model", SHAPE, source, weights, rank, 4, torch.float32, shard_bytes=8000)
    found = parameters(source, rank, torch.float32)
    load_hf_weights(folder / "export", load_shape(folder / "export"), source, rank, found)
    padding_is_zero = {name: tensor.masked_fill(tensor == -7, 0) for name, tensor in weights.items()}
    assert all(torch.equal(found[name], padding_is_zero[name]) for name in weights)


def case_late(rank: int, num_ranks: int, folder: Path) -> None:
    """Rank 1 stays away until rank 0 has given up."""
    plan = make_plan(megatron_layout(SHAPE, Topology(2, 1, 2), 8), engine_layout(SHAPE, 2, 1), 4, ROUND_BYTES)
    if rank == 1:
        while not (folder / "done").exists():
            time.sleep(0.05)
        return
    source = parameters(plan.source, rank, torch.float32, checkpoint())
    found = parameters(plan.destination, rank, torch.float32)
    with pytest.raises(RefitError) as caught:
        execute(plan.of_rank(rank), source, found, dtype=torch.float32, timeout_s=1)
    assert f"rank 0, round 1 of {len(plan.rounds)}: receiving model." in str(caught.value)
    assert " from rank 1 failed" in str(caught.value)
    assert "more than 1 s" in str(caught.value)
    (folder / "done").touch()


CASES: Mapping[str, Callable[[int, int, Path], None]] = {
    "execute": case_execute,
    "refit": case_refit,
    "flipped": case_flipped,
    "dropped": case_dropped,
    "misplaced": case_misplaced,
    "dead": case_dead,
    "slow": case_slow,
    "export": case_export,
    "late": case_late,
}


def main(rank: int, num_ranks: int, names: str, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=600))
    for name in names.split(","):
        CASES[name](rank, num_ranks, folder)
    if names in ("dead", "slow"):
        os._exit(0)  # the process group cannot be ended in order
    if names != "late":
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
