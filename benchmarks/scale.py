"""What every rank does alike, and so grows with ranks, model and samples: planning a refit, packing a step, exchanging rollouts.

    python benchmarks/scale.py            # a minute on one core; --ranks 1024 for the largest

Seconds are CPU time of one process, the median of three where it takes less than a second. docs/scale.md has the figures of one machine.
"""

from __future__ import annotations

import argparse
import pickle
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise

from megatron_r1z.layout.blocks import engine_layout, megatron_layout
from megatron_r1z.layout.known import find_shape
from megatron_r1z.layout.plan import make_plan
from megatron_r1z.layout.topology import Topology
from megatron_r1z.packing import PackingRules, pack
from megatron_r1z.record.tables import align
from megatron_r1z.types import FinishReason, GradedGroup, Group, Prompt, Response, Sample, Verdict, VerdictKind

MODELS = (("Llama-3.1-8B", 2, 1, 2), ("Llama-3.1-70B", 8, 4, 8))
"""Name, tensor and pipeline parallel size of the policy, ranks of an engine."""
MEAN_RESPONSE, BUDGET, PROMPT = 1000, 3000, 160


def main() -> None:
    """Measure and print three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=256, help="most ranks that a refit is planned for")
    parser.add_argument("--samples", type=int, default=4096, help="most samples of a step")
    parser.add_argument("--plan", nargs=5, metavar=("MODEL", "RANKS", "TP", "PP", "ENGINE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plan:
        print(*measure_plan(options.plan[0], *map(int, options.plan[1:])))
        return
    print_plans(options.ranks)
    print_packing(options.samples)
    print_exchange(options.samples)


def print_plans(most: int) -> None:
    """One fresh process for each plan, so that memory is that of one."""
    rows: list[tuple[str, ...]] = [("refit planned", "ranks", "copies", "rounds", "layouts s", "plan s", "a rank's part s", "MiB")]
    for model, tp, pp, engine in MODELS:
        for ranks in (64, 256, 1024, 4096):
            if ranks <= most:
                command = [sys.executable, __file__, "--plan", model, *map(str, (ranks, tp, pp, engine))]
                found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
                rows.append((f"{model} tp{tp} pp{pp} to tp{engine}", str(ranks), *found))
    print("\n".join([*align(rows), ""]), flush=True)


def measure_plan(model: str, ranks: int, tp: int, pp: int, engine: int) -> tuple[str, ...]:
    """Copies, rounds, seconds of layouts, plan and one rank's part, and the process's peak memory."""
    shape = find_shape(model).shape
    clock = [time.process_time()]
    source, destination = megatron_layout(shape, Topology(ranks, tp, pp), 128, "te"), engine_layout(shape, ranks, engine)
    clock.append(time.process_time())
    plan = make_plan(source, destination, 2)
    clock.append(time.process_time())
    plan.of_rank(ranks // 2)
    clock.append(time.process_time())
    copies = len(plan.local) + sum(map(len, plan.rounds))
    seconds = [f"{after - before:.2f}" for before, after in pairwise(clock)]
    return str(copies), str(len(plan.rounds)), *seconds, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)


def print_packing(most: int) -> None:
    """The whole assignment, which every rank computes."""
    rows = [("packing a step", "data-parallel ranks", "s")]
    draw = random.Random(0)
    for count in (128, 1024, 4096, 16384):
        if count <= most:
            samples = [make_sample(draw, index) for index in range(count)]
            for size in (8, 32, 128):
                rules = PackingRules(data_parallel_size=size, micro_batch_tokens=8192)
                seconds = timed(lambda: pack(samples, rules, 0, 0, token_weight=lambda _length: 1.0, denominator=1))  # noqa: B023
                rows.append((f"{count} samples", str(size), f"{seconds:.2f}"))
    print("\n".join([*align(rows), ""]), flush=True)


def print_exchange(most: int) -> None:
    """Graded groups of an iteration, as every rank gets them from all others."""
    rows = [("rollouts exchanged", "tokens", "MB", "packing s", "unpacking s")]
    draw = random.Random(0)
    for count in (1024, 4096, 16384):
        if count <= most:
            groups = [make_group(draw, index) for index in range(count // 8)]
            data = pickle.dumps(groups)
            tokens = sum(len(response.token_ids) for item in groups for response in item.group.responses)
            to, back = timed(lambda: pickle.dumps(groups)), timed(lambda: pickle.loads(data))  # noqa: B023
            rows.append((f"{count} responses", str(tokens), f"{len(data) / 1e6:.0f}", f"{to:.2f}", f"{back:.2f}"))
    print("\n".join(align(rows)), flush=True)


def timed(work: Callable[[], object]) -> float:
    """CPU seconds."""
    found: list[float] = []
    while len(found) < 3 and sum(found) < 3:
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return statistics.median(found)


def response_length(draw: random.Random) -> int:
    """Exponential, cut off."""
    return min(BUDGET, 1 + int(draw.expovariate(1 / MEAN_RESPONSE)))


def make_sample(draw: random.Random, index: int) -> Sample:
    """One row for training."""
    length = response_length(draw)
    return Sample(f"{index}", (7,) * (PROMPT + length), PROMPT, 1.0, 1.0, (-1.0,) * length, 0)


def make_group(draw: random.Random, index: int) -> GradedGroup:
    """A prompt with eight graded responses of different tokens."""
    prompt = Prompt(f"set/{index}", "x" * 700, tuple(draw.randrange(150_000) for _ in range(PROMPT)), ("7",), "set")
    responses = []
    for _ in range(8):
        length = response_length(draw)
        tokens = tuple(draw.randrange(150_000) for _ in range(length))
        responses.append(Response("x" * 4 * length, tokens, tuple(-draw.random() for _ in range(length)), FinishReason.STOP, 0))
    return GradedGroup(Group(index, prompt, tuple(responses)), tuple(Verdict(VerdictKind.WRONG, 0.0, "7") for _ in range(8)))


if __name__ == "__main__":
    main()
