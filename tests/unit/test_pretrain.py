"""Documents to steps."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("megatron.core")

from megatron_r1z.data.corpus import Document
from megatron_r1z.layout.topology import Coordinates, Topology
from megatron_r1z.objective import PolicyTokens
from megatron_r1z.packing import MicroBatch, PackingRules
from megatron_r1z.pretrain import loss_sums, make_batch, make_samples, mean_loss, next_token_terms

pytestmark = pytest.mark.usefixtures("one_rank")


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


VOCABULARY = 50
BIGRAMS = torch.log_softmax(torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0)), dim=1)
"""Log-probs of a token by the one before it: a model whose loss can be told without packing."""


class BigramRank:
    """One rank of a policy that is `BIGRAMS`."""

    def __init__(self, rules: PackingRules, where: Coordinates) -> None:
        self.topology = SimpleNamespace(coordinates=lambda _rank: where)
        self.packing_rules = lambda: rules
        self._has_output = where.pp_rank == 1

    def response_logprobs(self, batches: tuple[MicroBatch, ...]) -> list[torch.Tensor | None]:
        if not self._has_output:
            return [None] * len(batches)
        return [BIGRAMS[batch.token_ids_T[batch.rows_R], batch.targets_R] for batch in batches]


def make_rank(policy: Any, loss_on: str, documents_per_step: int) -> Any:
    corpus = SimpleNamespace(loss_on=loss_on, documents_per_step=documents_per_step)
    config, state = SimpleNamespace(corpus=corpus), SimpleNamespace(step=4)
    return SimpleNamespace(config=config, state=state, policy=policy, stopped=lambda: False)


@given(
    documents=st.lists(st.tuples(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20), st.integers(0, 20)), max_size=9),
    loss_on=st.sampled_from(["all", "response"]),
    sizes=st.tuples(st.integers(1, 3), st.sampled_from([1, 2]), st.sampled_from([1, 2])),
    budget=st.sampled_from([40, 64, 1000]),
    at_once=st.integers(1, 10),
    pad=st.booleans(),
)
def test_the_evaluation_loss_is_the_same_for_every_layout_and_packing(
    documents: list[tuple[list[int], int]], loss_on: str, sizes: tuple[int, int, int], budget: int, at_once: int, pad: bool
) -> None:
    """Sum and count of all ranks, each taken by itself, are those of a float64 loop over the documents."""
    texts = [Document(tuple(token_ids), min(prompt, len(token_ids))) for token_ids, prompt in documents]
    pairs = [
        (text.token_ids[place - 1], text.token_ids[place])
        for text in texts
        for place in range(max(text.prompt_length if loss_on == "response" else 0, 1), len(text.token_ids))
    ]
    expected = -sum(BIGRAMS[before, token].double().item() for before, token in pairs)
    dp, cp, tp = sizes
    rules = PackingRules(dp, budget, context_parallel_size=cp, pad_sequences=pad)
    ranks = [Coordinates(t, c, d, p) for t in range(tp) for c in range(cp) for d in range(dp) for p in range(2)]
    sums = [sums for where in ranks if (sums := loss_sums(make_rank(BigramRank(rules, where), loss_on, at_once), texts)) is not None]
    assert len(sums) == len(ranks)
    assert sum(tokens for _, tokens in sums) == len(pairs)
    assert sum(loss for loss, _ in sums) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_the_evaluation_loss_is_a_mean_over_tokens_not_over_documents() -> None:
    rank = make_rank(BigramRank(PackingRules(1, 40), Coordinates(0, 0, 0, 1)), "all", 1)
    texts = [Document((1, 2), 0), Document((3, 4, 5, 6, 7), 0)]
    pairs = [(1, 2), (3, 4), (4, 5), (5, 6), (6, 7)]
    assert mean_loss(rank, texts) == pytest.approx(-sum(BIGRAMS[pair].double().item() for pair in pairs) / 5, rel=1e-12)
