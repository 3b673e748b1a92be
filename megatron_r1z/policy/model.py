"""The Megatron model of this rank: a GPT per pipeline chunk, from the shape of a Hugging Face config.

A chunk's forward ends, on the last stage, in log-probs of the response tokens instead of logits: the head works on response rows only
and the [tokens, vocabulary] matrix never exists (`logprob.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor
from torch.nn import functional as F

from megatron_r1z.config import Fp8Config, ParallelConfig, PrecisionConfig, Recompute
from megatron_r1z.fp8.machine import transformer_engine_version
from megatron_r1z.fp8.recipes import is_fp8_layer, megatron_fields
from megatron_r1z.layout.families import ModelShape
from megatron_r1z.packing import MicroBatch
from megatron_r1z.policy.fp8_linear import Fp8ColumnParallelLinear, Fp8RowParallelLinear
from megatron_r1z.policy.local_layers import PackedAttention, RMSNorm
from megatron_r1z.policy.logprob import vocab_parallel_logprobs
from megatron_r1z.speed import Machine, model_speed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EXTRA_STATE = "_extra_state"
"""How torch calls what a module keeps besides its tensors."""
RECOMPUTE: dict[Recompute, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
"""In megatron-core's words. Its default for `selective` is attention, whose packed kernels keep no scores: there is little to gain."""


class ResponseModel(GPTModel):  # type: ignore[misc]  # megatron-core has no types
    """One pipeline chunk of a model that says something of response tokens."""

    def run_layers(self, batch: MicroBatch) -> Tensor:
        """Hidden states [T, 1, H] behind the layers of this chunk."""
        packed = packed_parameters(batch, self.config.context_parallel_size)
        hidden = None
        if self.pre_process:
            hidden = self.embedding(input_ids=batch.token_ids_T[None], position_ids=batch.position_ids_T[None])
        rotary = self.rotary_pos_emb(batch.max_seqlen, packed_seq=True)
        states: Tensor = self.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=packed)
        return states


class PolicyModel(ResponseModel):
    """One pipeline chunk of the policy."""

    def forward(self, batch: MicroBatch, unpadded_vocab_size: int, has_entropy: bool = False) -> Tensor:
        """Hidden states [T, 1, H] for the next stage; on the last stage float32 [2, R]: log-probs and entropies of the response tokens.

        The entropies carry a gradient with `has_entropy`; without it they cost the backward pass nothing.
        """
        hidden = self.run_layers(batch)
        return self._response_logprobs(hidden, batch, unpadded_vocab_size, has_entropy) if self.post_process else hidden

    def _response_logprobs(self, hidden: Tensor, batch: MicroBatch, vocab_size: int, has_entropy: bool) -> Tensor:
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight
        split = self.config.tensor_model_parallel_size > 1
        logprobs, entropy = vocab_parallel_logprobs(
            self._gather(hidden).squeeze(1)[batch.rows_R],
            weight,
            batch.targets_R,
            temperature=batch.temperatures_R,
            vocab_size=vocab_size,
            vocab_start=parallel_state.get_tensor_model_parallel_rank() * weight.shape[0],
            group=parallel_state.get_tensor_model_parallel_group() if split else None,
        )
        return torch.stack([logprobs, entropy if has_entropy else entropy.detach()])

    def _gather(self, hidden: Tensor) -> Tensor:
        """All positions on every tensor-parallel rank; the backward pass sums the ranks' parts of the gradient."""
        if self.config.sequence_parallel:
            gathered: Tensor = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
            return gathered
        copied: Tensor = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
        return copied


class ValueModel(ResponseModel):
    """One pipeline chunk of the critic."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments | {"share_embeddings_and_output_weights": False})
        if self.post_process:
            self.output_layer = torch.nn.Linear(self.config.hidden_size, 1, bias=False, dtype=self.config.params_dtype)

    def forward(self, batch: MicroBatch) -> Tensor:
        """Hidden states [T, 1, H] for the next stage; on the last stage float32 [R]: the value before each response token."""
        hidden = self.run_layers(batch)
        return self._values(hidden, batch) if self.post_process else hidden

    def _values(self, hidden: Tensor, batch: MicroBatch) -> Tensor:
        """Every tensor-parallel rank computes all values, so its gradient is whole: no sum over ranks as for the policy's head."""
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        rows_RH = hidden.squeeze(1)[batch.rows_R]
        return F.linear(rows_RH.float(), self.output_layer.weight.float()).squeeze(1)


Chunk = TypeVar("Chunk", PolicyModel, ValueModel)


def packed_parameters(batch: MicroBatch, context_parallel_size: int) -> PackedSeqParams:
    """Megatron's description of the packed sequences of a micro-batch, whole whatever this rank's part of them.

    Padding at the end of a sequence counts as a part of it: causality keeps it out of all real positions. Transformer Engine's
    context parallelism asks for boundaries with padding, and the very tensor without means to it that there is none between sequences,
    which all of its kernels can do (`DotProductAttention.forward`, `pad_between_seqs`).
    """
    padded = batch.cu_seqlens_S1 if context_parallel_size > 1 else None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens_S1,
        cu_seqlens_kv=batch.cu_seqlens_S1,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )


def has_transformer_engine() -> bool:
    """True where Transformer Engine layers can be built: its torch part can be imported and there is a GPU for it."""
    return torch.cuda.is_available() and transformer_engine_version() is not None


def this_machine() -> Machine:
    """What decides about settings for speed here."""
    return Machine(torch.cuda.is_available(), has_transformer_engine())


def build_chunks(
    kind: type[Chunk], shape: ModelShape, parallel: ParallelConfig, precision: PrecisionConfig, padded_vocab_size: int
) -> list[Chunk]:
    """The model chunks of this rank, one per virtual pipeline stage, with unset weights."""
    config = transformer_config(shape, parallel, precision)
    fp8 = precision.fp8 if precision.policy == "fp8" else None
    stages = [None] if parallel.virtual_pipeline_size == 1 else list(range(parallel.virtual_pipeline_size))
    return [_build_chunk(kind, shape, config, fp8, padded_vocab_size, stage) for stage in stages]


def transformer_config(shape: ModelShape, parallel: ParallelConfig, precision: PrecisionConfig) -> TransformerConfig:
    """Megatron's description of the model and how it is split. Of FP8 it knows where Transformer Engine computes it."""
    dtype = DTYPES[precision.policy_format]
    fp8 = megatron_fields(precision.fp8) if precision.policy == "fp8" and has_transformer_engine() else {}
    virtual, speed = parallel.virtual_pipeline_size, model_speed(parallel, this_machine())
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        layernorm_epsilon=shape.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        pipeline_model_parallel_layout=_pipeline_layout(parallel.pipeline_layers),
        sequence_parallel=parallel.sequence_parallel,
        batch_p2p_comm=False,
        overlap_p2p_comm=bool(speed.overlap_p2p_comm),
        calculate_per_token_loss=True,
        use_cpu_initialization=not torch.cuda.is_available(),
        gradient_accumulation_fusion=False,  # of Transformer Engine's layers alone: `optimizer.wrap_chunks`
        masked_softmax_fusion=False,
        bias_activation_fusion=bool(speed.swiglu_fusion),
        bias_dropout_fusion=False,
        apply_rope_fusion=has_transformer_engine(),
        persist_layer_norm=False,
        cpu_offloading=parallel.offload_layers > 0,
        cpu_offloading_num_layers=parallel.offload_layers,
        cpu_offloading_activations=True,
        cpu_offloading_weights=False,
        **RECOMPUTE[parallel.recompute],
        **fp8,
    )


def _pipeline_layout(chunk_layers: Sequence[int]) -> list[list[str]] | None:
    """What each model chunk holds, in model order; None: layers are split evenly, embedding and output layer are at the ends."""
    if not chunk_layers:
        return None
    chunks = [["decoder"] * count for count in chunk_layers]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


def _build_chunk(
    kind: type[Chunk], shape: ModelShape, config: TransformerConfig, fp8: Fp8Config | None, padded_vocab_size: int, vp_stage: int | None
) -> Chunk:
    virtual = {"ignore_virtual": False, "vp_stage": vp_stage}
    scaling = shape.rope_scaling
    chunk = kind(
        config=config,
        transformer_layer_spec=_block_spec(shape, config, fp8, vp_stage),
        vocab_size=padded_vocab_size,
        max_sequence_length=shape.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(**virtual),
        post_process=parallel_state.is_pipeline_last_stage(**virtual),
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
        rope_scaling=scaling is not None,
        rope_scaling_factor=scaling.factor if scaling is not None else 1.0,
        vp_stage=vp_stage,
    )
    return chunk.cuda(torch.cuda.current_device()) if torch.cuda.is_available() else chunk


def _block_spec(
    shape: ModelShape, config: TransformerConfig, fp8: Fp8Config | None, vp_stage: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    """Transformer Engine layers where they can run, the local ones elsewhere."""
    if has_transformer_engine():
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=shape.qk_norm)
    first, count = get_transformer_layer_offset(config, vp_stage), get_num_layers_to_build(config, vp_stage=vp_stage)
    in_fp8 = [fp8 is not None and is_fp8_layer(fp8, number, shape.num_layers) for number in range(first, first + count)]
    return TransformerBlockSubmodules(layer_specs=[_local_layer(shape, in_fp8=here) for here in in_fp8], layer_norm=RMSNorm)


def _local_layer(shape: ModelShape, *, in_fp8: bool) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=shape.qk_norm)
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if shape.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if in_fp8:
        mlp = layer.submodules.mlp  # a spec in megatron-core 0.16, a partial call in 0.19
        feed_forward = mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules
        attention.linear_qkv = feed_forward.linear_fc1 = Fp8ColumnParallelLinear
        attention.linear_proj = feed_forward.linear_fc2 = Fp8RowParallelLinear
    return layer
