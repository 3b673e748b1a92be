"""The local spec's layers against the textbook, in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("megatron.core")

from megatron.core.packed_seq_params import PackedSeqParams

from megatron_r1z.policy import local_layers
from megatron_r1z.policy.local_layers import PackedAttention, RMSNorm

HEAD_DIM = 6


def pack(lengths: list[int]) -> PackedSeqParams:
    boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths)
    )


def textbook(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of one sequence, head by head; query head h reads key-value head h // (heads / kv heads)."""
    length, heads = query.shape[:2]
    queries_per_group = heads // key.shape[1]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    outputs = []
    for head in range(heads):
        scores = query[:, head] @ key[:, head // queries_per_group].t() * scale
        outputs.append(torch.softmax(scores.masked_fill(future, -torch.inf), dim=1) @ value[:, head // queries_per_group])
    return torch.cat(outputs, dim=1)


def make_inputs(seed: int, lengths: list[int], heads: int, kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(sum(lengths), count, HEAD_DIM, generator=generator, dtype=torch.float64).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]


@given(
    seed=st.integers(0, 999),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    scale=st.sampled_from([None, 0.3]),
    short=st.sampled_from([0, 5, local_layers.SHORT]),
)
def test_packed_attention_is_attention_of_each_sequence(
    seed: int, lengths: list[int], heads: tuple[int, int], scale: float | None, short: int
) -> None:
    """In a grid, one by one, and whichever of the two its longest sequence asks for."""
    inputs = make_inputs(seed, lengths, *heads)
    layer = PackedAttention(SimpleNamespace(kv_channels=HEAD_DIM), softmax_scale=scale)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_layers, "SHORT", short)
        found = layer(*inputs, None, packed_seq_params=pack(lengths))
    boundaries = pairwise(torch.tensor([0, *lengths]).cumsum(0).tolist())
    expected = torch.cat([textbook(*(item[start:end] for item in inputs), scale or 1 / math.sqrt(HEAD_DIM)) for start, end in boundaries])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    for gradient, reference in zip(gradients, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_context_parallel_ranks_attend_as_one_does(run_ranks: Callable[..., None], tmp_path: Path, num_ranks: int) -> None:
    """Outputs and the gradients of queries, keys and values, of which other ranks' tokens have a share."""
    draw, cases = random.Random(num_ranks), []
    for seed, heads in enumerate([(1, 1), (4, 4), (4, 2), (6, 1)]):
        lengths = [2 * num_ranks * draw.randint(1, 6) for _ in range(draw.randint(1, 4))]
        inputs = make_inputs(seed, lengths, *heads)
        weights = torch.randn(sum(lengths), heads[0] * HEAD_DIM, generator=torch.Generator().manual_seed(seed + 9), dtype=torch.float64)
        cases.append({"lengths": lengths, "inputs": [item.detach() for item in inputs], "weights": weights})
    torch.save(cases, tmp_path / "cases.pt")
    run_ranks(Path(__file__).with_name("context_ranks.py"), num_ranks, str(tmp_path))
    ranks = [torch.load(tmp_path / f"rank_{rank}.pt") for rank in range(num_ranks)]
    for number, case in enumerate(cases):
        inputs = [item.requires_grad_() for item in case["inputs"]]
        boundaries = pairwise(torch.tensor([0, *case["lengths"]]).cumsum(0).tolist())
        expected = torch.cat([textbook(*(item[start:end] for item in inputs), 1 / math.sqrt(HEAD_DIM)) for start, end in boundaries])
        gradients = torch.autograd.grad((expected * case["weights"]).sum(), inputs)
        found = [rank[number] for rank in ranks]
        order = torch.cat([part["index"] for part in found]).argsort()
        torch.testing.assert_close(torch.cat([part["output"] for part in found])[order], expected, rtol=1e-10, atol=1e-12)
        for name, gradient in enumerate(gradients):
            mine = torch.cat([part["gradients"][name] for part in found])[order]
            torch.testing.assert_close(mine, gradient, rtol=1e-10, atol=1e-12)


def make_config(**fields: Any) -> Any:
    return SimpleNamespace(params_dtype=torch.float64, sequence_parallel=False) if not fields else SimpleNamespace(**fields)


@given(seed=st.integers(0, 999), eps=st.sampled_from([1e-6, 1e-5, 1e-1]))
def test_rms_norm(seed: int, eps: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = RMSNorm(make_config(), 12, eps=eps)
    layer.weight.data.copy_(torch.randn(12, generator=generator, dtype=torch.float64))
    hidden = torch.randn(5, 2, 12, generator=generator, dtype=torch.float64) * 0.1
    expected = hidden / torch.sqrt((hidden**2).mean(-1, keepdim=True) + eps) * layer.weight
    torch.testing.assert_close(layer(hidden), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_starts_at_one_and_tells_megatron_about_sequence_parallelism(sequence_parallel: bool, dtype: torch.dtype) -> None:
    config = make_config(params_dtype=dtype, sequence_parallel=sequence_parallel)
    layer = RMSNorm(config, hidden_size=12, eps=1e-6, persist_layer_norm=False)
    assert torch.equal(layer.weight, torch.ones(12, dtype=dtype))
    assert layer.weight.sequence_parallel is sequence_parallel


def test_rms_norm_of_bf16_is_rounded_once() -> None:
    """transformers' Llama normalises in float32 as well."""
    layer = RMSNorm(make_config(params_dtype=torch.bfloat16, sequence_parallel=False), 256, eps=1e-6)
    hidden = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = hidden.double() / torch.sqrt((hidden.double() ** 2).mean(-1, keepdim=True) + 1e-6)
    assert (layer(hidden).double() == exact.bfloat16().double()).double().mean() > 0.99
