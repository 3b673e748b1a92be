"""Log-probs from hidden states against log-softmax of the full matrix of logits in float64."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_r1z.policy.logprob import tile_shape, vocab_parallel_logprobs

HIDDEN = 8
GARBAGE = 50.0
"""What padding rows of the weight hold: enough to win every softmax they are let into."""
WHOLE = 1 << 20
"""Bytes of a tile that takes every matrix of these tests at once."""
EXACT = {torch.float64: 1e-12, torch.float32: 2e-5}
HALF_UNIT = 2.0**-8
"""Of the last place of bf16, relative: what rounding to it changes at most."""


def make_case(
    seed: int,
    rows: int,
    vocab_size: int,
    padding: int,
    temperature: float | None = 1.0,
    tile_bytes: int = 64,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Random hidden states, weight and targets; without a temperature each row has its own."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab_size + padding, HIDDEN, generator=generator, dtype=dtype)
    weight[vocab_size:] = GARBAGE
    own = 0.3 + 1.5 * torch.rand(rows, generator=generator)
    return {
        "hidden": torch.randn(rows, HIDDEN, generator=generator, dtype=dtype),
        "weight": weight,
        "targets": torch.randint(vocab_size, (rows,), generator=generator),
        "factors": torch.randn(rows, generator=generator, dtype=dtype),
        "entropy_factors": torch.randn(rows, generator=generator, dtype=dtype),
        "temperature": own if temperature is None else temperature,
        "vocab_size": vocab_size,
        "tile_bytes": tile_bytes,
    }


def evaluate(case: dict[str, Any], hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The tested function on one rank."""
    return vocab_parallel_logprobs(
        hidden,
        weight,
        case["targets"],
        temperature=case["temperature"],
        vocab_size=case["vocab_size"],
        vocab_start=0,
        group=None,
        tile_bytes=case["tile_bytes"],
    )


def compute(case: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tested function and the gradients of the log-probs and of the entropies, each row times its factor."""
    hidden = case["hidden"].to(dtype).requires_grad_()
    weight = case["weight"].to(dtype).requires_grad_()
    logprobs, entropy = evaluate(case, hidden, weight)
    assert logprobs.dtype == entropy.dtype == torch.promote_types(weight.dtype, torch.float32)
    gradients = gradients_of(case, logprobs, entropy, hidden, weight)
    assert all(gradient.dtype == weight.dtype for gradient in gradients.values())
    return {"logprobs": logprobs.detach(), "entropy": entropy.detach(), **gradients}


def gradients_of(case: dict[str, Any], logprobs: Tensor, entropy: Tensor, hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Of log-probs alone, as without an entropy bonus, and of log-probs and entropies together."""
    alone = (logprobs * case["factors"].to(logprobs)).sum()
    both = alone + (entropy * case["entropy_factors"].to(logprobs)).sum()
    grad_hidden, grad_weight = torch.autograd.grad(alone, [hidden, weight], retain_graph=True)
    both_hidden, both_weight = torch.autograd.grad(both, [hidden, weight])
    return {"hidden": grad_hidden, "weight": grad_weight, "hidden_of_both": both_hidden, "weight_of_both": both_weight}


def expect(case: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The same by log-softmax of the whole matrix in float64, from inputs that were rounded to `dtype`."""
    hidden = case["hidden"].to(dtype).double().requires_grad_()
    weight = case["weight"].to(dtype).double().requires_grad_()
    temperature = torch.as_tensor(case["temperature"], dtype=torch.float64).reshape(-1, 1)
    all_logprobs = torch.log_softmax(hidden @ weight[: case["vocab_size"]].t() / temperature, dim=1)
    logprobs = all_logprobs.gather(1, case["targets"][:, None]).squeeze(1)
    entropy = -(all_logprobs.exp() * all_logprobs).sum(1)
    return {"logprobs": logprobs.detach(), "entropy": entropy.detach(), **gradients_of(case, logprobs, entropy, hidden, weight)}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].double(), value.double(), rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@given(
    seed=st.integers(0, 999),
    rows=st.integers(0, 9),
    vocab_size=st.integers(1, 40),
    padding=st.integers(0, 5),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.5, None]),
    tile_bytes=st.integers(1, 500),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_values_entropy_and_gradients(
    seed: int, rows: int, vocab_size: int, padding: int, temperature: float | None, tile_bytes: int, dtype: torch.dtype
) -> None:
    case = make_case(seed, rows, vocab_size, padding, temperature, tile_bytes, dtype)
    assert_same(compute(case), expect(case), EXACT[dtype])


@given(seed=st.integers(0, 999), tile_bytes=st.integers(1, 3000))
def test_the_size_of_the_tiles_changes_nothing(seed: int, tile_bytes: int) -> None:
    whole = make_case(seed, 9, 31, 1, None, WHOLE)
    assert_same(compute(whole | {"tile_bytes": tile_bytes}), compute(whole), 1e-13)


@given(rows=st.integers(0, 10**6), elements=st.integers(0, 10**8))
def test_a_tile_keeps_to_its_budget(rows: int, elements: int) -> None:
    height, width = tile_shape(rows, elements)
    assert 1 <= height <= max(rows, 1)
    assert width >= 1
    assert height * width <= max(elements, 1)
    assert height * (width + 1) > elements, "as many columns as there is room for"


@given(seed=st.integers(0, 999))
def test_a_row_sees_its_own_temperature_only(seed: int) -> None:
    case = make_case(seed, 5, 23, 2, None)
    together = compute(case)
    for row, temperature in enumerate(case["temperature"].tolist()):
        alone = compute(case | {"temperature": temperature})
        for name in ("logprobs", "entropy", "hidden", "hidden_of_both"):
            torch.testing.assert_close(together[name][row], alone[name][row], rtol=1e-12, atol=1e-12)


@given(seed=st.integers(0, 999), padding=st.integers(1, 9))
def test_padding_rows_get_no_probability_and_no_gradient(seed: int, padding: int) -> None:
    bare, padded = make_case(seed, 5, 23, 0), make_case(seed, 5, 23, padding)
    padded |= {name: bare[name] for name in ("hidden", "targets", "factors", "entropy_factors")}
    padded["weight"][:23] = bare["weight"]
    found, without = compute(padded), compute(bare)
    for name in ("weight", "weight_of_both"):
        assert torch.equal(found[name][23:], torch.zeros(padding, HIDDEN, dtype=torch.float64))
        found[name] = found[name][:23]
    assert_same(found, without, 1e-13)


def test_no_rows_at_all() -> None:
    found = compute(make_case(0, 0, 11, 2, None))
    assert found["logprobs"].shape == found["entropy"].shape == (0,)
    assert found["hidden"].shape == (0, HIDDEN)
    assert not found["weight"].any()
    assert not found["weight_of_both"].any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-10)])
def test_large_logits_do_not_overflow(dtype: torch.dtype, tolerance: float) -> None:
    case = make_case(0, 4, 11, 2, dtype=dtype)
    case["hidden"] = case["hidden"] * 1e3
    assert_same(compute(case), expect(case), tolerance)


@pytest.mark.parametrize("tile_bytes", [32, WHOLE])
def test_columns_without_any_probability(tile_bytes: int) -> None:
    """A tile that is as good as empty beside another one, in either order."""
    case = make_case(0, 4, 12, 0, tile_bytes=tile_bytes)
    case["hidden"][:, 0] = torch.tensor([1e3, -1e3, 1e3, -1e3])
    case["weight"][:6, 0], case["weight"][6:, 0] = 1.0, -1.0
    assert_same(compute(case), expect(case), 1e-10)


@given(
    seed=st.integers(0, 999),
    rows=st.integers(1, 9),
    vocab_size=st.integers(1, 40),
    padding=st.integers(0, 5),
    temperature=st.sampled_from([0.3, 1.0, None]),
    tile_bytes=st.integers(1, 500),
)
def test_bf16_weights_are_operands_and_nothing_else(
    seed: int, rows: int, vocab_size: int, padding: int, temperature: float | None, tile_bytes: int
) -> None:
    """Log-probs and entropies are those of a float64 evaluation of the same bf16 operands, as in float32."""
    case = make_case(seed, rows, vocab_size, padding, temperature, tile_bytes, torch.bfloat16)
    assert_same_but_for_bf16(compute(case), case, parts=1)


def assert_same_but_for_bf16(found: dict[str, Tensor], case: dict[str, Any], parts: int) -> None:
    """Log-probs and entropies to float32's rounding; gradients to two roundings to bf16, of the derivative by logits and of the result.

    `parts` is of how many rounded parts the gradient of the hidden states is the sum. Rounding by half a unit at most gives a bound that is
    proven: of each product by its operands' absolute values, of the result by itself.
    """
    expected, sizes = expect(case), operand_sizes(case)
    assert_same({name: found[name] for name in ("logprobs", "entropy")}, {name: expected[name] for name in ("logprobs", "entropy")}, 2e-5)
    for name, size in sizes.items():
        rounded = size if parts > 1 and name.startswith("hidden") else expected[name].abs()
        bound = HALF_UNIT * (size + rounded * (1 + HALF_UNIT)) + 2e-5 * (1 + size)
        assert ((found[name].double() - expected[name]).abs() <= bound).all(), name


def operand_sizes(case: dict[str, Any]) -> dict[str, Tensor]:
    """For each gradient the product of its operands' absolute values, float64: what a relative error of one of them is a share of."""
    hidden, weight = case["hidden"].double(), case["weight"].double()
    temperature = torch.as_tensor(case["temperature"], dtype=torch.float64).reshape(-1, 1)
    products = (hidden @ weight[: case["vocab_size"]].t()).requires_grad_()
    all_logprobs = torch.log_softmax(products / temperature, dim=1)
    logprobs = all_logprobs.gather(1, case["targets"][:, None]).squeeze(1)
    alone = (logprobs * case["factors"]).sum()
    both = alone + (-(all_logprobs.exp() * all_logprobs).sum(1) * case["entropy_factors"]).sum()
    sizes = {}
    for suffix, loss in (("", alone), ("_of_both", both)):
        slopes = torch.autograd.grad(loss, products, retain_graph=True)[0].abs()
        sizes[f"hidden{suffix}"] = slopes @ weight[: case["vocab_size"]].abs()
        sizes[f"weight{suffix}"] = torch.nn.functional.pad(slopes, (0, weight.shape[0] - slopes.shape[1])).t() @ hidden.abs()
    return sizes


def test_gradient_accumulates_over_micro_batches_like_one() -> None:
    case = make_case(3, 8, 17, 0)
    halves = [
        compute(case | {name: case[name][part] for name in ("hidden", "targets", "factors", "entropy_factors")})
        for part in (slice(0, 5), slice(5, 8))
    ]
    whole = compute(case)
    for of in ("", "_of_both"):
        torch.testing.assert_close(halves[0][f"weight{of}"] + halves[1][f"weight{of}"], whole[f"weight{of}"])
        torch.testing.assert_close(torch.cat([half[f"hidden{of}"] for half in halves]), whole[f"hidden{of}"])


def test_a_vocabulary_over_two_ranks_is_one_vocabulary(tmp_path: Path, run_ranks: Callable[..., None]) -> None:
    """Padding of any size, up to a second rank that has nothing else."""
    choose = random.Random(0)
    cases = [make_case(2, 7, 19, 3, 0.7), make_case(3, 0, 22, 0), make_case(4, 7, 10, 10, None, WHOLE)]
    for seed in range(30):
        vocab_size = choose.randint(1, 40)
        padding = choose.randrange(vocab_size % 2, vocab_size + 1, 2)
        dtype = choose.choice(list(EXACT))
        temperature = choose.choice([0.3, 1.0, None])
        cases.append(make_case(seed, choose.randint(0, 9), vocab_size, padding, temperature, choose.randint(1, 500), dtype))
        cases.append(make_case(seed, choose.randint(1, 9), vocab_size, padding, temperature, choose.randint(1, 500), torch.bfloat16))
    torch.save(cases, tmp_path / "cases.pt")
    run_ranks(Path(__file__).with_name("vocab_ranks.py"), 2, str(tmp_path))
    results = [torch.load(tmp_path / f"rank_{rank}.pt") for rank in range(2)]
    for case, *parts in zip(cases, *results, strict=True):
        joined = {
            "logprobs": parts[0]["logprobs"],
            "entropy": parts[0]["entropy"],
            **{name: parts[0][name].double() + parts[1][name].double() for name in ("hidden", "hidden_of_both")},
            **{name: torch.cat([part[name] for part in parts]) for name in ("weight", "weight_of_both")},
        }
        for name in ("logprobs", "entropy"):
            assert torch.equal(parts[0][name], parts[1][name])
        if case["weight"].dtype is torch.bfloat16:
            assert_same_but_for_bf16(joined, case, parts=2)
            continue
        tolerance = EXACT[case["weight"].dtype]
        assert_same(joined, compute(case), tolerance / 2)
        assert_same(joined, expect(case), tolerance)


@pytest.mark.parametrize("tile_bytes", [8, 100, WHOLE])
def test_inputs_are_left_as_they_are(tile_bytes: int) -> None:
    """The function works in place on its own matrices only."""
    case = make_case(5, 6, 13, 2, None, tile_bytes)
    before = {name: value.clone() for name, value in case.items() if isinstance(value, Tensor)}
    compute(case)
    assert all(torch.equal(case[name], value) for name, value in before.items())


class Allocations(TorchDispatchMode):
    """What the operations inside it make."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        """Elements of the largest tensor."""
        self.largest_float32 = 0
        """Of the largest in float32."""
        self.products = 0
        """Matrix products."""
        self._storages: list[StorageWeakRef] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.products += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
            self.largest_float32 = max(self.largest_float32, result.numel() if result.dtype is torch.float32 else 0)
            self._storages.append(StorageWeakRef(result.untyped_storage()))
        return result

    def alive(self) -> set[int]:
        """Memory that is still in use."""
        return {storage.cdata for storage in self._storages if not storage.expired()}


def identity(tensor: Tensor) -> int:
    """Of its memory."""
    return StorageWeakRef(tensor.untyped_storage()).cdata


@pytest.mark.parametrize("has_bonus", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_as_large_as_tokens_times_vocabulary(dtype: torch.dtype, has_bonus: bool) -> None:
    """Neither a matrix of all logits nor one of all rows or of all columns: the largest is a gradient, or a tile."""
    rows, vocab_size, elements = 200, 300, 1000
    case = make_case(0, rows, vocab_size, 4, None, 4 * elements, torch.float32)
    hidden, weight = (case[name].to(dtype).requires_grad_() for name in ("hidden", "weight"))
    with Allocations() as forward:
        logprobs, entropy = evaluate(case, hidden, weight)
    total = (logprobs * case["factors"]).sum() + (entropy.sum() if has_bonus else 0)
    with Allocations() as backward:
        total.backward()
    gradients = weight.numel(), hidden.numel()
    assert forward.largest <= max(elements, *gradients)
    assert backward.largest == max(elements, *gradients)
    assert elements < max(gradients) < rows * vocab_size / 10
    if dtype is torch.bfloat16:
        assert forward.largest_float32 <= elements
        assert backward.largest_float32 == hidden.numel() < weight.numel(), "a part of the weight at a time in float32"


def test_without_gradient_nothing_is_kept_and_each_tile_is_one_product() -> None:
    """With gradient, temperature and normaliser of each row are kept, and each tile is three products more."""
    case = make_case(0, 50, 60, 4, None, 4 * 500, torch.float32)
    hidden, weight = case["hidden"].requires_grad_(), case["weight"].requires_grad_()
    inputs = {identity(value) for value in case.values() if isinstance(value, Tensor)}
    with Allocations() as free, torch.no_grad():
        outputs = evaluate(case, hidden, weight)
    assert all(output.grad_fn is None for output in outputs)
    assert free.alive() - inputs == {identity(output) for output in outputs}
    height, width = tile_shape(50, 500)
    tiles = -(-50 // height) * -(-60 // width)
    assert free.products == tiles > 4
    with Allocations() as bound:
        logprobs, entropy = evaluate(case, hidden, weight)
        kept = bound.alive() - inputs - {identity(logprobs), identity(entropy)}
        logprobs.sum().backward()
    assert bound.products == 4 * tiles
    assert len(kept) == 2
