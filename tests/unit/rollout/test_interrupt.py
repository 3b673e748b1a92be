"""A rollout that is given up: what the engine is told, and when. The real engine is stopped in `tests/loop/test_train.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

from megatron_r1z.config import RolloutConfig
from megatron_r1z.errors import Interrupted
from megatron_r1z.host.rank import StopFlag
from megatron_r1z.rollout.vllm_engine import STEPS_BETWEEN_LOOKS, EngineSettings, VllmEngine
from megatron_r1z.speed import Machine, engine_speed


@dataclass
class Output:
    request_id: str
    finished: bool = True


@dataclass
class Steps:
    """An engine whose requests end after so many steps each; `flag` is set at a step of its own."""

    lengths: list[int]
    flag: StopFlag
    stop_at: int | None
    taken: int = 0
    aborted: list[str] = field(default_factory=list)

    def has_unfinished_requests(self) -> bool:
        return not self.aborted and self.taken < max(self.lengths)

    def step(self) -> list[Output]:
        self.flag.requested |= self.taken == self.stop_at
        self.taken += 1
        return [Output(str(number), length == self.taken) for number, length in enumerate(self.lengths) if length >= self.taken]

    def abort_request(self, requests: list[str]) -> None:
        self.aborted += requests


def engine_on(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("megatron_r1z.rollout.vllm_engine._start", lambda _settings: type("LLM", (), {"llm_engine": steps}))
    monkeypatch.setattr("megatron_r1z.rollout.vllm_engine.record_segments", lambda: None)
    return VllmEngine(
        EngineSettings("", "fp32", 0, 1, 1, 8, 8, 1, 0, speed=engine_speed(RolloutConfig(), 8, Machine(False, False))), steps.flag
    )


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12), stop_at=st.none() | st.integers(0, 60))
def test_after_a_request_to_stop_all_requests_are_dropped_within_a_few_steps(lengths: list[int], stop_at: int | None) -> None:
    steps = Steps(lengths, StopFlag(), stop_at)
    with pytest.MonkeyPatch.context() as monkeypatch:
        engine = engine_on(steps, monkeypatch)
    requests = [str(number) for number in range(len(lengths))]
    looks = range(0, max(lengths), STEPS_BETWEEN_LOOKS)
    seen = next((step for step in looks if stop_at is not None and step > stop_at), None)
    if seen is None:
        assert [output.request_id for output in engine._outputs(requests)] == requests
        assert (steps.taken, steps.aborted) == (max(lengths), [])
        return
    with pytest.raises(Interrupted):
        engine._outputs(requests)
    assert (steps.taken, steps.aborted) == (seen, requests)
