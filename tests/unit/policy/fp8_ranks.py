"""One tensor-parallel rank of `test_fp8_linear.py`: `fp8_ranks.py RANK NUM_RANKS FOLDER` reads `case.pt` and leaves `rank_<RANK>.pt`."""

from __future__ import annotations

import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_r1z.errors import TrainingError
from megatron_r1z.layout.topology import Topology
from megatron_r1z.policy.cpu import megatron_device
from megatron_r1z.policy.fp8_linear import Fp8ColumnParallelLinear, Fp8RowParallelLinear
from megatron_r1z.policy.fp8_state import check_same_number
from megatron_r1z.policy.parallel import start_megatron


@megatron_device()
def main(rank: int, num_ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=600))
    start_megatron(Topology(num_ranks, tp=num_ranks), seed=0)
    case = torch.load(folder / "case.pt")
    results = {flag: step(case, rank, num_ranks, flag) for flag in (False, True)}
    check_same_number(3, torch.device("cpu"))
    try:
        check_same_number(3 + rank, torch.device("cpu"))
    except TrainingError as error:
        torch.save(results | {"refusal": str(error)}, folder / f"rank_{rank}.pt")
    dist.destroy_process_group()


def step(case: dict[str, Tensor], rank: int, num_ranks: int, sequence_parallel: bool) -> dict[str, Tensor]:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=256,
        num_attention_heads=2,
        tensor_model_parallel_size=num_ranks,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    options = {"config": config, "init_method": torch.nn.init.zeros_}
    first = Fp8ColumnParallelLinear(256, 512, **options, bias=True, gather_output=False)
    second = Fp8RowParallelLinear(512, 256, **options, bias=False, input_is_parallel=True, skip_bias_add=True)
    rows = slice(rank * 256, (rank + 1) * 256)
    with torch.no_grad():
        first.weight.copy_(case["first"][rows])
        first.bias.copy_(case["bias"][rows])
        second.weight.copy_(case["second"][:, rows])
    tokens = slice(rank * 32, (rank + 1) * 32) if sequence_parallel else slice(None)
    inputs = case["inputs"][tokens].clone().requires_grad_()
    output, _ = second(first(inputs)[0])
    output.backward(case["gradient"][tokens])
    return {
        "output": output.detach(),
        "inputs": inputs.grad,
        "first": first.weight.grad,
        "bias": first.bias.grad,
        "second": second.weight.grad,
    }


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
