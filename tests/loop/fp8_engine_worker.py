"""Ranks of `test_fp8_engine.py`: an FP8 policy, emulated, and live FP8 engines of vLLM; everything around the products in float32."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1z.config import ModelConfig, NumberFormat, OptimizerConfig, ParallelConfig, PrecisionConfig, RolloutConfig
from megatron_r1z.fp8.blocks import quantise_weight
from megatron_r1z.layout.blocks import box_slices, engine_layout, hf_layout, megatron_layout, padded_vocab_size
from megatron_r1z.layout.families import ModelShape, hf_tensors, load_shape
from megatron_r1z.layout.fp8 import SCALES, by_format, fp8_matrices, fp8_parameters, modules_to_not_convert
from megatron_r1z.layout.topology import Topology
from megatron_r1z.packing import pack
from megatron_r1z.policy.parallel import start_megatron
from megatron_r1z.policy.policy import MegatronPolicy
from megatron_r1z.pretrain import NEXT_TOKEN_LOSS
from megatron_r1z.protocols import Sampling
from megatron_r1z.reshard.quantise import QuantisedSource, plans_by_format
from megatron_r1z.reshard.refit import Refit
from megatron_r1z.rollout.cpu import prepare_import
from megatron_r1z.rollout.vllm_engine import EngineSettings, VllmEngine
from megatron_r1z.speed import Machine, engine_speed
from megatron_r1z.types import Prompt, Sample
from megatron_r1z.weights.initialise import random_weights

PROMPTS = [Prompt(f"test/{length}", "", tuple(3 + index * 5 % 17 for index in range(length)), ("",), "test") for length in (3, 40, 9, 30)]
SAMPLING = Sampling(num_samples=2, max_tokens=24, temperature=1.0, top_p=1.0, top_k=-1, stop=(), seed=11)


class Float32Around(PrecisionConfig):
    """FP8 products in a float32 model: then nothing else rounds, and two sides that multiply the same bytes agree."""

    @property
    def policy_format(self) -> NumberFormat:
        return "fp32"


def main(model: Path, policy_format: str, tp: int, engine_tp: int, output: Path) -> None:
    """Refit twice with other weights in between; write how far log-probs lie apart on what the engines sample, and the bytes they hold."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, num_ranks, shape = dist.get_rank(), dist.get_world_size(), load_shape(model)
    topology = Topology(num_ranks, tp)
    start_megatron(topology, seed=1)
    sections = Sections(
        ModelConfig(path=str(model)),
        ParallelConfig(num_ranks=num_ranks, tensor_parallel_size=tp),
        Float32Around(policy="fp8") if policy_format == "fp8" else PrecisionConfig(policy="fp32"),
    )
    policy = MegatronPolicy(sections, shape, topology, padded_vocab_size=padded_vocab_size(shape.vocab_size, tp))
    source, destination = megatron_layout(shape, topology, 1), engine_layout(shape, num_ranks, engine_tp)
    random_weights(shape, source, rank, policy.parameters(), seed=3)
    matrices = fp8_matrices(shape, [source, destination])
    allow_float32()
    engine = VllmEngine(
        EngineSettings(
            model_folder=str(model),
            dtype="fp32",
            rank=rank,
            num_ranks=num_ranks,
            tensor_parallel_size=engine_tp,
            max_model_tokens=128,
            max_concurrent_sequences=16,
            kv_cache_bytes=64 << 20,
            seed=5,
            speed=engine_speed(RolloutConfig(), 128, Machine(False, False)),
            not_in_fp8=tuple(modules_to_not_convert(shape, matrices)),
        )
    )
    plans = plans_by_format(source, destination, matrices, torch.float32, 20_000, num_ranks)
    refit = Refit(plans, rank, QuantisedSource(policy.parameters, fp8_parameters(source, rank, matrices)), engine)
    refit(0)
    for tensor in policy.parameters().values():
        tensor.mul_(1.5)
    receipt = refit(1)
    check_bytes(shape, destination, matrices, engine, rank)
    policy.start_training(NEXT_TOKEN_LOSS, OptimizerConfig())
    difference = differences(policy, engine, topology)
    row = {"max": difference.max().item(), "mean": difference.mean().item(), "count": difference.numel(), "bytes": receipt.nbytes_by_format}
    (output / f"{rank}.json").write_text(json.dumps(row))
    dist.barrier()


def allow_float32() -> None:
    """vLLM has no kernel for FP8 in a float32 model, but the one of `rollout/fp8_cpu.py` can do it."""
    prepare_import()
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    Fp8Config.get_supported_act_dtypes = classmethod(lambda cls: [torch.float32])


@dataclasses.dataclass(frozen=True)
class Sections:
    model: ModelConfig
    parallel: ParallelConfig
    precision: PrecisionConfig


def check_bytes(shape: ModelShape, destination: Any, matrices: frozenset[str], engine: VllmEngine, rank: int) -> None:
    """What vLLM's kernels use after its reload is what quantising the whole matrices gives."""
    live: dict[str, torch.Tensor] = engine._llm.apply_model(lambda model: dict(model.named_parameters()))[0]
    weights = {spec.name: torch.empty(spec.shape) for spec in hf_tensors(shape)}
    random_weights(shape, hf_layout(shape, 1), 0, weights, seed=3)
    quantised = {name: quantise_weight(1.5 * weights[name]) for name in matrices}
    formats = by_format(destination, matrices)
    assert formats.data.blocks_of(rank)
    for block in formats.data.blocks_of(rank):
        found = live[block.parameter][box_slices(block.local_start, block.size)]
        expected = quantised[block.tensor].data[box_slices(block.start, block.size)]
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), block
    for block in formats.scales.blocks_of(rank):
        expected = quantised[block.tensor.removesuffix(SCALES)].scale_inv[box_slices(block.start, block.size)]
        assert torch.equal(live[block.parameter][box_slices(block.local_start, block.size)], expected), block


def differences(policy: MegatronPolicy, engine: VllmEngine, topology: Topology) -> torch.Tensor:
    """Absolute, of each token that any engine sampled."""
    mine = [
        (group.prompt.token_ids, item.token_ids, item.logprobs)
        for group in engine.generate(PROMPTS, SAMPLING, 1)
        for item in group.responses
    ]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    samples = [
        Sample(str(index), (*prompt, *response), len(prompt), 1.0, 1.0, logprobs, 1)
        for index, (prompt, response, logprobs) in enumerate(row for rows in everyone for row in rows)
    ]
    rank = topology.coordinates(dist.get_rank())
    batch = pack(samples, policy.packing_rules(), rank.dp_rank, 0, token_weight=lambda _: 1.0, denominator=1)
    pairs = zip(policy.response_logprobs(batch.micro_batches), batch.micro_batches, strict=True)
    return torch.cat([(ours - item.engine_logprobs_R).abs() for ours, item in pairs if ours is not None])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
