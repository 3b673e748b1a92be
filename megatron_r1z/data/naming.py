"""Names of sources, which figures and files of a run carry: as short as they can be and still differ."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path

from megatron_r1z.config import RowSource
from megatron_r1z.data.rows import split_suffixes


def name_sources(sources: Sequence[RowSource]) -> list[str]:
    """A name for each source: its own, else the stem of its file or the last part of its dataset's name, with what tells it from others.

    That is folders or the dataset's owner before it, then split and subset behind it.
    """
    given = {source.name for source in sources}
    tails = {source.label: _make_tails(source) for source in sources if source.name is None}

    def choose(label: str) -> str:
        taken = given | {tail for other, candidates in tails.items() if other != label for tail in candidates}
        numbered = (f"{label}-{number}" for number in count(2))
        return next(name for name in chain(tails[label], [label], numbered) if name not in taken)

    return [source.name or choose(source.label) for source in sources]


def _make_tails(source: RowSource) -> list[str]:
    """`c`, `b-c`, `a-b-c` for a/b/c.jsonl; `b`, `a-b`, `b-split`, `b-subset-split`, `a-b-subset-split` for the dataset a/b."""
    if source.path is not None:
        return _join_tails(Path(split_suffixes(source.path)[0]).parts)
    tails = _join_tails(Path(source.dataset or "").parts)
    rest = [source.split] if source.subset is None else [source.subset, source.split]
    return [*tails, *(f"{tail}-{'-'.join(rest[-depth:])}" for depth in range(1, len(rest) + 1) for tail in tails)]


def _join_tails(parts: Sequence[str]) -> list[str]:
    return ["-".join(parts[-depth:]) for depth in range(1, len(parts) + 1)]
