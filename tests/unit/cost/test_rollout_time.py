"""Seconds of a rollout against a simulation of an engine, event by event."""

from __future__ import annotations

import random

import pytest

from megatron_r1z.cost.assumptions import DEFAULT
from megatron_r1z.cost.rollout_time import RolloutTime
from tests.unit.cost.runs import SHAPE, cost


def rollout_time(response: float = 400.0, **rollout: int) -> RolloutTime:
    run = cost(response=response, rollout=rollout)
    assert run.cluster is not None
    return RolloutTime(run.config, run.shape, run.lengths, run.engine, run.cluster, run.assumptions)


def simulated(model: RolloutTime, seed: int) -> float:
    """Decode seconds of an engine that starts a waiting response whenever one ends, one step at a time."""
    draw, budget = random.Random(seed), model.lengths.budget
    waiting = [min(budget, max(1, round(draw.expovariate(1 / model.lengths.scale)))) for _ in range(round(model.responses))]
    running: list[list[int]] = []  # tokens so far, tokens to come
    seconds = 0.0
    while waiting or running:
        while waiting and len(running) < model.concurrent:
            running.append([0, waiting.pop()])
        context = model.lengths.prompt + sum(done for done, _ in running) / len(running)
        seconds += model.decode_step(len(running), context).total
        running = [[done + 1, left - 1] for done, left in running if left > 1]
    return seconds


@pytest.mark.parametrize(
    ("response", "places", "prompts"),
    [(400.0, 64, 256), (400.0, 16, 256), (150.0, 32, 512), (900.0, 64, 256), (400.0, 256, 256)],
    ids=["a queue", "a long queue", "short responses", "most are cut off", "no queue"],
)
def test_decoding_takes_as_long_as_a_simulated_engine(response: float, places: int, prompts: int) -> None:
    model = rollout_time(response, max_concurrent_sequences=places, prompts_per_iteration=prompts)
    runs = [simulated(model, seed) for seed in range(3)]
    assert model.rollout().decode.total == pytest.approx(sum(runs) / len(runs), rel=0.04)


def test_a_step_waits_for_memory_or_for_arithmetic_whichever_takes_longer() -> None:
    model = rollout_time()
    few, many = model.decode_step(1, 1), model.decode_step(100_000, 1)
    assert few.compute == 0 < few.weights
    assert many.weights + many.cache == 0 < many.compute
    assert few.weights == pytest.approx(model._read_weights / (3000e9 * DEFAULT.memory_share))


def test_the_embedding_is_read_only_where_it_is_the_output_layer() -> None:
    model = rollout_time()
    assert model.memory.weights - model._read_weights == SHAPE.vocab_size * SHAPE.hidden_size * 2


def test_the_cache_limits_how_many_run_at_once() -> None:
    model = rollout_time(kv_cache_bytes=64 << 20, prompts_per_iteration=256)
    held = (64 << 20) // model.memory.cache_bytes_per_token
    assert model.concurrent == int(held / 450) < 256


def test_engines_share_the_prompts() -> None:
    one, two = rollout_time(), rollout_time(tensor_parallel_size=2)
    assert (one.num_engines, two.num_engines) == (8, 4)
    assert two.responses == 2 * one.responses
    assert two.decode_step(8, 100).tensor_parallel > 0 == one.decode_step(8, 100).tensor_parallel
