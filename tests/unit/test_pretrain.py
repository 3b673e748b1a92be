"""Documents to steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("megatron.core")

from megatron_r1z.corpus import Document
from megatron_r1z.layout.topology import Topology
from megatron_r1z.objective import PolicyTokens
from megatron_r1z.packing import PackingRules
from megatron_r1z.pretrain import make_batch, make_samples, next_token_terms


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("ranks") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_run(loss_on: str) -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(corpus=SimpleNamespace(loss_on=loss_on)),
        state=SimpleNamespace(step=4),
        policy=SimpleNamespace(packing_rules=lambda: PackingRules(1, 40), topology=Topology(1)),
    )


@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=6),
    loss_on=st.sampled_from(["all", "response"]),
)
def test_every_token_that_something_precedes_is_predicted_once_with_weight_one(lengths: list[tuple[int, int]], loss_on: str) -> None:
    documents = [
        Document(tuple(range(100 * index + 1, 100 * index + 1 + prompt + rest)), prompt) for index, (prompt, rest) in enumerate(lengths)
    ]
    run = make_run(loss_on)
    batch = make_batch(run, make_samples(run, documents))
    first = [max(document.prompt_length, 1) if loss_on == "response" else 1 for document in documents]
    expected = Counter(token for document, start in zip(documents, first, strict=True) for token in document.token_ids[start:])
    assert Counter(token for item in batch.micro_batches for token in item.targets_R.tolist()) == expected
    assert batch.denominator == sum(item.denominator for item in batch.micro_batches) == max(expected.total(), 1)
    for item in batch.micro_batches:
        assert torch.equal(item.weights_R, torch.ones(item.targets_R.numel()))
        assert torch.equal(item.token_ids_T[item.rows_R + 1], item.targets_R)


def test_the_loss_of_a_step_is_the_mean_negative_logprob() -> None:
    run = make_run("all")
    batch = make_batch(run, make_samples(run, [Document((1, 2, 3, 4), 0), Document((5, 6), 0)]))
    (item,) = batch.micro_batches
    logprobs = torch.tensor([-1.0, -2.0, -3.0, -6.0])
    terms = next_token_terms(PolicyTokens(logprobs, torch.zeros(4), torch.zeros(4), None), item)
    assert terms.losses_R.sum().item() / batch.denominator == pytest.approx(3.0)
