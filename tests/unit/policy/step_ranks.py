"""One rank of `test_figures.py`: `step_ranks.py RANK NUM_RANKS FOLDER` reads `steps.pt` and leaves `stats_<RANK>.pt`.

The figures of optimizer steps as policy and critic make them, from log-probs and values that come from a table and from no model.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1z.config import AlgorithmConfig
from megatron_r1z.layout.topology import Topology
from megatron_r1z.objective import make_loss
from megatron_r1z.packing import MicroBatch, PackingRules, pack
from megatron_r1z.policy import critic, policy, step
from megatron_r1z.policy.parallel import start_megatron
from megatron_r1z.policy.trained import Taken
from megatron_r1z.types import Sample, UpdateStats, ValueStats

ALGORITHM = AlgorithmConfig(iterations=1, tis_cap=1.1, dual_clip=1.3, kl_coef=0.1)
VALUE_CLIP = 0.2
BUDGET = 40


@dataclass(frozen=True)
class Told:
    """Of the response tokens of a sample."""

    current: Tensor
    old: Tensor
    reference: Tensor
    entropy: Tensor
    values: Tensor
    """The critic's at the step."""


Table = Mapping[str, Told]


def stats_of(samples: Sequence[Sample], table: Table, rank: int, num_ranks: int) -> tuple[UpdateStats, ValueStats]:
    """What a step over `samples` leaves, on ranks that split them."""
    rules = PackingRules(num_ranks, BUDGET)
    batch = pack(samples, rules, rank, 0, token_weight=lambda _length: 1.0, denominator=100)
    taken = Taken(grad_norm=float(len(samples)), learning_rate=1e-3, skipped=False)
    loss = make_loss(ALGORITHM)
    parts, value_parts = [], []
    for item in batch.micro_batches:
        work = step.Work(item, told(table, item, "old"), told(table, item, "reference"))
        output = torch.stack([told(table, item, "current"), told(table, item, "entropy")])
        parts.append(step._micro_batch_loss(loss, work, output)[2])
        value_parts.append(critic._micro_batch_loss(item, VALUE_CLIP, told(table, item, "values"))[2])
    sums = critic.ValueSums(*step.sum_over_ranks([part.sums for part in value_parts], len(fields(critic.ValueSums))))
    return policy._stats(step._reduce(parts), batch.denominator, taken), critic._stats(sums, batch.denominator, taken, ())


def told(table: Table, batch: MicroBatch, name: str) -> Tensor:
    return torch.cat([torch.zeros(0), *(getattr(table[sample_id], name) for sample_id in batch.sample_ids)])


def main(rank: int, num_ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=60))
    start_megatron(Topology(num_ranks), seed=0)
    steps, table = torch.load(folder / "steps.pt", weights_only=False)
    table = {name: Told(*parts) for name, parts in table.items()}
    torch.save([stats_of(samples, table, rank, num_ranks) for samples in steps], folder / f"stats_{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
