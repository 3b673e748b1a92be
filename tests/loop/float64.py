"""Float64 where a library asks for float32 by name: sums in another order are equal to 1e-15, so nothing hangs on their last bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

FP8_IN_FLOAT64 = "fp8-fp64"
"""A policy with FP8 operands that keeps everything else in float64, which no configuration offers."""


class KeepFloat64(TorchFunctionMode):
    """transformers computes norms, softmax and rotary angles in float32 whatever the model's type; here they stay float64.

    Megatron has float32 gradients besides, and clips them only if their type says so.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        if func is torch.Tensor.type and len(args) == 1:
            return func(*args).replace("Double", "Float")
        wider = {torch.float32: torch.float64}
        args = tuple(wider[arg] if arg is torch.float32 else arg for arg in args)
        return func(*args, **{name: wider[arg] if arg is torch.float32 else arg for name, arg in (kwargs or {}).items()})
