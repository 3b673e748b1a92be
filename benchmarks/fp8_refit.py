"""Time and bytes of a refit into FP8 engines over those of the same refit in bfloat16, in one run.

    python benchmarks/fp8_refit.py                  # one process; two ranks in one machine's memory; two ranks through the process group
    python benchmarks/fp8_refit.py --model FOLDER   # one process, into live vLLM engines of that model

The policy is bfloat16 with random weights; an FP8 refit quantises every matrix of the layers on the rank that holds it, each time anew.
Engines without `--model` are plain arrays in vLLM's layout. Both kinds of refit take turns in the same processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from measuring import run_ranks
from refit import Arrays, live_engine, through_wires, timed
from torch import Tensor

from megatron_r1z.host.shared_memory import SharedCopies
from megatron_r1z.layout.blocks import Layout, engine_layout, megatron_layout
from megatron_r1z.layout.families import ModelShape, load_shape
from megatron_r1z.layout.fp8 import fp8_matrices, fp8_parameters, modules_to_not_convert
from megatron_r1z.layout.topology import Topology
from megatron_r1z.record.tables import align
from megatron_r1z.reshard.quantise import QuantisedSource, plans_by_format
from megatron_r1z.reshard.refit import ROUND_BYTES, Refit

SHAPE = ModelShape("llama", 24, 1024, 8, 4, 128, 3072, 16384, True, False, False, 1e5, None, 1e-5, 8192)
"""Of 0.3 billion elements, 95 % of them in matrices of layers, as in a model of 70 billion."""
WAYS = {"one process": 1, "two ranks, shared memory": 2, "two ranks, process group": 2}
DTYPE = torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of one rank: seconds of the fastest refit, and bytes written over all ranks."""

    bf16_s: float
    fp8_s: float
    quantise_s: float
    """Part of `fp8_s`."""
    bf16_bytes: int
    fp8_bytes: int


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model; one process refits into live engines of it")
    parser.add_argument("--repeats", type=int, default=7, help="refits timed of each kind, of which the fastest counts")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        print(json.dumps(dataclasses.asdict(measure(options))))
        return
    rows = [("way", "bf16 ms", "fp8 ms", "of it quantising", "time ratio", "bytes ratio")]
    rows += [(way, *_cells(measure_way(way))) for way in WAYS if not options.model or way == "one process"]
    print("\n".join([f"{options.model or 'a Llama of 0.3 billion elements'}, 2 threads or ranks", *align(rows)]))


def _cells(figures: list[Figures]) -> tuple[str, ...]:
    """The slower rank decides."""
    bf16, fp8, quantise = (max(getattr(item, name) for item in figures) for name in ("bf16_s", "fp8_s", "quantise_s"))
    ratio = figures[0].fp8_bytes / figures[0].bf16_bytes
    return f"{bf16 * 1e3:.1f}", f"{fp8 * 1e3:.1f}", f"{quantise * 1e3:.1f}", f"{fp8 / bf16:.2f}", f"{ratio:.3f}"


def measure_way(way: str) -> list[Figures]:
    """One way in fresh processes."""
    threads = max(1, len(os.sched_getaffinity(0)) // WAYS[way])
    return [Figures(**json.loads(line)) for line in run_ranks(__file__, [*sys.argv[1:], "--way", way], WAYS[way], threads)]


def measure(options: argparse.Namespace) -> Figures:
    """One rank of one way."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group("gloo")
    num_ranks = WAYS[options.way]
    shape = load_shape(options.model) if options.model else SHAPE
    policy, layout = megatron_layout(shape, Topology(num_ranks, tp=num_ranks), 1), engine_layout(shape, num_ranks, 1)
    generator = torch.Generator().manual_seed(options.rank)
    shared = SharedCopies(
        {name: torch.randn(size, generator=generator).to(DTYPE) for name, size in policy.parameters[options.rank].items()}
    )
    links = through_wires if options.way == "two ranks, process group" else lambda links: links
    times: dict[str, list[float]] = {"bf16": [], "fp8": [], "quantise": []}
    refits, nbytes, source = {}, {}, None
    for name, matrices in (("bf16", frozenset()), ("fp8", fp8_matrices(shape, [policy, layout]))):
        plans = plans_by_format(policy, layout, matrices, DTYPE, ROUND_BYTES["cpu"], num_ranks)
        weights: Any = lambda: shared.tensors  # noqa: E731
        if matrices:
            weights = source = QuantisedSource(weights, fp8_parameters(policy, options.rank, matrices))
        engine = (
            live_engine(options.model, modules_to_not_convert(shape, matrices) if matrices else None)
            if options.model
            else FormatArrays(layout, options.rank, plans)
        )
        refits[name] = Refit(plans, options.rank, weights, engine, links=links)
        nbytes[name] = refits[name](0).nbytes
    for version in range(1, options.repeats + 1):
        for name, refit in refits.items():
            times[name].append(timed(lambda refit=refit, version=version: refit(version)))  # type: ignore[misc]
        times["quantise"].append(timed(source))
    fastest = {name: min(values) for name, values in times.items()}
    return Figures(fastest["bf16"], fastest["fp8"], fastest["quantise"], nbytes["bf16"], nbytes["fp8"])


class FormatArrays(Arrays):
    """An engine that only holds parameters, each in the number format of its plan."""

    def __init__(self, layout: Layout, rank: int, plans: Sequence[tuple[torch.dtype, Any]]) -> None:
        super().__init__(layout, rank)
        self._live: dict[str, Tensor] = {
            name: torch.zeros(size, dtype=dtype) for dtype, plan in plans for name, size in plan.destination.parameters[rank].items()
        }


if __name__ == "__main__":
    main()
