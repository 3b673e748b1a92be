"""Text for `pretrain`: its sources, tokenised, long documents dropped or split, and the resumable order in which documents are drawn."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Protocol, overload

from megatron_r1z.config import CorpusConfig, TextSource
from megatron_r1z.data.fingerprint import RowsMark, digest_indexed, digest_row, digest_texts, new_digest
from megatron_r1z.data.naming import name_sources
from megatron_r1z.data.order import SeededStream
from megatron_r1z.data.rows import Row, chosen_rows, explain_filter
from megatron_r1z.data.tokenizer import Tokenizer, tokenise
from megatron_r1z.errors import DataError

ROWS_AT_ONCE = 1000
"""Rows that the tokenizer gets in one call: enough for its threads, few enough that their texts and lists of ids do not count."""
INDEX_HEADER = b"MMIDIDX\x00\x00"
"""What a `.idx` begins with (megatron/core/datasets/indexed_dataset.py)."""
INDEX_COUNT_AT = len(INDEX_HEADER) + 8 + 1
"""Where it has the number of its documents: behind a version of 8 bytes and a number format of 1."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text, tokenised, with its end-of-sequence token, or a part of one.

    >>> Document((17, 2, 9, 1), prompt_length=2).token_ids[2:]
    (9, 1)
    """

    token_ids: tuple[int, ...]
    prompt_length: int
    """Tokens of the prompt, behind which `loss_on: response` starts to count; 0 for plain text."""


class Tokens(Protocol):
    """The documents of a source as token ids, of any length."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each document."""
        ...

    def prompt_length(self, document: int) -> int:
        """Tokens of the prompt of a document; 0 where it has none."""
        ...

    def read(self, document: int, start: int, stop: int) -> Sequence[int]:
        """Token ids `start` to `stop` of a document."""
        ...


class TextTokens:
    """Tokenised rows in memory, 4 bytes a token."""

    def __init__(self) -> None:
        self.lengths = array("i")
        self._prompt_lengths = array("i")
        self._starts = array("q", [0])
        self._token_ids = array("i")

    def append(self, document: Document) -> None:
        """Add one behind the others."""
        self.lengths.append(len(document.token_ids))
        self._prompt_lengths.append(document.prompt_length)
        self._token_ids.extend(document.token_ids)
        self._starts.append(len(self._token_ids))

    def prompt_length(self, document: int) -> int:
        """See `Tokens`."""
        return self._prompt_lengths[document]

    def read(self, document: int, start: int, stop: int) -> Sequence[int]:
        """See `Tokens`."""
        first = self._starts[document]
        return self._token_ids[first + start : first + stop]


class DocumentSet(Sequence[Document]):
    """The documents of a source that are not longer than a limit; longer ones are dropped or split.

    A long document of n tokens is split into windows of at most L tokens, each beginning with the last token of the one before: so every
    token but the first of the document is predicted exactly once, and no window has a single token. A window starts with no context but
    that token.
    """

    def __init__(self, tokens: Tokens, max_tokens: int, *, split: bool) -> None:
        self._tokens = tokens
        self._max_tokens = max_tokens
        counts = (num_windows(int(length), max_tokens, split=split) for length in tokens.lengths)
        self._ends = array("q", accumulate(counts))

    def __len__(self) -> int:
        """Documents and windows."""
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Document: ...

    @overload
    def __getitem__(self, index: slice) -> list[Document]: ...

    def __getitem__(self, index: int | slice) -> Document | list[Document]:
        """One or several, read from the source now."""
        chosen = range(len(self))[index]
        return [self._read(number) for number in chosen] if isinstance(chosen, range) else self._read(chosen)

    @property
    def num_documents(self) -> int:
        """Of the source."""
        return len(self._ends)

    @property
    def num_dropped(self) -> int:
        """Documents of the source of which nothing is left: too long, or without any token."""
        return sum(end == before for before, end in zip((0, *self._ends[:-1]), self._ends, strict=True))

    def _read(self, number: int) -> Document:
        document = bisect_right(self._ends, number)
        window = number - (self._ends[document - 1] if document else 0)
        length, start = int(self._tokens.lengths[document]), window * (self._max_tokens - 1)
        stop = min(start + self._max_tokens, length)
        prompt_length = min(max(self._tokens.prompt_length(document) - start, 0), stop - start)
        return Document(tuple(self._tokens.read(document, start, stop)), prompt_length)


def num_windows(length: int, max_tokens: int, *, split: bool) -> int:
    """Documents of at most `max_tokens` that one of `length` becomes.

    >>> [num_windows(length, 4, split=True) for length in (0, 1, 4, 5, 7, 8)], num_windows(5, 4, split=False)
    ([0, 1, 1, 2, 2, 3], 0)
    """
    if length <= max_tokens:
        return min(length, 1)
    return (length - 2) // (max_tokens - 1) + 1 if split else 0


@dataclass(frozen=True, slots=True)
class TextSet:
    """The usable documents of one source."""

    name: str
    documents: DocumentSet
    rows: RowsMark
    """What it is recognised by."""

    def describe(self, config: CorpusConfig) -> str:
        """What was read and what became of it, one line."""
        found, limit = self.documents, config.max_document_tokens
        if config.long_documents == "split":
            return f"{self.rows.label}: {found.num_documents} documents, {len(found)} when split at {limit} tokens"
        return f"{self.rows.label}: {len(found)} documents, {found.num_dropped} dropped (over {limit} tokens)"


class DocumentStream(SeededStream[Document]):
    """Documents of several weighted sources in a seeded order that resumes exactly; `DocumentStream([(documents, weight), ...], seed)`."""


def check_corpus(config: CorpusConfig) -> list[RowsMark]:
    """Read every row that is trained on or evaluated, without tokenising it.

    Returns:
        What the sources that are trained on are recognised by, in order.

    Raises:
        DataError: a source or a row is unfit; the message names file, line and what is wrong.
    """
    marks = [_mark_rows(source, config.loss_on) for source in (*config.sources, *config.evaluation)]
    return marks[: len(config.sources)]


def _mark_rows(source: TextSource, loss_on: str) -> RowsMark:
    if source.is_indexed:
        return _mark_indexed(source)
    count, digest = digest_texts(_iterate_pairs(source, loss_on))
    if not count:
        raise _nothing(source)
    return RowsMark.of(source, count, digest)


def _mark_indexed(source: TextSource) -> RowsMark:
    _check_files(source)
    index = Path(source.path or "")
    with index.open("rb") as stream:
        stream.seek(INDEX_COUNT_AT)
        count = int.from_bytes(stream.read(8), "little")
    return RowsMark.of(source, count, digest_indexed(index, source.offset, source.limit))


def load_texts(config: CorpusConfig, sources: Sequence[TextSource], tokenizer: Tokenizer, vocab_size: int) -> list[TextSet]:
    """The documents of each of `sources` (training or evaluation) under the limit of `config`.

    Rows are tokenised here, prompt and response apart, as they are in a rollout, and end with the end-of-sequence token if there is one.
    Of an indexed dataset nothing but the lengths is read; its token ids must be below `vocab_size`.

    Raises:
        DataError: a source or a row is unfit, or every document is too long; the message names file, line and what is wrong.
    """
    return [
        TextSet(name, *_load_documents(config, source, tokenizer, vocab_size))
        for source, name in zip(sources, name_sources(sources), strict=True)
    ]


def _load_documents(config: CorpusConfig, source: TextSource, tokenizer: Tokenizer, vocab_size: int) -> tuple[DocumentSet, RowsMark]:
    tokens, rows = _open_indexed(source, vocab_size) if source.is_indexed else _tokenise(source, config.loss_on, tokenizer)
    if not len(tokens.lengths):
        raise _nothing(source)
    documents = DocumentSet(tokens, config.max_document_tokens, split=config.long_documents == "split")
    if not documents:
        raise DataError(
            f"{source.label}: all {documents.num_documents} documents are longer than corpus.max_document_tokens "
            f"{config.max_document_tokens}; raise the limit, or set corpus.long_documents to split."
        )
    return documents, rows


def _nothing(source: TextSource) -> DataError:
    chosen = f" from row {source.offset}" if source.offset else ""
    return DataError(f"{source.label} holds no documents{chosen}{explain_filter(source) if source.where else ''}.")


def _check_files(source: TextSource) -> None:
    index = Path(source.path or "")
    for path in (index, index.with_suffix(".bin")):
        if not path.is_file() or not path.stat().st_size:
            raise DataError(f"there is nothing in {path}; an indexed dataset of megatron-core is a .idx and a .bin of the same name.")
    with index.open("rb") as stream:
        if stream.read(len(INDEX_HEADER)) != INDEX_HEADER:
            raise DataError(f"{index} is no index of megatron-core: it does not begin with {INDEX_HEADER!r}.")


def _open_indexed(source: TextSource, vocab_size: int) -> tuple[Tokens, RowsMark]:
    from megatron_r1z.data.indexed import IndexedTokens

    rows = _mark_indexed(source)
    return IndexedTokens(Path(source.path or ""), source.offset, source.limit, vocab_size), rows


def _tokenise(source: TextSource, loss_on: str, tokenizer: Tokenizer) -> tuple[Tokens, RowsMark]:
    tokens, digest, count = TextTokens(), new_digest(), 0
    pairs = _iterate_pairs(source, loss_on)
    while some := list(islice(pairs, ROWS_AT_ONCE)):
        count += len(some)
        for pair in some:
            digest_row(digest, pair)
        heads = tokenise([head for head, _ in some], tokenizer, has_start=True)
        tails = tokenizer([tail for _, tail in some], add_special_tokens=False).input_ids
        for head, tail, (prompt, _) in zip(heads, tails, some, strict=True):
            tokens.append(_make_document(head, tail, bool(prompt), tokenizer.eos_token_id))
    return tokens, RowsMark.of(source, count, digest.hexdigest())


def _iterate_pairs(source: TextSource, loss_on: str) -> Iterator[tuple[str, str]]:
    return (_split_row(row, source, loss_on) for row in chosen_rows(source))


def _split_row(row: Row, source: TextSource, loss_on: str) -> tuple[str, str]:
    """Prompt and response of a row; the prompt of a row of plain text is empty."""
    columns = (source.prompt_column, source.response_column)
    if any(map(row.has, columns)):
        return row.get_text(columns[0]), row.get_text(columns[1])
    if loss_on == "response":
        raise DataError(
            f"{row.where}: corpus.loss_on response needs the columns '{columns[0]}' and '{columns[1]}'; the columns are {list(row.values)}."
        )
    return "", row.get_text(source.text_column)


def _make_document(head: list[int], tail: list[int], has_prompt: bool, eos: int | None) -> Document:
    """`head` begins with what the tokenizer puts before a text (BOS), with or without a prompt behind it."""
    token_ids = [*head, *tail]
    if eos is not None and token_ids[-1:] != [eos]:
        token_ids.append(eos)
    return Document(tuple(token_ids), len(head) if has_prompt else 0)
