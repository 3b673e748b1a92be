"""The configurations for GPUs: each can be started and fits the cluster that it names, none repeats another, and the page shows them."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from megatron_r1z.config import TrainConfig, load_config
from megatron_r1z.cost.checks import check_shape
from megatron_r1z.errors import ConfigError
from megatron_r1z.layout.known import find_shape

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
PAPER = ("oat-zero-7b", "oat-zero-1.5b", "oat-zero-3b-llama", "grpo-vs-drgrpo-1.5b", "template-x-questions-1.5b")
MODELS = ("qwen2.5-7b", "qwen2.5-32b", "qwen2.5-72b", "qwen3-8b", "qwen3-32b", "llama3.1-8b", "llama3.1-70b")
GPUS = ("h100", "h200", "b200")
BF16 = tuple(f"{model}-{gpu}" for model in MODELS for gpu in GPUS)
FP8 = tuple(f"{model}-{gpu}-fp8" for model in MODELS for gpu in GPUS if model != "qwen2.5-72b")  # 29568 / 8 is no multiple of 128
OURS = (*BF16, *FP8)


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plan_docs", ROOT / "tools" / "plan_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool()


def header(name: str) -> list[str]:
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("#").strip() for line in lines if line.startswith("#")]


def test_these_are_all_configurations_for_gpus(tool: ModuleType) -> None:
    assert {path.stem for path in tool.gpu_configs()} == {*PAPER, *OURS}


@pytest.mark.parametrize("name", [*PAPER, *OURS])
def test_a_configuration_fits_the_cluster_that_its_header_names(name: str, tool: ModuleType) -> None:
    cost = tool.planned(CONFIGS / f"{name}.yaml").cost
    check_shape(cost.config, find_shape(cost.config.model.path).shape, cost.cluster)
    assert cost.shortfall() is None
    assert cost.cluster is not None
    assert cost.config.parallel.num_ranks == cost.cluster.num_gpus
    assert cost.config.logging.folder.startswith("runs/")
    text = " ".join(header(name))
    assert "docs/configs.md. Not run." in text
    assert "Numbers: " in text


@pytest.mark.parametrize("name", [*PAPER, *OURS])
def test_the_commands_in_a_header_are_accepted(name: str) -> None:
    """With their overrides; shell variables stand for values that are listed above them."""
    found = [line for line in header(name) if "megatron_r1z train " in line or re.match("megatron-r1z (train|launch|sweep) ", line)]
    assert found
    for line in found:
        arguments = shlex.split(re.split(r" train | launch | sweep | {2,}#", line)[1].rstrip("\\ "))
        overrides = [item for item in arguments[1:] if "=" in item and "$" not in item and "=[" not in item]
        config = load_config(TrainConfig, ROOT / arguments[0], overrides)
        assert arguments[0] == f"configs/{name}.yaml"
        assert config.algorithm.iterations > 0


def test_no_two_runs_share_a_folder() -> None:
    folders = [load_config(TrainConfig, CONFIGS / f"{name}.yaml").logging.folder for name in (*PAPER, *OURS)]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("name", OURS)
def test_a_file_of_ours_says_only_what_differs(name: str) -> None:
    tree = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    says = {"model": ["path"]} if name in BF16 else {"precision": ["policy", "engine"]}
    if name.endswith("-h100-fp8") and "70b" not in name:
        says |= {"rollout": ["kv_cache_bytes"]}
    assert {section: list(fields) for section, fields in tree.items() if section != "base"} == says | {"logging": ["folder"]}


@pytest.mark.parametrize("name", FP8)
def test_fp8_is_smaller_and_faster_than_bf16(name: str, tool: ModuleType) -> None:
    fp8, bf16 = (tool.planned(CONFIGS / f"{item}.yaml").cost for item in (name, name.removesuffix("-fp8")))
    assert fp8.time.total < bf16.time.total
    assert fp8.engine.weights < 0.65 * bf16.engine.weights


def test_the_72b_model_cannot_be_computed_in_blocks() -> None:
    config = load_config(TrainConfig, CONFIGS / "qwen2.5-72b-h100.yaml", ["precision.policy=fp8"])
    with pytest.raises(ConfigError, match="linear_fc1 has 3696 rows"):
        check_shape(config, find_shape(config.model.path).shape)


@pytest.mark.parametrize("name", [*PAPER, *OURS])
def test_the_recipe_is_the_paper_s(name: str) -> None:
    """Section 2.1 of the recipe: 128 x 8 responses of at most 3000 tokens, 8 steps of 128, Adam(0.9, 0.95) at 1e-6 without decay."""
    config = load_config(TrainConfig, CONFIGS / f"{name}.yaml")
    rollout, optimizer, algorithm = config.rollout, config.optimizer, config.algorithm
    assert (rollout.prompts_per_iteration, rollout.samples_per_prompt, rollout.max_response_tokens) == (128, 8, 3000)
    assert (rollout.temperature, rollout.top_p, config.data.max_prompt_tokens) == (1.0, 1.0, 1024)
    assert (algorithm.name, algorithm.train_batch_size, algorithm.clip_low, algorithm.clip_high) == ("drgrpo", 128, 0.2, 0.2)
    assert (optimizer.lr, optimizer.schedule, optimizer.betas, optimizer.eps) == (1e-6, "constant", (0.9, 0.95), 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_grad) == (0.0, 1.0)
    assert [source.split for source in config.evaluation.sets] == ["aime", "amc", "math", "minerva", "olympiad_bench"]
    assert (config.evaluation.every, config.evaluation.temperature) == (16, 0.0)


def test_the_page_of_configurations_is_up_to_date(tool: ModuleType) -> None:
    page = (ROOT / "docs" / "configs.md").read_text(encoding="utf-8")
    assert page == tool.configs_page(), "run: python tools/plan_docs.py configs > docs/configs.md"


def test_the_table_of_published_runs_is_up_to_date(tool: ModuleType) -> None:
    page = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- published: python tools/plan_docs.py published -->")[2].partition("<!-- /published -->")[0]
    assert shown.strip() == tool.published_table().strip(), "put what `python tools/plan_docs.py published` prints there"


def test_the_model_is_within_a_factor_of_two_of_every_published_run(tool: ModuleType) -> None:
    for row in tool.published_rows():
        seconds = row.cost.time.update if row.update_only else row.cost.time.total
        assert 0.5 < seconds / row.published_s < 2
