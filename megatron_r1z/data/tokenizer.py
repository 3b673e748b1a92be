"""Tokenizers: from transformers, what they put around a text, and which of their tokens are special."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from megatron_r1z.errors import DataError, MissingExtraError


class Tokenizer(Protocol):
    """What this package needs of a transformers tokenizer."""

    eos_token_id: int | None

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any:
        """An object whose `input_ids` holds one list of token ids per text."""
        ...

    def apply_chat_template(self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool) -> Any:
        """The conversation as text, up to where the assistant's turn starts."""
        ...


class AddedTokens(NamedTuple):
    """What a tokenizer writes around a text."""

    before: list[int]
    """BOS, or nothing."""
    behind: list[int]
    """EOS in some tokenizers; a prompt goes without."""


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a model folder in Hugging Face format; never asks the network.

    Raises:
        DataError: the folder is missing or holds no usable tokenizer.
    """
    if not Path(folder).is_dir():
        raise DataError(f"there is no model folder {folder}; model.path names a folder in Hugging Face format.")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtraError("reading a tokenizer needs transformers; run `pip install transformers`.") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the library raises its own Exception types for a malformed tokenizer.json
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(f"no tokenizer can be read from {folder}: {first_line.rstrip('.')}.") from error
    if not tokenizer("A 1").input_ids:  # what transformers 5 makes of a folder without tokenizer.json
        raise DataError(f"no tokenizer can be read from {folder}: it turns every text into nothing; copy tokenizer.json there.")
    return tokenizer


def tokenise(texts: Sequence[str], tokenizer: Tokenizer, *, has_start: bool) -> list[list[int]]:
    """Token ids of texts that are to be gone on from; with `has_start` behind what the tokenizer puts before a text, if it is not there."""
    start = added_tokens(tokenizer).before if has_start else []
    plain: list[list[int]] = tokenizer(list(texts), add_special_tokens=False).input_ids
    return [token_ids if token_ids[: len(start)] == start else [*start, *token_ids] for token_ids in plain]


def added_tokens(tokenizer: Tokenizer) -> AddedTokens:
    """What a tokenizer adds to a text.

    Raises:
        DataError: it changes the text itself.
    """
    text = "A 1"
    (plain,) = tokenizer([text], add_special_tokens=False).input_ids
    (whole,) = tokenizer([text], add_special_tokens=True).input_ids
    for first in range(len(whole) - len(plain) + 1):
        if whole[first : first + len(plain)] == plain:
            return AddedTokens(list(whole[:first]), list(whole[first + len(plain) :]))
    raise DataError(f"the tokenizer makes {plain} of {text!r} and with its special tokens {whole}; those must stand around the rest.")


def special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """The special tokens that text can spell out, by id."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {number: token.content for number, token in added.items() if token.special and token.content}
