"""Linear layers that compute as Transformer Engine's FP8 layers do under `Float8BlockScaling`, on any device, with bf16 products.

What Transformer Engine multiplies (2.20.2: `pytorch/module/linear.py`; the quantisers from `Float8BlockScalingRecipeState` and the
recipe's `x_block_scaling_dim` 1, `w_block_scaling_dim` 2, `grad_block_scaling_dim` 1), with x [T, K], weight [N, K], y [T, N]:

    y      = x  by 1 x 128 along K   times   weight by 128 x 128             rowwise copies
    grad x = grad y  by 1 x 128 along N   times   weight by 128 x 128        the same bytes: a square block serves both ways
    grad w = grad y  by 1 x 128 along T   times   x  by 1 x 128 along T      columnwise copies, quantised from x and grad y themselves

Here each operand is rounded to what its FP8 bytes stand for, which bfloat16 holds exactly, and multiplied in its own type with float32
sums. Two things differ from the hardware: the order of the sums, and nothing is kept in FP8 between the passes. Results leave in the
type of the activations, as there; bias gradients are sums of the unrounded gradient, as there.

A weight is rounded in every product anew, which at 2048 tokens is a few percent of the time of a layer of 1024 x 1024. A copy kept between
passes would have to know of every way in which weights are written.

Written for megatron-core 0.16.1 and 0.19.2, whose layers call `_forward_impl` by keywords (`tests/unit/policy/test_fp8_linear.py` fails
where they do not). Gradients of activations are summed over tensor-parallel ranks by Megatron's own mappings.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_r1z.fp8.blocks import round_columns, round_rows, round_weight


class Fp8ColumnParallelLinear(ColumnParallelLinear):  # type: ignore[misc]  # megatron-core has no types
    """Rows of the weight split over tensor-parallel ranks."""

    def _forward_impl(
        self, *, weight: Tensor, bias: Tensor | None, allreduce_dgrad: bool, sequence_parallel: bool, tp_group: Any, **others: Any
    ) -> Tensor:
        inputs = others["input"]
        if sequence_parallel:
            inputs = gather_from_sequence_parallel_region(inputs, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            inputs = copy_to_tensor_model_parallel_region(inputs, group=tp_group)
        return fp8_linear(inputs, weight, bias)


class Fp8RowParallelLinear(RowParallelLinear):  # type: ignore[misc]  # megatron-core has no types
    """Columns of the weight split over tensor-parallel ranks; the layer sums their products in the type of the activations."""

    def _forward_impl(self, *, weight: Tensor, **others: Any) -> Tensor:
        return fp8_linear(others["input"], weight, None)


def fp8_linear(inputs: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """[..., K] -> [..., N], with FP8 operands in the product and in both products of its gradient."""
    output_TN: Tensor = _Fp8Product.apply(inputs.reshape(-1, inputs.shape[-1]), weight_NK)  # type: ignore[no-untyped-call]
    output = output_TN.view(*inputs.shape[:-1], weight_NK.shape[0])
    return output if bias_N is None else output + bias_N


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_TK: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(input_TK, weight_NK)
        return round_rows(input_TK) @ round_weight(weight_NK).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        input_TK, weight_NK = ctx.saved_tensors
        gradient_TN = gradients[0]
        grad_input = round_rows(gradient_TN) @ round_weight(weight_NK) if ctx.needs_input_grad[0] else None
        grad_weight = round_columns(gradient_TN).t() @ round_columns(input_TK) if ctx.needs_input_grad[1] else None
        return grad_input, grad_weight
