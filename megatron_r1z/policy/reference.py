"""The weights of the reference model: kept in the host's memory, and in the policy's place for the passes that take its log-probs.

One copy of a rank's weights in the host's memory and two exchanges an iteration, in place of a second model on the device. Under every
layout it is exact: the weights come back to the bit, and the optimizer's state does not take part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class ReferenceWeights:
    """A copy of the weights that are in place when it is made."""

    def __init__(self, parameters: Callable[[], Mapping[str, Tensor]]) -> None:
        """`parameters` gives the weights of a rank; writing into them changes the model."""
        self._parameters = parameters
        self._kept = {name: tensor.to("cpu", copy=True) for name, tensor in parameters().items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has these weights; afterwards its own, to the bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """One tensor after the other, so that no more than one is there three times."""
        for name, tensor in self._parameters().items():
            own = tensor.to("cpu", copy=True)
            tensor.copy_(self._kept[name])
            self._kept[name] = own
