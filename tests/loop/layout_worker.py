"""One rank of `test_layouts.py`: takes one Dr. GRPO step under every layout of this world size and saves what came out.

Run by torchrun with the folder of the case: `case.pt` (model folder, samples, layouts) in, `<layout>.pt` out.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from transformers import AutoModelForCausalLM

from megatron_r1z.config import ModelConfig, OptimizerConfig, ParallelConfig, PrecisionConfig
from megatron_r1z.layout.blocks import Layout, megatron_layout, padded_vocab_size
from megatron_r1z.layout.families import ModelShape, load_shape
from megatron_r1z.layout.topology import Topology
from megatron_r1z.objective import OBJECTIVES, clipped_losses
from megatron_r1z.packing import pack
from megatron_r1z.policy.parallel import start_megatron, start_process_group
from megatron_r1z.policy.policy import MegatronPolicy


@dataclasses.dataclass(frozen=True)
class Settings:
    model: ModelConfig
    parallel: ParallelConfig
    precision: PrecisionConfig
    optimizer: OptimizerConfig


def main(folder: Path) -> None:
    case = torch.load(folder / "case.pt", weights_only=False)
    start_process_group(120)
    shape = load_shape(case["model"])
    weights = AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32).state_dict()
    for name, options in case["layouts"].items():
        result = take_step(case, shape, weights, options)
        if dist.get_rank() == 0:
            torch.save(result, folder / f"{name}.pt")
    dist.destroy_process_group()


def take_step(case: dict, shape: ModelShape, weights: dict[str, torch.Tensor], options: dict) -> dict:
    options = dict(options)
    optimizer = OptimizerConfig(lr=1e-3, distributed=options.pop("distributed", False))
    precision = PrecisionConfig(policy=options.pop("precision", "fp32"))
    settings = Settings(
        ModelConfig(path=case["model"]), ParallelConfig(num_ranks=dist.get_world_size(), **options), precision, optimizer
    )
    parallel = settings.parallel
    topology = Topology(parallel.num_ranks, parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.virtual_pipeline_size)
    start_megatron(topology, seed=1)
    layout = megatron_layout(shape, topology, 1)
    policy = MegatronPolicy(
        settings, shape, topology, padded_vocab_size=padded_vocab_size(shape.vocab_size, topology.tp), temperature=case["temperature"]
    )
    copy_in(layout, policy.parameters(), weights)
    policy.start_training(lambda new, old, batch: clipped_losses(new, old, batch.advantages_R, batch.weights_R, 0.2, 0.2))

    objective = OBJECTIVES[case["algorithm"]]
    lengths = [sample.response_length for sample in case["samples"]]
    batch = pack(
        case["samples"],
        policy.packing_rules(),
        topology.coordinates(dist.get_rank()).dp_rank,
        token_weight=objective.token_weight,
        denominator=objective.denominator(lengths, case["length_constant"]),
    )
    logprobs = policy.response_logprobs(batch.micro_batches)
    # A second step starts from moved weights, so that its ratio is not 1 and the clip is live.
    old = tuple(None if item is None else item + case["old_shift"] for item in logprobs)
    first = policy.update(dataclasses.replace(policy.with_old_logprobs([batch])[0], old_logprobs=old))
    second = policy.update(dataclasses.replace(policy.with_old_logprobs([batch])[0], old_logprobs=old))
    new = gather(layout, policy.parameters(), shape)
    parallel_state.destroy_model_parallel()
    return {"steps": [dataclasses.asdict(first), dataclasses.asdict(second)], "weights": new, "micro_batches": len(batch.micro_batches)}


def box(start: tuple[int, ...], size: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(first, first + count) for first, count in zip(start, size, strict=True))


def copy_in(layout: Layout, parameters: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
    for parameter in parameters.values():
        parameter.zero_()
    for block in layout.blocks_of(dist.get_rank()):
        parameters[block.parameter][box(block.local_start, block.size)] = weights[block.tensor][box(block.start, block.size)]


def gather(layout: Layout, parameters: dict[str, torch.Tensor], shape: ModelShape) -> dict[str, torch.Tensor]:
    """All checkpoint tensors on rank 0; copies of a block must agree to the bit over ranks."""
    mine = [(block, parameters[block.parameter][box(block.local_start, block.size)].clone()) for block in layout.blocks_of(dist.get_rank())]
    everything: list = [None] * dist.get_world_size()
    dist.all_gather_object(everything, mine)
    tensors: dict[str, torch.Tensor] = {}
    seen: dict[tuple, torch.Tensor] = {}
    for block, value in (item for rank in everything for item in rank):
        key = (block.tensor, block.start)
        assert key not in seen or torch.equal(seen[key], value), f"copies of {key} differ"
        seen[key] = value
    from megatron_r1z.layout.families import hf_tensors

    for spec in hf_tensors(shape):
        tensors[spec.name] = torch.full(spec.shape, torch.nan)
    for (name, start), value in seen.items():
        tensors[name][box(start, tuple(value.shape))] = value.float()
    return tensors


if __name__ == "__main__":
    main(Path(sys.argv[1]))
