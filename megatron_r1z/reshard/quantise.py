"""The policy's parameters as a refit into an FP8 engine reads them: matrices quantised on the rank that holds them, once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_r1z.fp8.blocks import Quantised, quantise_weight, scale_shape
from megatron_r1z.host.shared_memory import SharedTensors
from megatron_r1z.layout.blocks import Layout
from megatron_r1z.layout.fp8 import BLOCK, SCALES, by_format
from megatron_r1z.layout.plan import Plan, make_plan


def plans_by_format(
    source: Layout, destination: Layout, matrices: Collection[str], dtype: torch.dtype, round_bytes: int, ranks_per_node: int
) -> list[tuple[torch.dtype, Plan]]:
    """The plans of a `Refit`: one if no matrix goes over in FP8, otherwise of all else, of the matrices, and of their scales.

    Args:
        source: of the policy.
        destination: of the engines.
        matrices: what goes over in FP8 (`layout/fp8.fp8_matrices`).
        dtype: number format of everything else.
        round_bytes: bound of a rank's buffer.
        ranks_per_node: consecutive ranks that share a node; what a rank lacks comes from its own node where that has it.
    """
    layouts = zip(by_format(source, matrices), by_format(destination, matrices), strict=True)
    return [
        (number_format, make_plan(mine, theirs, number_format.itemsize, round_bytes, ranks_per_node))
        for number_format, (mine, theirs) in zip(dtypes_by_format(dtype), layouts, strict=True)
        if mine.blocks
    ]


def dtypes_by_format(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Of the layouts of `layout/fp8.Formats`, where everything that is not in FP8 is in `dtype`."""
    return dtype, torch.float8_e4m3fn, torch.float32


PART_ROWS = 24 * BLOCK
"""What a thread takes at a time."""
BITS = {torch.bfloat16: (torch.int16, np.int32(16)), torch.float32: (torch.int32, np.int32(0))}
"""Formats of the compiled loop: as which integers it reads them, and how far these lie from the bits of a float32."""


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
        is_on_gpu = any(parameters[name].is_cuda for name in names)
        staged = {}
        for name in names:
            weight, device = parameters[name], parameters[name].device if is_on_gpu else "meta"
            staged[name] = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=device)
            staged[name + SCALES] = torch.empty(scale_shape(*weight.shape), dtype=torch.float32, device=device)
        self._shared = None if is_on_gpu else SharedTensors(staged)
        self._staged = staged if self._shared is None else self._shared.tensors

    @torch.no_grad()
    def __call__(self) -> Mapping[str, Tensor]:
        """The present parameters, quantised anew."""
        parameters = self._source()
        quantise_all([(parameters[name], Quantised(self._staged[name], self._staged[name + SCALES])) for name in self._names])
        return {**parameters, **self._staged}


def quantise_all(pairs: Collection[tuple[Tensor, Quantised]]) -> None:
    """`quantise_weight` of each first into each second; on a CPU by a compiled loop on as many threads as torch has."""
    parts = [part for weight, target in pairs for part in _parts(weight.detach(), target)]
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        usual = list(threads.map(_quantise_part, parts))
    for part in (part for part, is_usual in zip(parts, usual, strict=True) if not is_usual):
        data, scale_inv = quantise_weight(part.weight)
        part.target.data.copy_(data)
        part.target.scale_inv.copy_(scale_inv)


class _Part(NamedTuple):
    """Whole rows of blocks of a matrix."""

    weight: Tensor
    target: Quantised


def _parts(weight: Tensor, target: Quantised) -> Iterator[_Part]:
    for first in range(0, weight.shape[0], PART_ROWS):
        rows, blocks = slice(first, first + PART_ROWS), slice(first // BLOCK, (first + PART_ROWS) // BLOCK)
        yield _Part(weight[rows], Quantised(target.data[rows], target.scale_inv[blocks]))


def _quantise_part(part: _Part) -> bool:
    """False where the compiled loop cannot do it."""
    weight, (data, scale_inv) = part
    if weight.is_cuda or weight.dtype not in BITS or not weight.is_contiguous():
        return False
    from megatron_r1z.fp8.compiled import quantise_blocks

    integer, shift = BITS[weight.dtype]
    done: bool = quantise_blocks(weight.view(integer).numpy(), shift, data.view(torch.uint8).numpy(), scale_inv.numpy())
    return done
