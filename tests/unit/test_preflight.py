"""What is refused before a rank starts: one sentence with the numbers."""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_r1z import preflight
from megatron_r1z.config import AnalyseConfig, EvaluateConfig, PretrainConfig, TrainConfig, dump_config, make_config
from megatron_r1z.data.changes import record_work
from megatron_r1z.errors import ConfigError, DataError, MissingExtraError, UsageError
from megatron_r1z.layout.families import hf_tensors, load_shape
from megatron_r1z.preflight import check_analyse, check_evaluate, check_pretrain, check_train, require_libraries

pytest.importorskip("megatron.core")
pytest.importorskip("vllm")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "quickstart"))
make_task = importlib.import_module("make_task")


ENDS_TEXTS = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<eos>", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<eos>": {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}},
}
"""A post-processor of tokenizer.json."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The quickstart's model with weights of zero, questions, a corpus and a reward function, on a machine without a GPU."""
    monkeypatch.setattr(preflight, "_has_cuda", lambda: False)
    make_task.save_model(tmp_path / "model")
    save_weights(tmp_path / "model")
    (tmp_path / "questions.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n\n{"problem": "1+2", "answer": 3}\n')
    (tmp_path / "corpus.jsonl").write_text('{"text": "1+1=2"}\n{"prompt": "1+2=", "response": "3"}\n')
    (tmp_path / "reward.py").write_text("def reward(response, answers, finish_reason):\n    return 1.0\n")
    return tmp_path


def edit_model(folder: Path, **fields: Any) -> None:
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with contextlib.suppress(DataError):  # of a configuration that is to be refused itself
        save_weights(folder / "model")


def save_weights(model: Path) -> None:
    tensors = {spec.name: torch.zeros(spec.shape) for spec in hf_tensors(load_shape(model))}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def train_config(folder: Path, **sections: dict[str, Any]) -> TrainConfig:
    tree: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder / "model")},
        "data": {"train": [{"path": str(folder / "questions.jsonl")}], "template": "no", "max_prompt_tokens": 56},
        "algorithm": {"iterations": 3, "train_batch_size": 8},
        "rollout": {"prompts_per_iteration": 4, "samples_per_prompt": 4, "max_response_tokens": 200},
        "precision": {"policy": "fp32", "engine": "fp32"},
        "logging": {"folder": str(folder / "run")},
    }
    for name, fields in sections.items():
        tree[name] = tree.get(name, {}) | fields
    return make_config(TrainConfig, tree)


def pretrain_config(folder: Path, **sections: dict[str, Any]) -> PretrainConfig:
    tree: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder / "model"), "random_init": True},
        "corpus": {"sources": [{"path": str(folder / "corpus.jsonl")}], "steps": 3, "max_document_tokens": 256},
        "logging": {"folder": str(folder / "run")},
    }
    for name, fields in sections.items():
        tree[name] = tree.get(name, {}) | fields
    return make_config(PretrainConfig, tree)


def refusal(folder: Path, kind: type[UsageError] = ConfigError, **sections: dict[str, Any]) -> str:
    """The sentence with which a training run is refused."""
    with pytest.raises(kind) as caught:
        check_train(train_config(folder, **sections))
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


def test_what_can_run_is_not_refused(folder: Path) -> None:
    check_train(train_config(folder))
    check_train(train_config(folder, grading={"function": f"{folder / 'reward.py'}:reward"}))
    check_pretrain(pretrain_config(folder))


def test_nothing_is_written(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    check_train(train_config(folder))
    assert sorted(folder.rglob("*")) == before


# ----------------------------------------------------------------------------------------------------------------------------- fp8


def test_fp8_that_cannot_run_is_refused(folder: Path) -> None:
    edit_model(folder, hidden_size=192)
    sentence = refusal(folder, precision={"policy": "fp8"})
    assert "precision.fp8.recipe blockwise needs multiples of 128 in every matrix of a rank: linear_qkv has" in sentence
    if not torch.cuda.is_available():
        assert "mxfp8 cannot run here: it needs a GPU, and there is none" in refusal(
            folder, precision={"policy": "fp8", "fp8": {"recipe": "mxfp8"}}
        )
    check_train(train_config(folder, precision={"fp8": {"recipe": "mxfp8"}}))
    check_train(train_config(folder, precision={"policy": "fp32", "engine": "bf16"}))


def test_an_engine_in_fp8_needs_matrices_that_can_be_cut_into_blocks(folder: Path) -> None:
    assert "rollout.refit is gathered, which hands over no FP8" in refusal(
        folder, precision={"engine": "fp8"}, rollout={"refit": "gathered"}
    )
    edit_model(folder, hidden_size=192, num_attention_heads=6, num_key_value_heads=6)
    assert "with hidden size 192, head size 32 and feed-forward size 352 no rank has a matrix that can be cut into blocks of 128 x 128" in (
        refusal(folder, precision={"engine": "fp8"})
    )
    edit_model(folder, hidden_size=256, intermediate_size=512, num_attention_heads=2, num_key_value_heads=2, head_dim=128)
    check_train(train_config(folder, precision={"engine": "fp8"}))


# --------------------------------------------------------------------------------------------------------------------------- model


def test_the_policy_cannot_be_split(folder: Path) -> None:
    sentence = refusal(folder, parallel={"num_ranks": 3, "tensor_parallel_size": 3})
    assert "policy: num_heads is 4, which tp 3 does not divide; tp 2 does" in sentence


def test_the_policy_cannot_split_key_value_heads(folder: Path) -> None:
    edit_model(folder, num_key_value_heads=2)
    sentence = refusal(folder, parallel={"num_ranks": 4, "tensor_parallel_size": 4})
    assert "num_kv_heads is 2, which tp 4 does not divide" in sentence


def test_the_layers_cannot_be_split(folder: Path) -> None:
    parallel = {"num_ranks": 2, "pipeline_parallel_size": 2}
    chunks = "2 model chunks (pipeline_parallel_size 2 x virtual_pipeline_size 1)"
    assert refusal(folder, parallel=parallel) == (
        f"the model's 3 layers cannot be split evenly over {chunks}; set parallel.pipeline_layers, for example to [2, 1]."
    )
    assert refusal(folder, parallel=parallel | {"pipeline_layers": [2, 2]}) == (
        "parallel.pipeline_layers [2, 2] adds up to 4, but the model has 3 layers; set parallel.pipeline_layers, for example to [2, 1]."
    )
    check_train(train_config(folder, parallel=parallel | {"pipeline_layers": [1, 2]}))


def test_there_are_more_chunks_than_layers(folder: Path) -> None:
    sentence = refusal(folder, parallel={"num_ranks": 2, "pipeline_parallel_size": 2, "virtual_pipeline_size": 2})
    assert sentence.endswith("; lower parallel.pipeline_parallel_size or parallel.virtual_pipeline_size to at most 3 chunks.")


def test_context_parallelism_on_a_gpu_needs_bf16(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine's kernels for it have 16 bits; the attention for a CPU computes in any format."""
    parallel, policy = {"num_ranks": 2, "context_parallel_size": 2}, {"policy": "fp32"}
    check_train(train_config(folder, parallel=parallel, precision=policy))
    monkeypatch.setattr(preflight, "_has_cuda", lambda: True)
    check_train(train_config(folder, parallel=parallel, precision={"policy": "bf16"}))
    sentence = refusal(folder, parallel=parallel, precision=policy)
    assert sentence.startswith("parallel.context_parallel_size is 2, and the attention of Transformer Engine")


def test_there_is_no_gpu_to_offload_from(folder: Path) -> None:
    sentence = refusal(folder, parallel={"offload_layers": 2})
    assert sentence.endswith("this machine has no GPU; set parallel.offload_layers=0.")
    sentence = refusal(folder, optimizer={"distributed": True, "offload_to_host": True})
    assert sentence.endswith("this machine has no GPU; set optimizer.offload_to_host=false.")


def test_the_engine_cannot_be_split(folder: Path) -> None:
    edit_model(folder, num_attention_heads=6, num_key_value_heads=6, hidden_size=192, intermediate_size=240)
    sentence = refusal(folder, parallel={"num_ranks": 4}, rollout={"tensor_parallel_size": 4})
    assert "engine: num_heads is 6, which tp 4 does not divide" in sentence


def test_a_head_size_that_vllm_cannot_compute_on_a_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_model(folder, hidden_size=64)
    sentence = refusal(folder)
    assert "head size of 16" in sentence
    assert "32, 48, 64" in sentence
    monkeypatch.setattr(preflight, "_has_cuda", lambda: True)
    check_train(train_config(folder))


@pytest.mark.parametrize("check", ["train", "pretrain"])
def test_an_unknown_family(folder: Path, check: str) -> None:
    edit_model(folder, architectures=["GPT2LMHeadModel"], model_type="gpt2")
    with pytest.raises(
        DataError, match=r"describes GPT2LMHeadModel, which is not supported; known families: llama, mistral, .*qwen3_moe\."
    ):
        check_train(train_config(folder)) if check == "train" else check_pretrain(pretrain_config(folder))


@pytest.mark.parametrize("check", ["train", "pretrain"])
def test_a_mixture_of_experts(folder: Path, check: str) -> None:
    edit_model(folder, architectures=["MixtralForCausalLM"], model_type="mixtral", num_local_experts=4)
    with pytest.raises(
        ConfigError, match=r"is a mixture of 4 experts, and the policy is built for dense models only; `megatron-r1z plan --model` works"
    ):
        check_train(train_config(folder)) if check == "train" else check_pretrain(pretrain_config(folder))


def test_rotary_scaling_that_megatron_does_not_have(folder: Path) -> None:
    llama3 = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    edit_model(folder, rope_scaling=llama3)
    check_train(train_config(folder))
    edit_model(folder, rope_scaling=llama3 | {"high_freq_factor": 3.0})
    assert "high_freq_factor=3.0" in refusal(folder)


def test_there_is_no_model(folder: Path) -> None:
    assert str(folder / "nothing") in refusal(folder, DataError, model={"path": str(folder / "nothing")})


def test_there_are_no_weights(folder: Path) -> None:
    (folder / "model" / "model.safetensors").unlink()
    sentence = refusal(folder, DataError)
    assert f"{folder / 'model'} holds neither model.safetensors nor model.safetensors.index.json" in sentence
    assert "model.random_init" in sentence
    check_train(train_config(folder, model={"random_init": True}))


COMMANDS = {
    "train": lambda folder: check_train(train_config(folder)),
    "pretrain": lambda folder: check_pretrain(pretrain_config(folder, model={"random_init": False})),
    "evaluate": lambda folder: check_evaluate(evaluate_config(folder)),
    "analyse": lambda folder: check_analyse(analyse_config(folder)),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_looks_at_the_whole_model_folder(folder: Path, command: str) -> None:
    """What is refused is in test_model_folder.py; here: that it is asked, of config.json, tensors, tokenizer and generation_config.json."""
    check, model = COMMANDS[command], folder / "model"
    check(folder)
    edit_model(folder, logit_scale=0.5)
    with pytest.raises(DataError, match=r"has logit_scale 0\.5"):
        check(folder)
    edit_model(folder, logit_scale=None)
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.ones(27, 128)}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"lm_head\.weight that differs"):
        check(folder)
    edit_model(folder, vocab_size=20)
    with pytest.raises(DataError, match=r"the model has 20 rows"):
        check(folder)
    edit_model(folder, vocab_size=27)
    (model / "generation_config.json").write_text("{")
    with pytest.raises(DataError, match=r"generation_config\.json is not valid JSON"):
        check(folder)


@pytest.mark.parametrize("command", ["train", "evaluate", "analyse"])
def test_a_stop_string_that_can_never_be_found(folder: Path, command: str) -> None:
    stop = {"rollout": {"max_response_tokens": 200, "stop": ["<eos>", "<eos>\n"]}}
    make = {"train": train_config, "evaluate": evaluate_config, "analyse": analyse_config}[command]
    check = {"train": check_train, "evaluate": check_evaluate, "analyse": check_analyse}[command]
    with pytest.raises(ConfigError, match=r"rollout\.stop has '<eos>\\n', which can never be found"):
        check(make(folder, **stop))
    stop["rollout"]["stop"] = ["<eos>"]
    check(make(folder, **stop))


def test_a_tokenizer_that_ends_prompts_is_told(folder: Path) -> None:
    assert check_train(train_config(folder)) == []
    path = folder / "model" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": ENDS_TEXTS}))
    (said,) = check_train(train_config(folder))
    assert said == f"the tokenizer of {folder / 'model'} ends a text with '<eos>'; prompts go without it."


def test_there_is_no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).unlink()
    assert f"no tokenizer can be read from {folder / 'model'}" in refusal(folder, DataError)


def test_a_tokenizer_without_the_chat_template_that_is_asked_for(folder: Path) -> None:
    assert "chat template" in refusal(folder, DataError, data={"template": "chat"})


def test_a_checkpoint_that_the_run_would_not_go_on_from(folder: Path, make_checkpoint: Callable[[Path], Path]) -> None:
    checkpoints = folder / "run" / "checkpoints"
    for step in (50, 100):
        make_checkpoint(checkpoints / f"step_{step:06d}")
    for pointer in ("step_000100\n", "", None):
        if pointer is None:
            (checkpoints / "latest").unlink()
        else:
            (checkpoints / "latest").write_text(pointer)
        sentence = refusal(folder, checkpoint={"resume": False})
        assert f"{folder / 'run'} holds checkpoints (step_000050, step_000100) and checkpoint.resume is false" in sentence
        check_train(train_config(folder))


def test_a_damaged_checkpoint_is_refused_before_ranks_start(folder: Path, make_checkpoint: Callable[[Path], Path]) -> None:
    checkpoint = make_checkpoint(folder / "run" / "checkpoints" / "step_000050")
    assert "is damaged" not in refusal(folder, checkpoint={"resume": False})
    (checkpoint.parent / "latest").write_text("step_000050")
    (checkpoint / "common.pt").unlink()
    assert "step_000050 is damaged: common.pt is missing; there is no complete one before it" in refusal(folder, DataError)
    sentence = refusal(folder, logging={"folder": str(folder / "other")}, model={"checkpoint": str(checkpoint)})
    assert f"model.checkpoint {checkpoint} is damaged: common.pt is missing" in sentence


# ------------------------------------------------------------------------------------------------------------------------- lengths


def test_more_tokens_than_positions(folder: Path) -> None:
    sentence = refusal(folder, rollout={"max_response_tokens": 300})
    assert "data.max_prompt_tokens 56 + rollout.max_response_tokens 300 = 356, but the model has 256 positions" in sentence
    assert "lower one of them by 100" in sentence


def test_documents_longer_than_the_positions(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"corpus\.max_document_tokens is 257; the model has 256 positions\."):
        check_pretrain(pretrain_config(folder, corpus={"max_document_tokens": 257}))


@pytest.mark.parametrize(("engine", "itemsize"), [("fp32", 4), ("bf16", 2)])
def test_a_cache_that_does_not_hold_one_sequence(folder: Path, engine: str, itemsize: int) -> None:
    needed = 2 * 3 * 4 * 32 * itemsize * 256  # keys and values x layers x heads x head size x bytes x tokens
    sentence = refusal(folder, rollout={"kv_cache_bytes": needed - 1}, precision={"engine": engine})
    assert f"rollout.kv_cache_bytes is {needed - 1}, but one sequence of 256 tokens needs {needed}" in sentence
    check_train(train_config(folder, rollout={"kv_cache_bytes": needed}, precision={"engine": engine}))


def test_the_ranks_of_an_engine_share_the_cache(folder: Path) -> None:
    needed = 2 * 3 * 2 * 32 * 4 * 256
    ranks = {"num_ranks": 2}
    check_train(train_config(folder, parallel=ranks, rollout={"kv_cache_bytes": needed, "tensor_parallel_size": 2}))
    assert f"needs {needed}" in refusal(folder, parallel=ranks, rollout={"kv_cache_bytes": needed - 1, "tensor_parallel_size": 2})


# ----------------------------------------------------------------------------------------------------------------------- questions


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"problem": "1+1", "answer": "2"}\n{"problem": \n', ":2: not valid JSON"),
        ('{"problem": "1+1", "answer": "2"}\n\n[1, 2]\n', ":3: each line must be a JSON object, not list"),
        ("", " holds no questions"),
        ('{"problem": "1+1", "solution": "2"}\n', ":1: no column 'answer'; the columns are 'problem', 'solution'"),
        ('{"question": "1+1", "answer": "2"}\n', ":1: no column 'problem'; the columns are 'question', 'answer'"),
        ('{"problem": "1+1", "answer": null}\n', ":1: 'answer' has no answer (None)"),
        ('{"problem": " ", "answer": "2"}\n', ":1: 'problem' is empty"),
    ],
)
@pytest.mark.parametrize("place", ["train", "evaluation"])
def test_question_files_that_cannot_be_used(folder: Path, text: str, sentence: str, place: str) -> None:
    path = folder / "bad.jsonl"
    path.write_text(text)
    source = {"path": str(path)}
    if place == "train":
        found = refusal(folder, DataError, data={"train": [{"path": str(folder / "questions.jsonl")}, source]})
    else:
        found = refusal(folder, DataError, evaluation={"sets": [source]})
    assert found.startswith(f"{path}{sentence}")


def test_a_question_file_that_is_not_there(folder: Path) -> None:
    path = str(folder / "nothing.jsonl")
    assert f"there is no file {path}" in refusal(folder, DataError, data={"train": [{"path": path}]})


def test_columns_of_another_name(folder: Path) -> None:
    (folder / "other.jsonl").write_text('{"question": "1+1", "result": "2"}\n')
    source = {"path": str(folder / "other.jsonl"), "problem_column": "question", "answer_column": "result"}
    check_train(train_config(folder, data={"train": [source]}))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [('{"text": "1+1=2"}\n{"text"\n', ":2: not valid JSON"), ('{"words": "1+1=2"}\n', ":1: ")],
)
def test_a_corpus_that_cannot_be_used(folder: Path, text: str, sentence: str) -> None:
    (folder / "corpus.jsonl").write_text(text)
    with pytest.raises(DataError) as caught:
        check_pretrain(pretrain_config(folder))
    assert str(caught.value).startswith(f"{folder / 'corpus.jsonl'}{sentence}")


# -------------------------------------------------------------------------------------------------------------- reward, optimizer


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("{folder}/nothing.py:reward", "there is no file {folder}/nothing.py"),
        ("{folder}/reward.py:score", "{folder}/reward.py defines no 'score'"),
        ("{folder}/reward.py", "write it as path.py:name"),
        ("{folder}/broken.py:reward", "{folder}/broken.py fails to load: ZeroDivisionError"),
        ("{folder}/short.py:reward", "must take (response, answers, finish_reason)"),
        (
            "{folder}/empty.py:reward",
            "fails on all of 5 responses made up for a question with the answer '2', the first time with ValueError",
        ),
    ],
)
def test_a_reward_function_that_cannot_be_used(folder: Path, function: str, sentence: str) -> None:
    (folder / "empty.py").write_text("def reward(response, answers, finish_reason):\n    pass\n")
    (folder / "broken.py").write_text("1 / 0\n")
    (folder / "short.py").write_text("def reward(response):\n    return 1.0\n")
    assert sentence.format(folder=folder) in refusal(folder, DataError, grading={"function": function.format(folder=folder)})


def test_a_reward_that_knows_only_the_answers_of_the_run_is_tried_with_one_of_them(folder: Path) -> None:
    (folder / "table.py").write_text("def reward(response, answers, finish_reason):\n    return {'2': 1.0, '3': 0.0}[answers[0]]\n")
    check_train(train_config(folder, grading={"extra": [{"function": f"{folder / 'table.py'}:reward"}]}))


def test_conversations_that_the_chat_template_does_not_take(folder: Path) -> None:
    path = folder / "model" / "tokenizer_config.json"
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    row = {"prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1"}], "reward_model": {"ground_truth": "2"}}
    (folder / "messages.jsonl").write_text(json.dumps(row) + "\n")
    data = {"train": [{"path": str(folder / "messages.jsonl")}], "template": "chat"}
    assert (
        f"{folder / 'messages.jsonl'}:1: template chat: the tokenizer's chat template does not take these messages (no system role)."
        in (refusal(folder, DataError, data=data))
    )
    check_train(train_config(folder, data=data | {"template": "no"}))


@pytest.mark.parametrize("check", ["train", "pretrain"])
def test_the_distributed_optimizer_without_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch, check: str) -> None:
    def run() -> None:
        optimizer = {"distributed": True}
        if check == "train":
            check_train(train_config(folder, optimizer=optimizer))
        else:
            check_pretrain(pretrain_config(folder, optimizer=optimizer))

    with pytest.raises(ConfigError, match=r"set optimizer\.distributed=false on a machine without a GPU\."):
        run()
    monkeypatch.setattr(preflight, "_has_cuda", lambda: True)
    run()


# ----------------------------------------------------------------------------------------------------------------------- libraries


@pytest.mark.parametrize("module", ["no_such_library", "no_such_library.core", "json.no_such_part"])
def test_a_missing_library_is_named_with_the_extra(module: str) -> None:
    with pytest.raises(MissingExtraError) as caught:
        require_libraries(("json", module))
    assert str(caught.value).startswith(f"{module} is not installed; run `make env`")
    assert "megatron-r1z[cpu]" in str(caught.value)


@pytest.mark.parametrize("library", ["megatron.core", "vllm", "transformers", "math_verify"])
def test_libraries_come_first(folder: Path, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine where nothing is installed the first sentence is about that, whatever else is wrong."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else find_spec(name))
    sentence = refusal(folder, MissingExtraError, model={"path": "nowhere"})
    assert sentence.startswith(f"{library} is not installed")


def test_the_libraries_of_a_run_are_here() -> None:
    require_libraries(("torch", "megatron.core", "vllm", "transformers", "sympy", "math_verify"))


def evaluate_config(folder: Path, **sections: dict[str, Any]) -> EvaluateConfig:
    tree: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder / "model")},
        "data": {"template": "no", "max_prompt_tokens": 56},
        "evaluation": {"sets": [{"path": str(folder / "questions.jsonl")}]},
        "rollout": {"max_response_tokens": 200},
        "precision": {"policy": "fp32", "engine": "fp32"},
        "logging": {"folder": str(folder / "run")},
    }
    for name, fields in sections.items():
        tree[name] = tree.get(name, {}) | fields
    return make_config(EvaluateConfig, tree)


def test_a_good_evaluation_passes(folder: Path) -> None:
    check_evaluate(evaluate_config(folder))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"checkpoint": "no/such/step_000001"}}, r"model.checkpoint no/such/step_000001 is not a complete checkpoint"),
        ({"rollout": {"max_response_tokens": 9000}}, "the model has"),
        ({"grading": {"extra": [{"function": "no/such.py:x"}]}}, "there is no file no/such.py"),
        ({"evaluation": {"sets": [{"path": "no/such.jsonl"}]}}, "there is no file no/such.jsonl"),
        ({"rollout": {"tensor_parallel_size": 3}, "parallel": {"num_ranks": 3}}, "heads"),
    ],
)
def test_an_evaluation_that_cannot_work_is_refused(folder: Path, sections: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_evaluate(evaluate_config(folder, **(sections | {"rollout": {"max_response_tokens": 200} | sections.get("rollout", {})})))


@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        ({"evaluation": {"temperature": 0.6}}, r"evaluation.temperature 0.0, which is now 0.6"),
        ({"rollout": {"max_response_tokens": 100}}, r"rollout.max_response_tokens 200, which is now 100"),
        ({"grading": {"mode": "fast"}}, r"grading.mode 'strict', which is now 'fast'"),
        ({"parallel": {"num_ranks": 2}}, None),
        ({"grading": {"workers": 4}}, None),
        ({"rollout": {"temperature": 0.7}}, None),
    ],
)
def test_responses_of_different_evaluations_are_not_mixed(folder: Path, changed: dict[str, dict[str, Any]], refused: str | None) -> None:
    base = evaluate_config(folder)
    base.folder.mkdir(parents=True)
    (base.folder / "config.yaml").write_text(dump_config(base))
    sets = {"sets": [{"path": str(folder / "questions.jsonl")}]}
    config = evaluate_config(folder, **{name: fields | (sets if name == "evaluation" else {}) for name, fields in changed.items()})
    if refused is None:
        check_evaluate(config)
        return
    with pytest.raises(ConfigError, match=refused):
        check_evaluate(config)


ROWS = [("1+1", ["2"]), ("1+2", ["3"])]


def write_records(path: Path, rows: list[tuple[str, list[str]]]) -> None:
    """Responses to the questions of the fixture, as an evaluation leaves them."""
    attempt = {"text": "2", "length": 1, "finish_reason": "stop", "verdict": "wrong", "extracted": "2"}
    records = [
        {"question_id": f"questions/{index}", "prompt": prompt, "answers": answers, "attempts": [attempt], "majority": None}
        for index, (prompt, answers) in enumerate(rows)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize("command", ["evaluate", "analyse"])
def test_responses_by_other_references_to_other_prompts_or_of_another_model_are_refused_before_ranks_start(
    folder: Path, command: str
) -> None:
    if command == "evaluate":
        config: Any = evaluate_config(folder)
        check: Callable[[], None] = partial(check_evaluate, config)
        path = folder / "run" / "evaluation" / "questions.jsonl"
    else:
        config = analyse_config(
            folder, analysis={"templates": ["no"], "temperatures": [0.5], "questions": {"path": str(folder / "questions.jsonl")}}
        )
        check = partial(check_analyse, config)
        path = folder / "run" / "analysis" / "responses" / "no_t0.5.jsonl"
    save_weights(folder / "model")
    record_work(config.folder, config)
    write_records(path, ROWS)
    check()
    write_records(path, [ROWS[0], ("1+2", ["4"])])
    with pytest.raises(DataError, match=r"verdicts on questions/1 by the answer \['4'\], which is now \['3'\]"):
        check()
    write_records(path, [ROWS[0], ("1+2=", ["3"])])
    with pytest.raises(DataError, match=r"responses to other questions; the first is on line 2"):
        check()
    write_records(path, ROWS)
    tensors = {spec.name: torch.ones(spec.shape) for spec in hf_tensors(load_shape(folder / "model"))}
    save_file(tensors, folder / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"responses with other weights than .* has now \(model.path: model.safetensors\)"):
        check()


def test_a_run_that_would_go_on_as_another_is_refused_before_ranks_start(
    folder: Path, make_checkpoint: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[tuple[Any, Callable[[Any], object], Any]] = [
        (train_config(folder), check_train, train_config(folder, rollout={"seed": 5})),
        (pretrain_config(folder), check_pretrain, pretrain_config(folder, corpus={"seed": 5})),
    ]
    for config, check, other in commands:
        run = folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        record_work(run, config, goes_on=False)
        check(other)
        make_checkpoint(run / "checkpoints" / "step_000001")
        with pytest.raises(ConfigError, match=r"seed 0, which is now 5"):
            check(other)
        monkeypatch.setenv("RANK", "1")  # of torchrun, where the first rank says it
        check(other)
        monkeypatch.delenv("RANK")


def analyse_config(folder: Path, **sections: dict[str, Any]) -> AnalyseConfig:
    tree: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder / "model")},
        "analysis": {"questions": {"path": str(folder / "questions.jsonl")}, "max_prompt_tokens": 56},
        "rollout": {"max_response_tokens": 200},
        "logging": {"folder": str(folder / "run")},
    }
    for name, fields in sections.items():
        tree[name] = tree.get(name, {}) | fields
    return make_config(AnalyseConfig, tree)


def test_a_good_analysis_passes(folder: Path) -> None:
    check_analyse(analyse_config(folder))
    check_analyse(analyse_config(folder, analysis={"judge": {"url": "http://localhost:8000/v1"}}))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"checkpoint": "no/such/step_000001"}}, r"model.checkpoint no/such/step_000001 is not a complete checkpoint"),
        ({"rollout": {"max_response_tokens": 9000}}, "the model has"),
        ({"analysis": {"questions": {"path": "no/such.jsonl"}}}, "there is no file no/such.jsonl"),
        ({"analysis": {"level_column": "hardness"}}, "no column 'hardness'; the columns are"),
        ({"analysis": {"templates": ["no", "few_shot"], "shots_path": "no/shots.txt"}}, "cannot read the shots file no/shots.txt"),
        ({"analysis": {"judge": {"url": "http://x/v1", "api_key_env": "R1Z_NO_SUCH_KEY"}}}, "R1Z_NO_SUCH_KEY, which is not set"),
    ],
)
def test_an_analysis_that_cannot_work_is_refused(folder: Path, sections: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_analyse(analyse_config(folder, **sections))


@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        ({"analysis": {"samples": 4}}, r"analysis.samples 8, which is now 4"),
        ({"rollout": {"max_response_tokens": 100}}, r"rollout.max_response_tokens 200, which is now 100"),
        ({"analysis": {"temperatures": [0.7], "templates": ["no"], "k": [1], "keywords": ["hm"], "judge": {"url": "http://x/v1"}}}, None),
        ({"parallel": {"num_ranks": 2}}, None),
    ],
)
def test_responses_of_different_analyses_are_not_mixed(folder: Path, changed: dict[str, dict[str, Any]], refused: str | None) -> None:
    base = analyse_config(folder)
    base.folder.mkdir(parents=True)
    (base.folder / "config.yaml").write_text(dump_config(base))
    config = analyse_config(folder, **changed)
    if refused is None:
        check_analyse(config)
        return
    with pytest.raises(ConfigError, match=refused):
        check_analyse(config)
