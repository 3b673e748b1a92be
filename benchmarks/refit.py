"""Time and memory of a refit beside a plain copy of the same bytes, and beside gathering whole tensors, in one run.

    python benchmarks/refit.py                     # one process, then two ranks: TP2 to two engines of TP1
    python benchmarks/refit.py --model FOLDER      # one process, into a live vLLM engine of that model

Weights are random, of SmolLM2-135M's shape, bfloat16 on both sides; two ranks take 8 heads and 4 key-value heads, because TP2 cannot split
its 9 and 3. Engines without `--model` are plain arrays in vLLM's layout, so the figures are those of the hand-over alone. The copy is
`copy_` between two sets of tensors of the engine's shapes, by as many ranks and threads; the crossing copy is `copy_` of the boxes that
come from the other rank, out of tensors of this rank that are shaped as the other's. Peak memory is what a rank has at most beyond what
it had before the first refit; memory of the other rank that it has mapped counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from measuring import read_status, reset_peak, run_ranks
from torch import Tensor

from megatron_r1z.config import RolloutConfig
from megatron_r1z.host.shared_memory import SharedCopies
from megatron_r1z.layout.blocks import Box, Layout, box_slices, engine_layout, megatron_layout
from megatron_r1z.layout.families import ModelShape, load_shape
from megatron_r1z.layout.plan import Plan, make_plan
from megatron_r1z.layout.topology import Topology
from megatron_r1z.protocols import Result
from megatron_r1z.record.tables import align
from megatron_r1z.reshard import execute
from megatron_r1z.reshard.digest import Ledger, Piece
from megatron_r1z.reshard.gather import GatheredRefit, WholeTensors
from megatron_r1z.reshard.links import Links, Wire
from megatron_r1z.reshard.moves import Move, bind
from megatron_r1z.reshard.refit import ROUND_BYTES, Refit
from megatron_r1z.rollout.vllm_engine import EngineSettings, VllmEngine
from megatron_r1z.speed import Machine, engine_speed

SMOLLM2 = ModelShape("llama", 30, 576, 9, 3, 64, 1536, 49152, True, False, False, 1e5, None, 1e-5, 8192)
SPLITTABLE = dataclasses.replace(SMOLLM2, num_heads=8, num_kv_heads=4)
DTYPE = torch.bfloat16
"""Of policy, wire and engine."""


class Arrays:
    """An engine that only holds parameters."""

    def __init__(self, layout: Layout, rank: int) -> None:
        self._live = {name: torch.zeros(size, dtype=DTYPE) for name, size in layout.parameters[rank].items()}
        self._blocks = layout.blocks_of(rank)

    def parameters(self) -> Mapping[str, Tensor]:
        """By the names of the layout."""
        return self._live

    def receive(self, write: Callable[[Mapping[str, Tensor]], Result]) -> Result:
        """Let the refit write."""
        return write(self._live)

    def receive_whole(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Cut whole tensors as an engine's loader does."""
        for name, tensor in tensors:
            for block in (block for block in self._blocks if block.tensor == name):
                target = self._live[block.parameter][box_slices(block.local_start, block.size)]
                target.copy_(tensor[box_slices(block.start, block.size)])

    def accept(self, policy_version: int) -> None:
        """Nothing was computed from older weights."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """What one rank measured, seconds and bytes."""

    refit_s: float
    copy_s: float
    """Of all bytes that a refit writes on this rank."""
    crossing_copy_s: float
    """Of the bytes that come from another rank."""
    written: int
    crossing: int
    peak: int


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model; one process refits into a live engine of it")
    parser.add_argument("--repeats", type=int, default=9, help="refits timed, of which the fastest counts")
    parser.add_argument("--round-mb", type=float, default=ROUND_BYTES["cpu"] / 2**20, help="bound of a rank's buffer")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        print(json.dumps(dataclasses.asdict(measure(options))))
        return
    for num_ranks in (1,) if options.model else (1, 2):
        rows = [("way", "refit ms", "copy ms", "ratio", "to the crossing copy", "peak MB a rank")]
        rows += [(way, *_cells(measure_way(num_ranks, way))) for way in WAYS if num_ranks > 1 or way != "process group"]
        print("\n".join([_title(options.model, num_ranks), *align(rows), ""]), flush=True)


WAYS = ("planned", "no digests", "process group", "gathered")
"""As it is; copies and messages alone; without memory that both ranks see; whole tensors on every rank."""


class Blind(Ledger):
    """A ledger that does not look."""

    def enter(self, piece: Piece, size: Box | None = None) -> Tensor | None:
        """Enter a piece; no sum is wanted."""
        super().enter(piece, size)
        return None


def _title(model: str | None, num_ranks: int) -> str:
    what = f"{model}, live engine" if model else "SmolLM2-135M's shape"
    split = "one process" if num_ranks == 1 else "two ranks, TP2 to two engines of TP1"
    return f"{what}, {split}, {max(1, len(os.sched_getaffinity(0)) // num_ranks)} thread(s) a rank, bfloat16"


def _cells(figures: Sequence[Figures]) -> tuple[str, ...]:
    """The slower rank decides."""
    refit, copy, crossing = (max(getattr(item, name) for item in figures) for name in ("refit_s", "copy_s", "crossing_copy_s"))
    return (
        f"{refit * 1e3:.1f}",
        f"{copy * 1e3:.1f}",
        f"{refit / copy:.2f}",
        f"{refit / crossing:.2f}" if crossing else "-",
        f"{max(item.peak for item in figures) / 1e6:.0f}",
    )


def measure_way(num_ranks: int, way: str) -> list[Figures]:
    """One way in fresh processes."""
    arguments = [*sys.argv[1:], "--ranks", str(num_ranks), "--way", way]
    lines = run_ranks(__file__, arguments, num_ranks, max(1, len(os.sched_getaffinity(0)) // num_ranks))
    return [Figures(**json.loads(line)) for line in lines]


def measure(options: argparse.Namespace) -> Figures:
    """One rank of one way."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group("gloo")
    shape = load_shape(options.model) if options.model else SMOLLM2 if options.ranks == 1 else SPLITTABLE
    policy = megatron_layout(shape, Topology(options.ranks, tp=options.ranks), 1)
    layout = engine_layout(shape, options.ranks, 1)
    plan = make_plan(policy, layout, DTYPE.itemsize, int(options.round_mb * 2**20))
    generator = torch.Generator().manual_seed(options.rank)
    shared = SharedCopies(
        {name: torch.randn(size, generator=generator).to(DTYPE) for name, size in policy.parameters[options.rank].items()}
    )
    weights = shared.tensors
    engine: Any = live_engine(options.model) if options.model else Arrays(layout, options.rank)
    others = {name: torch.randn(tensor.shape, generator=generator).to(DTYPE) for name, tensor in engine.parameters().items()}
    written = sum(tensor.nbytes for tensor in others.values())
    crossing = sum(copy.nbytes for copies in plan.rounds for copy in copies if copy.destination_rank == options.rank)
    boxes = crossing_boxes(plan, options.rank, engine.parameters(), generator)
    compile_loop()
    before = reset_peak()
    refit = make_refit(options, shape, policy, plan, weights, engine)
    times: dict[str, list[float]] = {"refit": [], "copy": [], "crossing": []}
    refit(0)
    peak = read_status("VmHWM") - before
    for version in range(1, options.repeats + 1):
        times["refit"].append(timed(lambda version=version: refit(version)))  # type: ignore[misc]
        times["copy"].append(timed(lambda: copy_all(engine.parameters(), others)))
        times["crossing"].append(timed(lambda: copy_boxes(boxes)))
    fastest = {name: min(values) for name, values in times.items()}
    return Figures(fastest["refit"], fastest["copy"], fastest["crossing"] if crossing else 0.0, written, crossing, peak)


def make_refit(
    options: argparse.Namespace, shape: ModelShape, policy: Layout, plan: Plan, weights: Mapping[str, Tensor], engine: Any
) -> Callable[[int], object]:
    """The hand-over to be measured."""
    if options.way == "gathered":
        return GatheredRefit(WholeTensors(shape, policy, options.rank, lambda: weights, DTYPE), engine)
    if options.way == "no digests":
        execute.Ledger = Blind  # type: ignore[misc]
    links = through_wires if options.way == "process group" else lambda links: links
    return Refit([(DTYPE, plan)], options.rank, lambda: weights, engine, links=links)


def through_wires(links: Links) -> Links:
    """Every link through the process group."""
    return Links({peer: Wire(peer, None) for peer in links.seen}, {}, None)


def copy_all(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """A plain copy of an engine's parameters."""
    for name, target in targets.items():
        target.copy_(values[name])


def compile_loop() -> None:
    """So that the memory of the compiler does not count."""
    box = torch.zeros(8, dtype=DTYPE)
    for step in bind([Move(box, box.clone(), None, None, DTYPE)], torch.empty_like):
        step()


def crossing_boxes(plan: Plan, rank: int, live: Mapping[str, Tensor], generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """What comes from other ranks: boxes of the engine's parameters, and of tensors of this rank that are shaped as theirs."""
    theirs: dict[tuple[int, str], Tensor] = {}
    boxes = []
    for copy in (copy for copies in plan.rounds for copy in copies if copy.destination_rank == rank):
        key = copy.source_rank, copy.source_parameter
        if key not in theirs:
            theirs[key] = torch.randn(plan.source.parameters[copy.source_rank][copy.source_parameter], generator=generator).to(DTYPE)
        target = live[copy.destination_parameter][box_slices(copy.destination_start, copy.size)]
        boxes.append((target, theirs[key][box_slices(copy.source_start, copy.size)]))
    return boxes


def copy_boxes(boxes: Sequence[tuple[Tensor, Tensor]]) -> None:
    """A plain copy of what comes from other ranks."""
    for target, value in boxes:
        target.copy_(value)


def timed(work: Callable[[], object]) -> float:
    """Seconds, all ranks starting together."""
    dist.barrier()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def live_engine(model: str, not_in_fp8: Sequence[str] | None = None) -> VllmEngine:
    """A vLLM engine of the shape of a model folder; `not_in_fp8`: see `EngineSettings`."""
    return VllmEngine(
        EngineSettings(
            model_folder=model,
            dtype="bf16",
            rank=0,
            num_ranks=1,
            tensor_parallel_size=1,
            max_model_tokens=load_shape(model).max_positions,
            max_concurrent_sequences=8,
            kv_cache_bytes=64 << 20,
            seed=0,
            speed=engine_speed(RolloutConfig(), load_shape(model).max_positions, Machine(False, False)),
            not_in_fp8=None if not_in_fp8 is None else tuple(not_in_fp8),
        )
    )


if __name__ == "__main__":
    main()
