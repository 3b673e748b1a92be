"""One rank of `test_step.py`: `figure_ranks.py RANK NUM_RANKS FOLDER` reads `values_<RANK>.pt` and leaves `rank_<RANK>.pt`."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_r1z.policy.step import largest_values


def main(rank: int, num_ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=600))
    cases = torch.load(folder / f"values_{rank}.pt")
    torch.save([largest_values(values, count) for values, count in cases], folder / f"rank_{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
