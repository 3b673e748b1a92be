"""Indexed datasets of megatron-core (`.idx` and `.bin`, token ids) as documents of a corpus: mapped into memory, not read into it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_r1z.errors import DataError


class IndexedTokens:
    """Some of the sequences of an indexed dataset; as in Megatron's own GPTDataset, a sequence is a document."""

    def __init__(self, path: Path, offset: int, limit: int | None, vocab_size: int) -> None:
        """Open `path`, the `.idx`; use `limit` documents from `offset` on.

        Raises:
            DataError: the two files are no indexed dataset, or do not belong together.
        """
        self._path = path
        self._vocab_size = vocab_size
        try:
            self._dataset = IndexedDataset(str(path.with_suffix("")))
            self._dataset[len(self._dataset) - 1]  # what a shorter .bin lacks
        except (AssertionError, ValueError, IndexError, OSError) as error:
            raise DataError(f"{path} and its .bin are no indexed dataset of megatron-core ({_first_line(error)}).") from error
        self._first = offset
        self.lengths: Sequence[int] = self._dataset.sequence_lengths[offset : None if limit is None else offset + limit]

    def prompt_length(self, _document: int) -> int:
        """0: token ids alone do not say where a prompt ends."""
        return 0

    def read(self, document: int, start: int, stop: int) -> Sequence[int]:
        """Token ids `start` to `stop` of a document, from the file.

        Raises:
            DataError: an id is not in the vocabulary.
        """
        token_ids: list[int] = self._dataset.get(self._first + document, start, stop - start).tolist()
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self._vocab_size:
            raise DataError(
                f"{self._path}: document {self._first + document} has token ids from {min(token_ids)} to {max(token_ids)} and the model "
                f"{self._vocab_size} tokens; write the dataset with the tokenizer of model.path."
            )
        return token_ids


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
