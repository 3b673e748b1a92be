"""Block FP8 products for vLLM on a CPU, as its GPU kernels compute them.

vLLM 0.32 has such a kernel for CPUs with AMX only, and there activations stay in bfloat16. This one serves every CPU and does what DeepGEMM
does on Hopper: activations in blocks of 1 x 128 with power-of-two scales, sums in float32. It stands in for the product alone: vLLM
creates, loads and reloads the weights as everywhere.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.model_executor.kernels.linear import _POSSIBLE_FP8_BLOCK_KERNELS
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.platforms.interface import PlatformEnum

from megatron_r1z.fp8.blocks import Quantised, dequantise


class EmulatedBlockKernel(Fp8BlockScaledMMLinearKernel):  # type: ignore[misc]  # vLLM's classes have no types
    """Weights and activations are rounded to FP8 and multiplied in float32."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        scale = config.activation_quant_key.scale
        self.quant_fp8 = QuantFP8(static=scale.static, group_shape=scale.group_shape, use_ue8m0=True)

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """On every CPU."""
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Keep the weight's values beside its bytes, in float32."""
        self._weight: Tensor = dequantise(Quantised(layer.weight.data, layer.weight_scale_inv.data))

    def apply_block_scaled_mm(self, A: Tensor, B: Tensor, As: Tensor, Bs: Tensor) -> Tensor:
        """A [T, K] with scales As [T, K / 128]; the weight is the one that was processed."""
        return dequantise(Quantised(A, As)) @ self._weight.t()


def prefer_emulation() -> None:
    """Make vLLM choose this kernel on a CPU."""
    kernels = _POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU]
    if EmulatedBlockKernel not in kernels:
        kernels.insert(0, EmulatedBlockKernel)
