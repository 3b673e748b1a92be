"""Block quantisation against a scalar reference that was written from the CUDA source of Transformer Engine, one number at a time."""

from __future__ import annotations

import bisect
import importlib
import itertools
import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_r1z.fp8.blocks import (
    BLOCK,
    Quantised,
    dequantise,
    quantise_rows,
    quantise_weight,
    round_columns,
    round_rows,
    round_weight,
    scale_of_maximum,
    scale_shape,
)
from megatron_r1z.fp8.machine import transformer_engine_version

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
FLOAT32_MAX = 3.4028234663852886e38
LARGEST = {torch.float32: FLOAT32_MAX, torch.bfloat16: 3.3895313892515355e38, torch.float16: 65504.0}
# Hard for a scale: around 448 times powers of two, the smallest and largest numbers, 448 / maximum beyond float32.
CORNERS = [448 * 2.0**e * f for e in (-140, -20, -8, 0, 8, 100) for f in (1 - 2**-24, 1 - 2**-8, 1, 1 + 2**-23, 1 + 2**-7)]
CORNERS += [0.0, -0.0, 2.0**-149, 2.0**-126, 1.3165e-36, 1.3166e-36, 1e-30, 3e38, FLOAT32_MAX, math.inf, -math.inf, math.nan]


# --- The reference: Python floats, and `struct` to round to float32. ---------------------------------------------------------------------


def float32(value: float) -> float:
    """Rounded to float32."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def e4m3_value(bits: int) -> float:
    """OCP 8-bit floating point, e4m3: bias 7, subnormals of 2^-9, no infinity, not-a-number only where all other bits are set."""
    sign, exponent, mantissa = -1.0 if bits & 0x80 else 1.0, bits >> 3 & 0xF, bits & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


POSITIVE = [e4m3_value(bits) for bits in range(0x7F)]
MIDDLES = [(low + high) / 2 for low, high in itertools.pairwise(POSITIVE)]


def to_e4m3(value: float) -> int:
    """`cvt.rn.satfinite.e4m3x2.f32`: to nearest, ties to the even mantissa, beyond the largest: the largest."""
    if math.isnan(value):
        return 0x7F
    below = bisect.bisect_left(MIDDLES, abs(value))  # middles below it, and so the number to which it belongs
    is_tie = below < len(MIDDLES) and MIDDLES[below] == abs(value)
    return (0x80 if math.copysign(1.0, value) < 0 else 0) | (below + (below & 1) * is_tie)


def reference_scale(amax: float, largest: float, power_of_two: bool) -> float:
    """`compute_scale_from_amax` of recipe_common.cuh, epsilon 0."""
    if math.isinf(amax) or amax == 0 or math.isnan(amax):
        return 1.0
    scale = float32(448 / amax)  # a double quotient rounded to float32 is the float32 quotient
    if math.isinf(scale):
        scale = largest
    return 2.0 ** (math.frexp(scale)[1] - 1) if power_of_two else scale


def reference_block(values: list[float], largest: float, power_of_two: bool) -> tuple[list[int], float]:
    """Bytes and 1 / scale of a block; `fmaxf` leaves out what is not a number."""
    amax = max((abs(value) for value in values if not math.isnan(value)), default=0.0)
    scale = reference_scale(amax, largest, power_of_two)
    return [to_e4m3(float32(value * scale)) for value in values], float32(1 / scale)


def reference(values: Tensor, block_rows: int, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Bytes [R, K] and scale_inv of a matrix."""
    rows, columns = values.shape
    largest = LARGEST[values.dtype]
    data = torch.zeros(rows, columns, dtype=torch.uint8)
    scales = torch.zeros(-(-rows // block_rows), -(-columns // BLOCK))
    for i, j in itertools.product(range(scales.shape[0]), range(scales.shape[1])):
        part = (slice(i * block_rows, (i + 1) * block_rows), slice(j * BLOCK, (j + 1) * BLOCK))
        block = values[part]
        found, scales[i, j] = reference_block(block.flatten().tolist(), largest, power_of_two)
        data[part] = torch.tensor(found, dtype=torch.uint8).view(block.shape)
    return data, scales


# --- Against it. -------------------------------------------------------------------------------------------------------------------------


def bits(quantised: Quantised) -> Tensor:
    """Bytes, with one form of not-a-number."""
    found = quantised.data.view(torch.uint8)
    return torch.where(found == 0xFF, 0x7F, found)


def random_values(shape: tuple[int, ...], dtype: torch.dtype, seed: int, spread: float = 4.0) -> Tensor:
    """Values over many powers of two, some of them corners."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * torch.exp(spread * torch.randn(shape, generator=generator))
    return values.to(dtype)


def assert_same(quantised: Quantised, values: Tensor, block_rows: int, power_of_two: bool) -> None:
    data, scales = reference(values, block_rows, power_of_two)
    assert torch.equal(quantised.scale_inv, scales)
    assert torch.equal(bits(quantised), data)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("shape", [(128, 128), (130, 260), (1, 1), (256, 64), (3, 384)])
def test_a_weight_is_quantised_bit_by_bit_as_the_kernels_do(shape: tuple[int, int], power_of_two: bool, dtype: torch.dtype) -> None:
    values = random_values(shape, dtype, seed=sum(shape))
    assert_same(quantise_weight(values, power_of_two=power_of_two), values, BLOCK, power_of_two)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("shape", [(7, 128), (5, 300), (1, 1), (3, 64)])
def test_rows_are_quantised_bit_by_bit_as_the_kernels_do(shape: tuple[int, int], power_of_two: bool, dtype: torch.dtype) -> None:
    values = random_values(shape, dtype, seed=sum(shape))
    assert_same(quantise_rows(values, power_of_two=power_of_two), values, 1, power_of_two)


@given(
    st.lists(st.sampled_from(CORNERS) | st.floats(width=32), min_size=1, max_size=5),
    st.sampled_from(FLOATS),
    st.booleans(),
)
def test_corners_are_quantised_as_the_kernels_do(numbers: list[float], dtype: torch.dtype, power_of_two: bool) -> None:
    values = torch.tensor([numbers], dtype=torch.float64).to(torch.float32).to(dtype)
    assert_same(quantise_rows(values, power_of_two=power_of_two), values, 1, power_of_two)
    assert_same(quantise_weight(values, power_of_two=power_of_two), values, BLOCK, power_of_two)


@pytest.mark.parametrize("power_of_two", [True, False])
def test_scales_of_all_corners_and_of_many_maxima(power_of_two: bool) -> None:
    maxima = torch.tensor([abs(corner) for corner in CORNERS], dtype=torch.float32)
    maxima = torch.cat([maxima, random_values((3000,), torch.float32, seed=1, spread=12.0).abs()])
    found = scale_of_maximum(maxima, torch.float32, power_of_two=power_of_two)
    assert found.tolist() == [reference_scale(value, FLOAT32_MAX, power_of_two) for value in maxima.tolist()]


def test_every_number_of_e4m3_and_every_middle_between_two_is_rounded_as_the_hardware_does() -> None:
    values = torch.tensor([sign * value for value in (*POSITIVE, *MIDDLES) for sign in (1, -1)])
    values = torch.stack([values, torch.full_like(values, 448.0)], dim=1)  # a block each, of scale 1
    found = quantise_rows(values)
    assert found.scale_inv.unique().tolist() == [1.0]
    assert bits(found)[:, 0].tolist() == [to_e4m3(value) for value in values[:, 0].tolist()]


# --- Properties. -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_was_quantised_once_is_quantised_to_the_same_values(dtype: torch.dtype) -> None:
    values = random_values((256, 256), dtype, seed=3, spread=1.0)
    once = dequantise(quantise_weight(values))
    assert torch.equal(dequantise(quantise_weight(once)), once)
    rows = dequantise(quantise_rows(values))
    assert torch.equal(dequantise(quantise_rows(rows)), rows)


def test_bfloat16_holds_dequantised_values_exactly() -> None:
    quantised = quantise_weight(random_values((128, 256), torch.float32, seed=4, spread=1.0))
    assert torch.equal(dequantise(quantised, torch.bfloat16).float(), dequantise(quantised))


@pytest.mark.parametrize("quantise", [quantise_weight, quantise_rows])
def test_the_error_is_at_most_half_a_step(quantise: object) -> None:
    """Half of 2^-3 of the value, or half of a subnormal's step of 2^-9 over the scale."""
    values = random_values((256, 384), torch.float32, seed=5, spread=1.0)
    found = quantise_weight(values) if quantise is quantise_weight else quantise_rows(values)
    scales = dequantise(Quantised(torch.ones_like(found.data), found.scale_inv))
    assert bool(((dequantise(found) - values).abs() <= torch.maximum(values.abs() * 2.0**-4, scales * 2.0**-10)).all())


def test_a_transposed_weight_has_transposed_blocks() -> None:
    """Why one quantisation serves both the forward pass and the gradient of the input."""
    weight = random_values((384, 256), torch.float32, seed=6)
    once, transposed = quantise_weight(weight), quantise_weight(weight.t())
    assert torch.equal(transposed.scale_inv, once.scale_inv.t())
    assert torch.equal(transposed.data.view(torch.uint8), once.data.t().contiguous().view(torch.uint8))


def test_a_shard_cut_between_blocks_is_quantised_as_the_whole() -> None:
    weight = random_values((512, 384), torch.float32, seed=7)
    whole, shard = quantise_weight(weight), quantise_weight(weight[128:384, 256:])
    assert torch.equal(shard.data.view(torch.uint8), whole.data.view(torch.uint8)[128:384, 256:])
    assert torch.equal(shard.scale_inv, whole.scale_inv[1:3, 2:])


def test_larger_tensors_are_cut_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_values((640, 200), torch.bfloat16, seed=8)
    whole = [quantise_weight(weight), quantise_rows(weight)]
    monkeypatch.setattr("megatron_r1z.fp8.blocks.TILE_ELEMENTS", 128)
    for before, now in zip(whole, [quantise_weight(weight), quantise_rows(weight)], strict=True):
        assert torch.equal(now.data.view(torch.uint8), before.data.view(torch.uint8))
        assert torch.equal(now.scale_inv, before.scale_inv)


def test_rows_keep_their_leading_dimensions() -> None:
    values = random_values((2, 3, 200), torch.float32, seed=9)
    found, flat = quantise_rows(values), quantise_rows(values.view(6, 200))
    assert found.data.shape == (2, 3, 200)
    assert found.scale_inv.shape == (2, 3, 2)
    assert torch.equal(dequantise(found), dequantise(flat).view(2, 3, 200))


# --- Rounding without the bytes. ---------------------------------------------------------------------------------------------------------


def assert_rounded(values: Tensor) -> None:
    """All three ways, against the bytes; `equal_nan` because a not-a-number stays one."""
    for found, quantised in (
        (round_weight(values), quantise_weight(values)),
        (round_rows(values), quantise_rows(values)),
        (round_columns(values).t(), quantise_rows(values.t().contiguous())),
    ):
        torch.testing.assert_close(found, dequantise(quantised, values.dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(128, 128), (300, 200), (1, 1), (5, 256)])
def test_rounding_is_quantising_and_back(shape: tuple[int, int], dtype: torch.dtype) -> None:
    spread = 4.0 if dtype is not torch.float16 else 1.0
    assert_rounded(random_values(shape, dtype, seed=sum(shape), spread=spread))


@given(st.lists(st.sampled_from(CORNERS) | st.floats(width=32), min_size=1, max_size=5), st.sampled_from(FLOATS[:2]))
def test_corners_are_rounded_as_they_are_quantised(numbers: list[float], dtype: torch.dtype) -> None:
    assert_rounded(torch.tensor([numbers], dtype=torch.float64).to(torch.float32).to(dtype))


def test_rounding_larger_matrices_is_cut_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    values = random_values((1000, 384), torch.bfloat16, seed=11)
    whole = [round_weight(values), round_rows(values), round_columns(values)]
    monkeypatch.setattr("megatron_r1z.fp8.blocks.TILE_ELEMENTS", 384 * 128)
    for before, now in zip(whole, [round_weight(values), round_rows(values), round_columns(values)], strict=True):
        assert torch.equal(now, before)


def test_shapes_and_formats() -> None:
    found = quantise_weight(torch.randn(576, 1536))
    assert (found.data.shape, found.data.dtype, found.scale_inv.dtype) == ((576, 1536), torch.float8_e4m3fn, torch.float32)
    assert found.scale_inv.shape == scale_shape(576, 1536)
    assert found.data.is_contiguous()
    empty = quantise_rows(torch.zeros(0, 256))
    assert (empty.data.shape, empty.scale_inv.shape) == ((0, 256), (0, 2))


@pytest.mark.skipif(
    transformer_engine_version() is None,
    reason="transformer-engine is not installed: it must be absent on a CPU (megatron-core would use it), run this where it is",
)
@pytest.mark.parametrize("shape", [(256, 512), (192, 576), (576, 1536)])
def test_transformer_engines_own_tensor_reads_our_blocks(shape: tuple[int, int]) -> None:
    """Its class is plain torch and needs no GPU once it is imported. Its scales are padded to a multiple of 4 columns."""
    te = importlib.import_module("transformer_engine.pytorch.tensor.float8_blockwise_tensor")
    constants = importlib.import_module("transformer_engine.pytorch.constants")
    found = quantise_weight(random_values(shape, torch.bfloat16, seed=10, spread=1.0))
    rows, columns = found.scale_inv.shape
    padded = torch.nn.functional.pad(found.scale_inv, (0, -columns % 4))
    fp8_dtype = next(key for key, value in constants.TE_DType_To_Torch.items() if value is torch.float8_e4m3fn)
    tensor = te.Float8BlockwiseQTensorStorage(
        rowwise_data=found.data.view(torch.uint8),
        rowwise_scale_inv=padded,
        columnwise_data=None,
        columnwise_scale_inv=None,
        fp8_dtype=fp8_dtype,
        quantizer=te.Float8BlockQuantizer(fp8_dtype, rowwise=True, columnwise=False),
        is_2D_scaled=True,
    )
    assert tensor._quantizer.get_scale_shape(shape, columnwise=False) == (rows, columns + -columns % 4)
    assert torch.equal(tensor.dequantize(dtype=torch.float32), dequantise(found))
