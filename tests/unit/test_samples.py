"""From graded groups to samples: baselines, masks, filters, lost responses, penalties, and the batches that come of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1z.loop import make_batches, make_estimates
from megatron_r1z.objective import AGGREGATIONS, OBJECTIVES, centred, estimated
from megatron_r1z.samples import Estimates, choose_groups, make_samples
from megatron_r1z.types import (
    FinishReason,
    GradedGroup,
    Verdict,
    VerdictKind,
)
from tests.unit.loop_parts import BUDGET, DEFAULT, Policies, graded, make_run, some_groups

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize("name", OBJECTIVES)
@given(rewards=st.lists(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=4, max_size=4), min_size=1, max_size=4))
def test_samples_are_the_responses_in_group_order(name: str, rewards: list[list[float]]) -> None:
    groups = [graded(3 * number, row) for number, row in enumerate(rewards)]
    samples = make_samples(groups, OBJECTIVES[name], 0.7, DEFAULT)
    assert [sample.sample_id for sample in samples] == [f"{item.group.group_id}/{index}" for item in groups for index in range(4)]
    responses = [(item.group.prompt, response) for item in groups for response in item.group.responses]
    for sample, (prompt, response) in zip(samples, responses, strict=True):
        assert sample.token_ids[: sample.prompt_length] == prompt.token_ids
        assert sample.token_ids[sample.prompt_length :] == response.token_ids
        assert sample.engine_logprobs == response.logprobs
        assert (sample.response_length, sample.policy_version, sample.temperature) == (response.length, 7, 0.7)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_advantages_are_taken_within_each_group(name: str) -> None:
    groups = [graded(0, [1.0, 0.0, 0.0]), graded(1, [1.0, 1.0, 1.0]), graded(2, [0.0, 0.0, 1.0])]
    samples = make_samples(groups, OBJECTIVES[name], 0.7, DEFAULT)
    expected = [OBJECTIVES[name].advantages([verdict.reward for verdict in item.verdicts]) for item in groups]
    assert [sample.advantage for sample in samples] == [value for row in expected for value in row]
    assert [sample.advantage for sample in samples[3:6]] == [0.0] * 3
    assert samples[0].advantage == samples[8].advantage > 0 > samples[1].advantage


@pytest.mark.parametrize("name", OBJECTIVES)
@given(rewards=st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=4, max_size=4), cut=st.frozensets(st.integers(0, 3)))
def test_masked_responses_have_no_gradient_and_stay_in_baseline_and_denominator(
    name: str, rewards: list[float], cut: frozenset[int]
) -> None:
    run = make_run(name, prompts=1, samples=4, batch=4)
    groups = [graded(0, rewards, cut)]
    plain, masked = (make_samples(groups, OBJECTIVES[name], 0.7, replace(DEFAULT, mask_truncated=masks)) for masks in (False, True))
    assert [sample.advantage for sample in plain] == OBJECTIVES[name].advantages(rewards)
    assert [sample.advantage for sample in masked] == [0.0 if index in cut else plain[index].advantage for index in range(4)]
    ((plain_batch,), _), ((masked_batch,), _) = (make_batches(samples, run, 0) for samples in (plain, masked))
    assert masked_batch.denominator == plain_batch.denominator
    trained = {sample_id for item in masked_batch.micro_batches for sample_id in item.sample_ids}
    assert trained == {sample.sample_id for index, sample in enumerate(plain) if sample.advantage and index not in cut}


@pytest.mark.parametrize("name", OBJECTIVES)
@given(rewards=st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=3, max_size=3), min_size=4, max_size=4), masks=st.booleans())
def test_filtered_groups_are_counted_neither_in_n_nor_in_the_denominator(name: str, rewards: list[list[float]], masks: bool) -> None:
    """As if the step had the other groups alone: masked responses of those count."""
    run = make_run(name, batch=12)
    groups = [graded(number, row, frozenset({1})) for number, row in enumerate(rewards)]
    mixed = [item for item in groups if item.is_mixed]
    samples = make_samples(groups, run.objective, 0.7, replace(DEFAULT, filter_groups=True, mask_truncated=masks))
    ((batch,), _) = make_batches(samples, run, 0)
    lengths = [response.length for item in mixed for response in item.group.responses]
    assert batch.num_samples == len(lengths)
    assert batch.denominator == sum(item.denominator for item in batch.micro_batches) == run.objective.denominator(lengths, BUDGET) > 0
    assert [sample.advantage for sample in samples] == [
        sample.advantage for sample in make_samples(groups, run.objective, 0.7, replace(DEFAULT, mask_truncated=masks))
    ]


def test_a_kl_term_or_an_entropy_bonus_has_all_counted_samples_trained() -> None:
    """Also those with advantage 0, and not those that were filtered out."""
    run = make_run(batch=12)
    groups = [graded(0, [1.0, 0.0, 0.0]), graded(1, [1.0] * 3), graded(2, [0.0] * 3, frozenset({1})), graded(3, [0.0, 1.0, 1.0])]
    for switches in ({"kl_coef": 0.1}, {"entropy_coef": 0.1}):
        for filters in (False, True):
            algorithm = replace(DEFAULT, filter_groups=filters, **switches)  # type: ignore[arg-type]
            ((batch,), _) = make_batches(make_samples(groups, run.objective, 0.7, algorithm), run, 0)
            trained = {sample_id for item in batch.micro_batches for sample_id in item.sample_ids}
            assert {int(sample_id[0]) for sample_id in trained} == ({0, 3} if filters else {0, 1, 2, 3})
            assert len(trained) == batch.num_samples == (6 if filters else 12)


LOST = {
    "aborted": lambda response, verdict: (replace(response, finish_reason=FinishReason.ABORT), verdict),
    "aborted before its first token": lambda response, verdict: (
        replace(response, finish_reason=FinishReason.ABORT, token_ids=(), logprobs=(), text=""),
        verdict,
    ),
    "without a token": lambda response, verdict: (replace(response, token_ids=(), logprobs=(), text=""), verdict),
    "timeout": lambda response, _verdict: (response, Verdict(VerdictKind.TIMEOUT, 0.0, "7")),
    "error": lambda response, _verdict: (response, Verdict(VerdictKind.ERROR, 0.0, None)),
}
"""What may become of a response that says nothing of the policy."""


def with_lost(item: GradedGroup, lost: Sequence[str | None]) -> GradedGroup:
    pairs = [
        (response, verdict) if how is None else LOST[how](response, verdict)
        for response, verdict, how in zip(item.group.responses, item.verdicts, lost, strict=True)
    ]
    responses, verdicts = zip(*pairs, strict=True)
    return GradedGroup(replace(item.group, responses=responses), verdicts)


def without_lost(item: GradedGroup, lost: Sequence[str | None]) -> GradedGroup:
    kept = [index for index, how in enumerate(lost) if how is None]
    responses, verdicts = ([row[index] for index in kept] for row in (item.group.responses, item.verdicts))
    return GradedGroup(replace(item.group, responses=tuple(responses)), tuple(verdicts))


SWITCHES = (
    {},
    {"mask_truncated": True},
    {"filter_groups": True},
    {"kl_coef": 0.1},
    {"entropy_coef": 0.1, "filter_groups": True},
    {"kl_coef": 0.5, "kl_in": "reward", "kl_estimator": "k1"},
)


@pytest.mark.parametrize("name", AGGREGATIONS)
@given(
    rewards=st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=3, max_size=3), min_size=4, max_size=4),
    lost=st.lists(st.lists(st.none() | st.sampled_from(list(LOST)), min_size=3, max_size=3), min_size=4, max_size=4),
    switches=st.sampled_from(SWITCHES),
)
def test_a_step_with_responses_that_were_not_judged_is_the_step_without_them(
    name: str, rewards: list[list[float]], lost: list[list[str | None]], switches: dict[str, Any]
) -> None:
    """Baseline, N, D and what is trained on; groups may be left with one response, or with none."""
    if name == "ppo":
        switches = {key: value for key, value in switches.items() if key not in ("mask_truncated", "filter_groups")}
    whole = [graded(number, row, frozenset({1})) for number, row in enumerate(rewards)]
    found, expected = (
        step_over([change(item, row) for item, row in zip(whole, lost, strict=True)], name, switches)
        for change in (with_lost, without_lost)
    )
    assert found == expected


def step_over(groups: list[GradedGroup], name: str, switches: dict[str, Any]) -> tuple[Any, ...]:
    """What a step over all samples of the groups is, whatever they are called."""
    run = make_run(name, batch=12)
    run.policy = Policies()  # type: ignore[assignment]
    if name == "ppo":
        run.critic = SimpleNamespace(values=lambda batches: [item.targets_R.float() / 500 for item in batches])  # type: ignore[assignment]
    algorithm = replace(run.config.algorithm, **switches)
    run.config = replace(run.config, algorithm=algorithm)
    samples = make_samples(groups, run.objective, 0.7, algorithm, make_estimates(groups, run))
    assert len(samples) == sum(len(item.group.responses) for item in groups), "rollouts/ has a row for each"
    ((batch,), _) = make_batches(samples, run, 0) if any(sample.is_counted for sample in samples) else (([None]), None)
    if batch is None:
        assert not any(sample.has_gradient for sample in samples)
        return (0, set(), [item.is_mixed for item in groups])
    tokens = {
        row
        for item in batch.micro_batches
        for row in zip(
            *(values.tolist() for values in (item.targets_R, item.advantages_R, item.weights_R, item.values_R, item.returns_R)), strict=True
        )
    }
    return batch.num_samples, tokens, [item.is_mixed for item in groups], batch.denominator


def test_a_step_of_which_nothing_was_judged_is_a_step_without_a_gradient() -> None:
    for name in AGGREGATIONS:
        run = make_run(name, batch=12)
        run.critic = SimpleNamespace(values=lambda batches: [item.targets_R.float() for item in batches])  # type: ignore[assignment]
        groups = [with_lost(graded(number, [1.0, 0.0, 0.0]), list(LOST)[number % 3 : number % 3 + 3]) for number in range(4)]
        samples = make_samples(groups, run.objective, 0.7, run.config.algorithm, make_estimates(groups, run))
        ((batch,), step_of) = make_batches(samples, run, 0)
        assert (batch.num_samples, len(step_of)) == (0, 12)
        assert batch.denominator >= 1
        assert sum(item.targets_R.numel() for item in batch.micro_batches) == 0


def test_dynamic_sampling_goes_by_the_responses_that_were_judged() -> None:
    """Else a time-out among right responses would make a group count as mixed, and be chosen before one that is."""
    alike = with_lost(graded(0, [1.0, 1.0, 1.0]), [None, "timeout", None])
    mixed = graded(1, [1.0, 0.0, 1.0])
    assert [item.is_mixed for item in (alike, mixed)] == [False, True]
    assert choose_groups([alike, mixed], 1) == [mixed]


def test_the_kl_penalty_is_taken_off_the_reward_of_each_response_before_its_advantage() -> None:
    run, groups = make_run(batch=12), some_groups(4, 3)
    run.policy = Policies()  # type: ignore[assignment]
    assert make_estimates(groups, run) == Estimates()
    algorithm = replace(run.config.algorithm, kl_coef=0.5, kl_in="reward", kl_estimator="k1")
    run.config = replace(run.config, algorithm=algorithm)
    estimates = make_estimates(groups, run)
    assert estimates.divergences is not None
    assert estimates.values is None
    samples = make_samples(groups, run.objective, 0.7, algorithm, estimates)
    for item, start in zip(groups, range(0, 12, 3), strict=True):
        divergences = [[token / 1000 for token in response.token_ids] for response in item.group.responses]  # policy minus reference
        for index, expected in enumerate(divergences):
            assert estimates.divergences[f"{item.group.group_id}/{index}"] == pytest.approx(expected)
        rewards = [verdict.reward - 0.5 * sum(of_tokens) for verdict, of_tokens in zip(item.verdicts, divergences, strict=True)]
        assert [sample.advantage for sample in samples[start : start + 3]] == pytest.approx(centred(rewards), abs=1e-6)
    assert not any(sample.has_further_terms for sample in samples)


def test_under_ppo_advantages_are_estimated_by_token_from_the_critic_and_from_divergences() -> None:
    run, groups = make_run("ppo", batch=12), some_groups(4, 3)
    run.policy = Policies()  # type: ignore[assignment]
    run.critic = SimpleNamespace(values=lambda batches: [item.targets_R.float() / 500 for item in batches])  # type: ignore[assignment]
    algorithm = replace(run.config.algorithm, kl_coef=0.5, kl_in="reward", kl_estimator="k1", gae_lambda=0.5)
    run.config = replace(run.config, algorithm=algorithm)
    samples = iter(make_samples(groups, run.objective, 0.7, algorithm, make_estimates(groups, run)))
    for item in groups:
        for response, verdict in zip(item.group.responses, item.verdicts, strict=True):
            sample, tokens = next(samples), response.token_ids
            rewards = [-0.5 * token / 1000 for token in tokens]
            rewards[-1] += verdict.reward
            assert sample.values == pytest.approx([token / 500 for token in tokens])
            assert sample.advantages == pytest.approx(estimated(rewards, sample.values, 0.5), abs=1e-6)
            assert sample.returns == pytest.approx([sum(pair) for pair in zip(sample.advantages, sample.values, strict=True)])
            assert sample.has_gradient
    assert next(samples, None) is None


def test_a_batch_has_the_values_and_returns_of_its_tokens() -> None:
    run, groups = make_run("ppo", batch=12), some_groups(4, 3)
    values = {f"{group}/{index}": [0.1 * place + index for place in range(index + 1)] for group in range(4) for index in range(3)}
    samples = make_samples(groups, run.objective, 0.7, run.config.algorithm, Estimates(values=values))
    by_token = {
        token: (value, aim)
        for sample in samples
        for token, value, aim in zip(sample.token_ids[sample.prompt_length :], sample.values, sample.returns, strict=True)
    }
    (batch,), _ = make_batches(samples, run, 0)
    found = {
        token: pair
        for item in batch.micro_batches
        for token, *pair in zip(item.targets_R.tolist(), item.values_R.tolist(), item.returns_R.tolist(), strict=True)
    }
    assert set(found) == set(by_token)
    assert all(found[token] == pytest.approx(pair) for token, pair in by_token.items())
