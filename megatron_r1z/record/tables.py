"""Tables for a terminal and for Markdown. Standard library only."""

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


def markdown(rows: Sequence[Sequence[object]]) -> str:
    r"""A Markdown table, the first row its header, the first column to the left and the others to the right.

    >>> markdown([("set", "accuracy"), ("amc", "40 %")])
    '| set | accuracy |\n| --- | --: |\n| amc | 40 % |'
    """
    header, *body = rows
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *body]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines)
