"""One rank of `test_cost.py`: builds policies and critics under every layout of this world size, takes a step and counts live tensors.

Run by torchrun with a folder: `cases.json` (a list of cases, see `test_cost.py`) in, `measured_<rank>.json` (a row per case) out.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import weakref
from collections.abc import Callable, Iterable
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
from megatron_r1z.layout.families import ModelShape, load_shape
from megatron_r1z.layout.topology import Topology
from megatron_r1z.objective import make_loss
from megatron_r1z.packing import GlobalBatch, PackingRules, pack
from megatron_r1z.policy import step
from megatron_r1z.policy.cpu import megatron_device
from megatron_r1z.policy.critic import MegatronCritic
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
    model, passes, rules = make_model(settings, shape, topology, OptimizerConfig(distributed=case["distributed"]), of_critic=case["critic"])
    where = topology.coordinates(dist.get_rank())
    batch = pack(
        make_samples(case["samples"], shape.vocab_size),
        rules,
        where.dp_rank,
        where.cp_rank,
        token_weight=lambda _length: 1.0,
        denominator=1000,
    )
    kept = Kept(model.parameters().values())
    with kept.counted():
        update(model, batch)  # in which the moments are made
    live = Live()
    with live, megatron_device():
        passes(batch)
    measured = {
        "weights": held(model.parameters().values()),
        "gradients": held(buffer.grad_data for chunk in model.model.chunks for buffer in chunk.buffers),
        "optimizer": held(optimizer_tensors(model), but=model.parameters().values()),
        "kept": kept.most,
        "peak": live.most,
        "tokens": batch.micro_batches[0].num_tokens,
        "responses": max(item.rows_R.numel() for item in batch.micro_batches),
        "micro_batches": len(batch.micro_batches),
    }
    del model, passes
    gc.collect()
    parallel_state.destroy_model_parallel()
    return measured


def make_model(
    settings: Settings, shape: ModelShape, topology: Topology, optimizer: OptimizerConfig, *, of_critic: bool
) -> tuple[MegatronPolicy | MegatronCritic, Callable[[GlobalBatch], Any], PackingRules]:
    """A policy or a critic of random weights that is ready to train, what makes its forward and backward passes, and its packing."""
    padded = padded_vocab_size(shape.vocab_size, topology.tp)
    policy = MegatronPolicy(settings, shape, topology, padded_vocab_size=padded)
    for weight in policy.parameters().values():
        weight.normal_(0, 0.02)
    if of_critic:
        critic = MegatronCritic(settings, shape, topology, padded_vocab_size=padded)
        critic.start_as(policy.parameters())
        critic.start_training(0.2, optimizer)
        return critic, critic._passes, policy.packing_rules()
    loss = make_loss(AlgorithmConfig(iterations=1))
    policy.start_training(loss, optimizer)
    return policy, lambda batch: step.forward_backward(policy.model, TrainBatch(batch).work(), loss), policy.packing_rules()


def update(model: MegatronPolicy | MegatronCritic, batch: GlobalBatch) -> None:
    if isinstance(model, MegatronCritic):
        model.update(batch)
    else:
        model.update(TrainBatch(batch))


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


def optimizer_tensors(model: MegatronPolicy | MegatronCritic) -> list[Tensor]:
    """Master weights and moments."""
    chained = getattr(model.optimizer, "chained_optimizers", [model.optimizer])
    inner = [item.optimizer for item in chained]
    masters = [parameter for item in inner for group in item.param_groups for parameter in group["params"]]
    states = [value for item in inner for state in item.state.values() for value in state.values()]
    return [*masters, *(value for value in states if isinstance(value, Tensor))]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
