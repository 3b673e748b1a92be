"""Datasets of the Hugging Face Hub, from local folders and, without a network, in the words in which they are refused."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1z.config import QuestionSource
from megatron_r1z.data.questions import Question, load_questions
from megatron_r1z.data.rows import MalformedRow, Row, chosen_rows, find, has_lone_surrogate, name_columns, scan_rows
from megatron_r1z.errors import DataError, MissingExtraError

datasets = pytest.importorskip("datasets")

TRAIN = [{"question": "1 + 1", "answer": "It is\n#### 2"}, {"question": "2 + 2", "answer": "#### 4"}]
TEST = [{"question": "3 + 3", "answer": "#### 6"}]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared tables go to the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def save_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def save_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(path)


def source(folder: Path, **fields: Any) -> QuestionSource:
    return QuestionSource(dataset=str(folder), problem_column="question", answer_after="####", **fields)


@pytest.fixture(params=["jsonl", "parquet"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A dataset with the splits train and test."""
    save = {"jsonl": save_jsonl, "parquet": save_parquet}[request.param]
    save(tmp_path / "sums" / f"train.{request.param}", TRAIN)
    save(tmp_path / "sums" / f"test.{request.param}", TEST)
    return tmp_path / "sums"


def test_splits_of_a_folder(folder: Path) -> None:
    assert load_questions(source(folder)) == [Question("sums/0", "1 + 1", ("2",), "sums"), Question("sums/1", "2 + 2", ("4",), "sums")]
    assert load_questions(source(folder, split="test")) == [Question("sums/0", "3 + 3", ("6",), "sums")]


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    """The form of the paper's evaluation sets."""
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(TRAIN), "test": datasets.Dataset.from_list(TEST)})
    both.save_to_disk(tmp_path / "sums")
    both["test"].save_to_disk(tmp_path / "alone")
    assert [question.problem for question in load_questions(source(tmp_path / "sums", split="test"))] == ["3 + 3"]
    assert [question.question_id for question in load_questions(source(tmp_path / "sums"))] == ["sums/0", "sums/1"]
    assert [question.question_id for question in load_questions(source(tmp_path / "alone"))] == ["alone/0"]
    with pytest.raises(DataError, match=r"sums has no split 'dev'; its splits are 'train', 'test'\.$"):
        load_questions(source(tmp_path / "sums", split="dev"))


def test_rows_are_chosen_as_in_a_file(folder: Path) -> None:
    assert [question.question_id for question in load_questions(source(folder, offset=1))] == ["sums/1"]
    assert [question.question_id for question in load_questions(source(folder, where={"question": ("2 + 2",)}))] == ["sums/1"]


def test_a_row_is_named_by_dataset_split_and_number(folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_questions(QuestionSource(dataset=str(folder)))
    assert str(caught.value) == f"{folder} (train): row 0: no column 'problem'; the columns are 'question', 'answer'."


def test_subsets(tmp_path: Path) -> None:
    save_jsonl(tmp_path / "sums" / "easy.jsonl", TRAIN)
    save_jsonl(tmp_path / "sums" / "hard.jsonl", TEST)
    (tmp_path / "sums" / "README.md").write_text(
        "---\nconfigs:\n- config_name: easy\n  data_files: easy.jsonl\n- config_name: hard\n  data_files: hard.jsonl\n---\n"
    )
    assert [question.problem for question in load_questions(source(tmp_path / "sums", subset="hard"))] == ["3 + 3"]
    assert "'easy', 'hard'" in refusal(source(tmp_path / "sums"))
    assert "'easy', 'hard'" in refusal(source(tmp_path / "sums", subset="medium"))


def refusal(source: QuestionSource) -> str:
    """The sentence with which a dataset is refused."""
    with pytest.raises(DataError) as caught:
        load_questions(source)
    sentence = str(caught.value)
    assert sentence.startswith(f"cannot load the dataset {source.label}: ")
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


def test_an_unknown_split(folder: Path) -> None:
    sentence = refusal(source(folder, split="validation"))
    assert "validation" in sentence
    assert "'train'" in sentence
    assert "'test'" in sentence
    assert "check subset, split and the files of the folder" in sentence


def test_a_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty" in refusal(source(tmp_path / "empty"))
    assert "no/such/folder" in refusal(source(Path("no/such/folder")))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "sums").mkdir()
    (tmp_path / "sums" / "train.jsonl").write_text('{"question": "1 + 1",\n')
    assert "JSON" in refusal(source(tmp_path / "sums"))


def test_without_a_network(tmp_path: Path) -> None:
    program = (
        "from megatron_r1z.config import QuestionSource\nfrom megatron_r1z.data.questions import load_questions\n"
        "try:\n    load_questions(QuestionSource(dataset='openai/gsm8k', subset='main'))\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("DataError cannot load the dataset openai/gsm8k (main, train): ")
    assert "load it once where there is a network, or copy it here and give its folder." in result.stdout
    assert result.stdout.count("\n") == 1


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"^reading the dataset a/b \(train\) needs datasets; run `pip install datasets`"):
        load_questions(QuestionSource(dataset="a/b"))


def test_a_malformed_line_is_passed_over_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"a": 1}\n\n{"a":\n[1]\n{"a": 2}\n')
    rows = list(scan_rows(QuestionSource(path=str(path))))
    assert [(row.index, row.where, isinstance(row, MalformedRow)) for row in rows] == [
        (0, f"{path}:1", False),
        (1, f"{path}:3", True),
        (2, f"{path}:4", True),
        (3, f"{path}:5", False),
    ]
    with pytest.raises(DataError, match=r"q\.jsonl:4: each line must be a JSON object, not list\."):
        rows[2].get("a")
    rows_of_corpus = chosen_rows(QuestionSource(path=str(path)))
    assert next(rows_of_corpus).values == {"a": 1}
    with pytest.raises(DataError, match=r"q\.jsonl:3: not valid JSON"):
        next(rows_of_corpus)


ROWS = [{"problem": "1 + 1", "answer": "2"}, {"problem": "Wie groß ist 2 + 2?", "answer": "4, genau"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
FORMS = {
    "q.jsonl": LINES.encode(),
    "q.JSONL": LINES.encode("utf-8-sig"),
    "q.json": json.dumps(ROWS).encode(),
    "q.Json": b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=2).encode(),
    "lines.json": LINES.encode(),
    "q.jsonl.gz": gzip.compress(LINES.encode()),
    "q.json.GZ": gzip.compress(json.dumps(ROWS).encode()),
    "q.csv": 'problem,answer\n1 + 1,2\n\nWie groß ist 2 + 2?,"4, genau"\n'.encode(),
    "q.CSV": 'problem,answer\r\n1 + 1,2\r\n"Wie groß ist 2 + 2?","4, genau"\r\n'.encode("utf-8-sig"),
    "q.csv.gz": gzip.compress('"problem","answer"\n1 + 1,2\nWie groß ist 2 + 2?,"4, genau"'.encode()),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_same_rows_in_every_form(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FORMS[name])
    rows = list(scan_rows(QuestionSource(path=str(tmp_path / name))))
    assert [(row.index, row.values) for row in rows] == list(enumerate(ROWS))
    stem = name.partition(".")[0]
    assert [question.question_id for question in load_questions(QuestionSource(path=str(tmp_path / name)))] == [f"{stem}/0", f"{stem}/1"]


def test_a_line_of_csv_is_where_its_row_begins(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text('problem,answer\n"two\nlines",1\n\n,2\nc,3,4\nd,5\n')
    rows = list(scan_rows(QuestionSource(path=str(tmp_path / "q.csv"))))
    assert [(row.where.partition("q.csv")[2], isinstance(row, MalformedRow)) for row in rows] == [
        (":2", False),
        (":5", False),
        (":6", True),
        (":7", False),
    ]
    with pytest.raises(DataError, match=r"q\.csv:6: 3 values for 2 columns; quote values with a comma in\.$"):
        rows[2].get("problem")


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "half of a character": (
        "q.jsonl",
        b'{"problem": "p", "answer": "1"}\n{"problem": "\\ud83d?", "answer": "1"}\n',
        r":2: 'problem' holds half",
    ),
    "half in an answer": ("q.jsonl", b'\n\n{"problem": "p", "answer": ["1", "\\ude00"]}\n', r":3: 'answer' holds half of a character, or"),
    "half in a message": (
        "q.jsonl",
        b'{"problem": [{"role": "user", "content": "\\ud83d"}], "answer": "1"}\n',
        r":1: 'problem' holds half",
    ),
    "Latin-1": (
        "q.jsonl",
        b'{"problem": "caf\xe9", "answer": "1"}\n',
        r":1: not UTF-8 text \(invalid continuation byte at byte 16 of the line",
    ),
    "UTF-16": ("q.jsonl", '{"problem": "p", "answer": "1"}\n'.encode("utf-16"), ":1: not UTF-8 text"),
    "Latin-1 in CSV": (
        "q.csv",
        b"problem,answer\nok,1\ncaf\xe9,2\n",
        r":3: 'problem' holds half of a character, or a byte that is not UTF-8",
    ),
    "Latin-1 in a list": ("q.json", b'[{"problem": "caf\xe9"}]', r"q\.json: not UTF-8 text \(.* at byte 17 of the file"),
    "a list that ends early": ("q.json", b'[{"problem": "p", "answer": 1},\n', r"q\.json: not valid JSON \(Expecting value: line 2"),
    "a list of lists": ("q.json", b'[{"problem": "p", "answer": 1}, [1]]', r"q\.json: row 1: each entry must be a JSON object, not list"),
    "one object": ("q.json", b'{\n "data": []\n}\n', r"q\.json is one JSON object over several lines; write the list of its rows alone"),
    "a key twice": ("q.jsonl", b'{"problem": "p", "answer": 1, "answer": 2}\n', ":1: the key 'answer' is there twice; keep one of them"),
    "a nested key twice": ("q.jsonl", b'{"problem": "p", "answer": 1, "x": {"y": 1, "y": 2}}\n', ":1: the key 'y' is there twice"),
    "a column twice": ("q.csv", b"problem,answer,answer\np,1,2\n", "q.csv:1: the column 'answer' is there twice; rename one"),
    "too deep": ("q.jsonl", b'{"problem": ' + b"[" * 100_000 + b"\n", ":1: lists or objects in one another more deeply than can be read"),
    "a long number": (
        "q.jsonl",
        b'{"problem": "p", "answer": ' + b"7" * 5000 + b"}\n",
        ":1: a whole number is too long to be read; write it as text",
    ),
    "an infinite number": ("q.jsonl", b'{"problem": "p", "answer": 1e400}\n', r":1: 'answer' has no answer \(inf\)"),
    "a list of nothing": ("q.jsonl", b'{"problem": "p", "answer": [NaN]}\n', r":1: 'answer' has no answer \(nan\)"),
    "a quotation that never ends": ("q.csv", b'problem,answer\n"p,1\n', r"q\.csv:\d: not valid CSV \(unexpected end of data\)"),
    "no gzip": ("q.jsonl.gz", b'{"problem": "p", "answer": 1}\n', r"q\.jsonl\.gz cannot be read to its end \(Not a gzipped file"),
    "half a gzip": (
        "q.jsonl.gz",
        gzip.compress(LINES.encode() * 99)[:-20],
        r"q\.jsonl\.gz cannot be read to its end \(Compressed file ended",
    ),
    "empty": ("q.jsonl", b"", r"q\.jsonl holds no questions\."),
    "an empty list": ("q.json", b"[]", r"q\.json holds no questions\."),
    "an empty table": ("q.csv", b"problem,answer\n", r"q\.csv holds no questions\."),
}


@pytest.mark.parametrize(("name", "content", "complaint"), BAD_FILES.values(), ids=BAD_FILES)
def test_what_cannot_be_read_is_told_with_its_place(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=complaint) as caught:
        load_questions(QuestionSource(path=str(tmp_path / name)))
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


def test_an_answer_of_any_number_of_digits(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(f'{{"problem": "p", "answer": {"7" * 400}}}\n')
    assert load_questions(QuestionSource(path=str(tmp_path / "q.jsonl")))[0].answers == ("7" * 400,)


def test_types_may_change_from_row_to_row(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("".join(f'{{"problem": "p", "answer": {answer}}}\n' for answer in ('"x"', "1", "0.5", '["1", 2]')))
    found = load_questions(QuestionSource(path=str(tmp_path / "q.jsonl")))
    assert [question.answers for question in found] == [("x",), ("1",), ("0.5",), ("1", "2")]


def test_bad_text_in_a_column_that_is_not_used_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"problem": "p", "answer": "1", "solution": "\\ud83d"}\n')
    assert len(load_questions(QuestionSource(path=str(tmp_path / "q.jsonl")))) == 1


def test_parquet_that_is_not_text_and_parquet_with_a_column_twice(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    text = pa.Array.from_buffers(pa.string(), 3, pa.array([b"1 + 1", b"caf\xe9", b"2 + 2"]).buffers())
    pq.write_table(pa.table({"problem": text, "answer": ["2", "3", "4"]}), tmp_path / "q.parquet")
    rows = list(scan_rows(QuestionSource(path=str(tmp_path / "q.parquet"))))
    assert [(row.where.partition("q.parquet")[2], isinstance(row, MalformedRow)) for row in rows] == [
        (": row 0", False),
        (": row 1", True),
        (": row 2", False),
    ]
    with pytest.raises(
        DataError, match=r"q\.parquet: row 1: a value cannot be read \('utf-8' codec can't decode byte 0xe9 .*\); repair the row\.$"
    ):
        rows[1].get("problem")
    pq.write_table(pa.Table.from_arrays([pa.array(["p"]), pa.array(["q"])], names=["problem", "problem"]), tmp_path / "twice.parquet")
    with pytest.raises(DataError, match=r"twice\.parquet: the column 'problem' is there twice; rename one\.$"):
        list(scan_rows(QuestionSource(path=str(tmp_path / "twice.parquet"))))


def test_parquet_of_more_rows_than_are_read_at_once(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"problem": [f"p{index}" for index in range(2500)]}), tmp_path / "q.parquet")
    rows = list(scan_rows(QuestionSource(path=str(tmp_path / "q.parquet"))))
    assert [(row.index, row.values["problem"]) for row in rows] == [(index, f"p{index}") for index in range(2500)]


TREES = st.recursive(
    st.none() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text("ab.", min_size=1, max_size=3), inner, max_size=3)
)


@settings(deadline=None)
@given(st.dictionaries(st.text("ab.", min_size=1, max_size=3), TREES, max_size=4))
def test_every_column_that_is_named_can_be_reached(values: dict[str, Any]) -> None:
    row = Row(0, "q.jsonl:1", values)
    for name in name_columns(values):
        assert row.has(name)
    for name in values:
        assert find(values, name) is values[name]


@settings(deadline=None)
@given(st.text() | st.text(st.characters(categories=["Cs", "Ll"])))
def test_what_utf_8_cannot_hold_is_what_has_a_lone_surrogate(text: str) -> None:
    escaped = json.loads(json.dumps(text))
    assert has_lone_surrogate([{"a": escaped}]) == any(0xD800 <= ord(character) <= 0xDFFF for character in escaped)
    assert has_lone_surrogate({escaped: 1}) == has_lone_surrogate(escaped)
