"""Degrees of parallelism and rank coordinates, in Megatron-core's order.

`parallel_state.initialize_model_parallel` numbers ranks as tp-cp-ep-dp-pp, the first named axis fastest, and it does so twice: once for
the experts, which know no cp, and once for all other layers, which know no ep. So a rank is
`tp_rank + tp * (cp_rank + cp * (dp_rank + dp * pp_rank))` and also `etp_rank + etp * (ep_rank + ep * (edp_rank + edp * pp_rank))`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import NamedTuple

from megatron_r1z.errors import ConfigError


class Coordinates(NamedTuple):
    """Where a rank stands on each axis."""

    tp_rank: int
    cp_rank: int
    dp_rank: int
    pp_rank: int


class ExpertCoordinates(NamedTuple):
    """Where a rank stands among the ranks of its pipeline stage, as far as experts are concerned."""

    etp_rank: int
    ep_rank: int
    edp_rank: int


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
    Coordinates(tp_rank=1, cp_rank=0, dp_rank=0, pp_rank=1)
    >>> Topology(num_ranks=8, tp=2, ep=4, etp=1).expert_coordinates(5)
    ExpertCoordinates(etp_rank=0, ep_rank=1, edp_rank=1)

    Raises:
        ConfigError: a degree below 1, a rank count that tp x cp x pp or etp x ep x pp does not divide, vpp > 1 without pp > 1, or
            `chunk_layers` without an entry for every model chunk.
    """

    num_ranks: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    """Model chunks per pipeline rank (interleaved schedule)."""
    cp: int = 1
    """Context-parallel size: ranks that share the tokens of a sequence. They hold the same weights, as data-parallel ranks do."""
    ep: int = 1
    """Expert-parallel size: ranks over which the experts of a layer are spread."""
    etp: int | None = None
    """Expert-tensor-parallel size: ranks over which one expert is split; None is `tp`."""
    chunk_layers: tuple[int, ...] = ()
    """Layers of every model chunk in model order, which is chunk `vp_stage * pp + pp_rank`; empty: the same for all."""

    def __post_init__(self) -> None:
        for name in ("num_ranks", "tp", "pp", "vpp", "cp", "ep", "expert_tp"):
            if getattr(self, name) < 1:
                raise ConfigError(f"topology: {name.replace('expert_tp', 'etp')} is {getattr(self, name)}; it must be at least 1.")
        self._check_ranks({"tp": self.tp, "cp": self.cp, "pp": self.pp})
        self._check_ranks({"etp": self.expert_tp, "ep": self.ep, "pp": self.pp})
        if self.vpp > 1 and self.pp == 1:
            raise ConfigError(f"topology: vpp is {self.vpp} and pp is 1; virtual pipelining needs pp of at least 2.")
        if self.chunk_layers and (len(self.chunk_layers) != self.num_chunks or min(self.chunk_layers) < 1):
            raise ConfigError(
                f"topology: chunk_layers is {_in_words(self.chunk_layers)}; it must give each of the {self._chunks_in_words} "
                "at least one layer."
            )

    def _check_ranks(self, degrees: dict[str, int]) -> None:
        product = math.prod(degrees.values())
        if self.num_ranks % product:
            split = " x ".join(f"{name} {size}" for name, size in degrees.items())
            raise ConfigError(
                f"topology: {self.num_ranks} ranks cannot be split into {split}; the rank count must be a multiple of {product}."
            )

    @property
    def dp(self) -> int:
        """Data-parallel size: ranks, of those that hold the same weights, that take samples of their own."""
        return self.num_ranks // (self.tp * self.cp * self.pp)

    @property
    def expert_tp(self) -> int:
        """`etp` with its default filled in."""
        return self.tp if self.etp is None else self.etp

    @property
    def num_chunks(self) -> int:
        """Model chunks of the whole model."""
        return self.pp * self.vpp

    @property
    def _chunks_in_words(self) -> str:
        return f"pp {self.pp} x vpp {self.vpp} = {self.num_chunks} model chunks"

    def coordinates(self, rank: int) -> Coordinates:
        """Coordinates of a global rank.

        Raises:
            ConfigError: the rank does not exist.
        """
        self._check_exists(rank)
        copies, tp_rank = divmod(rank, self.tp)
        samples, cp_rank = divmod(copies, self.cp)
        return Coordinates(tp_rank, cp_rank, samples % self.dp, samples // self.dp)

    def expert_coordinates(self, rank: int) -> ExpertCoordinates:
        """Expert coordinates of a global rank; its pipeline rank is that of `coordinates`.

        Raises:
            ConfigError: the rank does not exist.
        """
        self._check_exists(rank)
        holder = rank % (self.num_ranks // self.pp) // self.expert_tp
        return ExpertCoordinates(rank % self.expert_tp, holder % self.ep, holder // self.ep)

    def _check_exists(self, rank: int) -> None:
        if not 0 <= rank < self.num_ranks:
            raise ConfigError(f"topology: rank {rank} does not exist; there are {self.num_ranks} ranks.")

    def rank_of(self, tp_rank: int, cp_rank: int, dp_rank: int, pp_rank: int) -> int:
        """Global rank at these coordinates: the inverse of `coordinates`."""
        return tp_rank + self.tp * (cp_rank + self.cp * (dp_rank + self.dp * pp_rank))

    def chunks(self, num_layers: int, pp_rank: int) -> tuple[Chunk, ...]:
        """The model chunks of a pipeline rank, by `vp_stage` (mcore `transformer_layer.get_transformer_layer_offset`).

        Raises:
            ConfigError: `chunk_layers` adds up to another number of layers, or it is empty and the layers cannot be split evenly.
        """
        sizes = self._layers_of_chunks(num_layers)
        ends = list(accumulate(sizes))
        indices = [vp_stage * self.pp + pp_rank for vp_stage in range(self.vpp)]
        return tuple(
            Chunk(vp_stage, range(ends[index] - sizes[index], ends[index]), index == 0, index == self.num_chunks - 1)
            for vp_stage, index in enumerate(indices)
        )

    def _layers_of_chunks(self, num_layers: int) -> tuple[int, ...]:
        sizes = self.chunk_layers or (num_layers // self.num_chunks,) * self.num_chunks
        if sum(sizes) == num_layers:
            return sizes
        remedy = f"lower pp or vpp to at most {num_layers} chunks"
        if num_layers >= self.num_chunks:
            example = _in_words(nearly_even(num_layers, self.num_chunks))
            remedy = f"set chunk_layers, for example {example} (typed as layers={example.replace(', ', ':').replace(' ', '')})"
        if self.chunk_layers:
            wrong = f"chunk_layers {_in_words(sizes)} adds up to {sum(sizes)}, but the model has {num_layers} layers"
        else:
            wrong = f"{num_layers} layers cannot be split evenly over {self._chunks_in_words}"
        raise ConfigError(f"topology: {wrong}; {remedy}.")


def nearly_even(num_layers: int, num_chunks: int) -> tuple[int, ...]:
    """Sizes that differ by at most one; the chunks at both ends, which hold embedding and output layer too, are the smaller ones."""
    size, num_larger = divmod(num_layers, num_chunks)
    first_larger = (num_chunks - num_larger) // 2
    return tuple(size + (first_larger <= index < first_larger + num_larger) for index in range(num_chunks))


def _in_words(sizes: tuple[int, ...]) -> str:
    """Numbers with repetitions drawn together.

    >>> _in_words((7, 8, 8, 8, 7))
    '7, 8 x 3, 7'
    """
    counts = [(size, len(list(group))) for size, group in groupby(sizes)]
    return ", ".join(f"{size} x {count}" if count > 1 else str(size) for size, count in counts)
