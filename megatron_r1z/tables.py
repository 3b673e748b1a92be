"""Tables for a terminal. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence


def align(rows: Sequence[Sequence[object]]) -> list[str]:
    """One line per row, columns of one width, the first to the left and the others to the right."""
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            str(cell).rjust(width) if column else str(cell).ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
