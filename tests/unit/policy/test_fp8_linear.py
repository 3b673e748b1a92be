"""The emulated FP8 layer against products of dequantised operands in float64, and split over ranks against one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core")

from megatron_r1z.fp8.blocks import dequantise, quantise_rows, quantise_weight
from megatron_r1z.policy.fp8_linear import fp8_linear

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8}


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()).to(dtype)


def rows(values: Tensor) -> Tensor:
    """In blocks of 1 x 128 along the last dimension, float64."""
    return dequantise(quantise_rows(values.contiguous())).double()


def reference(inputs: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients of input and weight: what the module's docstring says, from the bytes."""
    whole = dequantise(quantise_weight(weight)).double()
    return rows(inputs) @ whole.t(), rows(gradient) @ whole, rows(gradient.t()) @ rows(inputs.t()).t()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 128, 200])
def test_output_and_gradients_are_products_of_fp8_operands(tokens: int, dtype: torch.dtype) -> None:
    inputs = draw(tokens, 1, 256, seed=tokens, dtype=dtype).requires_grad_()
    weight = draw(384, 256, seed=1, dtype=dtype).requires_grad_()
    gradient = draw(tokens, 1, 384, seed=2, dtype=dtype)
    output = fp8_linear(inputs, weight, None)
    output.backward(gradient)
    expected = reference(inputs.detach()[:, 0], weight.detach(), gradient[:, 0])
    for found, wanted in zip((output[:, 0], inputs.grad[:, 0], weight.grad), expected, strict=True):
        assert found.dtype is dtype
        scale = wanted.abs().max().item()
        torch.testing.assert_close(found.detach().double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale / 16)


def test_it_is_not_the_product_of_unrounded_operands() -> None:
    """A few percent apart, so that the tests above can fail."""
    inputs, weight = draw(64, 256, seed=3), draw(128, 256, seed=4)
    plain, fp8 = inputs @ weight.t(), fp8_linear(inputs, weight, None)
    assert 0.01 < ((fp8 - plain).norm() / plain.norm()).item() < 0.06


def test_the_bias_and_its_gradient_are_not_rounded() -> None:
    inputs, weight, bias = draw(64, 128, seed=5), draw(128, 128, seed=6), draw(128, seed=7).requires_grad_()
    gradient = draw(64, 128, seed=8)
    output = fp8_linear(inputs, weight, bias)
    assert torch.equal(output, fp8_linear(inputs, weight, None) + bias)
    output.backward(gradient)
    torch.testing.assert_close(bias.grad, gradient.sum(0))


def test_a_pass_without_gradient_computes_the_same() -> None:
    """Log-probs and training round alike."""
    inputs, weight = draw(64, 128, seed=9, dtype=torch.bfloat16), draw(128, 128, seed=10, dtype=torch.bfloat16).requires_grad_()
    with torch.no_grad():
        before = fp8_linear(inputs, weight, None)
    assert torch.equal(fp8_linear(inputs, weight, None), before)


def test_a_weight_that_was_written_is_rounded_anew() -> None:
    inputs, weight = draw(64, 128, seed=11), torch.nn.Parameter(draw(128, 128, seed=12))
    before = fp8_linear(inputs, weight, None)
    weight.data.mul_(1.25)
    assert torch.equal(fp8_linear(inputs, weight, None), fp8_linear(inputs, weight.detach().clone(), None))
    assert not torch.equal(fp8_linear(inputs, weight, None), before)


def test_what_is_not_a_number_stays_one() -> None:
    inputs, weight = draw(64, 128, seed=13), draw(128, 128, seed=14)
    inputs[3, 5] = torch.nan
    found = fp8_linear(inputs, weight, None).isnan()
    assert bool(found[3].all())
    assert int(found.any(dim=1).sum()) == 1


@pytest.fixture(scope="module")
def case() -> dict[str, Tensor]:
    return {
        "inputs": draw(64, 1, 256, seed=15),
        "first": draw(512, 256, seed=16) / 16,
        "bias": draw(512, seed=17),
        "second": draw(256, 512, seed=18) / 16,
        "gradient": draw(64, 1, 256, seed=19),
    }


def test_two_ranks_compute_what_one_computes(case: dict[str, Tensor], run_ranks: Any, tmp_path: Path) -> None:
    """megatron-core's layers call ours: a column-parallel one, then a row-parallel one, and their gradients."""
    torch.save(case, tmp_path / "case.pt")
    run_ranks(Path(__file__).with_name("fp8_ranks.py"), 2, str(tmp_path))
    ranks = [torch.load(tmp_path / f"rank_{rank}.pt") for rank in range(2)]
    for found in ranks:
        assert found["refusal"] == "ranks have between 3 and 4 micro-batches for one pass; with FP8 all need the same number."
    for sequence_parallel in (False, True):
        compare(case, [found[sequence_parallel] for found in ranks], sequence_parallel)


def compare(case: dict[str, Tensor], parts: list[dict[str, Tensor]], sequence_parallel: bool) -> None:
    inputs, first, bias, second = (case[name].clone().requires_grad_() for name in ("inputs", "first", "bias", "second"))
    output = fp8_linear(fp8_linear(inputs, first, bias), second, None)
    output.backward(case["gradient"])

    def join(name: str, dim: int) -> Tensor:
        return torch.cat([part[name] for part in parts], dim)

    def tokens(name: str) -> Tensor:
        return join(name, 0) if sequence_parallel else parts[0][name]

    found = {
        "output": (tokens("output"), output.detach()),
        "inputs": (tokens("inputs"), inputs.grad),
        "first": (join("first", 0), first.grad),
        "bias": (join("bias", 0), bias.grad),
        "second": (join("second", 1), second.grad),
    }
    for name, (mine, wanted) in found.items():
        torch.testing.assert_close(
            mine, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item(), msg=lambda text, name=name: f"{name}: {text}"
        )
