"""What FP8 layers of Transformer Engine keep between passes, and what keeps log-prob passes out of it.

Only recipe `delayed` keeps anything: for each tensor a scale, and a history of largest magnitudes from which the next scale is made. Every
forward pass writes into the newest entry of the history, also without gradient: the quantiser's `amax` is a view of it, and its kernels
raise it (2.20.2, `pytorch/quantization.py:1449`; `common/cast/fp8/quantize_fp8.cuh:223`). Only a pass with gradient moves on to the next
entry and makes new scales (`pytorch/quantization.py:779`). So the tokens of a log-prob pass would enter the scales of the next training
pass, and how often log-probs are taken would change what is trained.

`tests/unit/policy/test_fp8_state.py` has these rules as a small model, and compares what they rest on with the source where it is
installed. Rules and reasons: docs/fp8.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1z.errors import TrainingError


class DelayedState(Protocol):
    """`DelayedScalingRecipeState` of Transformer Engine: the tensors of a module in one direction."""

    scale: Tensor
    """[n], ones at first."""
    amax_history: Tensor
    """[length, n], zeros at first; 0 is the newest entry, which the passes raise."""


@contextmanager
def scales_kept(chunks: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Inside, passes leave scales and histories as they were; what they make anew is as if it had never been used.

    Tensors are written in place: Transformer Engine's global buffers refer to them.
    """
    modules = list(chunks)
    before = [(state, state.scale.clone(), state.amax_history.clone()) for state in delayed_states(modules)]
    try:
        yield
    finally:
        for state, scale, amax_history in before:
            state.scale.copy_(scale)
            state.amax_history.copy_(amax_history)
        known = {id(state) for state, *_ in before}
        for state in delayed_states(modules):
            if id(state) not in known:
                state.scale.fill_(1.0)
                state.amax_history.zero_()


def check_same_number(num_micro_batches: int, device: torch.device) -> None:
    """All ranks must make the same number of FP8 forward passes: after each, `delayed` reduces over data and tensor-parallel ranks.

    Raises:
        TrainingError: on every rank, before any waits for a pass that never comes.
    """
    extremes = torch.tensor([num_micro_batches, -num_micro_batches], device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    most, fewest = extremes[0].item(), -extremes[1].item()
    if most != fewest:
        raise TrainingError(
            f"ranks have between {fewest:.0f} and {most:.0f} micro-batches for one pass; with FP8 all need the same number."
        )


def delayed_states(modules: Sequence[torch.nn.Module]) -> list[DelayedState]:
    """What modules of Transformer Engine keep under recipe `delayed`; nothing under the others."""
    metas = (getattr(module, "fp8_meta", None) for chunk in modules for module in chunk.modules())
    states: Iterator[Any] = (meta.get(key) for meta in metas if isinstance(meta, dict) for key in ("scaling_fwd", "scaling_bwd"))
    return [state for state in states if isinstance(getattr(state, "amax_history", None), Tensor)]
