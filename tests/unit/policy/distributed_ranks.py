"""One data-parallel rank of `test_trained.py`: `distributed_ranks.py RANK NUM_RANKS FOLDER` trains, saves, loads and goes on.

Leaves `rank_<RANK>.pt` with the weights of a policy that was never stopped, of one that was loaded, of one that was loaded under another
learning rate, and of one with more rows of padding in its vocabulary, behind the step that follows; by the optimizer of a GPU
(`fused_adam.py`) and by torch's.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1z.config import OptimizerConfig, ParallelConfig, PrecisionConfig
from megatron_r1z.layout.families import ModelShape
from megatron_r1z.layout.topology import Topology
from megatron_r1z.packing import pack
from megatron_r1z.policy.parallel import start_megatron
from megatron_r1z.policy.policy import MegatronPolicy, TrainBatch
from megatron_r1z.pretrain import NEXT_TOKEN_LOSS
from megatron_r1z.types import Sample
from megatron_r1z.weights.checkpoint import Checkpoints

sys.path.insert(0, str(Path(__file__).parent))
from fused_adam import take_the_place_of_transformer_engines

SHAPE = ModelShape("qwen2", 2, 64, 2, 1, 32, 96, 128, False, True, False, 1e4, None, 1e-6, 512)
OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.1)


def main(rank: int, num_ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=60))
    start_megatron(Topology(num_ranks), seed=0)
    results = {"whole": results_of(folder / "whole", distributed=False)}
    take_the_place_of_transformer_engines()
    results["distributed"] = results_of(folder / "distributed", distributed=True)
    torch.save(results, folder / f"rank_{rank}.pt")
    dist.destroy_process_group()


def results_of(folder: Path, *, distributed: bool) -> dict[str, dict[str, Tensor]]:
    checkpoints, config = Checkpoints(folder, keep=2), dataclasses.replace(OPTIMIZER, distributed=distributed)
    trained = make_policy(config, seed=1)
    for number in (1, 2):
        take_step(trained, number)
    path = checkpoints.save(2, trained, {"saved": "so far"})
    assert path is not None
    saved = weights_of(trained)
    take_step(trained, 3)
    loaded = make_policy(config, seed=2)
    assert checkpoints.load(path, loaded) == {"saved": "so far"}
    found = {"saved": saved, "loaded": weights_of(loaded)}
    take_step(loaded, 3)
    slower = make_policy(dataclasses.replace(config, lr=1e-3), seed=2)
    checkpoints.load(path, slower)
    take_step(slower, 3)
    wider = make_policy(config, seed=2, padding=64)
    checkpoints.load(path, wider)
    take_step(wider, 3)
    found["more padding"] = weights_of(wider)
    return found | {"never stopped": weights_of(trained), "gone on": weights_of(loaded), "slower": weights_of(slower)}


def make_policy(config: OptimizerConfig, seed: int, padding: int = 0) -> MegatronPolicy:
    settings = SimpleNamespace(
        model=None, parallel=ParallelConfig(num_ranks=dist.get_world_size()), precision=PrecisionConfig(policy="bf16")
    )
    policy = MegatronPolicy(settings, SHAPE, settings.parallel.topology, padded_vocab_size=SHAPE.vocab_size + padding)
    generator = torch.Generator().manual_seed(seed)
    for tensor in policy.parameters().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) / 8)
    policy.start_training(NEXT_TOKEN_LOSS, config)
    return policy


def take_step(policy: MegatronPolicy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    samples = [
        Sample(f"0/{number}", tuple(torch.randint(SHAPE.vocab_size, (24,), generator=generator).tolist()), 8, 1.0, 1.0, (0.0,) * 16, 0)
        for number in range(4)
    ]
    batch = pack(samples, policy.packing_rules(), dist.get_rank(), 0, token_weight=lambda _length: 1.0, denominator=64)
    policy.update(TrainBatch(batch))


def weights_of(policy: MegatronPolicy) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in policy.parameters().items()}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
