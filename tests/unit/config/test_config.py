"""Configurations: what is read, what is refused and with which words."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1z.config import (
    AlgorithmConfig,
    AnalyseConfig,
    EvaluateConfig,
    OptimizerConfig,
    ParallelConfig,
    PretrainConfig,
    QuestionSource,
    RolloutConfig,
    TrainConfig,
    dump_config,
    load_config,
    make_config,
    to_tree,
)
from megatron_r1z.config.yaml_tree import read_tree
from megatron_r1z.errors import ConfigError
from megatron_r1z.layout.topology import Topology

CONFIGS = Path(__file__).parents[3] / "configs"

TRAIN: dict[str, Any] = {
    "model": {"path": "model"},
    "data": {"train": [{"path": "questions.jsonl"}]},
    "algorithm": {"iterations": 3},
    "logging": {"folder": "runs/x"},
}
PRETRAIN: dict[str, Any] = {
    "model": {"path": "model", "random_init": True},
    "corpus": {"sources": [{"path": "corpus.jsonl"}], "steps": 10},
    "logging": {"folder": "runs/x"},
}


def write(folder: Path, tree: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree), encoding="utf-8")
    return path


def train(folder: Path, *overrides: str) -> TrainConfig:
    """The smallest training configuration with overrides."""
    return load_config(TrainConfig, write(folder, TRAIN), overrides)


# ------------------------------------------------------------------------------------------------------------------------- reading


def test_a_minimal_file_gets_the_defaults(tmp_path: Path) -> None:
    config = train(tmp_path)
    assert config.rollout == RolloutConfig()
    assert config.data.train == (QuestionSource(path="questions.jsonl"),)
    assert config.max_model_tokens == 1024 + 3000


@pytest.mark.parametrize(("kind", "tree"), [(TrainConfig, TRAIN), (PretrainConfig, PRETRAIN)])
def test_a_dump_reads_back_as_the_same_configuration(kind: Any, tree: dict[str, Any], tmp_path: Path) -> None:
    config = load_config(kind, write(tmp_path, tree), ["parallel.num_ranks=2", "optimizer.lr=3e-7", "logging.folder='10: #x'"])
    text = dump_config(config)
    assert load_config(kind, write(tmp_path, text)) == config
    assert make_config(kind, to_tree(config)) == config


def test_a_dump_notes_what_differs_from_the_defaults(tmp_path: Path) -> None:
    lines = dump_config(train(tmp_path, "rollout.seed=7", "algorithm.name=grpo")).splitlines()
    assert "  seed: 7  # default: 0" in lines
    assert "  name: grpo  # default: drgrpo" in lines
    noted = [line for line in lines if "# default" in line and not line.startswith("  train:")]
    assert noted == ["  name: grpo  # default: drgrpo", "  seed: 7  # default: 0"]


@given(
    lr=st.floats(min_value=1e-12, max_value=1.0),
    betas=st.tuples(st.floats(0.0, 0.999), st.floats(0.0, 0.999)),
    stop=st.none() | st.lists(st.text(st.characters(codec="utf-8"), min_size=1), max_size=3),
    path=st.text(st.characters(codec="utf-8"), min_size=1),
)
def test_any_values_survive_the_round_trip(lr: float, betas: tuple[float, float], stop: list[str] | None, path: str) -> None:
    config = make_config(
        TrainConfig, TRAIN | {"optimizer": {"lr": lr, "betas": list(betas)}, "rollout": {"stop": stop}, "model": {"path": path}}
    )
    assert make_config(TrainConfig, yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_of_the_repository_are_accepted(path: Path) -> None:
    sections = read_tree(path).values
    kinds = {"corpus": PretrainConfig, "algorithm": TrainConfig, "analysis": AnalyseConfig}
    kind: Any = next((kind for section, kind in kinds.items() if section in sections), EvaluateConfig)
    config = load_config(kind, path)
    assert make_config(kind, yaml.safe_load(dump_config(config))) == config


def test_the_topology_is_that_of_the_layouts(tmp_path: Path) -> None:
    config = train(tmp_path, "parallel.num_ranks=8", "parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2")
    assert config.parallel.topology == Topology(8, tp=2, pp=2)
    context = train(tmp_path, "parallel.num_ranks=8", "parallel.tensor_parallel_size=2", "parallel.context_parallel_size=2")
    assert context.parallel.topology == Topology(8, tp=2, cp=2)
    uneven = dataclasses.replace(config.parallel, virtual_pipeline_size=2, pipeline_layers=(1, 2, 2, 1))
    assert uneven.topology == Topology(8, tp=2, pp=2, vpp=2, chunk_layers=(1, 2, 2, 1))


def test_records_are_frozen(tmp_path: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        train(tmp_path).model.path = "other"  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------------------------- YAML 1.1 traps


@pytest.mark.parametrize("value", ["1e-6", "1.0e-6", "0.000001", "1E-6"])
def test_a_number_without_a_point_is_a_number(value: str, tmp_path: Path) -> None:
    assert train(tmp_path, f"optimizer.lr={value}").optimizer.lr == 1e-6
    assert load_config(TrainConfig, write(tmp_path, yaml.safe_dump(TRAIN) + f"optimizer:\n  lr: {value}\n")).optimizer.lr == 1e-6


def test_a_bare_no_is_the_template_of_that_name(tmp_path: Path) -> None:
    assert train(tmp_path, "data.template=no").data.template == "no"
    assert load_config(TrainConfig, write(tmp_path, dump_config(train(tmp_path, "data.template=no")))).data.template == "no"


def test_whole_numbers_become_floats_but_not_the_reverse(tmp_path: Path) -> None:
    temperature = train(tmp_path, "rollout.temperature=1").rollout.temperature
    assert (temperature, type(temperature)) == (1.0, float)
    with pytest.raises(ConfigError, match=r"^rollout.seed must be of type int, not 1.0\.$"):
        train(tmp_path, "rollout.seed=1.0")


# ------------------------------------------------------------------------------------------------------------------------ overrides


def test_overrides_set_values_lists_entries_of_lists_and_nothing(tmp_path: Path) -> None:
    config = train(
        tmp_path,
        "rollout.stop=['</answer>', 'a=b']",
        "optimizer.betas=[0.8, 0.99]",
        "data.train.0.weight=2",
        "checkpoint.resume=false",
        "evaluation.sets=[{path: a.jsonl, limit: 5}]",
        "evaluation.sets.0.limit=null",
        "logging.folder=runs/a=b",
    )
    assert config.rollout.stop == ("</answer>", "a=b")
    assert config.optimizer.betas == (0.8, 0.99)
    assert config.data.train[0].weight == 2.0
    assert config.checkpoint.resume is False
    assert config.evaluation.sets == (QuestionSource(path="a.jsonl"),)
    assert config.logging.folder == "runs/a=b"


def test_the_last_override_of_a_field_holds(tmp_path: Path) -> None:
    assert train(tmp_path, "rollout.seed=1", "rollout.seed=2").rollout.seed == 2


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("rollout.seed", "'rollout.seed' is not an override; write section.field=value."),
        ("=3", "'=3' is not an override; write section.field=value."),
        ("rollout.sead=1", "unknown key 'rollout.sead'; did you mean 'rollout.seed'?"),
        ("rolout.seed=1", "unknown key 'rolout'; did you mean 'rollout'?"),
        ("model.path.x=1", "override model.path.x: 'path' is a value, not a section."),
        ("data.train.1.weight=1", "override data.train.1.weight: '1' is not the number of one of 1 entries (from 0)."),
        ("data.train.x=1", "override data.train.x: 'x' is not the number of one of 1 entries (from 0)."),
    ],
)
def test_a_wrong_override_is_explained(override: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        train(tmp_path, override)
    assert str(caught.value) == sentence


# ------------------------------------------------------------------------------------------------------------------------- mappings


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.train.0.where={level: [3, 4.5], subject: Algebra, hard: true}"],
        ["data.train.0.where={subject: [Algebra]}", "data.train.0.where.level=[3, 4.5]", "data.train.0.where.hard=true"],
    ],
)
def test_a_mapping_takes_values_and_lists_of_them(overrides: list[str], tmp_path: Path) -> None:
    config = train(tmp_path, *overrides)
    assert config.data.train[0].where == {"level": (3, 4.5), "subject": ("Algebra",), "hard": (True,)}
    assert to_tree(config)["data"]["train"][0]["where"] == {"level": [3, 4.5], "subject": ["Algebra"], "hard": [True]}
    assert load_config(TrainConfig, write(tmp_path, dump_config(config))) == config


WORDS = st.text("ab1 :-{}[],#'\"\n\u00e9") | st.sampled_from(["no", "1e3", "null", "~"])


@given(st.dictionaries(WORDS, st.lists(st.integers() | st.booleans() | st.floats(allow_nan=False) | WORDS, min_size=1), max_size=3))
def test_any_mapping_survives_the_round_trip(where: dict[str, list[Any]]) -> None:
    config = make_config(TrainConfig, TRAIN | {"data": {"train": [{"path": "questions.jsonl", "where": where}]}})
    again = make_config(TrainConfig, yaml.safe_load(dump_config(config)))
    assert again == config
    assert repr(again) == repr(config)  # true is 1 to ==


def test_what_messages_call_a_source() -> None:
    assert QuestionSource(path="a/b.jsonl").label == "a/b.jsonl"
    assert QuestionSource(dataset="openai/gsm8k", split="test").label == "openai/gsm8k (test)"
    assert QuestionSource(dataset="openai/gsm8k", subset="main").label == "openai/gsm8k (main, train)"


def test_two_splits_of_a_dataset_are_two_sets(tmp_path: Path) -> None:
    sets = "evaluation.sets=[{dataset: openai/gsm8k, split: test}, {dataset: openai/gsm8k}]"
    assert [source.split for source in train(tmp_path, sets).evaluation.sets] == ["test", "train"]


# -------------------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["rollout.samples_per_promt=4"], "unknown key 'rollout.samples_per_promt'; did you mean 'rollout.samples_per_prompt'?"),
        (["data.train.0.problem_colum=x"], "unknown key 'data.train.0.problem_colum'; did you mean 'data.train.0.problem_column'?"),
        (["model={}"], "'model.path' is missing; it has no default."),
        (["model=3"], "model must be a section of fields, not 3."),
        (["model.path=3"], "model.path must be of type str, not 3."),
        (["rollout.seed=true"], "rollout.seed must be of type int, not True."),
        (["rollout.temperature=warm"], "rollout.temperature must be of type float, not 'warm'."),
        (["checkpoint.resume=1"], "checkpoint.resume must be of type bool, not 1."),
        (["data.train={}"], "data.train must be a list, not {}."),
        (["optimizer.betas=[0.9]"], "optimizer.betas needs 2 entries, not 1."),
        (
            ["algorithm.name=dapo"],
            "algorithm.name is 'dapo'; it must be one of drgrpo, grpo, grpo_remove_std_bias, grpo_remove_len_bias, rloo, token_mean, "
            "reinforce, ppo.",
        ),
        (["precision.policy=fp16"], "precision.policy is 'fp16'; it must be one of fp32, bf16, fp8."),
        (["precision.fp8.recipe=block"], "precision.fp8.recipe is 'block'; it must be one of blockwise, mxfp8, tensorwise, delayed."),
        (
            ["precision.fp8.last_layers_bf16=-1"],
            "precision.fp8 leaves 0 layers at the beginning and -1 at the end in bf16; both must be at least 0.",
        ),
        (
            ["precision.fp8.recipe=delayed", "precision.fp8.first_layers_bf16=1"],
            "precision.fp8: with recipe delayed all layers share one FP8 context; set first_layers_bf16 and last_layers_bf16 to 0.",
        ),
        (
            ["parallel.num_ranks=6", "parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"],
            "parallel: 6 ranks cannot be split into tensor_parallel_size 2 x pipeline_parallel_size 2 x context_parallel_size 1; "
            "make num_ranks a multiple of 4.",
        ),
        (
            ["parallel.num_ranks=6", "parallel.tensor_parallel_size=2", "parallel.context_parallel_size=2"],
            "parallel: 6 ranks cannot be split into tensor_parallel_size 2 x pipeline_parallel_size 1 x context_parallel_size 2; "
            "make num_ranks a multiple of 4.",
        ),
        (["parallel.context_parallel_size=0"], "parallel.context_parallel_size is 0; it must be above 0."),
        (["parallel.virtual_pipeline_size=2"], "parallel: virtual_pipeline_size > 1 needs pipeline_parallel_size > 1."),
        (
            [
                "parallel.num_ranks=2",
                "parallel.pipeline_parallel_size=2",
                "parallel.virtual_pipeline_size=2",
                "parallel.pipeline_layers=[3, 5]",
            ],
            "parallel.pipeline_layers is [3, 5]; it must give each of the 4 model chunks "
            "(pipeline_parallel_size 2 x virtual_pipeline_size 2) at least one layer.",
        ),
        (
            ["parallel.num_ranks=2", "parallel.pipeline_parallel_size=2", "parallel.pipeline_layers=[8, 0]"],
            "parallel.pipeline_layers is [8, 0]; it must give each of the 2 model chunks "
            "(pipeline_parallel_size 2 x virtual_pipeline_size 1) at least one layer.",
        ),
        (["parallel.recompute=all"], "parallel.recompute is 'all'; it must be one of none, selective, full."),
        (["optimizer.max_skipped_steps=0"], "optimizer.max_skipped_steps is 0; it must be above 0."),
        (
            ["optimizer.offload_to_host=true"],
            "optimizer.offload_to_host is a part of Megatron's distributed optimizer; set optimizer.distributed=true too.",
        ),
        (["parallel.offload_layers=-1"], "parallel.offload_layers is -1; it must be at least 0."),
        (
            ["parallel.offload_layers=2", "parallel.recompute=full"],
            "parallel.offload_layers is 2, which Megatron takes with pipeline_parallel_size 1 and recompute none; they are 1 and full.",
        ),
        (["parallel.sequence_parallel=true"], "parallel: sequence_parallel needs tensor_parallel_size > 1."),
        (["parallel.num_ranks=0"], "parallel.num_ranks is 0; it must be above 0."),
        (["data.train.0.weight=0"], "data: weight of questions.jsonl is 0.0; it must be above 0."),
        (["data.train=[]"], "data.train is empty; give at least one question file."),
        (
            ["data.train=[{weight: 2}]"],
            "data: a source has neither path nor dataset; give it a file, or a dataset of the Hugging Face Hub.",
        ),
        (
            ["data.train.0.dataset=openai/gsm8k"],
            "data: a source has path questions.jsonl and dataset openai/gsm8k; set one of them to null.",
        ),
        (
            ["data.train.0.split=test"],
            "data: questions.jsonl is a file, and subset and split are parts of a dataset; choose rows of a file by where.",
        ),
        (
            ["data.train.0.limit=0"],
            "data: questions.jsonl has offset 0 and limit 0; use at least 0 and at least 1.",
        ),
        (
            ["data.train.0.answer_after=''"],
            "data: answer_after of questions.jsonl is empty; write the text behind which the answer stands, or null.",
        ),
        (
            ["data.train.0.where={level: []}"],
            "data: where of questions.jsonl allows no value of 'level'; list at least one.",
        ),
        (
            ["data.train.0.where=[level, 3]"],
            "data.train.0.where must be a mapping from names to values, such as {name: [a, b]}, not ['level', 3].",
        ),
        (
            ["data.train.0.where={3: level}"],
            "data.train.0.where must be a mapping from names to values, such as {name: [a, b]}, not {3: 'level'}.",
        ),
        (
            ["data.train.0.where={level: [3, null]}"],
            "data.train.0.where.level.1 must be of type str or int or float or bool, not None.",
        ),
        (
            ["evaluation.sets=[{dataset: openai/gsm8k}, {dataset: openai/gsm8k, limit: 3}]"],
            "evaluation.sets names openai/gsm8k (train) twice; its figures would collide, so give each part a name of its own, "
            "such as name: level-1.",
        ),
        (["data.template=few_shot"], "data: template few_shot and shots_path go together; set both or neither."),
        (["data.shots_path=shots.txt"], "data: template few_shot and shots_path go together; set both or neither."),
        (["data.max_prompt_tokens=-1"], "data.max_prompt_tokens is -1; it must be above 0."),
        (
            ["rollout.temperature=0"],
            "rollout.temperature is 0.0; training needs a distribution, so it must be above 0 "
            "(evaluation has its own temperature, which may be 0).",
        ),
        (["rollout.top_p=1.5"], "rollout.top_p is 1.5; it must be above 0 and at most 1."),
        (["rollout.top_p=0"], "rollout.top_p is 0.0; it must be above 0 and at most 1."),
        (["rollout.samples_per_prompt=0"], "rollout.samples_per_prompt is 0; it must be above 0."),
        (["grading.timeout_s=0"], "grading.timeout_s is 0.0; it must be above 0."),
        (["algorithm.iterations=0"], "algorithm.iterations is 0; it must be above 0."),
        (["algorithm.clip_low=1"], "algorithm: clip_low 1.0 must be in (0, 1) and clip_high 0.2 above 0."),
        (["algorithm.clip_high=0"], "algorithm: clip_low 0.2 must be in (0, 1) and clip_high 0.0 above 0."),
        (
            ["algorithm.dual_clip=1"],
            "algorithm.dual_clip is 1.0; it bounds the ratio from above and must be greater than 1.",
        ),
        (
            ["algorithm.name=reinforce", "algorithm.dual_clip=3"],
            "algorithm: reinforce has no ratio, so there is nothing for dual_clip to clip; leave it out.",
        ),
        (["algorithm.sampling_rounds=0"], "algorithm.sampling_rounds is 0; it must be above 0."),
        (["algorithm.tis_cap=0"], "algorithm.tis_cap is 0.0; it must be above 0."),
        (["algorithm.gae_lambda=1.5"], "algorithm.gae_lambda is 1.5; it must be between 0 and 1."),
        (["algorithm.value_clip=0"], "algorithm.value_clip is 0.0; it must be above 0."),
        (["optimizer.critic_lr=0"], "optimizer.critic_lr is 0.0; it must be above 0."),
        (
            ["algorithm.name=ppo", "algorithm.filter_groups=true"],
            "algorithm: under ppo every response has advantages and the critic learns from each, so mask_truncated, filter_groups and "
            "sampling_rounds have no meaning; leave them out.",
        ),
        (["algorithm.kl_coef=-0.1"], "algorithm.kl_coef is -0.1; it must be at least 0."),
        (["algorithm.entropy_coef=-1"], "algorithm.entropy_coef is -1.0; it must be at least 0."),
        (["algorithm.kl_estimator=k4"], "algorithm.kl_estimator is 'k4'; it must be one of k1, k2, k3."),
        (
            ["algorithm.kl_coef=0.1", "algorithm.kl_in=reward", "algorithm.filter_groups=true"],
            "algorithm: with kl_in reward and kl_coef 0.1 no group has equal rewards, so filter_groups has none to filter; leave it out, "
            "or set kl_in=loss.",
        ),
        (["optimizer.lr=0"], "optimizer.lr is 0.0; it must be above 0."),
        (["optimizer.schedule=cosine"], "optimizer: schedule cosine needs decay_steps."),
        (
            ["optimizer.schedule=linear", "optimizer.decay_steps=0"],
            "optimizer: schedule linear decays from the end of the warm-up, after 0 steps, to decay_steps, which is 0; "
            "set it to at least 1.",
        ),
        (
            ["optimizer.schedule=cosine", "optimizer.decay_steps=20", "optimizer.warmup_steps=20"],
            "optimizer: schedule cosine decays from the end of the warm-up, after 20 steps, to decay_steps, which is 20; "
            "set it to at least 21.",
        ),
        (
            ["rollout.temperature=0.005"],
            "rollout has temperature 0.005, which vLLM would raise to 0.01 on its own; use at least that.",
        ),
        (
            ["evaluation.temperature=0.009"],
            "evaluation has temperature 0.009, which vLLM would raise to 0.01 on its own; use at least that.",
        ),
        (["checkpoint.every=0"], "checkpoint.every is 0; it must be above 0."),
        (["evaluation.samples=0"], "evaluation.samples is 0; it must be above 0."),
        (
            ["parallel.num_ranks=4", "rollout.tensor_parallel_size=3"],
            "rollout.tensor_parallel_size 3 does not divide the 4 ranks; engines are made of consecutive ranks.",
        ),
        (
            ["rollout.prompts_per_iteration=10", "rollout.samples_per_prompt=6", "algorithm.train_batch_size=32"],
            "algorithm.train_batch_size 32 does not divide the 60 samples of an iteration (10 prompts x 6); "
            "the largest that does below it is 30.",
        ),
        (
            ["rollout.samples_per_prompt=1"],
            "an advantage compares the samples of a prompt; rollout.samples_per_prompt is 1 and must be at least 2.",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused_with_its_numbers(overrides: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        train(tmp_path, *overrides)
    assert str(caught.value) == sentence


def test_a_corpus_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^corpus.steps is 0; it must be above 0\.$"):
        load_config(PretrainConfig, write(tmp_path, PRETRAIN), ["corpus.steps=0"])


ANALYSIS = {"model": {"path": "m"}, "logging": {"folder": "runs/x"}, "analysis": {"questions": {"path": "q.jsonl"}}}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"templates": []}, "analysis.templates is empty; give at least one."),
        ({"temperatures": [1.0, 0.5, 1.0]}, "analysis.temperatures names 1.0 twice; remove one."),
        ({"temperatures": [1.0, 0.001]}, "analysis has temperature 0.001, which vLLM would raise to 0.01 on its own; use at least that."),
        ({"samples": 4, "k": [1, 8]}, "analysis.k is [1, 8]; each must be at least 1 and at most analysis.samples, which is 4."),
        ({"keywords": ["recheck", ""]}, "analysis.keywords has an empty one, which every response contains; remove it."),
        ({"templates": ["few_shot"]}, "analysis: template few_shot and shots_path go together; give both or neither."),
        ({"shots_path": "shots.txt"}, "analysis: template few_shot and shots_path go together; give both or neither."),
        ({"temperatures": [0.0, 1.0]}, "analysis.samples is 8 at temperature 0, where all responses to a question are the same"),
        ({"temperatures": [0.5, -1.0]}, "analysis has temperature -1.0; it must be at least 0."),
        ({"top_p": 0}, "analysis.top_p is 0.0; it must be above 0 and at most 1."),
        ({"judge": {"url": "localhost:8000"}}, "analysis.judge.url is localhost:8000; it must start with http:// or https://"),
        ({"judge": {"concurrency": 0}}, "concurrency is 0; it must be above 0."),
    ],
)
def test_an_analysis_that_cannot_be_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(AnalyseConfig, ANALYSIS | {"analysis": ANALYSIS["analysis"] | fields})
    assert sentence in str(caught.value)


def test_an_analysis_asks_like_an_evaluation() -> None:
    """Each template at each temperature, the shots under `few_shot` alone."""
    more = {"templates": ["no", "few_shot"], "shots_path": "shots.txt", "system_prompt": "Be brief.", "top_p": 0.9, "samples": 3}
    config = make_config(AnalyseConfig, ANALYSIS | {"analysis": ANALYSIS["analysis"] | more})
    plain, shown = (config.evaluation(template, 0.4) for template in config.analysis.templates)
    assert (plain.data.template, plain.data.shots_path, plain.data.system_prompt) == ("no", None, "Be brief.")
    assert (shown.data.template, shown.data.shots_path) == ("few_shot", "shots.txt")
    assert (shown.evaluation.samples, shown.evaluation.temperature, shown.evaluation.top_p) == (3, 0.4, 0.9)
    assert [source.path for source in shown.evaluation.sets] == ["q.jsonl"]


def test_the_paper_s_analysis_is_the_default() -> None:
    """Section 2 of arXiv 2503.20783: three templates, temperatures 0.1 to 1.0, eight responses."""
    analysis = make_config(AnalyseConfig, ANALYSIS).analysis
    assert (analysis.templates, analysis.samples) == (("no", "r1", "qwen_math"), 8)
    assert analysis.temperatures == tuple(tenth / 10 for tenth in range(1, 11))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- a\n- b\n", "must hold sections such as 'model:' and 'data:'."),
        ("", "must hold sections such as 'model:' and 'data:'."),
        ("model: [\n", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(text: str, sentence: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, path)
    assert str(path) in str(caught.value)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^cannot read the configuration .*none\.yaml: No such file or directory\.$"):
        load_config(TrainConfig, tmp_path / "none.yaml")


# ------------------------------------------------------------------------------------------------------------------- derived numbers


def test_derived_numbers() -> None:
    assert ParallelConfig(num_ranks=8, tensor_parallel_size=2, pipeline_parallel_size=4).model_parallel_size == 8
    assert RolloutConfig(prompts_per_iteration=3, samples_per_prompt=5).samples_per_iteration == 15


def test_the_paper_s_numbers_are_the_defaults() -> None:
    """The recipe of arXiv 2503.20783: 128 questions x 8 samples, budget 3000, temperature 1, batch 128, learning rate 1e-6 throughout."""
    rollout, algorithm, optimizer = RolloutConfig(), AlgorithmConfig(iterations=1), OptimizerConfig()
    assert (rollout.prompts_per_iteration, rollout.samples_per_prompt, rollout.max_response_tokens) == (128, 8, 3000)
    assert (rollout.temperature, algorithm.name, algorithm.train_batch_size) == (1.0, "drgrpo", 128)
    assert (optimizer.lr, optimizer.schedule) == (1e-6, "constant")
