"""The policy's parameters as a refit into an FP8 engine reads them: matrices quantised on the rank that holds them, once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from megatron_r1z.fp8.blocks import quantise_weight, scale_shape
from megatron_r1z.layout.fp8 import SCALES
from megatron_r1z.shared_memory import SharedCopies


class QuantisedSource:
    """A source for `Refit` in the layouts of `layout/fp8.by_format`.

    Bytes and scales are kept from one refit to the next, where other ranks of the machine can read them: a byte for each element of the
    matrices beside the policy.

    Args:
        source: this rank's policy parameters, in any number format.
        names: which of them go over in FP8.
    """

    def __init__(self, source: Callable[[], Mapping[str, Tensor]], names: Collection[str]) -> None:
        self._source = source
        self._names = names
        parameters = source()
        staged = {name: torch.empty(parameters[name].shape, dtype=torch.float8_e4m3fn, device=parameters[name].device) for name in names}
        for name in names:
            shape = scale_shape(*parameters[name].shape)
            staged[name + SCALES] = torch.empty(shape, dtype=torch.float32, device=parameters[name].device)
        self._shared = None if any(tensor.is_cuda for tensor in staged.values()) else SharedCopies(staged)
        self._staged = staged if self._shared is None else self._shared.tensors

    @torch.no_grad()
    def __call__(self) -> Mapping[str, Tensor]:
        """The present parameters, quantised anew."""
        parameters = self._source()
        for name in self._names:
            data, scale_inv = quantise_weight(parameters[name].detach())
            self._staged[name].copy_(data)
            self._staged[name + SCALES].copy_(scale_inv)
        return {**parameters, **self._staged}
