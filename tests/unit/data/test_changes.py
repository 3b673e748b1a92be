"""What may change when work goes on in a folder, and that everything else is refused by the field with both values."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_r1z.config import AnalyseConfig, EvaluateConfig, PretrainConfig, TrainConfig, dump_config, leaves, make_config, to_tree
from megatron_r1z.data import changes
from megatron_r1z.data.changes import Difference, changed_settings, check_goes_on, check_same, describe_changes, go_on, record_work
from megatron_r1z.data.corpus import check_corpus
from megatron_r1z.data.inputs import INPUTS_FILE, load_inputs, read_inputs, save_inputs
from megatron_r1z.data.order import SeededStream
from megatron_r1z.data.questions import load_question_sets, mark_questions
from megatron_r1z.errors import ConfigError, DataError

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "quickstart"))
make_task = importlib.import_module("make_task")

OTHER: dict[str, Any] = {
    "rollout.temperature": 0.6,
    "rollout.max_response_tokens": 60,
    "rollout.samples_per_prompt": 8,
    "rollout.seed": 1,
    "rollout.stop": ["x"],
    "data.seed": 1,
    "data.template": "qwen_math",
    "data.system_prompt": "Think.",
    "data.max_prompt_tokens": 40,
    "algorithm.name": "grpo",
    "algorithm.kl_coef": 0.1,
    "algorithm.train_batch_size": 4,
    "grading.mode": "fast",
    "grading.reward": "boxed",
    "precision.policy": "bf16",
    "precision.engine": "bf16",
    "precision.fp8.first_layers_bf16": 1,
    "optimizer.distributed": True,
    "model.seed": 1,
    "model.random_init": True,
}
"""Values by which a run would be another one."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with weights of four bytes, questions, a corpus and a reward function."""
    make_task.save_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"1111")
    (tmp_path / "questions.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n{"problem": "1+2", "answer": 3}\n')
    (tmp_path / "corpus.jsonl").write_text('{"text": "1+1=2"}\n{"prompt": "1+2=", "response": "3"}\n')
    (tmp_path / "shots.txt").write_text("1+1=2\n{question}=")
    (tmp_path / "reward.py").write_text("import neighbour\ndef reward(response, answers, finish_reason):\n    return neighbour.value\n")
    (tmp_path / "neighbour.py").write_text("value = 1.0\n")
    return tmp_path


def set_in(tree: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    for name, value in values.items():
        *sections, field = name.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[field] = value
    return tree


def train_config(folder: Path, values: dict[str, Any] | None = None) -> TrainConfig:
    tree: dict[str, Any] = {
        "model": {"path": str(folder / "model")},
        "data": {"train": [{"path": str(folder / "questions.jsonl")}], "template": "no", "max_prompt_tokens": 56},
        "algorithm": {"iterations": 3, "train_batch_size": 8},
        "rollout": {"prompts_per_iteration": 4, "samples_per_prompt": 4, "max_response_tokens": 200},
        "precision": {"policy": "fp32", "engine": "fp32"},
        "logging": {"folder": str(folder / "run")},
    }
    return make_config(TrainConfig, set_in(tree, values or {}))


def pretrain_config(folder: Path, values: dict[str, Any] | None = None) -> PretrainConfig:
    tree: dict[str, Any] = {
        "model": {"path": str(folder / "model"), "random_init": True},
        "corpus": {"sources": [{"path": str(folder / "corpus.jsonl")}], "steps": 3, "max_document_tokens": 256},
        "logging": {"folder": str(folder / "run")},
    }
    return make_config(PretrainConfig, set_in(tree, values or {}))


def rows_of(config: TrainConfig | PretrainConfig) -> Any:
    if isinstance(config, PretrainConfig):
        return check_corpus(config.corpus)
    return mark_questions(config.data.train, load_question_sets(config.data.train))


def begin(config: TrainConfig | PretrainConfig) -> None:
    """Leave what a run leaves that has a checkpoint."""
    record_work(Path(config.logging.folder), config, rows_of(config), goes_on=False)
    checkpoint = Path(config.logging.folder) / "checkpoints" / "step_000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")


def check(config: TrainConfig | PretrainConfig) -> None:
    check_goes_on(config, rows_of(config))


def refusal(config: TrainConfig | PretrainConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        check(config)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


# ------------------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("name", OTHER)
def test_what_makes_another_run_is_refused_with_both_values_unless_it_is_asked_for(folder: Path, name: str) -> None:
    begin(train_config(folder))
    was = leaves(train_config(folder))[name]
    sentence = refusal(train_config(folder, {name: OTHER[name]}))
    assert f"{folder / 'run'} holds a run with {name} {was!r}, which is now {OTHER[name]!r}" in sentence
    assert f"checkpoint.accept_changes=[{name}]" in sentence
    check(train_config(folder, {name: OTHER[name], "checkpoint.accept_changes": [name]}))


def test_every_change_is_named_at_once(folder: Path) -> None:
    begin(train_config(folder))
    sentence = refusal(train_config(folder, {"rollout.temperature": 0.6, "data.seed": 3, "optimizer.lr": 1.0}))
    assert "rollout.temperature 1.0, which is now 0.6" in sentence
    assert "data.seed 0, which is now 3" in sentence
    assert "optimizer.lr" not in sentence
    assert sentence.endswith("checkpoint.accept_changes=[data.seed, rollout.temperature].")


STEERING: dict[str, Any] = {
    "optimizer.lr": 1e-5,
    "optimizer.clip_grad": 0.5,
    "optimizer.warmup_steps": 3,
    "algorithm.iterations": 30,
    "evaluation.every": 2,
    "evaluation.temperature": 0.5,
    "grading.timeout_s": 9.0,
    "grading.workers": 2,
    "checkpoint.every": 7,
    "parallel.num_ranks": 2,
    "parallel.micro_batch_tokens": 99,
    "rollout.kv_cache_bytes": 1 << 20,
    "logging.rollouts": False,
}


def test_what_a_run_is_steered_by_may_change_and_is_shown_in_one_line(folder: Path) -> None:
    begin(train_config(folder))
    config = train_config(folder, STEERING)
    check(config)
    (line,) = record_work(folder / "run", config, rows_of(config))
    assert "\n" not in line
    assert all(f"{name} {leaves(train_config(folder))[name]!r} -> {value!r}" in line for name, value in STEERING.items())


def test_a_folder_without_a_checkpoint_begins_anew(folder: Path) -> None:
    record_work(folder / "run", train_config(folder), rows_of(train_config(folder)))
    check(train_config(folder, {"rollout.temperature": 0.6}))


def test_the_tables_name_fields_that_exist(folder: Path) -> None:
    known = {name for make in (train_config, pretrain_config, analyse_config) for name in leaves(make(folder))}
    for table in (value for name, value in vars(changes).items() if name.startswith("MAY_CHANGE")):
        assert [entry for entry in table if not any(changes.is_among(name, (entry,)) for name in known)] == []


@pytest.mark.parametrize(("name", "near"), [("data.trian", "data.train"), ("rollout", "rollout.top_k"), ("kl_coef", "algorithm.kl_coef")])
def test_a_mistaken_name_is_refused(folder: Path, name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=r"there is no field .*; did you mean '"):
        train_config(folder, {"checkpoint.accept_changes": [name]})
    with pytest.raises(ConfigError, match="there is no field"):
        pretrain_config(folder, {"checkpoint.accept_changes": [name]})
    assert near in leaves(train_config(folder))


def test_the_work_of_another_command_is_refused(folder: Path) -> None:
    begin(pretrain_config(folder))
    assert "is no work of this command" in refusal(train_config(folder))


# ------------------------------------------------------------------------------------------------------------------------ contents


def test_other_questions_of_the_same_number_are_refused_and_a_renamed_file_goes_on(folder: Path) -> None:
    begin(train_config(folder))
    path = folder / "questions.jsonl"
    moved = folder / "elsewhere" / "other-name.jsonl"
    moved.parent.mkdir()
    shutil.copyfile(path, moved)
    check(train_config(folder, {"data.train": [{"path": str(moved)}]}))
    path.write_text(path.read_text().replace("1+2", "2+1"))
    sentence = refusal(train_config(folder))
    assert f"other rows of data.train.0 than are in {path} now (2 of {path} then, 2 now)" in sentence
    path.write_text(path.read_text().replace("2+1", "1+2").replace('"2"}', '"3"}'))
    assert "other rows of data.train.0" in refusal(train_config(folder))  # another answer to the same question
    check(train_config(folder, {"checkpoint.accept_changes": ["data.train"]}))


def test_sources_keep_number_order_and_weight(folder: Path) -> None:
    shutil.copyfile(folder / "corpus.jsonl", folder / "more.jsonl")
    (folder / "more.jsonl").write_text('{"problem": "7", "answer": "7"}\n')
    one, two = {"path": str(folder / "questions.jsonl")}, {"path": str(folder / "more.jsonl")}
    begin(train_config(folder, {"data.train": [one, two]}))
    assert "data.train of 2 sources, which are now 1" in refusal(train_config(folder, {"data.train": [one]}))
    assert "data.train.1.weight 1, which is now 2" in refusal(train_config(folder, {"data.train": [one, two | {"weight": 2.0}]}))
    assert "other rows of data.train.0" in refusal(train_config(folder, {"data.train": [two, one]}))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_another_model_or_tokenizer_under_the_same_path_is_refused(folder: Path, name: str) -> None:
    begin(train_config(folder))
    path = folder / "model" / name
    path.write_text(path.read_text() + " ")
    sentence = refusal(train_config(folder))
    assert f"other contents than {folder / 'model'} has now (model.path: {name})" in sentence
    check(train_config(folder, {"checkpoint.accept_changes": ["model.path"]}))


def test_the_same_model_elsewhere_is_the_same(folder: Path) -> None:
    begin(train_config(folder, {"algorithm.kl_coef": 0.1}))
    shutil.copytree(folder / "model", folder / "copy")
    check(train_config(folder, {"algorithm.kl_coef": 0.1, "model.path": str(folder / "copy")}))


def test_a_run_with_a_reference_model_goes_on_with_the_weights_that_it_began_from(folder: Path) -> None:
    config = train_config(folder, {"algorithm.kl_coef": 0.1})
    begin(config)
    (folder / "model" / "model.safetensors").write_bytes(b"2222")
    assert f"other weights than {folder / 'model'} has now (model.path: model.safetensors)" in refusal(config)
    check(train_config(folder, {"algorithm.kl_coef": 0.1, "checkpoint.accept_changes": ["model.path"]}))


def test_without_a_reference_model_the_weights_of_the_beginning_are_not_looked_at_and_not_forgotten(folder: Path) -> None:
    begin(train_config(folder))
    (folder / "model" / "model.safetensors").write_bytes(b"2222")
    check(train_config(folder))
    record_work(folder / "run", train_config(folder), rows_of(train_config(folder)))
    later = {"algorithm.kl_coef": 0.1, "checkpoint.accept_changes": ["algorithm.kl_coef"]}
    assert "other weights than" in refusal(train_config(folder, later))  # the reference would not be what the run began from


@pytest.mark.parametrize("name", ["reward.py", "neighbour.py"])
def test_another_reward_under_the_same_name_is_refused(folder: Path, name: str) -> None:
    values = {"grading.function": f"{folder / 'reward.py'}:reward"}
    begin(train_config(folder, values))
    (folder / name).write_text((folder / name).read_text() + "# another\n")
    assert f"grading.function: {(folder / name).as_posix()}" in refusal(train_config(folder, values))
    check(train_config(folder, values | {"checkpoint.accept_changes": ["grading.function"]}))


def test_other_shots_are_refused(folder: Path) -> None:
    values = {"data.template": "few_shot", "data.shots_path": str(folder / "shots.txt")}
    begin(train_config(folder, values))
    shutil.copyfile(folder / "shots.txt", folder / "renamed.txt")
    check(train_config(folder, values | {"data.shots_path": str(folder / "renamed.txt")}))
    (folder / "shots.txt").write_text("2+2=4\n{question}=")
    assert "data.shots_path" in refusal(train_config(folder, values))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"corpus.seed": 1}, "corpus.seed 0, which is now 1"),
        ({"corpus.documents_per_step": 8}, "corpus.documents_per_step 64, which is now 8"),
        ({"corpus.long_documents": "split"}, "corpus.long_documents 'drop', which is now 'split'"),
        ({"corpus.steps": 9, "corpus.evaluation_every": 2, "optimizer.lr": 1e-4, "parallel.num_ranks": 2}, None),
    ],
)
def test_pre_training_likewise(folder: Path, values: dict[str, Any], named: str | None) -> None:
    begin(pretrain_config(folder))
    if named is None:
        check(pretrain_config(folder, values))
    else:
        assert named in refusal(pretrain_config(folder, values))


def test_another_corpus_of_the_same_number_is_refused(folder: Path) -> None:
    begin(pretrain_config(folder))
    path = folder / "corpus.jsonl"
    path.rename(folder / "renamed.jsonl")
    check(pretrain_config(folder, {"corpus.sources": [{"path": str(folder / "renamed.jsonl")}]}))
    path.write_text((folder / "renamed.jsonl").read_text().replace("1+1=2", "1+2=3"))
    assert "other rows of corpus.sources.0" in refusal(pretrain_config(folder))


# ------------------------------------------------------------------------------------------------------------- records of the folder


def test_earlier_configurations_are_kept(folder: Path) -> None:
    configs = [train_config(folder, {"optimizer.lr": lr}) for lr in (1e-6, 1e-5, 1e-5, 1e-4)]
    for config in configs:
        record_work(folder / "run", config, rows_of(config))
    found = {path.name: path.read_text() for path in (folder / "run").glob("config*.yaml")}
    assert found == {
        "config.1.yaml": dump_config(configs[0]),
        "config.2.yaml": dump_config(configs[1]),
        "config.yaml": dump_config(configs[3]),
    }


def test_a_run_of_an_earlier_version_goes_on_and_says_so(folder: Path) -> None:
    begin(train_config(folder))
    (folder / "run" / INPUTS_FILE).unlink()
    check(train_config(folder))
    (line,) = record_work(folder / "run", train_config(folder), rows_of(train_config(folder)))
    assert "has no inputs.json, by an earlier version" in line
    assert record_work(folder / "run", train_config(folder), rows_of(train_config(folder))) == []
    (folder / "run" / "config.yaml").unlink()
    check(train_config(folder, {"rollout.temperature": 0.6}))


def with_removed_field(folder: Path, value: str) -> None:
    """As a version wrote it that had `precision.fp8.param`."""
    path = folder / "run" / "config.yaml"
    text = path.read_text()
    assert "fp8: {recipe" in text
    path.write_text(text.replace("fp8: {recipe", f"fp8: {{param: {value}, recipe"))


def test_a_run_goes_on_whose_record_has_a_field_that_is_gone(folder: Path) -> None:
    begin(train_config(folder))
    with_removed_field(folder, "false")
    check(train_config(folder))
    assert record_work(folder / "run", train_config(folder), rows_of(train_config(folder))) == []
    assert "param:" not in (folder / "run" / "config.yaml").read_text()


def test_a_run_that_used_what_is_gone_is_refused_by_name(folder: Path) -> None:
    begin(train_config(folder))
    with_removed_field(folder, "true")
    found = refusal(train_config(folder))
    assert "'precision.fp8.param' is gone, every run has False" in found
    assert "versions.json" in found


def test_the_record_survives_json(folder: Path) -> None:
    config = train_config(folder, {"grading.function": f"{folder / 'reward.py'}:reward"})
    inputs = read_inputs(config, rows_of(config))
    assert [len(inputs.settings) > 2, len(inputs.weights), len(inputs.rewards), len(inputs.rows)] == [True, 1, 2, 1]
    save_inputs(folder, inputs)
    assert load_inputs(folder) == inputs
    (folder / INPUTS_FILE).write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        load_inputs(folder)


def stream(seed: int = 0, weights: tuple[float, float] = (1.0, 2.0), digests: tuple[str, ...] = ("a", "b")) -> SeededStream[int]:
    return SeededStream([([1, 2, 3], weights[0]), ([4, 5], weights[1])], seed, digests)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (stream(seed=1), "by seed 0 and now it is 1"),
        (stream(weights=(2.0, 1.0)), r"weight \[1.0, 2.0\] and now they have \[2.0, 1.0\]"),
        (stream(digests=("a", "c")), r"source 1 \(from 0\) has other rows, though as many"),
    ],
)
def test_a_checkpoint_goes_on_in_its_own_order_only(folder: Path, other: SeededStream[int], named: str) -> None:
    drawn = stream()
    drawn.draw(4)
    state = json.loads(json.dumps(drawn.to_state()))
    with pytest.raises(DataError, match=named):
        go_on(other, state, train_config(folder))
    remark = go_on(other, state, train_config(folder, {"checkpoint.accept_changes": ["data.train"]}))
    assert remark is not None
    assert "the order begins anew" in remark
    assert other.cursor.drawn == 0
    again = stream()
    assert go_on(again, state, train_config(folder)) is None
    assert again.draw(6) == drawn.draw(6)


def test_a_cursor_of_an_earlier_version_goes_on_and_says_so(folder: Path) -> None:
    again = stream(seed=7)
    remark = go_on(again, {"drawn": 4, "taken": [3, 1], "sizes": [3, 2]}, train_config(folder))
    assert remark is not None
    assert "by an earlier version" in remark
    assert again.cursor.drawn == 4


# ---------------------------------------------------------------------------------------------------------- evaluations and analyses


def evaluate_config(folder: Path, values: dict[str, Any] | None = None) -> EvaluateConfig:
    tree: dict[str, Any] = {
        "model": {"path": str(folder / "model")},
        "evaluation": {"sets": [{"path": str(folder / "questions.jsonl")}]},
        "logging": {"folder": str(folder / "run")},
    }
    return make_config(EvaluateConfig, set_in(tree, values or {}))


def analyse_config(folder: Path, values: dict[str, Any] | None = None) -> AnalyseConfig:
    tree: dict[str, Any] = {
        "model": {"path": str(folder / "model")},
        "analysis": {"questions": {"path": str(folder / "questions.jsonl")}},
        "logging": {"folder": str(folder / "run")},
    }
    return make_config(AnalyseConfig, set_in(tree, values or {}))


@pytest.mark.parametrize("make", [evaluate_config, analyse_config])
def test_responses_of_two_models_are_not_mixed(folder: Path, make: Any) -> None:
    config = make(folder, {"grading.function": f"{folder / 'reward.py'}:reward"})
    record_work(config.folder, config)
    check_same(config)
    shutil.copytree(folder / "model", folder / "copy")
    check_same(make(folder, {"grading.function": f"{folder / 'reward.py'}:reward", "model.path": str(folder / "copy")}))
    (folder / "model" / "model.safetensors").write_bytes(b"2222")
    with pytest.raises(
        ConfigError, match=r"holds responses with other weights than .*model has now .*choose another logging.folder, or delete"
    ):
        check_same(config)
    (folder / "model" / "model.safetensors").write_bytes(b"1111")
    check_same(config)
    (folder / "neighbour.py").write_text("value = 2.0\n")
    with pytest.raises(ConfigError, match=r"grading.function: .*neighbour.py"):
        check_same(config)


def test_without_a_record_a_model_is_known_by_its_path(folder: Path) -> None:
    config = evaluate_config(folder)
    record_work(config.folder, config)
    (config.folder / INPUTS_FILE).unlink()
    check_same(config)
    with pytest.raises(ConfigError, match=r"model.path .* which is now"):
        check_same(evaluate_config(folder, {"model.path": str(folder / "copy")}))


def test_settings_are_compared_field_by_field(folder: Path) -> None:
    """Whatever is changed in a configuration is either allowed or named, never overlooked."""
    was = train_config(folder)
    for name, value in (OTHER | STEERING).items():
        now = train_config(folder, {name: value})
        found = changed_settings(was, now, changes.MAY_CHANGE_IN_RUNS)
        assert [item.field for item in found] == ([] if changes.is_among(name, changes.MAY_CHANGE_IN_RUNS) else [name])
        assert describe_changes(was, now) is not None
    assert describe_changes(was, dataclasses.replace(was)) is None
    assert to_tree(was) == to_tree(train_config(folder))
    assert str(Difference("a", "b")) == "b"
