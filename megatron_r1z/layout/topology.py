"""Degrees of parallelism and rank coordinates, in Megatron-core's order.

`parallel_state.initialize_model_parallel` numbers ranks as tp-cp-ep-dp-pp, the first named axis fastest. Context and expert parallel
sizes are 1 here, so a rank is `tp_rank + tp * (dp_rank + dp * pp_rank)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatron_r1z.errors import ConfigError


class Coordinates(NamedTuple):
    """Where a rank stands on each axis."""

    tp_rank: int
    dp_rank: int
    pp_rank: int


class Chunk(NamedTuple):
    """One model chunk of a pipeline rank: without virtual pipelining a pipeline rank has one, `vp_stage` 0."""

    vp_stage: int
    layers: range
    """Global layer numbers."""
    is_first: bool
    """Holds the embedding."""
    is_last: bool
    """Holds the final norm and the output layer."""


@dataclass(frozen=True)
class Topology:
    """How `num_ranks` ranks are split; the data-parallel size is what the other degrees leave.

    >>> Topology(num_ranks=8, tp=2, pp=2).coordinates(5)
    Coordinates(tp_rank=1, dp_rank=0, pp_rank=1)

    Raises:
        ConfigError: a degree below 1, a rank count that tp x pp does not divide, or vpp > 1 without pp > 1.
    """

    num_ranks: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    """Model chunks per pipeline rank (interleaved schedule)."""

    def __post_init__(self) -> None:
        for name in ("num_ranks", "tp", "pp", "vpp"):
            if getattr(self, name) < 1:
                raise ConfigError(f"topology: {name} is {getattr(self, name)}; it must be at least 1.")
        if self.num_ranks % (self.tp * self.pp):
            raise ConfigError(
                f"topology: {self.num_ranks} ranks cannot be split into tp {self.tp} x pp {self.pp}; "
                f"the rank count must be a multiple of {self.tp * self.pp}."
            )
        if self.vpp > 1 and self.pp == 1:
            raise ConfigError(f"topology: vpp is {self.vpp} and pp is 1; virtual pipelining needs pp of at least 2.")

    @property
    def dp(self) -> int:
        """Data-parallel size: copies of the model."""
        return self.num_ranks // (self.tp * self.pp)

    def coordinates(self, rank: int) -> Coordinates:
        """Coordinates of a global rank.

        Raises:
            ConfigError: the rank does not exist.
        """
        if not 0 <= rank < self.num_ranks:
            raise ConfigError(f"topology: rank {rank} does not exist; there are {self.num_ranks} ranks.")
        return Coordinates(rank % self.tp, rank // self.tp % self.dp, rank // (self.tp * self.dp))

    def rank_of(self, tp_rank: int, dp_rank: int, pp_rank: int) -> int:
        """Global rank at these coordinates: the inverse of `coordinates`."""
        return tp_rank + self.tp * (dp_rank + self.dp * pp_rank)

    def chunks(self, num_layers: int, pp_rank: int) -> tuple[Chunk, ...]:
        """The model chunks of a pipeline rank, by `vp_stage`.

        Chunk `vp_stage * pp + pp_rank` of the whole model has `num_layers / (pp * vpp)` layers
        (mcore `transformer_layer.get_transformer_layer_offset`).

        Raises:
            ConfigError: the layers cannot be split evenly.
        """
        num_chunks = self.pp * self.vpp
        if num_layers % num_chunks:
            raise ConfigError(
                f"topology: {num_layers} layers cannot be split evenly over pp {self.pp} x vpp {self.vpp} = {num_chunks} model chunks."
            )
        size = num_layers // num_chunks
        indices = [vp_stage * self.pp + pp_rank for vp_stage in range(self.vpp)]
        return tuple(
            Chunk(vp_stage, range(index * size, (index + 1) * size), index == 0, index == num_chunks - 1)
            for vp_stage, index in enumerate(indices)
        )
