"""Resumable order: endless passes over items, several sources mixed by weight.

Which item is draw number n is a function of the seed, the sizes and the weights alone: not of how draws are cut into calls, and not of
whether the run was stopped in between. Only `random.Random.random` is used, whose sequence the standard library keeps between versions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from random import Random
from typing import Any, Generic, TypeVar

from megatron_r1z.errors import DataError

Item = TypeVar("Item")


class SeededOrder:
    """Endless order of `size` items: pass after pass, each a fresh permutation that depends on (seed, pass) only."""

    def __init__(self, size: int, seed: str) -> None:
        self._size = size
        self._seed = seed
        self._pass = -1
        self._permutation: list[int] = []

    def index(self, position: int) -> int:
        """The item at `position` (from 0) of the endless order."""
        number, offset = divmod(position, self._size)
        if number != self._pass:
            generator = Random(f"{self._seed}/{number}")
            keys = [generator.random() for _ in range(self._size)]
            self._permutation = sorted(range(self._size), key=keys.__getitem__)
            self._pass = number
        return self._permutation[offset]


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a stream has been drawn, and of what.

    >>> Cursor(drawn=3, taken=(2, 1), sizes=(10, 5), seed=0, weights=(1.0, 2.0)).to_state()
    {'drawn': 3, 'taken': [2, 1], 'sizes': [10, 5], 'seed': 0, 'weights': [1.0, 2.0], 'digests': []}
    """

    drawn: int
    """Draws so far, over all sources."""
    taken: tuple[int, ...]
    """Draws so far from each source; their sum is `drawn`."""
    sizes: tuple[int, ...]
    """Items of each source. With seed, weights and digests it decides which item a draw is, so a restore refuses others."""
    seed: int | None = None
    """None where an earlier version of this package did not keep it; likewise empty weights."""
    weights: tuple[float, ...] = ()
    digests: tuple[str, ...] = ()
    """Of the contents of each source; empty where nobody took them."""

    def to_state(self) -> dict[str, Any]:
        """The cursor as JSON-able scalars and lists."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Cursor:
        """The inverse of `to_state`."""
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in state.items()}
        return Cursor(**values)

    def misfit(self, other: Cursor) -> str | None:
        """What keeps a stream that stands at `other` from going on here, as a sentence without its end; None where nothing does."""
        if self.sizes != other.sizes:
            return f"the checkpoint was drawing from sources of {list(self.sizes)} items and now they hold {list(other.sizes)}"
        if None not in (self.seed, other.seed) and self.seed != other.seed:
            return f"the checkpoint was drawing by seed {self.seed} and now it is {other.seed}"
        if self.weights and self.weights != other.weights:
            return f"the checkpoint was drawing from sources of weight {list(self.weights)} and now they have {list(other.weights)}"
        changed = [str(number) for number, pair in enumerate(zip(self.digests, other.digests, strict=False)) if pair[0] != pair[1]]
        if changed:
            return f"source {', '.join(changed)} (from 0) has other rows, though as many, than the checkpoint was drawing from"
        return None


class SeededStream(Generic[Item]):
    """Draws items of weighted sources without end; within a source none is repeated before its pass is over."""

    def __init__(self, sources: Sequence[tuple[Sequence[Item], float]], seed: int, digests: Sequence[str] = ()) -> None:
        """Mix `sources`, pairs of items and relative weight; `digests` are those of the contents of each.

        Raises:
            DataError: there is no source, or one of them is empty.
        """
        if not sources or not all(items for items, _ in sources):
            raise DataError(f"cannot draw from sources of {[len(items) for items, _ in sources]} items; every source needs at least one.")
        self._items = [items for items, _ in sources]
        self._weights = tuple(weight for _, weight in sources)
        self._digests = tuple(digests)
        self._bounds = list(accumulate(self._weights))
        self._seed = seed
        self._orders = [SeededOrder(len(items), f"order/{seed}/{index}") for index, items in enumerate(self._items)]
        self._drawn = 0
        self._taken = [0] * len(sources)

    @property
    def cursor(self) -> Cursor:
        """Where the stream stands."""
        return Cursor(self._drawn, tuple(self._taken), tuple(map(len, self._items)), self._seed, self._weights, self._digests)

    def draw(self, count: int) -> list[Item]:
        """The next `count` items."""
        return [self._draw_one() for _ in range(count)]

    def to_state(self) -> dict[str, Any]:
        """The cursor, JSON-able."""
        return self.cursor.to_state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on behind the draw at which `to_state` was taken.

        Raises:
            DataError: the state belongs to other sources.
        """
        cursor = Cursor.from_state(state)
        reason = cursor.misfit(self.cursor)
        if reason is not None:
            raise DataError(f"{reason}; give the same files, columns, token limits, weights and seed, or choose another logging.folder.")
        self._drawn, self._taken = cursor.drawn, list(cursor.taken)

    def _draw_one(self) -> Item:
        source = self._choose_source(self._drawn)
        item = self._items[source][self._orders[source].index(self._taken[source])]
        self._taken[source] += 1
        self._drawn += 1
        return item

    def _choose_source(self, draw: int) -> int:
        """The source of draw number `draw`: a function of the seed and that number."""
        if len(self._bounds) == 1:
            return 0
        point = Random(f"mix/{self._seed}/{draw}").random() * self._bounds[-1]
        return min(bisect_right(self._bounds, point), len(self._bounds) - 1)
