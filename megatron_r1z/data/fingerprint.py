"""What files hold: the digest by which a model, a reward function or a corpus is recognised, wherever it lies and whatever it is called.

Every byte counts. A file that nobody has written to is not read for it a second time: its size and the times at which its contents and
its entry last changed are noted with the digest, and as long as they are the same so is the digest. A copy, which has other times, is
read again and found to be the same.

Standard library only; torch is imported where a checkpoint of Megatron is opened.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1z.config import RowSource
from megatron_r1z.weights.folders import INDEX_FILE, SINGLE_FILE, companions

READ_BYTES = 8 << 20
"""What is read at a time."""
MAX_THREADS = 16
"""Files that are read side by side, of which a digest takes a core each."""
SAMPLES, SAMPLE_BYTES = 256, 64 << 10
"""Of the token ids of an indexed dataset, which may be terabytes, so many pieces of that size are read, evenly spread."""
NOT_WEIGHTS = ("optimizer.", "critic.")
"""How the entries of a Megatron checkpoint begin that are not the policy's weights."""


def new_digest() -> Any:
    """SHA-1: of the digests in the standard library the fastest on a CPU without instructions for one, and nobody forges weights here."""
    return hashlib.sha1(usedforsecurity=False)


@dataclass(frozen=True, slots=True)
class FileMark:
    """How a file is recognised."""

    num_bytes: int
    mtime_ns: int
    ctime_ns: int
    digest: str

    def is_of(self, status: os.stat_result) -> bool:
        """Whether the file has not been written to since."""
        return (self.num_bytes, self.mtime_ns, self.ctime_ns) == (status.st_size, status.st_mtime_ns, status.st_ctime_ns)


Marks = Mapping[str, FileMark]
"""Files of one place by name."""


@dataclass(frozen=True, slots=True)
class Part:
    """A file, or some ranges of its bytes."""

    path: Path
    ranges: tuple[tuple[int, int], ...] | None = None
    """First byte and length of each; None: all."""

    def mark(self, known: FileMark | None = None) -> FileMark:
        """The mark of the file; where it is as it was when `known` was taken, that one."""
        status = self.path.stat()
        if known is not None and known.is_of(status):
            return known
        digest = new_digest()
        with self.path.open("rb", buffering=0) as file:
            for first, length in ((0, status.st_size),) if self.ranges is None else self.ranges:
                file.seek(first)
                while length > 0 and (piece := file.read(min(READ_BYTES, length))):
                    digest.update(piece)
                    length -= len(piece)
        return FileMark(status.st_size, status.st_mtime_ns, status.st_ctime_ns, digest.hexdigest())


def mark_all(parts: Mapping[str, Part], known: Marks | None = None) -> dict[str, FileMark]:
    """The mark of each part, read side by side where it is not among `known`."""
    earlier = known or {}
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as threads:
        marks = threads.map(lambda name: parts[name].mark(earlier.get(name)), parts)
    return dict(zip(parts, marks, strict=True))


def differing(was: Marks, now: Marks) -> list[str]:
    """Names of files that one side lacks or that hold other bytes."""
    return [name for name in sorted({*was, *now}) if name not in was or name not in now or was[name].digest != now[name].digest]


# --- which files ---


def settings_parts(folder: str | Path) -> dict[str, Part]:
    """Of a model folder what is not weights: config.json and the files of the tokenizer."""
    paths = [Path(folder) / "config.json", *companions(Path(folder))]
    return {path.relative_to(folder).as_posix(): Part(path) for path in paths}


def weights_parts(folder: str | Path, checkpoint: str | Path | None) -> dict[str, Part]:
    """The weights of a model folder, or those of a Megatron checkpoint, without the optimizer's state and the critic that it may hold."""
    if checkpoint is not None:
        return _checkpoint_parts(Path(checkpoint))
    index = Path(folder) / INDEX_FILE
    names = sorted({SINGLE_FILE} if not index.is_file() else set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return {name: Part(Path(folder) / name) for name in names}


def _checkpoint_parts(folder: Path) -> dict[str, Part]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    ranges: dict[str, list[tuple[int, int]]] = {}
    for index, place in FileSystemReader(folder).read_metadata().storage_data.items():
        if not index.fqn.startswith(NOT_WEIGHTS):
            ranges.setdefault(place.relative_path, []).append((place.offset, place.length))
    return {name: Part(folder / name, tuple(sorted(found))) for name, found in sorted(ranges.items())}


def code_parts(function: str) -> dict[str, Part]:
    """The file of a reward function `path.py:name` and those of its folder that it imports, directly or through one another."""
    file = Path(function.rpartition(":")[0])
    found: dict[str, Part] = {}
    waiting = [file]
    while waiting:
        path = waiting.pop()
        name = path.relative_to(file.parent).as_posix()
        if name not in found:
            found[name] = Part(path)
            waiting += _imported(path, file.parent)
    return found


def _imported(path: Path, folder: Path) -> Iterator[Path]:
    """Files below `folder` that a file of it imports."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # whoever runs it says so
        return
    for node in ast.walk(tree):
        for module in _modules(node, path.parent.relative_to(folder).parts):
            for depth in range(1, len(module) + 1):
                place = folder.joinpath(*module[:depth])
                yield from (file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file())


def _modules(node: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """What an import statement may mean by its names: modules, or packages with modules in them."""
    if isinstance(node, ast.Import):
        yield from (tuple(alias.name.split(".")) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else ()
        module = (*base, *(node.module.split(".") if node.module else ()))
        yield from ((*module, *alias.name.split(".")) for alias in node.names)


# --- rows ---


@dataclass(frozen=True, slots=True)
class RowsMark:
    """The rows of one source that are trained on.

    >>> RowsMark("a.jsonl", 1.0, 32, "9f86d081").count
    32
    """

    label: str
    weight: float
    count: int
    digest: str

    @classmethod
    def of(cls, source: RowSource, count: int, digest: str) -> RowsMark:
        """The mark of so many rows of `source`."""
        return cls(source.label, source.weight, count, digest)


def digest_texts(rows: Iterable[Iterable[str]]) -> tuple[int, str]:
    """How many rows there are, and a digest of their texts in order, by which no two lists of rows look alike."""
    digest, count = new_digest(), 0
    for row in rows:
        digest_row(digest, row)
        count += 1
    return count, digest.hexdigest()


def digest_row(digest: Any, texts: Iterable[str]) -> None:
    """Add a row to a digest."""
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    digest.update(f"{[len(text) for text in encoded]}\n".encode())
    for text in encoded:
        digest.update(text)


def digest_indexed(index: Path, offset: int, limit: int | None) -> str:
    """A digest of an indexed dataset of megatron-core.

    It is of the whole `.idx`, which has the length of every document, and of the size and `SAMPLES` pieces of the `.bin`.
    """
    digest = new_digest()
    digest.update(f"{offset} {limit} {Part(index).mark().digest}".encode())
    tokens = index.with_suffix(".bin")
    size = tokens.stat().st_size
    starts = {max(0, (size - SAMPLE_BYTES) * number // (SAMPLES - 1)) for number in range(SAMPLES)}
    digest.update(f" {size} {Part(tokens, tuple((start, SAMPLE_BYTES) for start in sorted(starts))).mark().digest}".encode())
    return str(digest.hexdigest())
