"""What a refit quantises is what `quantise_weight` gives, whatever the numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_r1z.fp8.blocks import Quantised, quantise_weight, scale_shape
from megatron_r1z.layout.fp8 import SCALES
from megatron_r1z.reshard import quantise
from megatron_r1z.reshard.quantise import QuantisedSource, quantise_all


def empty(weight: Tensor) -> Quantised:
    return Quantised(torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(scale_shape(*weight.shape)).fill_(math.nan))


def assert_equal(found: Quantised, weight: Tensor) -> None:
    expected = quantise_weight(weight)
    assert torch.equal(found.scale_inv, expected.scale_inv)
    assert torch.equal(found.data.view(torch.uint8), expected.data.view(torch.uint8))


@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    magnitude=st.sampled_from([1e-36, 1e-20, 1e-3, 1.0, 448.0, 1e6, 1e35]),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
    seed=st.integers(0, 1000),
)
def test_bit_for_bit(rows: int, columns: int, dtype: torch.dtype, magnitude: float, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.exp(spread * torch.randn(rows, columns, generator=generator))
    weight = (weight * magnitude).to(dtype)
    weight[torch.rand(rows, columns, generator=generator) < 0.1] = 0.0
    found = empty(weight)
    quantise_all([(weight, found)])
    assert_equal(found, weight)


def test_every_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """All finite numbers of a block whose largest magnitude lies on either side of a power of two, ties among them."""
    monkeypatch.setattr(quantise, "quantise_weight", lambda _: pytest.fail("not by the compiled loop"))
    every = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for largest in (447.0, 448.0, 450.0, 3.4, 1e-5):
        values = every[every <= largest]
        weight = torch.zeros(256, 128, dtype=torch.bfloat16)
        weight.view(-1)[: values.numel()] = values
        weight[::2] *= -1
        found = empty(weight)
        quantise_all([(weight, found)])
        assert_equal(found, weight)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 1e38])
def test_unusual_numbers_and_formats(odd: float) -> None:
    weight = torch.randn(700, 130)
    weight[600, 3] = odd
    for matrix in (weight, weight.half(), torch.randn(130, 200).t()):
        found = empty(matrix)
        quantise_all([(matrix, found)])
        assert_equal(found, matrix)


def test_a_source_is_quantised_anew_and_keeps_its_memory() -> None:
    parameters = {"matrix": torch.randn(256, 128).bfloat16(), "norm": torch.ones(128)}
    source = QuantisedSource(lambda: parameters, ["matrix"])
    first = source()
    assert first.keys() == {"matrix", "norm", "matrix" + SCALES}
    assert first["norm"] is parameters["norm"]
    parameters["matrix"] = 3 * parameters["matrix"]
    second = source()
    assert second["matrix"].data_ptr() == first["matrix"].data_ptr()
    assert_equal(Quantised(second["matrix"], second["matrix" + SCALES]), parameters["matrix"])
    assert (second["matrix"].untyped_storage().filename or "").startswith("/proc/")
