"""AdamW over Megatron's gradient buffers, and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_r1z.config import OptimizerConfig
from megatron_r1z.policy.model import ResponseModel

ENDLESS_STEPS = 1 << 40
"""Decay steps of the constant schedule, which never gets there."""


def wrap_chunks(chunks: Sequence[ResponseModel], config: OptimizerConfig) -> list[DistributedDataParallel]:
    """Give every chunk float32 gradient buffers that are summed, never averaged, over data-parallel ranks.

    The weights must be in place: the distributed optimizer moves them into its own buffers.
    """
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=config.distributed)
    return [
        DistributedDataParallel(config=chunk.config, ddp_config=ddp, module=chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


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
