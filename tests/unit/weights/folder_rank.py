"""The rank of `test_model_folder.py`: `folder_rank.py RANK NUM_RANKS FOLDER` leaves the policy's log-probs of TOKENS for each model folder.

`FOLDER/*/config.json` are the models; `logprobs.pt` maps the name of each to float32 [tokens - 1].
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_r1z.assemble import make_policy, plan_weights
from megatron_r1z.config import AlgorithmConfig, ModelConfig, OptimizerConfig, ParallelConfig, PrecisionConfig
from megatron_r1z.objective import make_loss
from megatron_r1z.packing import pack
from megatron_r1z.policy.cpu import prepare_process
from megatron_r1z.types import Sample

TOKENS = tuple(range(2, 38))


@dataclass(frozen=True)
class Settings:
    """Of `plan_weights` and `make_policy`."""

    model: ModelConfig
    parallel: ParallelConfig
    precision: PrecisionConfig


def main(rank: int, num_ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    prepare_process()
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    found = {path.parent.name: logprobs_of(path.parent) for path in sorted(folder.glob("*/config.json"))}
    torch.save(found, folder / "logprobs.pt")
    dist.destroy_process_group()


def logprobs_of(model: Path) -> torch.Tensor:
    """Of TOKENS behind the first, by the policy as a run builds it."""
    config = Settings(ModelConfig(path=str(model)), ParallelConfig(), PrecisionConfig(policy="fp32", engine="fp32"))
    policy = make_policy(config, plan_weights(config))
    policy.start_training(make_loss(AlgorithmConfig(iterations=1)), OptimizerConfig())
    count = len(TOKENS) - 1
    sample = Sample("0/0", TOKENS, 1, 1.0, 1.0, (0.0,) * count, 0)
    batch = pack([sample], policy.packing_rules(), 0, 0, token_weight=lambda _: 1.0, denominator=1)
    (logprobs,) = policy.response_logprobs(batch.micro_batches)
    assert logprobs is not None
    parallel_state.destroy_model_parallel()
    return logprobs.detach().clone()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
