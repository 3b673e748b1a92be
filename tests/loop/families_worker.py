"""One rank of `test_families.py`: builds what megatron-core or vLLM build and writes down the names and shapes of its parameters.

Run by torchrun with a command and a folder. `megatron FOLDER`: `tasks.json` in, `rank_N.json` (a description per task) out.
`vllm FOLDER`: a model folder in, `rank_N.json` (shapes by name) out; all ranks are one engine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SEED = 1


def main(command: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    result = (
        describe_engine(folder)
        if command == "vllm"
        else [describe_policy(task) for task in json.loads((folder / "tasks.json").read_text())]
    )
    (folder / f"rank_{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()


def describe_engine(folder: Path) -> dict[str, list[int]]:
    """The parameters of a live engine with arbitrary weights, stacked experts flattened as in `engine_layout`."""
    from megatron_r1z.rollout.cpu import prepare_engine, prepare_import

    prepare_import()
    from vllm import LLM

    engine = LLM(
        model=str(folder),
        load_format="dummy",
        dtype="float32",
        skip_tokenizer_init=True,
        tensor_parallel_size=dist.get_world_size(),
        max_model_len=64,
        max_num_seqs=2,
        kv_cache_memory_bytes=32 << 20,
        disable_log_stats=True,
        **prepare_engine(64),
    )
    parameters: dict[str, torch.Tensor] = engine.apply_model(lambda model: dict(model.named_parameters()))[0]
    return {name: list(tensor.flatten(0, -2).shape if tensor.dim() > 2 else tensor.shape) for name, tensor in parameters.items()}


def describe_policy(task: dict[str, Any]) -> dict[str, Any]:
    """The chunks of this rank, built by megatron-core with its local layers, and where it says that the rank stands."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from megatron_r1z.policy.cpu import megatron_device, prepare_process

    prepare_process()
    with megatron_device():
        parallel_state.initialize_model_parallel(**task["parallel"])
        tensor_parallel.model_parallel_cuda_manual_seed(SEED, inference_rng_tracker=True, force_reset_rng=True)
        config = TransformerConfig(**task["config"], activation_func=torch.nn.functional.silu, pipeline_dtype=torch.float32)
        stages = range(config.virtual_pipeline_model_parallel_size) if config.virtual_pipeline_model_parallel_size else [None]
        chunks = [_build_chunk(config, task, stage) for stage in stages]
        described = {
            "parameters": [{name: list(tensor.shape) for name, tensor in chunk.named_parameters()} for chunk in chunks],
            "layers": [[get_transformer_layer_offset(config, stage), get_num_layers_to_build(config, stage)] for stage in stages],
            "experts": sorted(
                {tuple(getattr(layer.mlp, "local_expert_indices", ())) for chunk in chunks for layer in chunk.decoder.layers}
            ),
            "coordinates": [
                parallel_state.get_tensor_model_parallel_rank(),
                parallel_state.get_context_parallel_rank(),
                parallel_state.get_data_parallel_rank(),
                parallel_state.get_pipeline_model_parallel_rank(),
            ],
            "expert_coordinates": [
                parallel_state.get_expert_tensor_parallel_rank(),
                parallel_state.get_expert_model_parallel_rank(),
                parallel_state.get_expert_data_parallel_rank(),
            ],
        }
    parallel_state.destroy_model_parallel()
    return described


def _build_chunk(config: Any, task: dict[str, Any], stage: int | None) -> torch.nn.Module:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    from megatron_r1z.policy.local_layers import PackedAttention, RMSNorm

    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=False, normalization="RMSNorm", qk_layernorm=config.qk_layernorm
    )
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm  # mcore's own refuses sequence parallelism on CPU
    layer.submodules.self_attention.submodules.core_attention = PackedAttention  # and its own attention refuses context parallelism
    if config.qk_layernorm:
        layer.submodules.self_attention.submodules.q_layernorm = RMSNorm
        layer.submodules.self_attention.submodules.k_layernorm = RMSNorm
    virtual = {"ignore_virtual": False, "vp_stage": stage}
    return GPTModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules([layer] * get_num_layers_to_build(config, stage), layer_norm=RMSNorm),
        vocab_size=task["vocab_size"],
        max_sequence_length=64,
        pre_process=parallel_state.is_pipeline_first_stage(**virtual),
        post_process=parallel_state.is_pipeline_last_stage(**virtual),
        share_embeddings_and_output_weights=task["tied"],
        position_embedding_type="rope",
        vp_stage=stage,
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
