"""Documents of the pre-training corpus."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1z.config import CorpusConfig, TextSource
from megatron_r1z.data.corpus import Document, DocumentSet, DocumentStream, TextTokens, check_corpus, load_texts
from megatron_r1z.errors import ConfigError, DataError


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


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make_config(path: Path, rows: list[Any], source: dict[str, Any] | None = None, **fields: Any) -> CorpusConfig:
    return CorpusConfig(sources=(TextSource(path=write(path / "corpus.jsonl", rows), **(source or {})),), steps=1, **fields)


def load_documents(config: CorpusConfig, tokenizer: ByteTokenizer) -> tuple[list[Document], int]:
    """Documents and the number of dropped ones of the only source."""
    (found,) = load_texts(config, config.sources, tokenizer, 256)
    return list(found.documents), found.documents.num_dropped


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


def test_columns_have_the_names_that_the_source_gives_them(tmp_path: Path) -> None:
    rows = [{"problem": "ab", "solution": "cd", "text": "unused"}, {"body": "ef"}]
    config = make_config(tmp_path, rows, {"text_column": "body", "prompt_column": "problem", "response_column": "solution"})
    assert load_documents(config, ByteTokenizer())[0] == [Document((*b"abcd$",), 2), Document((*b"ef$",), 0)]


def test_a_source_is_cut_to_the_rows_that_it_chooses(tmp_path: Path) -> None:
    rows = [{"text": letter, "level": number % 2} for number, letter in enumerate("abcdefgh")]
    config = make_config(tmp_path, rows, {"where": {"level": (1,)}, "offset": 1, "limit": 2})
    assert [document.token_ids for document in load_documents(config, ByteTokenizer())[0]] == [(*b"d$",), (*b"f$",)]
    with pytest.raises(DataError, match=r"corpus\.jsonl holds no documents: where allows 7 and 'level' is 0, 1\."):
        check_corpus(make_config(tmp_path, rows, {"where": {"level": (7,)}}))
    with pytest.raises(DataError, match=r"corpus\.jsonl holds no documents from row 8\."):
        check_corpus(make_config(tmp_path, rows, {"offset": 8}))


def test_a_dataset_is_a_source(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write(tmp_path / "train.jsonl", [{"question": "ab", "solution": "c"}])
    source = TextSource(dataset=str(tmp_path), prompt_column="question", response_column="solution")
    config = CorpusConfig(sources=(source,), steps=1, loss_on="response")
    check_corpus(config)
    assert load_documents(config, ByteTokenizer())[0] == [Document((*b"abc$",), 2)]


def test_held_out_text_is_checked_too(tmp_path: Path) -> None:
    held_out = (TextSource(path=str(tmp_path / "nothing.jsonl")),)
    with pytest.raises(DataError, match=r"there is no file .*nothing\.jsonl"):
        check_corpus(make_config(tmp_path, [{"text": "a"}], evaluation=held_out))


def test_rows_are_recognised_alike_before_ranks_start_and_by_them(tmp_path: Path) -> None:
    rows = [{"text": "ab"}, {"prompt": "c", "response": "d"}, {"text": "e"}]
    config = make_config(tmp_path, rows, {"weight": 2.0, "limit": 2}, evaluation=(TextSource(path=write(tmp_path / "b.jsonl", rows)),))
    (checked,) = check_corpus(config)
    (loaded,) = load_texts(config, config.sources, ByteTokenizer(), 256)
    assert checked == loaded.rows
    assert (checked.count, checked.weight) == (2, 2.0)


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8), limit=st.integers(2, 9), prompt=st.integers(0, 45))
def test_splitting_predicts_every_token_but_the_first_of_a_document_exactly_once(lengths: list[int], limit: int, prompt: int) -> None:
    tokens, whole = TextTokens(), []
    for number, length in enumerate(lengths):
        whole.append(Document(tuple(range(100 * number, 100 * number + length)), min(prompt, length)))
        tokens.append(whole[-1])
    documents = DocumentSet(tokens, limit, split=True)
    predicted = Counter(token for document in documents for token in document.token_ids[1:])
    assert predicted == Counter(token for document in whole for token in document.token_ids[1:])
    assert all(2 <= len(document.token_ids) <= limit for document in documents if len(document.token_ids) > 1)
    of_prompts = {token for document in whole for token in document.token_ids[: document.prompt_length]}
    for document in documents:
        assert {token for token in document.token_ids if token in of_prompts} == set(document.token_ids[: document.prompt_length])
    assert documents.num_dropped == lengths.count(0)
    dropped = DocumentSet(tokens, limit, split=False)
    assert list(dropped) == [document for document in whole if 0 < len(document.token_ids) <= limit]
    assert len(dropped) + dropped.num_dropped == len(lengths)


def test_documents_are_read_by_number_and_slice() -> None:
    tokens = TextTokens()
    for number in range(3):
        tokens.append(Document((number,), 0))
    documents = DocumentSet(tokens, 4, split=False)
    assert documents[-1] == Document((2,), 0)
    assert documents[1:] == [Document((1,), 0), Document((2,), 0)]
    with pytest.raises(IndexError):
        documents[3]


class EndingTokenizer(ByteTokenizer):
    """One that ends every text itself."""

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Encoding:
        plain = super().__call__(text, add_special_tokens=add_special_tokens)
        return Encoding([[*ids, ord("$")] for ids in plain.input_ids]) if add_special_tokens else plain


def test_no_end_stands_between_prompt_and_response(tmp_path: Path) -> None:
    config = make_config(tmp_path, [{"prompt": "1+1=", "response": "2"}, {"text": "abc"}])
    (found,) = load_texts(config, config.sources, EndingTokenizer(bos=(2,)), 256)
    assert [document.token_ids for document in found.documents] == [(2, *b"1+1=2$"), (2, *b"abc$")]


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    source = (TextSource(path="a.jsonl"),)
    for fields, sentence in (
        ({}, "corpus.sources is empty"),
        ({"sources": source, "max_document_tokens": 1}, "corpus.max_document_tokens is 1; one token predicts nothing"),
        ({"sources": source, "loss_on": "response", "long_documents": "split"}, "would part responses from their prompts"),
        ({"sources": source, "loss_on": "response", "evaluation": (TextSource(path="b.idx"),)}, "and b.idx has token ids only"),
        ({"sources": source, "evaluation_every": 0}, "corpus.evaluation_every is 0; it must be above 0"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            CorpusConfig(steps=1, **fields)
    with pytest.raises(ConfigError, match=r"^corpus: c\.idx holds token ids without columns"):
        TextSource(path="c.idx", where={"a": (1,)})
    with pytest.raises(ConfigError, match=r"^corpus: weight of a\.jsonl is 0; it must be above 0\."):
        TextSource(path="a.jsonl", weight=0)


def make_blend(weights: tuple[float, ...]) -> list[tuple[list[Document], float]]:
    return [([Document((source, index), 0) for index in range(5 + 3 * source)], weight) for source, weight in enumerate(weights)]


@given(cuts=st.lists(st.integers(0, 15), min_size=1, max_size=5), seed=st.integers(0, 5))
def test_a_blend_resumes_at_any_cursor(cuts: list[int], seed: int) -> None:
    blend = make_blend((1.0, 0.25, 2.0))
    whole = DocumentStream(blend, seed).draw(sum(cuts) + 20)
    drawn: list[Document] = []
    state = DocumentStream(blend, seed).to_state()
    for cut in (*cuts, 20):
        stream = DocumentStream(blend, seed)
        stream.restore(json.loads(json.dumps(state)))
        drawn += stream.draw(cut)
        state = stream.to_state()
    assert drawn == whole


def test_shares_of_the_draws_are_those_of_the_weights() -> None:
    """Within four standard deviations of a share of 20,000 draws; the order is a function of the seed, so this cannot fail by chance."""
    weights = (1.0, 0.25, 2.0)
    counts = Counter(document.token_ids[0] for document in DocumentStream(make_blend(weights), seed=1).draw(20_000))
    for source, weight in enumerate(weights):
        share = weight / sum(weights)
        assert abs(counts[source] / 20_000 - share) < 4 * (share * (1 - share) / 20_000) ** 0.5


def test_the_stream_resumes() -> None:
    documents = [Document((index,), 0) for index in range(10)]
    first, second = DocumentStream([(documents, 1.0)], seed=3), DocumentStream([(documents, 1.0)], seed=3)
    drawn = first.draw(25)
    assert len(set(drawn[:10])) == 10
    second.restore(first.to_state())
    assert second.draw(5) == first.draw(5)
