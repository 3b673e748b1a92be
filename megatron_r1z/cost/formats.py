"""Number formats: how many bytes parameters and operands take in them, and how fast a device multiplies."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_r1z.config import ITEMSIZE, PrecisionConfig
from megatron_r1z.cost.cluster import Gpu
from megatron_r1z.layout.blocks import Box, engine_layout, megatron_layout
from megatron_r1z.layout.families import ModelShape, layer_tensors
from megatron_r1z.layout.fp8 import BLOCK, fp8_matrices
from megatron_r1z.layout.topology import Topology

FP32_BYTES = ITEMSIZE["fp32"]
"""Of gradients, master weights, moments, scales and softmax, whatever the format of the weights."""
_ROW_SCALED = 1 + FP32_BYTES / BLOCK
"""Bytes of an FP8 activation, with its part of the scale of 1 x 128."""
_BLOCK_SCALED = 1 + FP32_BYTES / BLOCK**2
"""Bytes of an FP8 weight, with its part of the scale of 128 x 128."""


@dataclass(frozen=True)
class NumberFormat:
    """One value of `precision.policy` or `precision.engine`."""

    itemsize: int
    """Bytes of an activation, and of a weight outside of the layers' matrices."""
    matrix_bytes: float
    """Bytes of one weight in a matrix of a layer, with scales and with every copy that is kept of it."""
    operand_bytes: float
    """Bytes of an element of a layer's input that autograd keeps for the gradient of the weight."""
    matrix_tflops: Callable[[Gpu], float]
    """Peak of the layers' matrix products."""
    tflops: Callable[[Gpu], float]
    """Peak of attention and of the output layer."""
    is_staged: bool = False
    """The engine's kernels keep weights in a layout of their own, so that a refit writes into a second copy (`rollout/weights.py`)."""

    @property
    def is_fp8(self) -> bool:
        """The layers' matrix products take FP8 operands."""
        return self.operand_bytes < self.itemsize


def _fp32(gpu: Gpu) -> float:
    return gpu.fp32_tflops


def _bf16(gpu: Gpu) -> float:
    return gpu.bf16_tflops


def _fp8(gpu: Gpu) -> float:
    return gpu.fp8_tflops


_PLAIN = {
    "fp32": NumberFormat(FP32_BYTES, FP32_BYTES, FP32_BYTES, _fp32, _fp32),
    "bf16": NumberFormat(ITEMSIZE["bf16"], ITEMSIZE["bf16"], ITEMSIZE["bf16"], _bf16, _bf16),
}
POLICY_FORMATS: Mapping[str, NumberFormat] = {
    **_PLAIN,
    "fp8": NumberFormat(2, 2 + 2 * _BLOCK_SCALED, _ROW_SCALED, _fp8, _bf16),
}
"""Transformer Engine keeps an FP8 weight twice, for the product and for its gradient, and inputs in FP8 alone (its `Float8BlockwiseQTensor`
and `Linear` by their source; not measured). The bf16 weight stays beside them."""
ENGINE_FORMATS: Mapping[str, NumberFormat] = {
    **_PLAIN,
    "fp8": NumberFormat(2, _BLOCK_SCALED, _ROW_SCALED, _fp8, _bf16, is_staged=True),
}
QUANTISED_BYTES = _BLOCK_SCALED
"""Of one weight in what a refit into an FP8 engine keeps beside the policy (`reshard.quantise.QuantisedSource`)."""


def policy_format(precision: PrecisionConfig) -> NumberFormat:
    """Of the policy."""
    return POLICY_FORMATS[precision.policy]


def engine_format(precision: PrecisionConfig, share: float = 1.0) -> NumberFormat:
    """Of the engine, of whose matrices `share` go over in FP8 where it is in FP8."""
    form = ENGINE_FORMATS[precision.engine]
    return replace(form, matrix_bytes=share * form.matrix_bytes + (1 - share) * form.itemsize) if form.is_fp8 else form


def fp8_share(shape: ModelShape, policy_tp: int, engine_tp: int, bf16_layers: Collection[int] = ()) -> float:
    """The share of the elements of the layers' matrices that go over in FP8 between such ranks (`layout/fp8.fp8_matrices`).

    All layers are cut alike, so one is looked at.
    """
    layer = replace(shape, num_layers=1)
    layouts = megatron_layout(layer, Topology(policy_tp, policy_tp), 1), engine_layout(layer, engine_tp, engine_tp)
    names = {name.removeprefix("model.layers.0.") for name in fp8_matrices(layer, layouts)}
    matrices = [spec for spec in layer_tensors(shape) if len(spec.shape) == 2]
    found = sum(spec.numel for spec in matrices if spec.name in names) / sum(spec.numel for spec in matrices)
    return found * (1 - len(bf16_layers) / shape.num_layers)


class ParameterCounts(NamedTuple):
    """Parameters of one rank."""

    matrices: int
    """In the layers' matrices."""
    others: int
    """Embedding, output layer, norms and biases."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.matrices + self.others

    def nbytes(self, form: NumberFormat) -> int:
        """Bytes in a number format."""
        return math.ceil(self.matrices * form.matrix_bytes) + self.others * form.itemsize


def count_parameters(parameters: Mapping[str, Box]) -> ParameterCounts:
    """Parameters of a rank from their shapes in a layout.

    >>> count_parameters({"model.layers.0.mlp.down_proj.weight": (4, 3), "model.norm.weight": (4,)})
    ParameterCounts(matrices=12, others=4)
    """
    matrices = sum(math.prod(size) for name, size in parameters.items() if "layers." in name and len(size) == 2)
    return ParameterCounts(matrices, sum(map(math.prod, parameters.values())) - matrices)
