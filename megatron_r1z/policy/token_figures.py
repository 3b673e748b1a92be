"""What a model says of each response token, brought together from the ranks: advantages may be made of it before packing.

Every rank gets all figures, as it has all rewards, so that advantages and packing are computed alike everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch.distributed as dist
from torch import Tensor

from megatron_r1z import ranks
from megatron_r1z.layout.topology import Topology
from megatron_r1z.packing import MicroBatch
from megatron_r1z.types import TokenFigures

Part = tuple[str, list[int], list[float]]
"""Sample id, positions and figures of those of its tokens that a rank has."""


def gather_figures(batches: Sequence[MicroBatch], figures: Sequence[Tensor | None], topology: Topology) -> TokenFigures:
    """The figures [R] of each micro-batch, by sample; all ranks call this. They are None on all but the last pipeline stage.

    Of tensor-parallel ranks, which have the same ones, only the first tells them.
    """
    is_first = topology.coordinates(dist.get_rank()).tp_rank == 0
    return join_figures(ranks.gather(split_figures(batches, figures) if is_first else []))


def split_figures(batches: Sequence[MicroBatch], figures: Sequence[Tensor | None]) -> list[Part]:
    """A rank's figures by sample; under context parallelism it has some of a sample's tokens."""
    parts = []
    for batch, values_R in zip(batches, figures, strict=True):
        if values_R is None:
            continue
        positions_R = batch.position_ids_T[batch.rows_R]
        for number, sample_id in enumerate(batch.sample_ids):
            is_here_R = batch.sequences_R == number
            parts.append((sample_id, positions_R[is_here_R].tolist(), values_R[is_here_R].tolist()))
    return parts


def join_figures(parts: Iterable[Part]) -> TokenFigures:
    """The parts of all ranks as the figures of whole responses, in the order of their tokens."""
    found: dict[str, dict[int, float]] = {}
    for sample_id, positions, values in parts:
        found.setdefault(sample_id, {}).update(zip(positions, values, strict=True))
    return {sample_id: [by_position[position] for position in sorted(by_position)] for sample_id, by_position in found.items()}
