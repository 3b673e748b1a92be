"""One rank of `test_cost.py`: builds a policy under every layout of this world size, takes two steps and counts its live tensors.

Run by torchrun with a folder: `cases.json` (a list of cases, see `test_cost.py`) in, `measured_<rank>.json` (a row per case) out.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_r1z.config import AlgorithmConfig, ModelConfig, OptimizerConfig, ParallelConfig, PrecisionConfig
from megatron_r1z.layout.blocks import padded_vocab_size
from megatron_r1z.layout.families import load_shape
from megatron_r1z.objective import make_loss
from megatron_r1z.packing import pack
from megatron_r1z.policy import step
from megatron_r1z.policy.cpu import megatron_device
from megatron_r1z.policy.parallel import start_megatron, start_process_group
from megatron_r1z.policy.policy import MegatronPolicy, TrainBatch
from megatron_r1z.types import Sample
from tests.loop.layout_worker import Kept, Settings

SAMPLE_TOKENS, PROMPT_TOKENS = 256, 64


class Live(TorchDispatchMode):
    """Bytes of tensors that have come into being since the start and are still there: now, and at most so far."""

    def __init__(self) -> None:
        super().__init__()
        tensors = (item for item in gc.get_objects() if issubclass(type(item), Tensor))
        self._known = {item.untyped_storage()._cdata for item in tensors}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += nbytes
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._drop, key, nbytes)

    def _drop(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.now -= nbytes


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    start_process_group(300)
    rows = [measure(case) for case in json.loads((folder / "cases.json").read_text())]
    (folder / f"measured_{dist.get_rank()}.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def measure(case: dict[str, Any]) -> dict[str, int]:
    parallel = ParallelConfig(num_ranks=dist.get_world_size(), **case["parallel"])
    settings = Settings(ModelConfig(path=case["model"]), parallel, PrecisionConfig(policy=case["precision"]))
    shape, topology = load_shape(case["model"]), parallel.topology
    start_megatron(topology, seed=1)
    padded = padded_vocab_size(shape.vocab_size, topology.tp)
    policy = MegatronPolicy(settings, shape, topology, padded_vocab_size=padded)
    for weight in policy.parameters().values():
        weight.normal_(0, 0.02)
    policy.start_training(
        make_loss(AlgorithmConfig(iterations=1)),
        OptimizerConfig(distributed=case["distributed"]),
    )
    where = topology.coordinates(dist.get_rank())
    batch = pack(
        make_samples(case["samples"], shape.vocab_size),
        policy.packing_rules(),
        where.dp_rank,
        where.cp_rank,
        token_weight=lambda _length: 1.0,
        denominator=1000,
    )
    policy.update(TrainBatch(batch))  # moments are made in the first step
    kept = Kept(policy.parameters().values())
    with kept.counted():
        policy.update(TrainBatch(batch))
    live = Live()
    with live, megatron_device():
        step.forward_backward(policy.model, TrainBatch(batch).work(), policy._loss)
    measured = {
        "weights": held(policy.parameters().values()),
        "gradients": held(buffer.grad_data for chunk in policy.model.chunks for buffer in chunk.buffers),
        "optimizer": held(optimizer_tensors(policy), but=policy.parameters().values()),
        "kept": kept.most,
        "peak": live.most,
        "tokens": batch.micro_batches[0].num_tokens,
        "responses": max(item.rows_R.numel() for item in batch.micro_batches),
        "micro_batches": len(batch.micro_batches),
    }
    del policy
    gc.collect()
    parallel_state.destroy_model_parallel()
    return measured


def make_samples(count: int, vocab_size: int) -> list[Sample]:
    draw = random.Random(0)
    responses = SAMPLE_TOKENS - PROMPT_TOKENS
    return [
        Sample(f"{index}", tuple(draw.randrange(vocab_size) for _ in range(SAMPLE_TOKENS)), PROMPT_TOKENS, 1.0, 1.0, (-1.0,) * responses, 0)
        for index in range(count)
    ]


def held(tensors: Iterable[Tensor], but: Iterable[Tensor] = ()) -> int:
    """Bytes of the memory behind tensors, each piece once."""
    others = {tensor.untyped_storage().data_ptr() for tensor in but}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(nbytes for pointer, nbytes in storages.items() if pointer not in others)


def optimizer_tensors(policy: MegatronPolicy) -> list[Tensor]:
    """Master weights and moments."""
    chained = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
    inner = [item.optimizer for item in chained]
    masters = [parameter for item in inner for group in item.param_groups for parameter in group["params"]]
    states = [value for item in inner for state in item.state.values() for value in state.values()]
    return [*masters, *(value for value in states if isinstance(value, Tensor))]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
