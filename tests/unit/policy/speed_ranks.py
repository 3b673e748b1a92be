"""One rank of `test_speed.py`: `speed_ranks.py RANK NUM_RANKS FOLDER CASE` takes steps with settings for speed off and on.

Leaves `CASE_rank_<RANK>.pt` with weights and log-probs of both, and with what was still to be fetched behind a step.
"""

from __future__ import annotations

import functools
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1z.config import AlgorithmConfig, OptimizerConfig, ParallelConfig, PrecisionConfig, SpeedConfig
from megatron_r1z.layout.families import ModelShape
from megatron_r1z.objective import make_loss
from megatron_r1z.packing import GlobalBatch, pack
from megatron_r1z.policy import optimizer
from megatron_r1z.policy.parallel import start_megatron
from megatron_r1z.policy.policy import MegatronPolicy
from megatron_r1z.types import Sample

sys.path.insert(0, str(Path(__file__).parent))
from fused_adam import take_the_place_of_transformer_engines

BUCKET_ELEMENTS = 5000
"""So small that this model has many buckets."""
OFF = dict.fromkeys(("overlap_grad_reduce", "overlap_param_gather", "overlap_p2p_comm", "swiglu_fusion"), False)
ON: dict[str, dict[str, Any]] = {
    "gradients": {"overlap_grad_reduce": True},
    "weights": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    "tied weights": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    "stages": {"overlap_p2p_comm": True, "overlap_grad_reduce": True},
    "swiglu": {"swiglu_fusion": True},
}


def main(rank: int, num_ranks: int, folder: Path, case: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"{case}_store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=60))
    degrees = {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2} if case == "stages" else {}
    start_megatron(ParallelConfig(num_ranks=num_ranks, **degrees).topology, seed=0)
    small = functools.partial(optimizer.DistributedDataParallelConfig, bucket_size=BUCKET_ELEMENTS)
    setattr(optimizer, "DistributedDataParallelConfig", small)  # noqa: B010
    take_the_place_of_transformer_engines()
    found = {}
    for name, speed in {"off": OFF, "on": OFF | ON[case]}.items():
        parallel = ParallelConfig(num_ranks=num_ranks, micro_batch_tokens=48, speed=SpeedConfig(**speed), **degrees)
        found[name] = results_of(parallel, case)
    torch.save(found, folder / f"{case}_rank_{rank}.pt")
    dist.destroy_process_group()


def results_of(parallel: ParallelConfig, case: str) -> dict[str, Any]:
    """Of two iterations of two steps, with a reference model, after each of which the weights are read."""
    shape = ModelShape("qwen2", 4, 64, 2, 1, 32, 96, 128, case == "tied weights", True, False, 1e4, None, 1e-6, 512)
    settings = SimpleNamespace(model=None, parallel=parallel, precision=PrecisionConfig(policy="fp32" if case == "swiglu" else "bf16"))
    policy = MegatronPolicy(settings, shape, parallel.topology, padded_vocab_size=shape.vocab_size)
    generator = torch.Generator().manual_seed(1)
    for tensor in policy.parameters().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) / 8)
    policy.keep_reference()
    distributed = "weights" in case
    policy.start_training(
        make_loss(AlgorithmConfig(iterations=1, kl_coef=0.1)), OptimizerConfig(lr=1e-2, weight_decay=0.1, distributed=distributed)
    )
    chunks = policy.model.chunks
    found: dict[str, Any] = {"under way": watch_sums(chunks), "norms": [], "logprobs": [], "weights": []}
    for iteration in range(2):
        for work in policy.with_logprobs([batch_of(policy, 2 * iteration + step) for step in range(2)]):
            found["norms"].append(policy.update(work).grad_norm)
            found["logprobs"] += work.old_logprobs
        found["behind a step"] = [value.detach().clone() for chunk in chunks for value in chunk.module.parameters()]
        found["weights"].append({name: tensor.clone() for name, tensor in policy.parameters().items()})
    found["logprobs"] += policy.response_logprobs(batch_of(policy, 9).micro_batches)
    return found


def watch_sums(chunks: list[Any]) -> list[tuple[int, int]]:
    """At the end of each backward pass, the parts of the gradient whose sum has begun, and all of them."""
    seen: list[tuple[int, int]] = []
    finalize = chunks[0].config.finalize_model_grads_func

    def look(*arguments: Any, **options: Any) -> None:
        handles = [group.grad_reduce_handle for chunk in chunks for group in chunk.bucket_groups]
        seen.append((sum(handle is not None for handle in handles), len(handles)))
        finalize(*arguments, **options)

    chunks[0].config.finalize_model_grads_func = look
    return seen


def batch_of(policy: MegatronPolicy, seed: int) -> GlobalBatch:
    generator = torch.Generator().manual_seed(seed)
    samples = [
        Sample(f"0/{number}", tuple(torch.randint(128, (24,), generator=generator).tolist()), 8, 1.0, 1.0, (-4.0,) * 16, 0)
        for number in range(16)
    ]
    place = policy.topology.coordinates(dist.get_rank())
    return pack(samples, policy.packing_rules(), place.dp_rank, 0, token_weight=lambda _length: 1.0, denominator=256)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
