"""AdamW that keeps its state as Transformer Engine's `FusedAdam` does: the number of steps in each group, the moments alone in the state.

megatron-core writes and reads the state of its distributed optimizer in that form. torch's AdamW has a number of steps for every parameter,
which megatron-core writes and cannot read back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """One group after the other, element by element."""

    def __init__(
        self, params: Any, lr: float, weight_decay: float, betas: tuple[float, float], eps: float, adam_w_mode: bool = True, **_: Any
    ) -> None:
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad.float()
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(parameter, dtype=torch.float32)
        (first, second), step = group["betas"], group["step"]
        mean = state["exp_avg"].lerp_(gradient, 1 - first) / (1 - first**step)
        square = state["exp_avg_sq"].lerp_(gradient**2, 1 - second) / (1 - second**step)
        parameter.sub_(group["lr"] * (mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * parameter))


def take_the_place_of_transformer_engines() -> None:
    """In megatron-core, for this process."""
    import megatron.core.optimizer as optimizer
    from megatron.core.optimizer import distrib_optimizer

    optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True
