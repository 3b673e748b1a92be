"""Number formats: how many bytes parameters take in them, and how fast a device multiplies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from megatron_r1z.config import ITEMSIZE
from megatron_r1z.cost.cluster import Gpu
from megatron_r1z.layout.blocks import Box

FP32_BYTES = ITEMSIZE["fp32"]
"""Of gradients, master weights, moments and softmax, whatever the format of the weights."""


@dataclass(frozen=True)
class NumberFormat:
    """One value of `precision.policy` or `precision.engine`."""

    itemsize: int
    """Bytes of an activation, and of a weight outside of the layers' matrices."""
    matrix_bytes: float
    """Bytes of one weight in a matrix of a layer, scales included."""
    tflops: Callable[[Gpu], float]
    """Peak of the layers' matrix products."""
    is_staged: bool = False
    """The engine's kernels keep weights in a layout of their own, so that a refit writes into a second copy (`rollout/weights.py`)."""


FORMATS: Mapping[str, NumberFormat] = {
    "fp32": NumberFormat(FP32_BYTES, FP32_BYTES, lambda gpu: gpu.fp32_tflops),
    "bf16": NumberFormat(ITEMSIZE["bf16"], ITEMSIZE["bf16"], lambda gpu: gpu.bf16_tflops),
}


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
