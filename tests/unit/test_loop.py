"""From graded groups to optimizer steps."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_r1z import loop
from megatron_r1z.data.prompts import PromptSet, PromptStream
from megatron_r1z.errors import Interrupted, TrainingError
from megatron_r1z.layout.topology import Topology
from megatron_r1z.loop import Run, RunState, make_batches, sample_groups, train
from megatron_r1z.objective import OBJECTIVES
from megatron_r1z.packing import GlobalBatch, MicroBatch, PackingRules
from megatron_r1z.protocols import Sampling
from megatron_r1z.record.metrics import Metrics, SilentLog
from megatron_r1z.samples import choose_groups, make_samples
from megatron_r1z.types import (
    FinishReason,
    GradedGroup,
    Group,
    Prompt,
    RefitReceipt,
    Response,
    Sample,
    UpdateStats,
    Verdict,
    VerdictKind,
)
from tests.unit.loop_parts import BUDGET, DEFAULT, STATS, graded, make_run, some_groups

pytestmark = pytest.mark.usefixtures("one_rank")


class Scripted:
    """Questions, engine and grader of a run in one: each round answers as its row of rewards says."""

    def __init__(self, rounds: list[list[list[float]]]) -> None:
        self._rounds = rounds
        self.drawn = 0
        self.seeds: list[int] = []

    def draw(self, count: int) -> list[Prompt]:
        self.drawn += count
        return [Prompt(f"q/{self.drawn - count + index}", "?", (1,), ("7",), "q") for index in range(count)]

    def generate(self, prompts: list[Prompt], sampling: Sampling, policy_version: int) -> list[Group]:
        assert policy_version == 3
        self.seeds.append(sampling.seed)
        groups = [graded(index, self._rounds[len(self.seeds) - 1][index]).group for index in range(len(prompts))]
        return [replace(group, prompt=prompt) for group, prompt in zip(groups, prompts, strict=True)][::-1]

    def grade(self, groups: list[Group]) -> list[GradedGroup]:
        rewards = self._rounds[len(self.seeds) - 1]
        return [GradedGroup(group, graded(0, rewards[group.group_id % len(rewards)]).verdicts) for group in groups]


@given(data=st.data(), rounds=st.integers(1, 4), prompts=st.integers(1, 4))
def test_groups_are_sampled_until_enough_are_mixed_or_the_rounds_are_used_up(data: st.DataObject, rounds: int, prompts: int) -> None:
    rewards = data.draw(
        st.lists(
            st.lists(st.sampled_from([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]), min_size=prompts, max_size=prompts),
            min_size=rounds,
            max_size=rounds,
        )
    )
    run, script = make_run(prompts=prompts, samples=2, batch=2 * prompts), Scripted(rewards)
    run.config = replace(run.config, algorithm=replace(run.config.algorithm, sampling_rounds=rounds))
    run.prompts = run.engine = run.grader = script  # type: ignore[assignment]
    sampled = sample_groups(run, 3)
    assert sampled is not None
    found, num_rounds = sampled
    mixed = [sum(row[0] != row[1] for part in rewards[: number + 1] for row in part) for number in range(rounds)]
    assert num_rounds == next((number + 1 for number in range(rounds) if mixed[number] >= prompts), rounds)
    assert (script.drawn, len(set(script.seeds))) == (num_rounds * prompts, num_rounds)
    assert script.seeds[0] == run.sampling(3).seed
    assert [item.group.group_id for item in found] == list(range(num_rounds * prompts))
    assert [item.group.prompt.prompt_id for item in found] == [f"q/{index}" for index in range(num_rounds * prompts)]
    assert [[verdict.reward for verdict in item.verdicts] for item in found] == [row for part in rewards[:num_rounds] for row in part]
    chosen = choose_groups(found, prompts)
    assert len(chosen) == prompts
    assert chosen == [item for item in found if item in chosen]
    assert sum(item.is_mixed for item in chosen) == min(prompts, mixed[num_rounds - 1])
    first_mixed = [item for item in found if item.is_mixed][:prompts]
    assert [item for item in chosen if item.is_mixed] == first_mixed
    if rounds == 1:
        assert chosen == found


def test_no_further_round_is_begun_when_the_run_was_asked_to_stop() -> None:
    run, script = make_run(prompts=1, samples=2, batch=2, stopped=True), Scripted([[[0.0, 0.0]]] * 3)
    run.config = replace(run.config, algorithm=replace(run.config.algorithm, sampling_rounds=3))
    run.prompts = run.engine = run.grader = script  # type: ignore[assignment]
    assert sample_groups(run, 3) is None
    assert script.drawn == 1


def ids(step_of: dict[str, int]) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for sample_id, step in step_of.items():
        found.setdefault(step, set()).add(sample_id)
    return found


@given(seed=st.integers(0, 9), iteration=st.integers(0, 99), batch=st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_batches_are_a_partition(seed: int, iteration: int, batch: int) -> None:
    run = make_run(seed=seed, batch=batch)
    samples = make_samples(some_groups(4, 3), run.objective, 0.7, DEFAULT)
    batches, step_of = make_batches(samples, run, iteration)
    assert sorted(step_of) == sorted(sample.sample_id for sample in samples)
    assert {step: len(members) for step, members in ids(step_of).items()} == dict.fromkeys(range(12 // batch), batch)
    assert [item.num_samples for item in batches] == [batch] * (12 // batch)
    by_id = {sample.sample_id: sample for sample in samples}
    for step, item in enumerate(batches):
        members = [by_id[sample_id] for sample_id in ids(step_of)[step]]
        expected = Counter(token for sample in members if sample.advantage for token in sample.token_ids[sample.prompt_length :])
        assert Counter(token for part in item.micro_batches for token in part.targets_R.tolist()) == expected


@pytest.mark.parametrize(("algorithm", "denominator"), [("drgrpo", 6 * BUDGET), ("rloo", 6 * BUDGET), ("grpo", 6)])
def test_the_denominator_counts_all_samples_of_the_step(algorithm: str, denominator: int) -> None:
    run = make_run(algorithm)
    for groups in (some_groups(4, 3), [graded(number, [1.0] * 3) for number in range(4)]):
        for batch in make_batches(make_samples(groups, run.objective, 0.7, DEFAULT), run, 0)[0]:
            assert batch.denominator == sum(item.denominator for item in batch.micro_batches) == denominator


def test_the_denominator_of_token_mean_is_the_tokens_of_the_step() -> None:
    run = make_run("token_mean")
    samples = make_samples(some_groups(4, 3), run.objective, 0.7, DEFAULT)
    batches, step_of = make_batches(samples, run, 0)
    for step, batch in enumerate(batches):
        assert batch.denominator == sum(sample.response_length for sample in samples if step_of[sample.sample_id] == step)


def test_token_weights_are_those_of_the_objective() -> None:
    run = make_run("grpo")
    for batch in make_batches(make_samples(some_groups(4, 3), run.objective, 0.7, DEFAULT), run, 0)[0]:
        for item in batch.micro_batches:
            lengths = 1 + item.targets_R % 100 // 10
            assert torch.equal(item.weights_R, 1.0 / lengths)


def test_the_order_follows_from_seed_and_iteration_alone() -> None:
    samples = make_samples(some_groups(16, 4), OBJECTIVES["drgrpo"], 0.7, DEFAULT)

    def order(seed: int, iteration: int) -> dict[str, int]:
        return make_batches(samples, make_run(prompts=16, samples=4, batch=16, seed=seed), iteration)[1]

    assert order(0, 3) == order(0, 3)
    assert len({tuple(sorted(order(seed, iteration).items())) for seed in range(3) for iteration in range(4)}) == 12


def test_the_samples_of_a_group_are_scattered_over_the_steps() -> None:
    """As in OAT, which permutes the whole buffer."""
    _, step_of = make_batches(
        make_samples(some_groups(16, 4), OBJECTIVES["drgrpo"], 0.7, DEFAULT), make_run(prompts=16, samples=4, batch=16), 0
    )
    groups = [{step_of[f"{group}/{index}"] for index in range(4)} for group in range(16)]
    assert sum(len(steps) > 1 for steps in groups) > 12


def test_a_single_step_has_everything() -> None:
    run = make_run(batch=12)
    samples = make_samples(some_groups(4, 3), run.objective, 0.7, DEFAULT)
    batches, step_of = make_batches(samples, run, 5)
    assert len(batches) == 1
    assert set(step_of.values()) == {0}


def test_the_order_of_the_samples_is_left_as_it_is() -> None:
    """They go to disk in group order after this."""
    samples: list[Sample] = make_samples(some_groups(4, 3), OBJECTIVES["drgrpo"], 0.7, DEFAULT)
    before = list(samples)
    make_batches(samples, make_run(), 0)
    assert samples == before


def test_sampling_has_its_own_seed_in_every_iteration() -> None:
    seeds = [make_run(seed=seed).sampling(iteration).seed for seed in (0, 1, 2) for iteration in range(100)]
    assert len(set(seeds)) == len(seeds)
    sampling = make_run().sampling(0)
    assert (sampling.num_samples, sampling.max_tokens, sampling.stop) == (3, BUDGET, ("</answer>",))


def test_iterations_go_on_from_the_state_and_end_when_asked(tmp_path: Path) -> None:
    run = make_run()
    seen = []
    for iteration in run.iterations():
        seen.append(iteration)
        run.state = SimpleNamespace(iteration=iteration + 1)  # type: ignore[assignment]
    assert seen == [3, 4]
    assert list(make_run(stopped=True).iterations()) == []


class Heard(SilentLog):
    """A log that remembers."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.said: list[str] = []

    def write(self, unit: str, number: int, metrics: Metrics) -> None:
        self.rows.append({unit: number, **metrics})

    def say(self, line: str) -> None:
        self.said.append(line)


def test_the_row_of_an_iteration_is_over_the_tokens_of_its_steps_and_what_teaches_nothing_is_said_once() -> None:
    run = make_run()
    run.log, run.state = Heard(), RunState(1, 3, {})
    stats = [replace(STATS, entropy=value, num_tokens=tokens) for value, tokens in ((1.0, 30), (4.0, 10), (math.nan, 0))]
    unformatted = Verdict(VerdictKind.UNFORMATTED, 0.0, None)
    groups = [replace(item, verdicts=(unformatted,) * 3) for item in some_groups(4, 3)]
    for _ in range(2):
        loop._record(run, {}, stats, [], RefitReceipt(1, 0, 0.0, (), ()))
        loop._advise(run, groups, make_samples(groups, run.objective, 0.7, DEFAULT))
    *steps, iteration = run.log.rows[:4]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert [row.get("update/entropy_nats") for row in steps] == [1.0, 4.0, None]
    assert (iteration["iteration"], iteration["update/entropy_nats"], iteration["update/trained_tokens"]) == (1, 1.75, 40)
    assert [line.split(" ")[1:3] for line in run.log.said] == [["12", "of"], ["no", "sample"]]


def test_waiting_for_the_groups_of_other_ranks_is_not_grading(monkeypatch: pytest.MonkeyPatch) -> None:
    run, script = make_run(prompts=1, samples=2, batch=2), Scripted([[[0.0, 1.0]]])
    run.prompts = run.engine = run.grader = script  # type: ignore[assignment]
    clock = iter(range(100))
    monkeypatch.setattr("megatron_r1z.record.metrics.time.perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr("megatron_r1z.loop.ranks.gather", lambda items: [next(clock) for _ in range(7)] and items)
    sample_groups(run, 3)
    assert run.watch.lap() == {"time/rollout_s": 1.0, "time/grade_s": 1.0, "time/gather_s": 10.0}


class Course:
    """All parts of a run but its loop, in one: what they do depends on the weights, and a stop may be asked for at any of their calls.

    `checkpoints` is what is on disk: weights and state by iteration; `rows` what was logged, by iteration.
    """

    topology = Topology(1)
    has_moments = True
    finds_answers = False

    def __init__(self, checkpoints: dict[int, tuple[int, dict[str, Any]]], rows: dict[int, dict[str, float]], stop_at: int | None) -> None:
        self.disk, self.rows, self.stop_at = checkpoints, rows, stop_at
        self.requested = False
        self.events: list[str] = []
        self.weights = 1
        self.engine_weights = 0

    def note_event(self, name: str) -> None:
        self.events.append(name)
        self.requested |= len(self.events) - 1 == self.stop_at

    def mix(self, *values: object) -> int:
        return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=4).digest(), "big")

    # engine and grader

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, policy_version: int) -> list[Group]:
        self.note_event("rollout" if sampling.top_k == -1 and sampling.seed > 10**6 else "evaluation")
        if self.requested:
            raise Interrupted
        groups = []
        for index, prompt in enumerate(prompts):
            tokens = [
                self.mix(self.engine_weights, prompt.prompt_id, sampling.seed, number) % 90 + 1 for number in range(sampling.num_samples)
            ]
            responses = [Response("r", (token,), (-float(token),), FinishReason.STOP, policy_version) for token in tokens]
            groups.append(Group(index, prompt, tuple(responses)))
        return groups

    def grade(self, groups: Sequence[Group]) -> list[GradedGroup]:
        self.note_event("grade")
        if self.requested:
            raise Interrupted
        return [GradedGroup(item, tuple(self.verdict(response) for response in item.responses)) for item in groups]

    def verdict(self, response: Response) -> Verdict:
        is_right = response.token_ids[0] % 2 == 0
        return Verdict(VerdictKind.CORRECT if is_right else VerdictKind.WRONG, float(is_right), None)

    # policy

    def packing_rules(self) -> PackingRules:
        return PackingRules(1, 64)

    def response_logprobs(self, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        return [item.engine_logprobs_R for item in batches]

    def with_logprobs(self, batches: Sequence[GlobalBatch]) -> Sequence[GlobalBatch]:
        self.note_event("log-probs")
        return batches

    def update(self, batch: GlobalBatch) -> UpdateStats:
        self.note_event("step")
        tokens = [token for item in batch.micro_batches for token in item.targets_R.tolist()]
        self.weights = self.mix(self.weights, tokens)
        figures = {item.name: 0.0 for item in dataclasses.fields(UpdateStats) if item.name not in ("skipped", "non_finite")}
        return UpdateStats(**figures | {"loss": float(self.weights)}, skipped=False)  # type: ignore[arg-type]

    def refit(self, policy_version: int) -> RefitReceipt:
        self.note_event("refit")
        self.engine_weights = self.weights
        return RefitReceipt(policy_version, 64 + policy_version, 0.0, (), ())

    # checkpoints and log

    def path(self, step: int) -> Path:
        return Path(f"step_{step}")

    def save(self, step: int, _policy: object, state: dict[str, Any], _critic: object) -> Path:
        self.note_event("save")
        self.disk[step] = self.weights, json.loads(json.dumps(state))
        return self.path(step)

    def note(self, step: int, state: dict[str, Any]) -> None:
        self.note_event("note")
        self.disk[step] = self.disk[step][0], json.loads(json.dumps(state))

    def write(self, unit: str, number: int, metrics: dict[str, float]) -> None:
        if unit == "iteration":
            row = self.rows.setdefault(number, {})
            figures = {name: value for name, value in metrics.items() if not name.startswith("time/")}
            assert not set(row) & set(figures), "logged twice"
            row |= figures

    def say(self, _line: str) -> None: ...
    def phase(self, _name: str) -> None: ...
    def row(self, _cells: object) -> None: ...


def course_of(course: Course, folder: Path) -> Run:
    """A run at the newest of the checkpoints of `course`, or at its beginning; as `made_run` makes it."""
    config = make_run(batch=4, prompts=4, samples=2).config
    config = replace(
        config,
        algorithm=replace(config.algorithm, iterations=5, sampling_rounds=2),
        evaluation=replace(config.evaluation, every=2),
        checkpoint=replace(config.checkpoint, every=3),
        logging=replace(config.logging, folder=str(folder), rollouts=False),
    )
    questions = [Prompt(f"q/{index}", "?", (1,), ("7",), "q") for index in range(7)]
    stream = PromptStream([(questions, 1.0)], 0)
    state, saved = RunState(0, 0, stream.to_state(), put_off=("evaluation",)), None
    if course.disk:
        course.weights, tree = course.disk[max(course.disk)]
        state = saved = RunState.from_tree(tree)
        stream.restore(state.prompts)
    for number in [number for number in course.rows if number > state.iteration or saved is None]:
        del course.rows[number]
    parts: Any = dict.fromkeys(("policy", "engine", "grader", "checkpoints", "log", "stop_flag"), course)
    evaluation = (PromptSet("held", questions[:2], 1.0, 0),)
    return Run(
        config=config, critic=None, refit=course.refit, prompts=stream, stop=(), evaluation=evaluation, state=state, saved=saved, **parts
    )


@pytest.fixture(scope="module")
def unbroken_course(tmp_path_factory: pytest.TempPathFactory, one_rank: None) -> Course:
    course = Course({}, {}, None)
    assert train(course_of(course, tmp_path_factory.mktemp("unbroken")))
    assert (sorted(course.disk), sorted(course.rows)) == ([3, 5], [0, 1, 2, 3, 4, 5])
    return course


def test_a_run_stopped_at_any_call_loses_nothing_and_goes_on_to_the_same_end(unbroken_course: Course, tmp_path: Path) -> None:
    """After the request only the steps that are left of the iteration, and the checkpoint; the rest of it is made up for."""
    for stop_at, at in enumerate(unbroken_course.events):
        first = Course({}, {}, stop_at)
        run = course_of(first, tmp_path)
        is_done = train(run)
        after = first.events[stop_at + 1 :]
        left = after.index("save") if "save" in after else len(after)
        assert set(after[:left]) <= ({"step"} if at == "step" else set()), (at, after)
        assert after[left:] in ([], ["save"]), (at, after)
        finished = first.events.count("refit") - 1 if at not in ("step", "refit") else None
        assert first.disk.keys() >= ({run.state.iteration} if run.state.iteration else set())
        if first.disk:
            weights, tree = first.disk[run.state.iteration]
            assert (weights, RunState.from_tree(tree)) == (first.weights, run.state)
            assert finished is None or run.state.iteration >= finished
        second = Course(first.disk, first.rows, None)
        assert train(course_of(second, tmp_path))
        assert not is_done or set(second.events) <= {"refit"}
        assert second.weights == unbroken_course.weights
        assert second.disk[5] == unbroken_course.disk[5]
        assert second.rows == unbroken_course.rows, at


@given(first=st.integers(0, 60), second=st.integers(0, 60))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_run_may_be_stopped_again_and_again(unbroken_course: Course, tmp_path: Path, first: int, second: int) -> None:
    course = Course({}, {}, first)
    train(course_of(course, tmp_path))
    for stop_at in (second, 0, 1, None):
        course = Course(course.disk, course.rows, stop_at)
        train(course_of(course, tmp_path))
    assert (course.weights, course.disk[5], course.rows) == (unbroken_course.weights, unbroken_course.disk[5], unbroken_course.rows)


class Diverging(Course):
    """From its third step on every step is skipped."""

    def update(self, batch: GlobalBatch) -> UpdateStats:
        before = self.weights
        stats = super().update(batch)
        if self.events.count("step") < 8:
            return stats
        self.weights = before
        return replace(stats, grad_norm=math.inf, skipped=True)


def test_a_run_that_ends_by_skips_leaves_the_checkpoints_as_they_were(tmp_path: Path) -> None:
    for _start in range(2):
        course = Diverging({}, {}, None)
        run = course_of(course, tmp_path)
        with pytest.raises(
            TrainingError, match=r"3 optimizer steps in a row were skipped.* no checkpoint was written, the newest is step_3:"
        ):
            train(run)
        assert list(course.disk) == [3]
        assert course.events[-1] == "step"
    assert TrainingError.status == 3
