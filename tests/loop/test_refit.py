"""Refits into live engines: what they sample is what an engine samples that vLLM itself has filled from the exported weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.loop.conftest import Task

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("refit_worker.py")
SIZES = {"hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": False, "head_dim": 32}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}


def prepare(folder: Path, task: Task, family: dict[str, Any], tp: int, pp: int, engine_tp: int) -> None:
    """A model folder without weights, with the task's tokenizer, and the settings of the worker."""
    shutil.copytree(task.model, folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    kept = {key: config[key] for key in ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id") if key in config}
    (folder / "model" / "config.json").write_text(json.dumps(kept | SIZES | family | {"rms_norm_eps": 1e-6, "torch_dtype": "float32"}))
    settings = {"model": str(folder / "model"), "tp": tp, "pp": pp, "engine_tp": engine_tp}
    (folder / "settings.json").write_text(json.dumps(settings))


def responses(folder: Path, name: str) -> list[Any]:
    """All responses by prompt and sample."""
    return sorted(row for path in folder.glob(f"responses_{name}_*.json") for row in json.loads(path.read_text()))


@pytest.mark.parametrize(("family", "engine_tp"), [(QWEN2, 1), (QWEN3, 2)], ids=["tied-4xTP1", "untied-2xTP2"])
def test_tp2_pp2_policy_into_live_engines(
    tmp_path: Path, task: Task, torchrun: Callable[..., None], family: dict[str, Any], engine_tp: int
) -> None:
    prepare(tmp_path, task, family, 2, 2, engine_tp)
    torchrun(4, WORKER, "refit", tmp_path)
    torchrun(engine_tp, WORKER, "fresh", tmp_path)
    before, after, fresh = (responses(tmp_path, name) for name in ("before", "after", "fresh"))
    assert len(fresh) == len(after) == len(before) == 12
    assert [row[:3] for row in after] == [row[:3] for row in fresh]
    assert [value for row in after for value in row[3]] == pytest.approx([value for row in fresh for value in row[3]], abs=1e-5)
    assert [row[2] for row in before] != [row[2] for row in after]


def test_whole_tensors_through_the_loader_of_vllm(tmp_path: Path, task: Task, torchrun: Callable[..., None]) -> None:
    prepare(tmp_path, task, QWEN2, 1, 2, 2)
    for command in ("refit", "gathered"):
        torchrun(2, WORKER, command, tmp_path)
    assert responses(tmp_path, "gathered") == responses(tmp_path, "after")


def test_kernels_with_a_layout_of_their_own(tmp_path: Path, task: Task, torchrun: Callable[..., None]) -> None:
    prepare(tmp_path, task, LLAMA, 1, 1, 1)
    torchrun(1, WORKER, "packed", tmp_path)
    torchrun(1, WORKER, "fresh", tmp_path)
    before, after, fresh = (responses(tmp_path, name) for name in ("before", "after", "fresh"))
    assert [row[:3] for row in after] == [row[:3] for row in fresh]
    assert [row[2] for row in before] != [row[2] for row in after]
