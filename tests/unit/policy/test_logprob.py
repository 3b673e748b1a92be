"""Log-probs from hidden states against the full matrix of logits in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_r1z.policy.logprob import vocab_parallel_logprobs

HIDDEN = 8
GARBAGE = 50.0
"""What padding rows of the weight hold: enough to win every softmax they are let into."""


def make_case(seed: int, rows: int, vocab_size: int, padding: int, temperature: float = 1.0, chunk_rows: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab_size + padding, HIDDEN, generator=generator)
    weight[vocab_size:] = GARBAGE
    return {
        "hidden": torch.randn(rows, HIDDEN, generator=generator),
        "weight": weight,
        "targets": torch.randint(vocab_size, (rows,), generator=generator),
        "factors": torch.randn(rows, generator=generator),
        "temperature": temperature,
        "vocab_size": vocab_size,
        "chunk_rows": chunk_rows,
    }


def compute(case: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tested function and the gradients of the log-probs, each row times its factor."""
    hidden = case["hidden"].to(dtype).requires_grad_()
    weight = case["weight"].to(dtype).requires_grad_()
    logprobs, entropy = vocab_parallel_logprobs(
        hidden,
        weight,
        case["targets"],
        temperature=case["temperature"],
        vocab_size=case["vocab_size"],
        vocab_start=0,
        group=None,
        chunk_rows=case["chunk_rows"],
    )
    assert not entropy.requires_grad
    assert logprobs.dtype == entropy.dtype == torch.float32
    grad_hidden, grad_weight = torch.autograd.grad((logprobs * case["factors"]).sum(), [hidden, weight])
    return {"logprobs": logprobs.detach(), "entropy": entropy, "hidden": grad_hidden, "weight": grad_weight}


def expect(case: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The same by log-softmax of the whole matrix in float64, from inputs that were rounded to `dtype`."""
    hidden = case["hidden"].to(dtype).double().requires_grad_()
    weight = case["weight"].to(dtype).double().requires_grad_()
    all_logprobs = torch.log_softmax(hidden @ weight[: case["vocab_size"]].t() / case["temperature"], dim=1)
    logprobs = all_logprobs.gather(1, case["targets"][:, None]).squeeze(1)
    grad_hidden, grad_weight = torch.autograd.grad((logprobs * case["factors"].double()).sum(), [hidden, weight])
    entropy = -(all_logprobs.exp() * all_logprobs).sum(1)
    return {"logprobs": logprobs.detach(), "entropy": entropy.detach(), "hidden": grad_hidden, "weight": grad_weight}


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
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.5]),
    chunk_rows=st.integers(1, 10),
)
def test_values_entropy_and_gradients(seed: int, rows: int, vocab_size: int, padding: int, temperature: float, chunk_rows: int) -> None:
    case = make_case(seed, rows, vocab_size, padding, temperature, chunk_rows)
    assert_same(compute(case), expect(case), 2e-5)


@given(seed=st.integers(0, 999), chunk_rows=st.integers(1, 9))
def test_the_size_of_the_chunks_changes_nothing(seed: int, chunk_rows: int) -> None:
    whole = make_case(seed, 9, 31, 1, chunk_rows=1024)
    assert_same(compute(whole | {"chunk_rows": chunk_rows}), compute(whole), 1e-5)


@given(seed=st.integers(0, 999), padding=st.integers(1, 9))
def test_padding_rows_get_no_probability_and_no_gradient(seed: int, padding: int) -> None:
    bare, padded = make_case(seed, 5, 23, 0), make_case(seed, 5, 23, padding)
    padded |= {name: bare[name] for name in ("hidden", "targets", "factors")}
    padded["weight"][:23] = bare["weight"]
    found, without = compute(padded), compute(bare)
    assert torch.equal(found["weight"][23:], torch.zeros(padding, HIDDEN))
    assert_same(found | {"weight": found["weight"][:23]}, without, 1e-5)


def test_no_rows_at_all() -> None:
    found = compute(make_case(0, 0, 11, 2))
    assert found["logprobs"].shape == found["entropy"].shape == (0,)
    assert found["hidden"].shape == (0, HIDDEN)
    assert not found["weight"].any()


def test_large_logits_do_not_overflow() -> None:
    case = make_case(0, 4, 11, 2)
    case["hidden"] = case["hidden"] * 1e3
    assert_same(compute(case), expect(case), 1e-3)


@settings(max_examples=20)
@given(seed=st.integers(0, 99))
def test_bf16_weights_get_a_float32_softmax(seed: int) -> None:
    """Only the matrix product and the stored gradients are rounded: far closer than a softmax in bf16 would be."""
    case = make_case(seed, 6, 29, 3)
    found, expected = compute(case, torch.bfloat16), expect(case, torch.bfloat16)
    assert found["hidden"].dtype == found["weight"].dtype == torch.bfloat16
    assert_same(found, expected, 6e-2)
    totals = torch.zeros(1)
    for target in range(29):
        totals = totals + compute(case | {"targets": torch.full((6,), target)}, torch.bfloat16)["logprobs"].exp()
    torch.testing.assert_close(totals, torch.ones(6), rtol=1e-5, atol=1e-5)


def test_gradient_accumulates_over_micro_batches_like_one() -> None:
    case = make_case(3, 8, 17, 0)
    halves = [compute(case | {name: case[name][part] for name in ("hidden", "targets", "factors")}) for part in (slice(0, 5), slice(5, 8))]
    whole = compute(case)
    torch.testing.assert_close(halves[0]["weight"] + halves[1]["weight"], whole["weight"])
    torch.testing.assert_close(torch.cat([half["hidden"] for half in halves]), whole["hidden"])


def test_a_vocabulary_over_two_ranks_is_one_vocabulary(tmp_path: Path, run_ranks: Callable[..., None]) -> None:
    """The last case gives the second rank nothing but padding."""
    cases = [make_case(1, 7, 22, 0), make_case(2, 7, 19, 3, 0.7), make_case(3, 0, 22, 0), make_case(4, 7, 10, 10, 1.3, 100)]
    torch.save(cases, tmp_path / "cases.pt")
    run_ranks(Path(__file__).with_name("vocab_ranks.py"), 2, str(tmp_path))
    results = [torch.load(tmp_path / f"rank_{rank}.pt") for rank in range(2)]
    for case, *parts in zip(cases, *results, strict=True):
        joined = {
            "logprobs": parts[0]["logprobs"],
            "entropy": parts[0]["entropy"],
            "hidden": parts[0]["hidden"] + parts[1]["hidden"],
            "weight": torch.cat([part["weight"] for part in parts]),
        }
        for name in ("logprobs", "entropy"):
            assert torch.equal(parts[0][name], parts[1][name])
        assert_same(joined, compute(case), 1e-5)
        assert_same(joined, expect(case), 2e-5)


@pytest.mark.parametrize("chunk_rows", [1, 4, 1024])
def test_inputs_are_left_as_they_are(chunk_rows: int) -> None:
    """The function works in place on its own matrices only."""
    case = make_case(5, 6, 13, 2, chunk_rows=chunk_rows)
    before = {name: value.clone() for name, value in case.items() if isinstance(value, Tensor)}
    compute(case)
    assert all(torch.equal(case[name], value) for name, value in before.items())
