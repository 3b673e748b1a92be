"""One rank of `test_layouts.py`: takes two Dr. GRPO steps under every layout of this world size and saves what came out.

Run by torchrun with a folder: `tasks.pt` (a list of tasks, see `test_layouts.py`) in, `results.pt` (a result per task name) out.
"""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_r1z.config import AlgorithmConfig, Fp8Config, ModelConfig, OptimizerConfig, ParallelConfig, PrecisionConfig
from megatron_r1z.host.float32 import keep_float32
from megatron_r1z.layout.blocks import Layout, megatron_layout, padded_vocab_size
from megatron_r1z.layout.families import ModelShape, hf_tensors, load_shape
from megatron_r1z.layout.topology import Topology
from megatron_r1z.objective import AGGREGATIONS, make_loss
from megatron_r1z.packing import MicroBatch, pack
from megatron_r1z.policy import fp8_linear, logprob, model
from megatron_r1z.policy.parallel import start_megatron, start_process_group
from megatron_r1z.policy.policy import MegatronPolicy, TrainBatch
from tests.loop.float64 import FP8_IN_FLOAT64, KeepFloat64


@dataclasses.dataclass(frozen=True)
class Settings:
    model: ModelConfig
    parallel: ParallelConfig
    precision: PrecisionConfig


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    tasks = torch.load(folder / "tasks.pt", weights_only=False)
    keep_float32("fp32", "fp32")  # a GPU may multiply otherwise
    start_process_group(300)
    results = {}
    for topology, group in groupby(sorted(tasks, key=lambda task: repr(topology_of(task))), key=topology_of):
        start_megatron(topology, seed=1)
        for task in group:
            everywhere = float64_everywhere() if task["precision"] == FP8_IN_FLOAT64 else nullcontext()
            with mock.patch.dict(logprob.TILE_BYTES, dict.fromkeys(logprob.TILE_BYTES, task["tile_bytes"])), everywhere:
                results[task["name"]] = take_steps(task, topology)
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


def topology_of(task: dict) -> Topology:
    return parallel_of(task).topology


def parallel_of(task: dict) -> ParallelConfig:
    return ParallelConfig(num_ranks=dist.get_world_size(), **task["parallel"])


def precision_of(task: dict) -> PrecisionConfig | SimpleNamespace:
    """What a configuration would say, or FP8 operands in a policy of `float64_everywhere`, which no configuration offers."""
    if task["precision"] == FP8_IN_FLOAT64:
        return SimpleNamespace(policy="fp8", policy_format="fp64", fp8=Fp8Config(**task["fp8"]))
    return PrecisionConfig(policy=task["precision"])


@contextmanager
def float64_everywhere() -> Iterator[None]:
    """What a policy keeps in float32 is float64 inside, but for what its FP8 operands are rounded from."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(model.DTYPES, fp64=torch.float64))
        for name in ("round_rows", "round_columns", "round_weight"):
            stack.enter_context(mock.patch.object(fp8_linear, name, from_float32(getattr(fp8_linear, name))))
        stack.enter_context(KeepFloat64())
        yield


def from_float32(rounding: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def rounded(values: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():  # of KeepFloat64, which makes a float64 of every float32
            return rounding(values.float()).to(values.dtype)

    return rounded


def take_steps(task: dict, topology: Topology) -> dict:
    """Load the weights, compute log-probs, take two optimizer steps on the same batch, collect the new weights."""
    from transformers import AutoModelForCausalLM  # tests/gpu takes the rest of this file without it

    settings = Settings(
        ModelConfig(path=task["model"]),
        parallel_of(task),
        precision_of(task),
    )
    optimizer = OptimizerConfig(lr=task["lr"], eps=task["eps"], clip_grad=task["max_norm"], distributed=task["distributed"])
    shape = load_shape(task["model"])
    layout = megatron_layout(shape, topology, 1, "te" if model.has_transformer_engine() else "local")
    padded = padded_vocab_size(shape.vocab_size, topology.tp)
    policy = MegatronPolicy(settings, shape, topology, padded_vocab_size=padded)
    copy_in(layout, policy.parameters(), AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32).state_dict())
    loss = make_loss(AlgorithmConfig(iterations=1, **task.get("switches", {})))
    if loss.has_kl:
        policy.keep_reference()
    policy.start_training(loss, optimizer)

    aggregation = AGGREGATIONS[task["algorithm"]]
    where = topology.coordinates(dist.get_rank())
    batch = pack(
        task["samples"],
        policy.packing_rules(),
        where.dp_rank,
        where.cp_rank,
        token_weight=aggregation.token_weight,
        denominator=aggregation.denominator([sample.response_length for sample in task["samples"]], task["length_constant"]),
    )
    # The samples carry the reference's log-probs where the engine's would be; old log-probs are those, shifted so that the clip is live.
    logprobs = policy.response_logprobs(batch.micro_batches)
    is_last_stage = logprobs[0] is not None
    old = tuple(shifted(item, task["shift_V"]) if is_last_stage else None for item in batch.micro_batches)
    sampled = dataclasses.replace(batch, micro_batches=tuple(off_engine(item, task["engine_shift_V"]) for item in batch.micro_batches))

    def reference() -> tuple[Tensor | None, ...]:
        """Taken anew before each step, from weights that the steps have left alone."""
        if not loss.has_kl:
            return ()
        with policy.as_reference():
            found = policy.response_logprobs(batch.micro_batches)
        pairs = zip(found, batch.micro_batches, strict=True)
        return tuple(None if mine is None else mine + task["reference_shift_V"][item.targets_R] for mine, item in pairs)

    kept = Kept(policy.parameters().values())
    with kept.counted() if task["measures_memory"] else nullcontext():
        stats = [policy.update(TrainBatch(sampled, old, reference())) for _ in range(task["steps"])]
    return {
        "logprob_error": largest_difference(logprobs, batch.micro_batches),
        "logprob_mean_square": mean_square(logprobs, batch.micro_batches, topology.tp),
        "steps": [dataclasses.asdict(item) for item in stats],
        "weights": gather(layout, policy.parameters(), shape),
        "micro_batches": len(batch.micro_batches),
        "kept_bytes": kept.most,
    }


def shifted(batch: MicroBatch, shift_V: Tensor) -> Tensor:
    return batch.engine_logprobs_R + shift_V[batch.targets_R]


def off_engine(batch: MicroBatch, shift_V: Tensor) -> MicroBatch:
    return dataclasses.replace(batch, engine_logprobs_R=batch.engine_logprobs_R + shift_V[batch.targets_R])


class Kept:
    """Memory that autograd holds for the backward pass: now, and at most so far. Weights are there anyway."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self._holders: dict[int, int] = {}
        self.now = self.most = 0

    def counted(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda box: box[0])

    def _pack(self, tensor: Tensor) -> Box:
        box, storage = Box([tensor]), tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._hold(storage.data_ptr(), storage.nbytes(), 1)
            weakref.finalize(box, self._hold, storage.data_ptr(), storage.nbytes(), -1)
        return box

    def _hold(self, pointer: int, nbytes: int, change: int) -> None:
        before = self._holders.get(pointer, 0)
        self._holders[pointer] = before + change
        self.now += nbytes * ((before + change > 0) - (before > 0))
        self.most = max(self.most, self.now)


class Box(list):
    """A list that can be referred to weakly."""


def largest_difference(logprobs: list[Tensor | None], batches: tuple[MicroBatch, ...]) -> float:
    pairs = zip(logprobs, batches, strict=True)
    differences = [(mine - batch.engine_logprobs_R).abs() for mine, batch in pairs if mine is not None]
    largest = torch.cat([torch.zeros(1), *differences]).max().double()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def mean_square(logprobs: list[Tensor | None], batches: tuple[MicroBatch, ...], tp: int) -> float:
    """Of the difference, over all response tokens; tensor-parallel ranks bring the same ones."""
    pairs = zip(logprobs, batches, strict=True)
    squares = torch.cat([torch.zeros(0), *((mine - batch.engine_logprobs_R).square() for mine, batch in pairs if mine is not None)])
    sums = torch.tensor([squares.double().sum(), squares.numel()], dtype=torch.float64) / tp
    dist.all_reduce(sums)
    return float(sums[0] / sums[1])


def box(start: tuple[int, ...], size: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(first, first + count) for first, count in zip(start, size, strict=True))


def copy_in(layout: Layout, parameters: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    for parameter in parameters.values():
        parameter.zero_()
    for block in layout.blocks_of(dist.get_rank()):
        parameters[block.parameter][box(block.local_start, block.size)] = weights[block.tensor][box(block.start, block.size)].to(
            parameters[block.parameter]
        )


def gather(layout: Layout, parameters: dict[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """All checkpoint tensors on every rank; copies of a block must agree to the bit over ranks."""
    mine = [(block, parameters[block.parameter][box(block.local_start, block.size)].clone()) for block in layout.blocks_of(dist.get_rank())]
    everything: list = [None] * dist.get_world_size()
    dist.all_gather_object(everything, mine)
    seen: dict[tuple, Tensor] = {}
    for block, value in (item for rank in everything for item in rank):
        key = (block.tensor, block.start)
        assert key not in seen or torch.equal(seen[key], value), f"copies of {key} differ"
        seen[key] = value
    tensors = {spec.name: torch.full(spec.shape, torch.nan, dtype=torch.float64) for spec in hf_tensors(shape)}
    for (name, start), value in seen.items():
        tensors[name][box(start, tuple(value.shape))] = value.double()
    return tensors


if __name__ == "__main__":
    main(Path(sys.argv[1]))
