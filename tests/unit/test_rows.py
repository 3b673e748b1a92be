"""Datasets of the Hugging Face Hub, from local folders and, without a network, in the words in which they are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_r1z.config import QuestionSource
from megatron_r1z.errors import DataError, MissingExtraError
from megatron_r1z.prompts import Question, load_questions
from megatron_r1z.rows import MalformedRow, chosen_rows, scan_rows

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
        "from megatron_r1z.config import QuestionSource\nfrom megatron_r1z.prompts import load_questions\n"
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
