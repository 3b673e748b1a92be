"""The one rank of `test_checkpoint_specs.py`: `checkpoint_ranks.py RANK NUM_RANKS FOLDER` saves and loads weights over layer specs.

Modules of Transformer Engine's spec are played by ours with extra state: its norms have one under a name that the local spec lacks, and
its linear layers have bytes where the local ones have nothing. Names of weights are the same in both, by megatron-core's own mapping.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from megatron_r1z.config import ParallelConfig, PrecisionConfig
from megatron_r1z.layout.families import ModelShape
from megatron_r1z.layout.topology import Topology
from megatron_r1z.policy.fp8_linear import Fp8ColumnParallelLinear, Fp8RowParallelLinear
from megatron_r1z.policy.local_layers import RMSNorm
from megatron_r1z.policy.parallel import start_megatron
from megatron_r1z.policy.policy import MegatronPolicy
from megatron_r1z.weights.checkpoint import load_weights, save_weights

SHAPE = ModelShape("qwen3", 2, 128, 1, 1, 128, 128, 311, False, False, True, 1e4, None, 1e-6, 512)
BYTES = torch.arange(5, dtype=torch.uint8)


def main(rank: int, num_ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=600))
    start_megatron(Topology(num_ranks), seed=0)
    results = {}
    for saver, loader in (("local", "te"), ("te", "local"), ("te", "te")):
        taken: list[object] = []
        with_spec(saver, lambda kind=saver: save(folder / f"{kind}", seed=1), [])
        results[f"{saver}-{loader}"] = with_spec(loader, lambda kind=saver: load(folder / f"{kind}"), taken), taken
    torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


def make_policy(seed: int) -> MegatronPolicy:
    settings = SimpleNamespace(model=None, parallel=ParallelConfig(), precision=PrecisionConfig(policy="fp8"))
    policy = MegatronPolicy(settings, SHAPE, Topology(1), padded_vocab_size=311)
    generator = torch.Generator().manual_seed(seed)
    for tensor in policy.parameters().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return policy


def save(folder: Path, seed: int) -> None:
    save_weights(folder, make_policy(seed), {})


def load(folder: Path) -> bool:
    """Whether a policy of other weights has those of the checkpoint afterwards."""
    policy, wanted = make_policy(seed=2), make_policy(seed=1).parameters()
    load_weights(folder, policy)
    return all(torch.equal(tensor, wanted[name]) for name, tensor in policy.parameters().items())


def with_spec(kind: str, action: Callable[[], object], taken: list[object]) -> object:
    """Inside, norms and linear layers have the extra state of their kind; `taken` gets what they are given."""
    if kind == "local":
        return action()
    kinds = (RMSNorm, Fp8ColumnParallelLinear, Fp8RowParallelLinear)
    for module in kinds:
        module.get_extra_state = lambda _self: BYTES
        module.set_extra_state = lambda _self, state: taken.append(state)
    try:
        return action()
    finally:
        for module in kinds:
            del module.get_extra_state, module.set_extra_state


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
