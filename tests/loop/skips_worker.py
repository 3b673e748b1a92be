"""One rank of `test_skips.py`: steps whose loss or gradient is not finite between steps that are in order, under every layout.

Run by torchrun with a folder that holds a model and `layouts.json`; leaves `rank_N.pt` (what came out, by layout).
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_r1z.config import ModelConfig, OptimizerConfig, ParallelConfig, PrecisionConfig
from megatron_r1z.layout.blocks import megatron_layout, padded_vocab_size
from megatron_r1z.layout.families import load_shape
from megatron_r1z.objective import Loss, PolicyTokens, TokenLosses, clipped_losses
from megatron_r1z.packing import GlobalBatch, MicroBatch, pack
from megatron_r1z.policy.parallel import start_megatron, start_process_group
from megatron_r1z.policy.policy import MegatronPolicy, TrainBatch
from megatron_r1z.policy.trained import Taken
from megatron_r1z.types import Sample

NO_FINITE_GRADIENT = 0.875
"""The advantage whose tokens have a finite loss and a gradient that is none."""


@dataclasses.dataclass(frozen=True)
class Settings:
    model: ModelConfig
    parallel: ParallelConfig
    precision: PrecisionConfig


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    start_process_group(300)
    layouts = json.loads((folder / "layouts.json").read_text())
    results = {name: try_layout(str(folder), *layout) for name, layout in layouts.items()}
    torch.save(results, folder / f"rank_{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


def try_layout(model: str, parallel: dict[str, Any], optimizer: dict[str, Any], precision: str) -> dict[str, Any]:
    """Two steps in order, with bad ones between them and without; and a step whose gradient is 0, for what weight decay does."""
    config = ParallelConfig(num_ranks=dist.get_world_size(), micro_batch_tokens=64, **parallel)
    settings = Settings(ModelConfig(path=model), config, PrecisionConfig(policy=precision))
    start_megatron(config.topology, seed=1)
    broken = make_policy(settings, OptimizerConfig(lr=1e-3, warmup_steps=4, weight_decay=0.5, **optimizer))
    unbroken = make_policy(settings, OptimizerConfig(lr=1e-3, warmup_steps=4, weight_decay=0.5, **optimizer))
    spoiled = make_policy(settings, OptimizerConfig(lr=1e-3, warmup_steps=4, weight_decay=0.5, **optimizer))
    decayed = make_policy(settings, OptimizerConfig(lr=0.25, weight_decay=0.5, **optimizer))
    before = copy(decayed)
    results = {
        "culprit": make_samples({})[3].sample_id,
        "broken": [step(broken, advantages) for advantages in ({}, {3: math.inf}, {2: NO_FINITE_GRADIENT}, {})],
        "unbroken": [step(unbroken, {}) for _ in range(2)],
        "spoiled": [step(spoiled, {}, spoil) for spoil in (None, infinite_element, overflowing_norm, None)],
        "spoiled_weights": all(torch.equal(one, other) for one, other in zip(copy(spoiled).values(), copy(unbroken).values(), strict=True)),
        "same_weights": all(torch.equal(one, other) for one, other in zip(copy(broken).values(), copy(unbroken).values(), strict=True)),
        "decay": [step(decayed, dict.fromkeys(range(8), 0.0))],
        "weights": {name: (tensor, before[name]) for name, tensor in copy(decayed).items()},
    }
    parallel_state.destroy_model_parallel()
    return results


def make_policy(settings: Settings, optimizer: OptimizerConfig) -> MegatronPolicy:
    shape, topology = load_shape(settings.model.path), settings.parallel.topology
    padded = padded_vocab_size(shape.vocab_size, topology.tp)
    policy = MegatronPolicy(settings, shape, topology, padded_vocab_size=padded)
    assert set(policy.parameters()) == set(megatron_layout(shape, topology, 1).parameters[dist.get_rank()])
    for index, (name, tensor) in enumerate(sorted(policy.parameters().items())):
        generator = torch.Generator().manual_seed(index)
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1 + ("norm" in name))
    policy.start_training(Loss(terms_of), optimizer)
    return policy


def terms_of(tokens: PolicyTokens, batch: MicroBatch) -> TokenLosses:
    logprobs_R = tokens.logprobs_R
    terms = clipped_losses(logprobs_R, tokens.old_logprobs_R, batch.advantages_R, batch.weights_R, 0.2, 0.2)
    marked_R = batch.advantages_R == NO_FINITE_GRADIENT
    steep = torch.where(marked_R, logprobs_R - logprobs_R.detach(), torch.ones(())).sqrt()  # sqrt(0), whose slope is infinite
    return dataclasses.replace(terms, losses_R=torch.where(marked_R, steep, terms.losses_R))


def step(policy: MegatronPolicy, advantages: dict[int, float], spoil: Callable[[Tensor], None] | None = None) -> dict[str, Any]:
    """A step; `spoil` changes the accumulated gradient of every tensor on rank 0 before the optimizer sees it."""
    take_step = policy.take_step

    def spoiled(loss: float) -> Taken:
        for chunk in policy.model.chunks if spoil is not None and dist.get_rank() == 0 else ():
            for parameter in chunk.parameters():
                spoil(parameter.main_grad)
        return take_step(loss)

    policy.take_step = spoiled  # type: ignore[method-assign]
    try:
        return dataclasses.asdict(policy.update(TrainBatch(make_batch(policy, advantages))))
    finally:
        policy.take_step = take_step  # type: ignore[method-assign]


def infinite_element(gradient: Tensor) -> None:
    gradient.view(-1)[0] = math.inf


def overflowing_norm(gradient: Tensor) -> None:
    """Every element is finite, and the sum of their squares is not in float32."""
    gradient.fill_(1e25)


def make_samples(advantages: dict[int, float]) -> list[Sample]:
    draw = random.Random(0)
    samples = []
    for index in range(8):
        tokens = tuple(draw.randrange(1, 64) for _ in range(draw.randint(5, 30)))
        sample = Sample(f"0/{index}", tokens, 3, advantages.get(index, draw.choice((-0.5, 0.5))), 1.0, (-1.0,) * (len(tokens) - 3), 0)
        samples.append(sample)
    return samples


def make_batch(policy: MegatronPolicy, advantages: dict[int, float]) -> GlobalBatch:
    where = policy.topology.coordinates(dist.get_rank())
    samples = make_samples(advantages)
    return pack(samples, policy.packing_rules(), where.dp_rank, where.cp_rank, token_weight=lambda _length: 1.0, denominator=100)


def copy(policy: MegatronPolicy) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in policy.parameters().items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
