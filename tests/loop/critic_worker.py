"""One rank of `test_critic.py`: the critic takes steps under every layout, is saved between them and goes on as another one.

Run by torchrun with a folder: `tasks.pt` in, `results.pt` (a result per layout) out.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_r1z.config import AlgorithmConfig, ModelConfig, OptimizerConfig, ParallelConfig, PrecisionConfig
from megatron_r1z.layout.blocks import Layout, megatron_layout, padded_vocab_size
from megatron_r1z.layout.families import load_shape
from megatron_r1z.objective import AGGREGATIONS, make_loss
from megatron_r1z.packing import GlobalBatch, pack
from megatron_r1z.policy.critic import HEAD, MegatronCritic
from megatron_r1z.policy.parallel import start_megatron, start_process_group
from megatron_r1z.policy.policy import MegatronPolicy, TrainBatch
from megatron_r1z.policy.token_figures import gather_figures
from megatron_r1z.weights.checkpoint import Checkpoints
from tests.loop.layout_worker import Settings, box, copy_in


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    task = torch.load(folder / "task.pt", weights_only=False)
    start_process_group(300)
    results = {}
    for name, (parallel, distributed) in task["layouts"].items():
        settings = Settings(
            ModelConfig(path=task["model"]),
            ParallelConfig(num_ranks=dist.get_world_size(), micro_batch_tokens=128, **parallel),
            PrecisionConfig(policy="fp32"),
        )
        start_megatron(settings.parallel.topology, seed=1)
        results[name] = take_steps(task, settings, distributed, folder / name)
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


def take_steps(task: dict[str, Any], settings: Settings, distributed: bool, folder: Path) -> dict[str, Any]:
    optimizer = OptimizerConfig(lr=task["lr"], eps=task["eps"], clip_grad=task["max_norm"], distributed=distributed)
    layout = megatron_layout(load_shape(task["model"]), settings.parallel.topology, 1)
    policy, critic = make_pair(task, settings, layout, optimizer)
    assert all(not tensor.any() for name, tensor in critic.parameters().items() if name.endswith(HEAD))
    write_head(critic, task["head"])
    batch = make_batch(task, policy)
    values = gather_figures(batch.micro_batches, critic.values(batch.micro_batches), policy.topology)
    before = weights_of(critic, layout)
    policy.update(TrainBatch(batch))  # of which the critic must notice nothing, and which has moments to save from here on
    stats = [critic.update(batch)]
    if not distributed:  # whose state Megatron saves on a GPU only
        Checkpoints(folder, 1).save(1, policy, {}, critic)
    stats.append(critic.update(batch))
    resumed = {} if distributed else go_on(critic, batch, folder / "step_000001", make_pair(task, settings, layout, optimizer))
    return resumed | {
        "values": values,
        "steps": [dataclasses.asdict(item) for item in stats],
        "before": before,
        "weights": weights_of(critic, layout),
    }


def go_on(critic: MegatronCritic, batch: GlobalBatch, checkpoint: Path, pair: tuple[MegatronPolicy, MegatronCritic]) -> dict[str, Any]:
    """The second step from a checkpoint after the first, beside the critic that has taken both."""
    policy, other = pair
    Checkpoints(checkpoint.parent, 1).load(checkpoint, policy, other)
    resumed = dataclasses.asdict(other.update(batch))
    weights = zip(critic.parameters().values(), other.parameters().values(), strict=True)
    return {"resumed": resumed, "same_bits": all(gather(all(torch.equal(*two) for two in weights)))}


def make_pair(
    task: dict[str, Any], settings: Settings, layout: Layout, optimizer: OptimizerConfig
) -> tuple[MegatronPolicy, MegatronCritic]:
    shape, topology = load_shape(task["model"]), settings.parallel.topology
    padded = padded_vocab_size(shape.vocab_size, topology.tp)
    policy = MegatronPolicy(settings, shape, topology, padded_vocab_size=padded)
    copy_in(layout, policy.parameters(), AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32).state_dict())
    critic = MegatronCritic(settings, shape, topology, padded_vocab_size=padded)
    critic.start_as(policy.parameters())
    policy.start_training(make_loss(AlgorithmConfig(name="ppo", iterations=1)), optimizer)
    critic.start_training(task["value_clip"], optimizer)
    return policy, critic


def write_head(critic: MegatronCritic, head_H: Tensor) -> None:
    for name, tensor in critic.parameters().items():
        if name.endswith(HEAD):
            tensor.copy_(head_H[None])
    critic.optimizer.reload_model_params()  # an optimizer may have a copy


def make_batch(task: dict[str, Any], policy: MegatronPolicy) -> GlobalBatch:
    where, aggregation = policy.topology.coordinates(dist.get_rank()), AGGREGATIONS["ppo"]
    return pack(
        task["samples"],
        policy.packing_rules(),
        where.dp_rank,
        where.cp_rank,
        token_weight=aggregation.token_weight,
        denominator=aggregation.denominator([sample.response_length for sample in task["samples"]], 100),
    )


def gather(item: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, item)
    return everyone


def weights_of(critic: MegatronCritic, layout: Layout) -> dict[str, Tensor]:
    """Checkpoint tensors by name, and the head as `head`; copies must agree to the bit over ranks."""
    parameters = critic.parameters()
    blocks = [item for item in layout.blocks_of(dist.get_rank()) if item.parameter in parameters and not item.parameter.endswith(HEAD)]
    mine = [(item.tensor, item.start, parameters[item.parameter][box(item.local_start, item.size)].clone()) for item in blocks]
    mine += [("head", (0, 0), tensor.clone()) for name, tensor in parameters.items() if name.endswith(HEAD)]
    pieces: dict[tuple[str, tuple[int, ...]], Tensor] = {}
    for name, start, value in (item for rank in gather(mine) for item in rank):
        assert torch.equal(pieces.setdefault((name, start), value), value), f"copies of {name} differ"
    sizes: dict[str, list[int]] = {}
    for (name, start), value in pieces.items():
        ends = [first + count for first, count in zip(start, value.shape, strict=True)]
        sizes[name] = [max(pair) for pair in zip(ends, sizes.get(name, ends), strict=True)]
    tensors = {name: torch.full(size, torch.nan) for name, size in sizes.items()}
    for (name, start), value in pieces.items():
        tensors[name][box(start, tuple(value.shape))] = value
    return tensors


if __name__ == "__main__":
    main(Path(sys.argv[1]))
