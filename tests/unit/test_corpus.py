"""Documents of the pre-training corpus."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_r1z.config import CorpusConfig
from megatron_r1z.corpus import Document, DocumentStream, load_documents
from megatron_r1z.errors import DataError


@dataclass
class Encoding:
    input_ids: list[list[int]]


@dataclass
class ByteTokenizer:
    """One token per byte; `$` is the end of the sequence."""

    eos_token_id: int | None = ord("$")
    bos: tuple[int, ...] = ()

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Encoding:
        start = self.bos if add_special_tokens else ()
        return Encoding([[*start, *entry.encode()] for entry in text])

    def apply_chat_template(self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool) -> str:
        raise AssertionError("a corpus has no chat")


def make_config(path: Path, rows: list[Any], **fields: Any) -> CorpusConfig:
    file = path / "corpus.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return CorpusConfig(path=str(file), steps=1, **fields)


def test_plain_text_has_no_prompt(tmp_path: Path) -> None:
    documents, num_dropped = load_documents(make_config(tmp_path, [{"text": "ab"}]), ByteTokenizer(bos=(1,)))
    assert documents == [Document((1, *b"ab$"), prompt_length=0)]
    assert num_dropped == 0


def test_the_loss_may_start_behind_the_prompt(tmp_path: Path) -> None:
    config = make_config(tmp_path, [{"prompt": "ab", "response": "cd"}], loss_on="response")
    assert load_documents(config, ByteTokenizer(bos=(1,)))[0] == [Document((1, *b"abcd$"), prompt_length=3)]


def test_an_end_of_sequence_token_is_neither_doubled_nor_invented(tmp_path: Path) -> None:
    config = make_config(tmp_path, [{"text": "ab$"}, {"text": "ab"}])
    assert [document.token_ids for document in load_documents(config, ByteTokenizer())[0]] == [(*b"ab$",), (*b"ab$",)]
    assert [document.token_ids for document in load_documents(config, ByteTokenizer(eos_token_id=None))[0]] == [(*b"ab$",), (*b"ab",)]


def test_long_documents_are_dropped_and_counted(tmp_path: Path) -> None:
    config = make_config(tmp_path, [{"text": "abc"}, {"text": "abcd"}, {"text": "a"}], max_document_tokens=4)
    documents, num_dropped = load_documents(config, ByteTokenizer())
    assert [len(document.token_ids) for document in documents] == [4, 2]
    assert num_dropped == 1
    with pytest.raises(DataError, match=r"all 1 documents are longer than corpus\.max_document_tokens 4"):
        load_documents(make_config(tmp_path, [{"text": "abcd"}], max_document_tokens=4), ByteTokenizer())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not valid JSON"),
        ({"txt": "a"}, "no column 'text'; the columns are 'txt'"),
        ({"prompt": "a"}, "no column 'response'; the columns are 'prompt'"),
        ({"response": "a"}, "no column 'prompt'"),
        ({"prompt": "a", "response": ""}, "'response' is empty"),
        ({"text": 3}, "'text' must be text, not 3"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=r"corpus\.jsonl:2: ") as caught:
        load_documents(make_config(tmp_path, [{"text": "a"}, row]), ByteTokenizer())
    assert message in str(caught.value)


def test_loss_on_the_response_needs_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"corpus\.jsonl:1: corpus\.loss_on response needs the columns"):
        load_documents(make_config(tmp_path, [{"text": "a"}], loss_on="response"), ByteTokenizer())


def test_an_empty_corpus(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no documents"):
        load_documents(make_config(tmp_path, []), ByteTokenizer())


def test_the_stream_resumes() -> None:
    documents = [Document((index,), 0) for index in range(10)]
    first, second = DocumentStream(documents, seed=3), DocumentStream(documents, seed=3)
    drawn = first.draw(25)
    assert len(set(drawn[:10])) == 10
    second.restore(first.to_state())
    assert second.draw(5) == first.draw(5)
