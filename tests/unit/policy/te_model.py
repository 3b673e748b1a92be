"""Transformer Engine's delayed scaling as a small model: what its modules keep, and when it moves.

Quotes are from transformer-engine 2.20.2, below `transformer_engine/`; `test_fp8_state.py` looks for them in the source of whatever
version is installed. The model has one input tensor per module, quantises by its scale alone, and counts reductions instead of doing them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

FP8_MAX = 448.0
HISTORY = 4
QUOTES = {  # file: what the model rests on
    "pytorch/quantization.py": [
        # A fresh state (1436-1442): `DelayedState` below.
        "self.scale = torch.ones(num_quantizers, dtype=torch.float32, device=device)",
        "self.amax_history = torch.zeros(",
        # The quantiser writes its amax into the newest entry of the history (1449), in any pass: `Module.forward`.
        "self.amax_history[0][i].reshape((1,))",
        # Only with gradient does the end of an autocast reduce, make scales and move on (779): `Engine.autocast`.
        "not _graph and torch.is_grad_enabled():",
        # ... in place, in tensors that the global buffers hold (553-561, 1067-1073, 1109): `Engine._reduce_and_update`.
        "_buffer[key].append(fp8_meta[fp8_meta_tensor_key].amax_history[0])",
        "amax_history.copy_(new_amax_history)",
        "amax_history[0].fill_(0.0)",
        "scale.copy_(",
        # Checkpoints (786-837): the first forward keeps scales in a queue, the recomputation takes the oldest: `Module.forward`.
        'fp8_meta["scaling_fwd"].amax_history.clone(),',
        ".popleft()",
    ],
    "pytorch/module/base.py": [
        # Which of the two a module does (lines 1602 and 1636): `Module.forward`.
        "FP8GlobalStateManager.get_old_fp8_meta_tensors_for_recompute(self.fp8_meta)",
        "FP8GlobalStateManager.copy_forward_fp8_meta_tensors_for_recompute(self.fp8_meta)",
    ],
}
CHECKPOINT_QUOTE = ("pytorch/distributed.py", "# to avoid unreachable FP8 recompute state.")
"""From 2.20.2 on (752): `checkpoint()` in a pass without gradient runs the function, and keeps nothing."""
KERNEL_QUOTE = "atomicMaxFloat(amax_ptr, amax);"
"""2.20.0.dev0, `common/cast/fp8/quantize_fp8.cuh:223`: kernels raise the amax, they do not set it."""


class DelayedState:
    """`DelayedScalingRecipeState` with one quantiser."""

    def __init__(self) -> None:
        self.scale = torch.ones(1)
        self.amax_history = torch.zeros(HISTORY, 1)


class Engine:
    """`FP8GlobalStateManager`: global buffers, autocast, recomputation."""

    def __init__(self, *, gradient_free_checkpoints: bool = True) -> None:
        self.gradient_free_checkpoints = gradient_free_checkpoints
        self.states: list[DelayedState] = []
        self.reductions = 0
        self.phase = "plain"

    @contextmanager
    def autocast(self) -> Iterator[None]:
        yield
        if torch.is_grad_enabled():
            self._reduce_and_update()

    def _reduce_and_update(self) -> None:
        self.reductions += 1
        for state in self.states:
            amax = state.amax_history.amax(dim=0)
            state.amax_history.copy_(torch.roll(state.amax_history, -1, 0))
            state.amax_history[0].fill_(0.0)
            state.scale.copy_(torch.where(amax > 0, FP8_MAX / amax, state.scale))


class Module(torch.nn.Module):
    """A linear layer's input quantiser; metadata appears with the first pass, as `init_fp8_metadata` makes it."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine
        self.fp8_meta: dict[str, object] = {"fp8_checkpoint": False}
        self.kept: deque[tuple[Tensor, Tensor]] = deque()
        self.recomputed_with: list[float] = []

    @property
    def state(self) -> DelayedState:
        found = self.fp8_meta["scaling_fwd"]
        assert isinstance(found, DelayedState)
        return found

    def forward(self, inputs: Tensor) -> Tensor:
        if "scaling_fwd" not in self.fp8_meta:
            self.fp8_meta["scaling_fwd"] = DelayedState()
            self.engine.states.append(self.state)
        if self.engine.phase == "recompute":
            now = self.state.amax_history.clone(), self.state.scale.clone()
            history, scale = self.kept.popleft()
            self.state.amax_history.copy_(history)
            self.state.scale.copy_(scale)
            self.recomputed_with.append(self.state.scale.item())
        elif self.engine.phase == "first":
            self.kept.append((self.state.amax_history.clone(), self.state.scale.clone()))
        newest = self.state.amax_history[0]
        newest.copy_(torch.maximum(newest, inputs.abs().max()))
        outputs = (inputs * self.state.scale).round() / self.state.scale
        if self.engine.phase == "recompute":
            self.state.amax_history.copy_(now[0])
            self.state.scale.copy_(now[1])
        return outputs


class Policy(torch.nn.Module):
    """Two modules under one autocast, as megatron-core wraps all layers with recipe `delayed` (0.16.1, transformer_block.py:717-724)."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine
        self.layers = torch.nn.ModuleList([Module(engine), Module(engine)])

    def states(self) -> list[tuple[float, list[float]]]:
        """Scale and history of each module."""
        return [(layer.state.scale.item(), layer.state.amax_history[:, 0].tolist()) for layer in self.layers]

    def run(self, inputs: Tensor, *, recompute: bool = False) -> Tensor:
        """A forward pass; with `recompute` inside a checkpoint."""
        keeps = recompute and (torch.is_grad_enabled() or not self.engine.gradient_free_checkpoints)
        self.engine.phase = "first" if keeps else "plain"
        with self.engine.autocast():
            for layer in self.layers:
                inputs = 3 * layer(inputs)
        self.engine.phase = "plain"
        return inputs

    def train_step(self, inputs: Tensor, *, recompute: bool = False) -> Tensor:
        """A forward pass, and what the backward pass computes again."""
        output = self.run(inputs, recompute=recompute)
        if recompute:
            self.engine.phase = "recompute"
            for layer in self.layers:
                inputs = 3 * layer(inputs)
            self.engine.phase = "plain"
            assert torch.equal(inputs, output), "the recomputed pass is not the first one"
        return output
