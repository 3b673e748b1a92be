"""FP8 through the real engine: the bytes that the policy multiplies are the bytes that vLLM multiplies."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.loop.conftest import ENVIRONMENT, ROOT, Task

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("fp8_engine_worker.py")
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True}
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="session")
def make_model(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Path]:
    """A model of one family whose matrices can be cut into blocks, without weights, with the task's tokenizer."""

    def make(family: dict[str, Any]) -> Path:
        folder = tmp_path_factory.mktemp("model") / "model"
        shutil.copytree(task.model, folder)
        config = json.loads((folder / "config.json").read_text())
        kept = {key: config[key] for key in ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id") if key in config}
        (folder / "config.json").write_text(json.dumps(kept | SIZES | family))
        return folder

    return make


@pytest.mark.parametrize(("family", "engine_tp"), [(LLAMA, 1), (QWEN2, 2)], ids=["llama-2xTP1", "qwen2-biases-TP2"])
def test_same_bytes_and_same_logprobs_on_both_sides(
    make_model: Callable[[dict[str, Any]], Path], torchrun: Callable[..., None], tmp_path: Path, family: dict[str, Any], engine_tp: int
) -> None:
    """With float32 around the products both sides agree as float32 sides do; a policy that does not round is far away."""
    model = make_model(family)
    found = {}
    for policy in ("fp8", "fp32"):
        folder = tmp_path / policy
        folder.mkdir()
        torchrun(2, WORKER, model, policy, 2, engine_tp, folder)
        found[policy] = json.loads((folder / "0.json").read_text())
    assert found["fp8"]["count"] == found["fp32"]["count"] > 50
    assert found["fp8"]["mean"] < found["fp32"]["mean"] / 20
    assert found["fp8"]["mean"] < 2e-3


LOAD = """
import json, sys
from megatron_r1z.rollout.cpu import prepare_engine, prepare_import
prepare_import()
import torch
torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
import os
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
from vllm import LLM, SamplingParams
folder, output, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
head = {"hf_overrides": {"head_dtype": "float32"}}  # as ours; in bf16 two logits are often equal, and the first is taken
engine = LLM(folder, max_model_len=80, kv_cache_memory_bytes=64 << 20, disable_log_stats=True, **head, **prepare_engine(80))
outputs = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=24), use_tqdm=False)
with open(output, "w") as file:
    json.dump([item.outputs[0].text for item in outputs], file)
"""


@pytest.fixture(scope="module")
def run(make_model: Callable[[dict[str, Any]], Path], training: list[str], cli: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two iterations of an FP8 policy with FP8 engines: the folder and how it ended."""
    layout = ("parallel.tensor_parallel_size=2", "rollout.tensor_parallel_size=2")
    fp8 = ("precision.policy=fp8", "precision.engine=fp8", "model.random_init=true", f"model.path={make_model(LLAMA)}")
    folder = tmp_path_factory.mktemp("run")
    return folder, cli.run("train", *training, *layout, *fp8, "algorithm.iterations=2", f"logging.folder={folder}")


def test_a_run_trains_through_fp8_engines(run: tuple[Path, Any]) -> None:
    folder, outcome = run
    assert (outcome.status, outcome.stderr) == (0, "")
    certificate = json.loads((folder / "certificate.json").read_text())
    assert (certificate["engine"], certificate["policy"]) == ("fp8", "fp8")
    assert certificate["mean_nats"] < 0.05
    rows = [json.loads(row) for row in (folder / "refits.jsonl").read_text().splitlines()]
    assert [row["policy_version"] for row in rows] == [0, 1, 2]
    for row in rows:
        by_format = row["bytes_by_format"]
        assert by_format["float8_e4m3fn"] == 2 * (4 * 256 * 256 + 3 * 256 * 512)
        assert by_format["float32"] == by_format["float8_e4m3fn"] // 128 // 128 * 4
        assert row["bytes"] == sum(by_format.values())
        assert row["not_in_fp8"] == []


def test_an_fp8_folder_is_what_vllm_loads_and_what_an_fp8_engine_makes_of_a_bf16_folder(
    run: tuple[Path, Any], task: Task, cli: Any, tmp_path: Path
) -> None:
    exported, fp8 = run[0] / "hf" / "final", tmp_path / "fp8"
    outcome = cli.run("convert", str(exported), str(fp8), "--to", "hf", "--dtype", "fp8")
    assert (outcome.status, outcome.stderr) == (0, "")
    texts = {}
    for name, folder in (("bf16", exported), ("fp8", fp8)):
        sets = (f"evaluation.sets=[{{path: {task.questions}, limit: 12}}]", "evaluation.temperature=0.0", "evaluation.samples=1")
        arguments = ("configs/quickstart.yaml", f"model.path={folder}", *sets, "rollout.max_response_tokens=24", "precision.engine=fp8")
        outcome = cli.run("evaluate", *arguments, "rollout.tensor_parallel_size=1", f"logging.folder={tmp_path / name}")
        assert (outcome.status, outcome.stderr) == (0, "")
        rows = [json.loads(line) for line in (tmp_path / name / "evaluation" / "easy_questions.jsonl").read_text().splitlines()]
        texts[name] = [row["attempts"][0]["text"] for row in rows]
    prompts = [row["prompt"] for row in rows]
    command = [sys.executable, "-c", LOAD, str(fp8), str(tmp_path / "texts.json"), json.dumps(prompts)]
    subprocess.run(command, check=True, env=ENVIRONMENT, cwd=ROOT)
    assert texts["fp8"] == texts["bf16"] == json.loads((tmp_path / "texts.json").read_text())
    assert len(set(texts["fp8"])) > 1
