"""A mistake of the user gets one sentence that names it, before any rank starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

GOOD_ROW = '{"problem": "1 + 1?", "answer": "2"}\n'


@pytest.fixture
def refusal(cli: Any, tmp_path: Path) -> Callable[..., str]:
    """Run a command that has to be refused; returns its sentence."""

    def run(*arguments: str, **options: Any) -> str:
        outcome = cli.run(*arguments, f"logging.folder={tmp_path / 'run'}", **options)
        assert outcome.status == 2, outcome.stderr
        assert outcome.stdout == ""
        assert outcome.stderr.endswith(".\n") or outcome.stderr.endswith("?\n")
        assert outcome.stderr.count("\n") == 1
        assert not (tmp_path / "run").exists()
        return outcome.stderr

    return run


@pytest.fixture
def good(base: Path, task: Any) -> list[str]:
    """A run that would start."""
    return ["configs/quickstart.yaml", f"model.path={base}", f"data.train=[{{path: {task.questions}}}]", "evaluation.sets=[]"]


def changed_model(base: Path, folder: Path, **values: Any) -> Path:
    """The base model with other values in its configuration."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


def test_unknown_key_gets_the_nearest_one(refusal: Callable[..., str], good: list[str]) -> None:
    sentence = refusal("train", *good, "rollout.samples_per_promt=4")
    assert "'rollout.samples_per_promt'" in sentence
    assert "'rollout.samples_per_prompt'" in sentence


def test_missing_configuration(refusal: Callable[..., str]) -> None:
    assert "configs/none.yaml" in refusal("pretrain", "configs/none.yaml")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (
            ["parallel.num_ranks=3", "parallel.tensor_parallel_size=3", "rollout.tensor_parallel_size=1"],
            ["policy", "num_heads is 4", "tp 3"],
        ),
        (
            ["parallel.num_ranks=3", "parallel.tensor_parallel_size=1", "rollout.tensor_parallel_size=3"],
            ["engine", "num_heads is 4", "tp 3"],
        ),
        (["parallel.num_ranks=6", "parallel.pipeline_parallel_size=3"], ["4 layers", "3"]),
        (["parallel.num_ranks=3"], ["num_ranks", "3 ranks", "2"]),
        (["rollout.tensor_parallel_size=4"], ["rollout.tensor_parallel_size 4", "2 ranks"]),
        (["algorithm.train_batch_size=100"], ["train_batch_size 100", "256 samples", "64"]),
        (["data.max_prompt_tokens=1000"], ["max_prompt_tokens 1000", "256 positions"]),
    ],
)
def test_numbers_that_do_not_fit(refusal: Callable[..., str], good: list[str], overrides: list[str], named: list[str]) -> None:
    sentence = refusal("train", *good, *overrides)
    assert all(text in sentence for text in named), sentence


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        (GOOD_ROW * 2 + '{"problem": "1 + 2?", \n' + GOOD_ROW, [":3"]),
        (GOOD_ROW + '{"problem": "1 + 2?"}\n', [":2", "'answer'"]),
        ("", []),
    ],
    ids=["malformed", "incomplete", "empty"],
)
def test_question_file_is_named_with_the_line(
    refusal: Callable[..., str], good: list[str], tmp_path: Path, rows: str, named: list[str]
) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(rows)
    sentence = refusal("train", *good, f"data.train=[{{path: {path}}}]")
    assert all(text in sentence for text in [str(path), *named]), sentence


def test_corpus_is_named_with_the_line(refusal: Callable[..., str], pretraining: list[str], tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "1+1=2"}\n{"texts": "1+1=2"}\n')
    sentence = refusal("pretrain", *pretraining, f"corpus.sources.0.path={path}")
    assert f"{path}:2" in sentence


def test_head_size_that_the_engine_cannot_compute(refusal: Callable[..., str], good: list[str], base: Path, tmp_path: Path) -> None:
    model = changed_model(base, tmp_path / "model", num_attention_heads=8, num_key_value_heads=8)
    assert "head size of 16" in refusal("train", *good, f"model.path={model}")


def test_unknown_family(refusal: Callable[..., str], good: list[str], base: Path, tmp_path: Path) -> None:
    model = changed_model(base, tmp_path / "model", architectures=["GPT2LMHeadModel"], model_type="gpt2")
    sentence = refusal("train", *good, f"model.path={model}")
    assert "GPT2LMHeadModel" in sentence
    assert "qwen2" in sentence


def test_a_model_that_is_another_one_to_another_reader(
    refusal: Callable[..., str], cli: Any, good: list[str], base: Path, tmp_path: Path
) -> None:
    model = changed_model(base, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, model / "model.safetensors", {"format": "pt"})
    sentence = refusal("train", *good, f"model.path={model}")
    assert f"{model / 'model.safetensors'} has a lm_head.weight that differs from model.embed_tokens.weight" in sentence
    outcome = cli.run("convert", str(model), str(tmp_path / "target"))
    assert (outcome.status, outcome.stdout, outcome.stderr) == (2, "", sentence)
    assert not (tmp_path / "target").exists()


def test_model_without_weights(refusal: Callable[..., str], good: list[str], task: Any) -> None:
    assert str(task.model) in refusal("train", *good, f"model.path={task.model}")


def test_torchrun_of_another_size(cli: Any, good: list[str], tmp_path: Path) -> None:
    outcome = cli.run("train", *good, f"logging.folder={tmp_path}", torchrun=1)
    assert outcome.status == 1  # torchrun's
    assert "rank 0: torchrun started 1 ranks but parallel.num_ranks is 2; make them equal." in outcome.stderr
