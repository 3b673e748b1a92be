"""Plans carried out by real gloo ranks, and by one rank without a process group."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from megatron_r1z.errors import RefitError
from megatron_r1z.layout.blocks import engine_layout, megatron_layout
from megatron_r1z.layout.families import ModelShape
from megatron_r1z.layout.plan import make_plan
from megatron_r1z.layout.topology import Topology
from megatron_r1z.protocols import Result
from megatron_r1z.reshard.once import execute
from megatron_r1z.reshard.refit import Refit, check_parameters

SHAPE = ModelShape("qwen2", 2, 16, 4, 2, 4, 24, 70, True, True, False, 1e4, None, 1e-6, 128)
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_hidden_layers": 4,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 311,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


WORKER = Path(__file__).with_name("ranks.py")


def test_four_ranks_reshard_refit_and_export(tmp_path: Path, run_ranks: Callable[..., None]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    run_ranks(WORKER, 4, "execute,export", str(tmp_path))
    names = sorted(path.name for path in (tmp_path / "export").iterdir())
    shards = [name for name in names if name.endswith(".safetensors")]
    assert names == ["config.json", *shards, "model.safetensors.index.json"]
    assert shards == [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    assert len(shards) >= 4
    assert json.loads((tmp_path / "export" / "config.json").read_text())["torch_dtype"] == "float32"
    assert not list(tmp_path.glob("export.*"))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_refits_that_must_work_and_refits_that_must_not(tmp_path: Path, run_ranks: Callable[..., None], num_ranks: int) -> None:
    run_ranks(WORKER, num_ranks, "refit,flipped,dropped,misplaced", str(tmp_path))


@pytest.mark.parametrize("case", ["dead", "slow"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_rank_that_fails_in_the_middle_ends_the_refit_in_time(
    tmp_path: Path, run_ranks: Callable[..., None], case: str, num_ranks: int
) -> None:
    run_ranks(WORKER, num_ranks, case, str(tmp_path))


def test_a_rank_that_stays_away_is_named(tmp_path: Path, run_ranks: Callable[..., None]) -> None:
    run_ranks(WORKER, 2, "late", str(tmp_path))


class ArrayEngine:
    def __init__(self, live: dict[str, torch.Tensor]) -> None:
        self.live, self.version = live, -1

    def parameters(self) -> dict[str, torch.Tensor]:
        return self.live

    def receive(self, write: Callable[[Mapping[str, torch.Tensor]], Result]) -> Result:
        return write(self.live)

    def accept(self, policy_version: int) -> None:
        self.version = policy_version


def single_rank() -> tuple[dict[str, torch.Tensor], ArrayEngine, Refit]:
    source, destination = megatron_layout(SHAPE, Topology(1), 32), engine_layout(SHAPE, 1, 1)
    weights = {name: torch.randn(size, requires_grad=True) for name, size in source.parameters[0].items()}
    engine = ArrayEngine({name: torch.zeros(size) for name, size in destination.parameters[0].items()})
    return weights, engine, Refit([(torch.float32, make_plan(source, destination, 4))], 0, lambda: weights, engine)  # type: ignore[arg-type]


def test_refit_without_a_process_group() -> None:
    weights, engine, refit = single_rank()
    receipt = refit(policy_version=1)
    assert receipt.policy_version == engine.version == 1
    assert receipt.seconds > 0
    embedding = weights["chunks.0.embedding.word_embeddings.weight"]
    assert torch.equal(engine.live["model.embed_tokens.weight"][:70], embedding[:70])
    assert receipt.nbytes == sum(tensor.numel() for tensor in engine.live.values()) * 4 - (128 - 70) * 16 * 4


def test_a_parameter_that_the_optimizer_replaced_is_found() -> None:
    weights, engine, refit = single_rank()
    weights["chunks.0.decoder.final_layernorm.weight"] = torch.full((16,), 3.0)
    refit(policy_version=1)
    assert torch.equal(engine.live["model.norm.weight"], torch.full((16,), 3.0))


def test_construction_compares_parameters_with_the_plan() -> None:
    source, destination = megatron_layout(SHAPE, Topology(1), 32), engine_layout(SHAPE, 1, 1)
    plan = make_plan(source, destination, 4)
    weights = {name: torch.zeros(size) for name, size in source.parameters[0].items()}
    live = {name: torch.zeros(size) for name, size in destination.parameters[0].items()}

    def build(live: dict[str, torch.Tensor]) -> Refit:
        return Refit([(torch.float32, plan)], 0, lambda: weights, ArrayEngine(live))  # type: ignore[arg-type]

    build(live)
    with pytest.raises(RefitError, match=r"engine has no parameter model.norm.weight"):
        build({name: tensor for name, tensor in live.items() if name != "model.norm.weight"})
    with pytest.raises(RefitError, match=r"engine parameter model.norm.weight has shape \[3\]; the layout says \[16\]"):
        build({**live, "model.norm.weight": torch.zeros(3)})
    with pytest.raises(RefitError, match=r"engine parameter extra is not in the layout"):
        build({**live, "extra": torch.zeros(3)})
    with pytest.raises(RefitError, match=r"model.norm.weight is torch.bfloat16, planned as torch.float32"):
        build({**live, "model.norm.weight": torch.zeros(16, dtype=torch.bfloat16)})
    with pytest.raises(RefitError, match=r"the policy has no parameter"):
        check_parameters("policy", 0, source.parameters[0], {})


def test_local_copies_convert() -> None:
    source = megatron_layout(SHAPE, Topology(1), 1)
    weights = {name: torch.randn(size) for name, size in source.parameters[0].items()}
    copied = {name: torch.zeros(size, dtype=torch.bfloat16) for name, size in source.parameters[0].items()}
    done = execute(make_plan(source, source, 2).of_rank(0), weights, copied, dtype=torch.bfloat16)
    assert all(torch.equal(copied[name], weights[name].bfloat16()) for name in weights)
    assert done.nbytes == 2 * sum(tensor.numel() for tensor in weights.values())
