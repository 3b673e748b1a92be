"""AdamW over Megatron's gradient buffers, and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_r1z.config import OptimizerConfig
from megatron_r1z.policy.model import ResponseModel
from megatron_r1z.speed import GradientSpeed

ENDLESS_STEPS = 1 << 40
"""Decay steps of the constant schedule, which never gets there."""


def wrap_chunks(chunks: Sequence[ResponseModel], config: OptimizerConfig, speed: GradientSpeed) -> list[DistributedDataParallel]:
    """Give every chunk float32 gradient buffers that are summed, never averaged, over data-parallel ranks.

    The weights must be in place: the distributed optimizer moves them into its own buffers.
    """
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.distributed,
        overlap_grad_reduce=bool(speed.overlap_grad_reduce),
        overlap_param_gather=bool(speed.overlap_param_gather),
    )
    wrapped = [
        DistributedDataParallel(config=chunk.config, ddp_config=ddp, module=chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    for model in wrapped:
        if speed.gradient_accumulation_fusion:
            _fuse_accumulation(model)
        if speed.overlap_param_gather and model.module.post_process:
            _await_head(model)
    if speed.overlap_grad_reduce:
        only_last = [model.no_sync for model in wrapped]
        chunks[0].config.no_sync_func = only_last if len(only_last) > 1 else only_last[0]  # one configuration for all chunks
    return wrapped


def _fuse_accumulation(model: DistributedDataParallel) -> None:
    """Have Transformer Engine's layers add to the buffers, which are there now.

    By their own attribute: the field of megatron-core's configuration would have its embedding and output layer ask for apex.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def _await_head(model: DistributedDataParallel) -> None:
    """Wait for the output layer's weights behind the decoder: the head takes them without calling the layer, whose hook would wait."""
    head = [weight for weight in model.module.output_layer.parameters() if weight in model.param_to_bucket_group]

    def wait(*_arguments: object) -> None:
        for weight in head:
            model.param_to_bucket_group[weight].finish_param_sync()

    model.module.decoder.register_forward_hook(wait)


def complete_weights(chunks: Sequence[DistributedDataParallel]) -> None:
    """Have all of this rank's weights in place where the last step left some to be fetched later; all ranks that share them call this."""
    groups = [group for chunk in chunks for group in chunk.bucket_groups if chunk.ddp_config.overlap_param_gather]
    for group in groups:
        if not group.param_gather_dispatched:
            group.start_param_sync()
    for group in groups:
        group.finish_param_sync(skip_next_bucket_dispatch=True)


def build_optimizer(chunks: Sequence[DistributedDataParallel], config: OptimizerConfig) -> MegatronOptimizer:
    """AdamW with float32 master weights; it clips by the global gradient norm and does not decay vectors, which are biases and norms."""
    model = chunks[0].config
    dtype: torch.dtype = model.params_dtype
    return get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=config.distributed,
            optimizer_cpu_offload=config.offload_to_host,
            optimizer_offload_fraction=float(config.offload_to_host),
            use_precision_aware_optimizer=config.offload_to_host,  # whose code path Megatron's offload takes
            overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
        ),
        list(chunks),
    )


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Global norm of the accumulated gradient, the same on every rank; not finite where an element is not.

    Infinite too where the sum of squares overflows: clipping by such a norm would make a step of nothing. Megatron looks for such elements
    only where it scales the loss (fp16): elsewhere its step would write them into the weights.
    """
    optimizer.prepare_grads()
    norm = torch.tensor(float(optimizer.get_grad_norm()), dtype=torch.float64)
    norm = torch.where(norm.isfinite(), norm, math.inf)  # a maximum may lose a nan
    dist.all_reduce(norm, op=dist.ReduceOp.MAX)
    return norm.item()


def step_along(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Clip the gradient, of which `gradient_norm` gave the norm, and step: `optimizer.step()` without the norm a second time."""
    for part in optimizer.chained_optimizers:
        parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
        if parameters:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=grad_norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()


def build_schedule(optimizer: MegatronOptimizer, config: OptimizerConfig) -> OptimizerParamScheduler:
    """Linear warm-up, then constant, linear or cosine; one unit is one optimizer step.

    Megatron's warm-up of n steps begins at `init_lr` and is through after n steps: from a part in n + 1 it rises by one part a step, and no
    step has learning rate 0, which would waste the samples of it.
    """
    decays = config.schedule != "constant"
    return OptimizerParamScheduler(
        optimizer,
        init_lr=config.lr / (config.warmup_steps + 1),
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=config.decay_steps if decays and config.decay_steps else ENDLESS_STEPS,
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # a resumed run follows the configuration that it is given
    )
