"""Text for `pretrain`: its file, tokenised, and the resumable order in which documents are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_r1z.config import CorpusConfig
from megatron_r1z.errors import DataError
from megatron_r1z.order import SeededStream
from megatron_r1z.prompts import Tokenizer
from megatron_r1z.rows import Row, iterate_rows


@dataclass(frozen=True, slots=True)
class Document:
    """One text, tokenised, with its end-of-sequence token.

    >>> Document((17, 2, 9, 1), prompt_length=2).token_ids[2:]
    (9, 1)
    """

    token_ids: tuple[int, ...]
    prompt_length: int
    """Tokens of the prompt, behind which `loss_on: response` starts to count; 0 for rows of plain `text`."""


class DocumentStream(SeededStream[Document]):
    """Documents in a seeded order that resumes exactly, pass after pass."""

    def __init__(self, documents: Sequence[Document], seed: int) -> None:
        super().__init__([(documents, 1.0)], seed)


def check_corpus(config: CorpusConfig) -> None:
    """Read every row without tokenising it.

    Raises:
        DataError: the file or a row is unfit; the message names file, line and what is wrong.
    """
    _load_pairs(config)


def load_documents(config: CorpusConfig, tokenizer: Tokenizer) -> tuple[list[Document], int]:
    """The documents of `config.path` and how many were dropped because they are longer than `max_document_tokens`.

    Prompt and response are tokenised apart, as they are in a rollout; each document ends with the end-of-sequence token if there is one.

    Raises:
        DataError: the file or a row is unfit, or every document is too long; the message names file, line and what is wrong.
    """
    pairs = _load_pairs(config)
    heads = tokenizer([head for head, _ in pairs], add_special_tokens=True).input_ids
    tails = tokenizer([tail for _, tail in pairs], add_special_tokens=False).input_ids
    documents = [
        _make_document(head, tail, bool(prompt), tokenizer.eos_token_id)
        for head, tail, (prompt, _) in zip(heads, tails, pairs, strict=True)
    ]
    fitting = [document for document in documents if len(document.token_ids) <= config.max_document_tokens]
    if not fitting:
        raise DataError(
            f"{config.path}: all {len(documents)} documents are longer than corpus.max_document_tokens {config.max_document_tokens}; "
            "raise the limit."
        )
    return fitting, len(documents) - len(fitting)


def _load_pairs(config: CorpusConfig) -> list[tuple[str, str]]:
    pairs = [_split_row(row, config.loss_on) for row in iterate_rows(config.path)]
    if not pairs:
        raise DataError(f"{config.path} holds no documents.")
    return pairs


def _split_row(row: Row, loss_on: str) -> tuple[str, str]:
    """Prompt and response of a row; the prompt of a row of plain text is empty."""
    if "prompt" in row.values or "response" in row.values:
        return row.get_text("prompt"), row.get_text("response")
    if loss_on == "response":
        raise DataError(
            f"{row.where}: corpus.loss_on response needs the columns 'prompt' and 'response'; the columns are {list(row.values)}."
        )
    return "", row.get_text("text")


def _make_document(head: list[int], tail: list[int], has_prompt: bool, eos: int | None) -> Document:
    """`head` begins with what the tokenizer puts before a text (BOS), with or without a prompt behind it."""
    token_ids = [*head, *tail]
    if eos is not None and token_ids[-1] != eos:
        token_ids.append(eos)
    return Document(tuple(token_ids), len(head) if has_prompt else 0)
