"""Indexed datasets of megatron-core as a source of documents."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_r1z.config import CorpusConfig, TextSource
from megatron_r1z.data.corpus import DocumentStream, check_corpus, load_texts
from megatron_r1z.errors import DataError

TEXTS = [[5, 6, 7], [], [8], list(range(100, 123)), [9, 10]]


def write(path: Path, texts: list[list[int]] = TEXTS, dtype: Any = np.int32) -> str:
    """The way of docs/data.md; returns the name of the index."""
    builder = IndexedDatasetBuilder(str(path.with_suffix(".bin")), dtype=dtype)
    for token_ids in texts:
        builder.add_item(torch.tensor(token_ids, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(path.with_suffix(".idx")))
    return str(path.with_suffix(".idx"))


def load(name: str, vocab_size: int = 200, source: dict[str, Any] | None = None, **fields: Any) -> Any:
    config = CorpusConfig(sources=(TextSource(path=name, **(source or {})),), steps=1, **fields)
    (rows,) = check_corpus(config)
    (found,) = load_texts(config, config.sources, None, vocab_size)  # type: ignore[arg-type]  # nothing is tokenised
    assert found.rows == rows
    return found


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_what_was_written_is_read(tmp_path: Path, dtype: Any) -> None:
    found = load(write(tmp_path / "tokens", dtype=dtype))
    assert [list(document.token_ids) for document in found.documents] == [text for text in TEXTS if text]
    assert all(type(token) is int for document in found.documents for token in document.token_ids)
    assert (found.name, found.documents.num_dropped) == ("tokens", 1)
    assert found.rows.count == len(TEXTS)


def test_long_documents_are_split_or_dropped(tmp_path: Path) -> None:
    name = write(tmp_path / "tokens")
    assert [list(document.token_ids) for document in load(name, max_document_tokens=8).documents] == [[5, 6, 7], [8], [9, 10]]
    windows = [document.token_ids for document in load(name, max_document_tokens=8, long_documents="split").documents[2:-1]]
    assert [len(window) for window in windows] == [8, 8, 8, 2]
    assert all(before[-1] == after[0] for before, after in pairwise(windows))
    assert [windows[0][0], *(token for window in windows for token in window[1:])] == TEXTS[3]


def test_offset_and_limit_choose_documents(tmp_path: Path) -> None:
    found = load(write(tmp_path / "tokens"), source={"offset": 2, "limit": 2})
    assert [list(document.token_ids) for document in found.documents] == TEXTS[2:4]
    with pytest.raises(DataError, match=r"tokens\.idx holds no documents from row 5\."):
        load(write(tmp_path / "tokens"), source={"offset": 5})


def test_its_order_resumes_as_any_other(tmp_path: Path) -> None:
    documents = load(write(tmp_path / "tokens"), max_document_tokens=4, long_documents="split").documents
    first, second = (DocumentStream([(documents, 1.0)], seed=2) for _ in range(2))
    first.draw(7)
    second.restore(first.to_state())
    assert second.draw(20) == first.draw(20)


def test_token_ids_of_another_vocabulary_are_refused_when_they_are_read(tmp_path: Path) -> None:
    documents = load(write(tmp_path / "tokens"), vocab_size=122).documents
    assert documents[0].token_ids == (5, 6, 7)
    with pytest.raises(DataError, match=r"document 3 has token ids from 100 to 122 and the model 122 tokens"):
        documents[2]


def test_files_that_are_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is nothing in .*tokens\.idx"):
        load(str(tmp_path / "tokens.idx"))
    name = write(tmp_path / "tokens")
    whole = (tmp_path / "tokens.bin").read_bytes()
    (tmp_path / "tokens.bin").write_bytes(whole[:-8])
    with pytest.raises(DataError, match=r"tokens\.idx and its \.bin are no indexed dataset of megatron-core \(.+\)\."):
        load(name)
    (tmp_path / "tokens.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"there is nothing in .*tokens\.bin"):
        load(name)
    (tmp_path / "tokens.bin").write_bytes(whole)
    (tmp_path / "tokens.idx").write_bytes(b"something else")
    with pytest.raises(DataError, match="does not begin with"):
        load(name)
