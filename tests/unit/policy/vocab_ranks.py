"""One tensor-parallel rank of `test_logprob.py`: `vocab_ranks.py RANK NUM_RANKS FOLDER` reads `cases.pt` and leaves `rank_<RANK>.pt`."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_r1z.policy.logprob import vocab_parallel_logprobs


def main(rank: int, num_ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=600))
    results = []
    for case in torch.load(folder / "cases.pt"):
        rows = case["weight"].shape[0] // num_ranks
        hidden = case["hidden"].requires_grad_()
        weight = case["weight"][rank * rows : (rank + 1) * rows].clone().requires_grad_()
        logprobs, entropy = vocab_parallel_logprobs(
            hidden,
            weight,
            case["targets"],
            temperature=case["temperature"],
            vocab_size=case["vocab_size"],
            vocab_start=rank * rows,
            group=dist.group.WORLD,
            tile_bytes=case["tile_bytes"],
        )
        alone = (logprobs * case["factors"]).sum()
        both = alone + (entropy * case["entropy_factors"]).sum()
        names = ("hidden", "weight", "hidden_of_both", "weight_of_both")
        gradients = (*torch.autograd.grad(alone, [hidden, weight], retain_graph=True), *torch.autograd.grad(both, [hidden, weight]))
        results.append({"logprobs": logprobs.detach(), "entropy": entropy.detach(), **dict(zip(names, gradients, strict=True))})
    torch.save(results, folder / f"rank_{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
