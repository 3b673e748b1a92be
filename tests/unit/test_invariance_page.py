"""docs/invariance.md: a row for every case that the loop test measures, and every float32 figure within its bound."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.loop.invariance import BOUNDS
from tests.loop.test_layouts import BF16, CASES

PAGE = Path(__file__).parents[2] / "docs" / "invariance.md"


def rows() -> dict[str, list[float]]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {"/".join(row[:5]): [float(figure) for figure in row[5:]] for row in cells}


def test_the_page_has_every_case() -> None:
    assert list(rows()) == [case.name for case in [*CASES, BF16]]


def test_every_float32_row_is_within_the_bounds() -> None:
    for name, figures in rows().items():
        assert not name.endswith("fp32") or all(figure < bound for figure, bound in zip(figures, BOUNDS.values(), strict=True)), name
