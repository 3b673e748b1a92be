"""Lines of the table `Figures` of docs/gpu.md from what `tools/gpu_check.sh` found: `python tools/gpu_report.py results.jsonl ...`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

COLUMNS = ("Date", "Commit", "GPUs", "Model", "Layout, precision", "Check", "Figure")
ABOUT = ("model", "precision", "layout", "layers")
"""Figures that say what was checked, and have a column."""


def rows(lines: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """One for each check of each run that found figures or failed, in their order; a last line that was cut off is left out."""
    run: list[dict[str, Any]] = []
    for entry in filter(None, map(_parsed, lines)):
        if "run" in entry and run:
            yield from _rows_of(run)
            run = []
        run.append(entry)
    if run:
        yield from _rows_of(run)


def render(table: Iterable[tuple[str, ...]]) -> str:
    """Markdown."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *table]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        entry: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return entry


def _rows_of(run: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    head, entries = run[0], [entry for entry in run if "check" in entry]
    figures: dict[str, dict[str, Any]] = {}
    ended: dict[str, dict[str, Any]] = {}
    for entry in entries:
        figures.setdefault(entry["check"], {}).update(entry.get("figures", {}))
        if "status" in entry:
            ended[entry["check"]] = entry
    machine = figures.get("machine", {})
    gpu = f"{machine.get('num_gpus', 1)} x {machine['gpu']}" if machine.get("gpu") else "none (CPU)"
    for check, found in figures.items():
        end = ended.get(check, {"status": "not ended", "reason": ""})
        if not found and end["status"] != "failed":
            continue
        said = [f"{name} {_number(value)}" for name, value in found.items() if name not in ABOUT]
        if end["status"] != "passed":
            said.insert(0, f"**{end['status']}** {end['reason']}".strip())
        how = ", ".join(str(found[name]) for name in ABOUT[1:] if name in found)
        yield head.get("run", ""), head.get("commit", ""), gpu, str(found.get("model", "")), how, check, "; ".join(said)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return ".".join(map(str, value)) if isinstance(value, list) else str(value)


def main(paths: list[str]) -> None:
    """Print the table of all files."""
    print(render(row for path in paths for row in rows(Path(path).read_text(encoding="utf-8").splitlines())))


if __name__ == "__main__":
    main(sys.argv[1:])
