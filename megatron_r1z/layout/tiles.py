"""Tiles of the [tokens, vocabulary] matrix, which never exists as a whole (`policy/logprob.py`). Standard library only."""

from __future__ import annotations

import math

TILE_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}
"""Of one tile in the softmax's type, by device. Two are in memory at a time; on a CPU they stay in its cache."""


def tile_shape(num_rows: int, elements: int) -> tuple[int, int]:
    """Rows and columns of a tile of at most `elements`, or one: all rows, unless they would be more than four times the columns."""
    rows = max(1, min(num_rows, elements, 2 * math.isqrt(elements)))
    return rows, max(1, elements // rows)
