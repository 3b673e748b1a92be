"""A policy with FP8 products takes the same steps however it is split, and they are those of a reference that shares no code with it.

The reference is the one of `test_layouts.py`, float64, with the linear layers of its decoder replaced by products of dequantised bytes.
The policy keeps everything but the operands in float32: then both round to the same bytes nearly everywhere, and what is left is a
handful of values so close to the middle between two numbers of e4m3 that the last bit of float32 decides. In bf16 there are many of them,
which is why FP8 log-probs of two implementations are farther apart than bf16 ones (docs/fp8.md). The optimizer is AdamW with an epsilon so
large that it changes weights in proportion to their gradient: with a small one it would take the sign of gradients that are all noise.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from megatron_r1z.fp8.blocks import dequantise, quantise_rows, quantise_weight
from megatron_r1z.policy.logprob import TILE_BYTES
from tests.loop.test_layouts import (
    LENGTH_CONSTANT,
    MAX_NORM,
    VOCAB,
    Reference,
    draw_engine_shifts,
    draw_samples,
    draw_shifts,
    take_reference_steps,
)

pytestmark = pytest.mark.slow

TP2, PP2, SP = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}, {"sequence_parallel": True}
SMALL = {"micro_batch_tokens": 128}
ENDS = {"first_layers_bf16": 1, "last_layers_bf16": 1}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {  # ranks, how they are split, precision.fp8
    "tp1": (1, {}, {}),
    "tp1-small": (1, SMALL, {}),
    "tp1-full": (1, SMALL | {"recompute": "full"}, {}),
    "tp1-ends-bf16": (1, {}, ENDS),
    "tp2": (2, TP2, {}),
    "tp2-sp": (2, TP2 | SP, {}),
    "tp2-sp-full": (2, TP2 | SP | {"recompute": "full"}, {}),
    "pp2": (2, PP2, {}),
    "pp2-vpp2-ends-bf16": (2, PP2 | {"virtual_pipeline_size": 2}, ENDS),
    "dp2": (2, {}, {}),
}
LAYERS = 4
OPTIMIZER: dict[str, Any] = {"lr": 3.0, "eps": 1.0, "steps": 1}


def make_model(folder: Path) -> None:
    """Blocks of 128 fit its heads and, of two ranks, each one's share."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1 if "norm" in name or "embed" in name else 0.06)
    model.save_pretrained(folder)


class ReferenceProduct(torch.autograd.Function):
    """Operands by way of their bytes, products in float64."""

    @staticmethod
    def forward(ctx: Any, inputs_TK: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(inputs_TK, weight_NK)
        return rounded(inputs_TK) @ rounded(weight_NK, quantise_weight).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        inputs_TK, weight_NK = ctx.saved_tensors
        gradient_TN = gradients[0]
        grad_weight = rounded(gradient_TN.t()) @ rounded(inputs_TK.t()).t()
        return rounded(gradient_TN) @ rounded(weight_NK, quantise_weight), grad_weight


def rounded(values: Tensor, quantise: Callable[[Tensor], Any] = quantise_rows) -> Tensor:
    with torch._C.DisableTorchFunction():  # of KeepFloat64, which makes a float64 of every float32
        return dequantise(quantise(values.float().contiguous())).double()


class ReferenceLinear(torch.nn.Module):
    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return ReferenceProduct.apply(inputs.reshape(-1, inputs.shape[-1]), self.weight).view(*inputs.shape[:-1], -1)


def replace_linears(model: torch.nn.Module, layers: range) -> None:
    """All matrices of these layers."""
    for number in layers:
        for parent in (model.model.layers[number].self_attn, model.model.layers[number].mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(parent, name, ReferenceLinear(child))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8_model")
    make_model(folder)
    return folder


@pytest.fixture(scope="module")
def references(model: Path) -> dict[str, Reference]:
    """With all layers in FP8, with the inner ones, and with none."""
    kinds = {"all": range(LAYERS), "inner": range(1, LAYERS - 1), "none": range(0)}
    return {
        kind: take_reference_steps(
            model,
            draw_samples("drgrpo"),
            draw_shifts(),
            "drgrpo",
            prepare=lambda made, layers=layers: replace_linears(made, layers),
            **OPTIMIZER,
        )
        for kind, layers in kinds.items()
    }


def kind_of(layout: str) -> str:
    return "inner" if LAYOUTS[layout][2] else "all"


@pytest.fixture(scope="module")
def result_of(
    model: Path, references: dict[str, Reference], torchrun: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """The result of a layout, or of the policy as it is configured, in bf16; all of a world size run in one group of processes."""
    found: dict[int, dict[str, dict[str, Any]]] = {}

    def task(name: str, precision: str, against: str) -> dict[str, Any]:
        _, parallel, fp8 = LAYOUTS.get(name, LAYOUTS["tp1"])
        samples = [
            replace(item, engine_logprobs=tuple(values.tolist()))
            for item, values in zip(draw_samples("drgrpo"), references[against].logprobs, strict=True)
        ]
        return {
            "name": name,
            "model": str(model),
            "samples": samples,
            "shift_V": draw_shifts(),
            "engine_shift_V": draw_engine_shifts(),
            "measures_memory": False,
            "algorithm": "drgrpo",
            "precision": precision,
            "fp8": fp8,
            "parallel": {"micro_batch_tokens": 4096} | parallel,
            "distributed": False,
            "length_constant": LENGTH_CONSTANT,
            **OPTIMIZER,
            "max_norm": MAX_NORM,
            "tile_bytes": TILE_BYTES["cpu"],
        }

    def result(name: str) -> dict[str, Any]:
        num_ranks = LAYOUTS.get(name, (1,))[0]
        if num_ranks not in found:
            folder = tmp_path_factory.mktemp(f"fp8_world_{num_ranks}")
            tasks = [task(layout, "fp8-fp32", kind_of(layout)) for layout in LAYOUTS if LAYOUTS[layout][0] == num_ranks]
            if num_ranks == 1:
                tasks += [
                    task(f"{precision}/{against}", precision, against) for precision in ("fp8", "bf16") for against in ("all", "none")
                ]
            torch.save(tasks, folder / "tasks.pt")
            torchrun(num_ranks, Path(__file__).with_name("layout_worker.py"), folder)
            found[num_ranks] = torch.load(folder / "results.pt", weights_only=False)
        return found[num_ranks][name]

    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_with_fp8_products_is_that_of_the_reference(
    layout: str, result_of: Callable[[str], dict[str, Any]], references: dict[str, Reference]
) -> None:
    """Bounds are shares of what FP8 itself changes. Measured: log-probs 0.013, gradients 0.36; with some layers in bf16 0.06 and 0.55."""
    found, reference, plain = result_of(layout), references[kind_of(layout)], references["none"]
    fp8_changes = distance(plain.after, reference.after, reference.before)
    error = distance(found["weights"], reference.after, reference.before)
    assert found["logprob_mean_error"] < 0.15 * mean_distance(reference.logprobs, plain.logprobs)
    assert error < 0.65 * fp8_changes
    (step,) = found["steps"]
    assert step["loss"] == pytest.approx(reference.losses[0], abs=1e-3)
    assert step["grad_norm"] == pytest.approx(reference.grad_norms[0], rel=0.02)
    assert step["num_tokens"] == reference.figures[0]["num_tokens"]


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "tp1"])
def test_a_step_with_fp8_products_is_the_same_step_under_every_layout(
    layout: str, result_of: Callable[[str], dict[str, Any]], references: dict[str, Reference]
) -> None:
    """Shares of a rank end where blocks end, so all multiply the same bytes; only sums over ranks are rounded otherwise."""
    one = result_of("tp1" if kind_of(layout) == "all" else "tp1-ends-bf16")
    found, before = result_of(layout), references["none"].before
    assert found["logprob_mean_error"] == pytest.approx(one["logprob_mean_error"], rel=1e-3)
    error = distance(found["weights"], one["weights"], before)
    assert error < 0.02


def test_the_configured_policy_is_in_fp8(result_of: Callable[[str], dict[str, Any]]) -> None:
    """In bf16 the last bits decide about many operands, so it is closer to the reference in FP8, but not by much (docs/fp8.md)."""
    error = {name: result_of(name)["logprob_mean_error"] for name in ("fp8/all", "fp8/none", "bf16/all", "bf16/none")}
    assert error["fp8/all"] < error["fp8/none"]
    assert error["bf16/none"] < 0.2 * min(error["fp8/none"], error["bf16/all"])


def test_the_commands_train_in_fp8(task: Any, pretraining: list[str], cli: Any, tmp_path: Path) -> None:
    """Pre-training, then an iteration with an FP8 engine, tensor parallel on both sides; the model is exported in bf16."""
    from megatron_r1z.hf_files import locate_tensors

    subprocess.run(
        [sys.executable, "examples/quickstart/make_task.py", tmp_path, "--model", "llama-fp8"], check=True, stdout=subprocess.DEVNULL
    )
    two_ranks = ("parallel.num_ranks=2", "parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true", "precision.policy=fp8")
    folder = tmp_path / "base"
    model = f"model.path={tmp_path / 'model'}"
    outcome = cli.run("pretrain", *pretraining, model, "corpus.steps=30", *two_ranks, f"logging.folder={folder}")
    assert (outcome.status, outcome.stderr) == (0, "")
    assert "policy: FP8 blockwise, emulated (bf16 products of rounded operands, as there is no GPU)" in outcome.stdout
    losses = [json.loads(line)["pretrain/loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.6 * losses[0]
    with safe_open(locate_tensors(folder / "hf" / "final")["model.norm.weight"], "pt") as file:
        assert file.get_tensor("model.norm.weight").dtype is torch.bfloat16

    run = tmp_path / "run"
    arguments = [
        "configs/quickstart-fp8-emulated.yaml",
        f"model.path={folder / 'hf' / 'final'}",
        f"data.train=[{{path: {task.questions}}}]",
    ]
    arguments += ["evaluation.sets=[]", "rollout.prompts_per_iteration=8", "rollout.samples_per_prompt=4", "rollout.max_response_tokens=48"]
    arguments += ["algorithm.train_batch_size=16", "algorithm.iterations=1", f"logging.folder={run}"]
    outcome = cli.run("train", *arguments, *two_ranks)
    assert (outcome.status, outcome.stderr) == (0, "")
    certificate = json.loads((run / "certificate.json").read_text())
    assert (certificate["policy"], certificate["engine"]) == ("fp8", "fp8")
    assert certificate["mean_nats"] < 0.2


def mean_distance(first: list[Tensor], second: list[Tensor]) -> float:
    return float(torch.cat([(mine - other).abs() for mine, other in zip(first, second, strict=True)]).mean())


def distance(weights: dict[str, Tensor], others: dict[str, Tensor], before: dict[str, Tensor]) -> float:
    """Between two sets of weights, over how far the second ones moved."""
    apart = sum(((weights[name].double() - other) ** 2).sum() for name, other in others.items())
    moved = sum(((before[name] - other) ** 2).sum() for name, other in others.items())
    return float((apart / moved).sqrt())
