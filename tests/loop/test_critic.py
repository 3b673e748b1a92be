"""The critic takes the same steps under every layout: against a transformers model with a value head in float64, and after a reload."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from megatron_r1z.record.metrics import critic_metrics
from megatron_r1z.types import Sample, ValueStats
from tests.loop.float64 import KeepFloat64
from tests.loop.test_layouts import draw_samples, make_model

pytestmark = pytest.mark.slow

LEARNING_RATE, EPSILON, MAX_NORM, VALUE_CLIP, STEPS = 3e-4, 1e-6, 0.4, 0.2, 2
LAYOUTS: dict[str, tuple[dict[str, int | bool], bool]] = {  # of two ranks: parallel, distributed optimizer
    "tp2": ({"tensor_parallel_size": 2}, False),
    "tp2-sp": ({"tensor_parallel_size": 2, "sequence_parallel": True}, False),
    "pp2": ({"pipeline_parallel_size": 2}, False),
    "cp2": ({"context_parallel_size": 2}, False),
    "dp2": ({}, False),
    "dp2-distributed-optimizer": ({}, True),
}


def with_values(sample: Sample) -> Sample:
    """Values and advantages as random as can be, so that returns lie on both sides of the values and beyond the clip."""
    draw = random.Random(sample.sample_id)
    values, advantages = (tuple(draw.gauss(0, 0.5) for _ in range(sample.response_length)) for _ in range(2))
    return replace(sample, advantage=advantages, values=values, has_further_terms=True)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("critic")
    make_model(folder / "model", "qwen2")  # tied embeddings, of which the critic has the first only
    head = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 0.1
    return {"folder": folder, "model": str(folder / "model"), "head": head, "samples": [with_values(item) for item in draw_samples("ppo")]}


@pytest.fixture(scope="module")
def results(case: dict[str, Any], torchrun: Callable[..., None]) -> dict[str, dict[str, Any]]:
    settings = {"layouts": LAYOUTS, "lr": LEARNING_RATE, "eps": EPSILON, "max_norm": MAX_NORM, "value_clip": VALUE_CLIP}
    torch.save(case | settings, case["folder"] / "task.pt")
    torchrun(2, Path(__file__).with_name("critic_worker.py"), case["folder"])
    found: dict[str, dict[str, Any]] = torch.load(case["folder"] / "results.pt", weights_only=False)
    return found


@pytest.fixture(scope="module")
def expected(case: dict[str, Any]) -> dict[str, Any]:
    """Values, figures of the steps and weights after them, of one process and whole sequences."""
    with KeepFloat64():
        model = transformers.AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float64, attn_implementation="eager").model
    head = case["head"].double()[None].requires_grad_()
    optimizer = torch.optim.AdamW([*model.parameters(), head], lr=LEARNING_RATE, betas=(0.9, 0.95), eps=EPSILON, weight_decay=0.0)
    samples: list[Sample] = case["samples"]
    old = [torch.tensor(sample.values).double() for sample in samples]
    returns = [torch.tensor(sample.returns).double() for sample in samples]
    found: dict[str, Any] = {"steps": []}
    for _ in range(STEPS):
        optimizer.zero_grad()
        with KeepFloat64():
            values = [values_of(model, head, sample) for sample in samples]
        found.setdefault("values", {item.sample_id: value.tolist() for item, value in zip(samples, values, strict=True)})
        bounded = [before + (value - before).clamp(-VALUE_CLIP, VALUE_CLIP) for value, before in zip(values, old, strict=True)]
        squares = [((value - aim) ** 2, (other - aim) ** 2) for value, other, aim in zip(values, bounded, returns, strict=True)]
        loss = sum(torch.maximum(*pair).mean() / 2 for pair in squares) / len(samples)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([*model.parameters(), head], MAX_NORM).item()
        aims, all_values = torch.cat(returns), torch.cat(values).detach()
        found["steps"].append(
            {
                "loss": loss.item(),
                "grad_norm": norm,
                "learning_rate": LEARNING_RATE,
                "clip_fraction": torch.cat([second - first > 1e-9 for first, second in squares]).double().mean().item(),
                "value_mean": all_values.mean().item(),
                "return_mean": aims.mean().item(),
                "explained_variance": 1 - ((aims - all_values).var() / aims.var()).item(),
            }
        )
        optimizer.step()
    weights = {f"model.{name}": tensor.detach() for name, tensor in model.named_parameters()}
    return found | {"weights": weights | {"head": head.detach()}}


def values_of(model: torch.nn.Module, head: Tensor, sample: Sample) -> Tensor:
    hidden = model(torch.tensor([sample.token_ids])).last_hidden_state[0]
    return (hidden @ head[0])[sample.prompt_length - 1 : -1]


def test_the_steps_of_the_reference_are_worth_comparing(expected: dict[str, Any]) -> None:
    assert all(0.1 < step["clip_fraction"] < 0.9 for step in expected["steps"])
    assert any(step["grad_norm"] > MAX_NORM for step in expected["steps"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_takes_the_reference_steps(layout: str, results: dict[str, dict[str, Any]], expected: dict[str, Any]) -> None:
    result = results[layout]
    assert set(result["values"]) == set(expected["values"])
    for name, values in expected["values"].items():
        assert result["values"][name] == pytest.approx(values, abs=1e-5)
    for step, wanted in zip(result["steps"], expected["steps"], strict=True):
        found = step | {"explained_variance": critic_metrics([ValueStats(**step)])["critic/explained_variance"]}
        assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=3e-5, abs=1e-6)
        assert (step["skipped"], step["non_finite"]) == (False, ())
    assert set(result["weights"]) == set(expected["weights"])
    for name, tensor in expected["weights"].items():
        change = (tensor - result["before"][name].double()).norm()
        assert (result["weights"][name].double() - tensor).norm() < 5e-4 * change, name


@pytest.mark.parametrize("layout", [name for name, (_, distributed) in LAYOUTS.items() if not distributed])
def test_a_critic_from_a_checkpoint_goes_on_to_the_bit(layout: str, results: dict[str, dict[str, Any]]) -> None:
    result = results[layout]
    assert result["resumed"] == result["steps"][1]
    assert result["same_bits"]
