"""One context-parallel rank of `test_local_layers.py`: reads `cases.pt`, leaves `rank_<RANK>.pt`.

Run as `context_ranks.py RANK NUM_RANKS FOLDER`.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_r1z.packing import context_indices
from megatron_r1z.policy.cpu import megatron_device, prepare_process
from megatron_r1z.policy.local_layers import PackedAttention


def main(rank: int, num_ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    prepare_process()
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=600))
    torch.save([attend(case, rank, num_ranks) for case in torch.load(folder / "cases.pt")], folder / f"rank_{rank}.pt")
    dist.destroy_process_group()


def attend(case: dict[str, Any], rank: int, num_ranks: int) -> dict[str, Any]:
    """This rank's part of the output and, for its part of a weighted sum over all outputs, of the gradients."""
    boundaries = torch.tensor([0, *case["lengths"]]).cumsum(0).int()
    longest = max(case["lengths"])
    packed = PackedSeqParams("thd", boundaries, boundaries, boundaries, boundaries, longest, longest)
    layer = PackedAttention(SimpleNamespace(kv_channels=case["inputs"][0].shape[2]), pg_collection=SimpleNamespace(cp=dist.group.WORLD))  # type: ignore[arg-type]
    index = context_indices(boundaries, num_ranks, rank)
    inputs = [item[index].requires_grad_() for item in case["inputs"]]
    with megatron_device():
        output = layer(*inputs, None, packed_seq_params=packed)
        (output * case["weights"][index]).sum().backward()
    return {"index": index, "output": output.detach(), "gradients": [item.grad for item in inputs]}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
