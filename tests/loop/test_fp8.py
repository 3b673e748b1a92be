"""A policy with FP8 products takes the same steps however it is split, and they are those of a reference that shares no code with it.

The reference is the one of `test_layouts.py`, float64, with the linear layers of its decoder replaced by products of dequantised bytes.

What is no property: figures of such a policy in bf16 or float32. An operand close to the middle between two numbers of e4m3 is rounded to
either by the last bit of a sum, and the kind of CPU, the kernel and the layout decide about that bit. Each one moves what later
operands of its token are rounded from, so a few bits become a change of 1e-3 nats in the mean over all tokens.
What is one: equal inputs give equal bytes. So here the policy keeps everything but its operands in float64 (`float64.py`). Another
order of sums is then another 1e-15, which decides about one operand in 1e13, and there are some 1e7: policy, reference and all
layouts multiply the same bytes on every machine, and a scale of another block, or a cut through one, is 1e9 times as large as all that.

The optimizer is AdamW with an epsilon so large that it changes weights in proportion to their gradient, and a mistake shows in its size.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from megatron_r1z.fp8.blocks import dequantise, quantise_rows, quantise_weight
from megatron_r1z.layout.fp8 import BLOCK
from megatron_r1z.policy.logprob import TILE_BYTES
from tests.loop.float64 import FP8_IN_FLOAT64, KeepFloat64
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


@dataclass(frozen=True)
class Case:
    """One way to take the step."""

    num_ranks: int
    parallel: dict[str, Any]
    fp8: dict[str, Any] = field(default_factory=dict)
    precision: str = FP8_IN_FLOAT64
    against: str = "all"
    """The reference whose log-probs are compared with its own: that with all layers in FP8, with the `inner` ones or with `none`."""


LAYOUTS = {
    "tp1": Case(1, {}),
    "tp1-small": Case(1, SMALL),
    "tp1-full": Case(1, SMALL | {"recompute": "full"}),
    "tp1-ends-bf16": Case(1, {}, ENDS, against="inner"),
    "tp2": Case(2, TP2),
    "tp2-sp": Case(2, TP2 | SP),
    "tp2-sp-full": Case(2, TP2 | SP | {"recompute": "full"}),
    "pp2": Case(2, PP2),
    "pp2-vpp2-ends-bf16": Case(2, PP2 | {"virtual_pipeline_size": 2}, ENDS, against="inner"),
    "dp2": Case(2, {}),
}
SAME_MICRO_BATCHES = {"tp1-full": "tp1-small", "tp2": "tp1", "tp2-sp": "tp1", "tp2-sp-full": "tp1", "pp2": "tp1"}
"""Layouts that multiply the very matrices of another."""
CONFIGURED = {
    f"{name}/{against}": Case(num_ranks, parallel, precision=precision, against=against)
    for name, num_ranks, parallel, precision in (("fp8", 1, {}, "fp8"), ("fp8-tp2-sp", 2, TP2 | SP, "fp8"), ("bf16", 1, {}, "bf16"))
    for against in ("all", "none")
}
"""What configurations can say: bf16 with and without FP8 operands."""
CASES = LAYOUTS | CONFIGURED
LAYERS = 4
OPTIMIZER: dict[str, Any] = {"lr": 3.0, "eps": 1.0, "steps": 1}


def make_model(folder: Path) -> None:
    """Blocks of 128 fit its heads and, of two ranks, each one's share. Their sizes differ, so that none can have the scale of another."""
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
            if "proj" in name:
                blocks = parameter.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
                blocks *= torch.tensor([[0.25, 1.0], [1.6, 0.6]])[:, None, :, None]
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
    samples = draw_samples("drgrpo")
    with KeepFloat64():
        return {
            kind: take_reference_steps(
                model,
                samples,
                draw_shifts(),
                "drgrpo",
                prepare=lambda made, layers=layers: replace_linears(made, layers),
                multiplied_by=len(samples) * LENGTH_CONSTANT,
                **OPTIMIZER,
            )
            for kind, layers in kinds.items()
        }


@pytest.fixture(scope="module")
def result_of(
    model: Path, references: dict[str, Reference], torchrun: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """The result of a case; all of a world size run in one group of processes."""
    found: dict[int, dict[str, dict[str, Any]]] = {}

    def task(name: str, case: Case) -> dict[str, Any]:
        samples = [
            replace(item, engine_logprobs=tuple(values.tolist()))
            for item, values in zip(draw_samples("drgrpo"), references[case.against].logprobs, strict=True)
        ]
        return {
            "name": name,
            "model": str(model),
            "samples": samples,
            "shift_V": draw_shifts(),
            "engine_shift_V": draw_engine_shifts(),
            "measures_memory": False,
            "algorithm": "drgrpo",
            "precision": case.precision,
            "fp8": case.fp8,
            "parallel": {"micro_batch_tokens": 4096} | case.parallel,
            "distributed": False,
            "length_constant": LENGTH_CONSTANT,
            **OPTIMIZER,
            "max_norm": MAX_NORM,
            "tile_bytes": TILE_BYTES["cpu"],
        }

    def result(name: str) -> dict[str, Any]:
        num_ranks = CASES[name].num_ranks
        if num_ranks not in found:
            folder = tmp_path_factory.mktemp(f"fp8_world_{num_ranks}")
            torch.save([task(other, case) for other, case in CASES.items() if case.num_ranks == num_ranks], folder / "tasks.pt")
            torchrun(num_ranks, Path(__file__).with_name("layout_worker.py"), folder)
            found[num_ranks] = torch.load(folder / "results.pt", weights_only=False)
        return found[num_ranks][name]

    return result


def test_fp8_changes_enough_to_compare_with(references: dict[str, Reference]) -> None:
    """Of what the other tests allow: 1e9 and 1e4 times as much."""
    plain = references["none"]
    for kind in ("all", "inner"):
        assert mean_square(references[kind].logprobs, plain.logprobs) > 0.05**2
        assert distance(plain.after, references[kind].after, plain.before) > 0.05


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_with_fp8_products_is_that_of_the_reference(
    layout: str, result_of: Callable[[str], dict[str, Any]], references: dict[str, Reference]
) -> None:
    """All products of the forward pass have the reference's operands, to the bit.

    Gradients of weights have not quite: which tokens share a scale is a matter of packing, which decides about numbers so far below their
    block's largest that they are subnormal in e4m3. Measured: log-probs 8e-15 nats, weights 5e-7 of the step.
    """
    found, reference = result_of(layout), references[LAYOUTS[layout].against]
    assert found["logprob_error"] < 1e-10
    assert distance(found["weights"], reference.after, reference.before) < 1e-5
    (step,) = found["steps"]
    assert step["loss"] == pytest.approx(reference.losses[0], abs=1e-10)
    assert step["grad_norm"] == pytest.approx(reference.grad_norms[0], rel=1e-6)
    assert step["num_tokens"] == reference.figures[0]["num_tokens"]


@pytest.mark.parametrize("layout", SAME_MICRO_BATCHES)
def test_a_step_with_fp8_products_is_the_same_step_under_every_layout(
    layout: str, result_of: Callable[[str], dict[str, Any]], references: dict[str, Reference]
) -> None:
    """Shares of a rank end where blocks end, so all multiply the same bytes; only sums over ranks are rounded otherwise, at 1e-16."""
    found, one = result_of(layout), result_of(SAME_MICRO_BATCHES[layout])
    assert distance(found["weights"], one["weights"], references["none"].before) < 1e-10


@pytest.mark.parametrize("name", ["fp8", "fp8-tp2-sp"])
def test_the_configured_policy_is_in_fp8(name: str, result_of: Callable[[str], dict[str, Any]], references: dict[str, Reference]) -> None:
    """In bf16 last bits decide about many operands, so its errors are as large as FP8's own (docs/fp8.md); but they have much in common.

    In common is the projection of one on the other: 1 for the reference in FP8, 0 for errors of another origin, such as those of bf16.
    """
    whole = mean_square(references["all"].logprobs, references["none"].logprobs)

    def in_common(policy: str) -> float:
        to_none, to_all = (result_of(f"{policy}/{against}")["logprob_mean_square"] for against in ("none", "all"))
        return (to_none + whole - to_all) / (2 * whole)

    assert in_common(name) > 0.4
    assert abs(in_common("bf16")) < 0.1
    assert result_of(f"{name}/none")["logprob_mean_square"] > 10 * result_of("bf16/none")["logprob_mean_square"]


def test_the_commands_train_in_fp8(task: Any, pretraining: list[str], cli: Any, tmp_path: Path) -> None:
    """Pre-training, then an iteration with an FP8 engine, tensor parallel on both sides; the model is exported in bf16."""
    from megatron_r1z.weights.hf_files import locate_tensors

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


def mean_square(first: list[Tensor], second: list[Tensor]) -> float:
    """Of the difference."""
    return float(torch.cat([mine - other for mine, other in zip(first, second, strict=True)]).square().mean())


def distance(weights: dict[str, Tensor], others: dict[str, Tensor], before: dict[str, Tensor]) -> float:
    """Between two sets of weights, over how far the second ones moved."""
    apart = sum(((weights[name].double() - other) ** 2).sum() for name, other in others.items())
    moved = sum(((before[name] - other) ** 2).sum() for name, other in others.items())
    return float((apart / moved).sqrt())
