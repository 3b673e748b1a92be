"""From groups to graded groups: the built-in rewards of the R1-Zero recipe, or a reward function of the user's own."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Literal

from megatron_r1z.config import GradingConfig, Template
from megatron_r1z.errors import DataError, R1ZError
from megatron_r1z.grading import symbolic
from megatron_r1z.grading.answers import Extraction, extract_answer_tag, extract_boxed_answer
from megatron_r1z.grading.equality import Equality, compare, settle
from megatron_r1z.grading.pool import Outcome, OutcomeKind, WorkerPool
from megatron_r1z.types import FinishReason, GradedGroup, Group, Prompt, Response, Verdict, VerdictKind

RewardFunction = Callable[[str, tuple[str, ...], str], float]
"""`(response, answers, finish_reason)` to any finite number; `finish_reason` is `stop` or `length` (`abort`: the engine gave up)."""

CACHE_SIZE = 100_000
"""Pairs of answer and reference whose outcome is kept; each side has at most 2000 characters, most have fewer than ten."""

_Pair = tuple[str, str]
_Judgement = Equality | Literal[OutcomeKind.TIMEOUT, OutcomeKind.ERROR]
_EXTRACTORS: dict[str, Callable[[str], Extraction]] = {"boxed": extract_boxed_answer, "answer_tag": extract_answer_tag}
_SELF_TEST: tuple[tuple[str, str, bool], ...] = (
    ("5", "5.0", True),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", True),
    ("(x-1)(x+1)", "x^2-1", True),
    ("5 cm", "5 m", False),
    ("x^2+1", "x^2-1", False),
)
_log = logging.getLogger(__name__)


def make_grader(config: GradingConfig, template: Template) -> MathGrader:
    """The grader that `config` asks for; `auto` looks for answer tags under the r1 template and for a box otherwise."""
    automatic: Literal["boxed", "answer_tag"] = "answer_tag" if template == "r1" else "boxed"
    reward = automatic if config.reward == "auto" else config.reward
    return MathGrader(reward, config.function, config.workers, config.timeout_s)


class MathGrader:
    """Implements `protocols.Grader`.

    Built-in rewards (recipe: `boxed_reward_fn` and `answer_tag_reward_fn` of oat's math grader): 1.0 for a finished response in the right
    form whose answer equals a reference, else 0.0. A response that did not finish has reward 0.0 even with the right answer in it.

    With `function`, given as `path.py:name`, the reward is what that function returns; the verdict is `correct` from reward 1 on, `wrong`
    below, and `error` or `timeout` with reward 0.0 where it raises, returns no finite number or takes too long.
    """

    def __init__(self, reward: Literal["boxed", "answer_tag"], function: str | None, workers: int, timeout_s: float) -> None:
        self._extract = _EXTRACTORS[reward]
        self._uses_function = function is not None
        self._comparisons: WorkerPool[_Pair, Equality] = WorkerPool(_make_comparer, workers, timeout_s)
        # A user's function may load a model of its own, so its memory is its own affair.
        self._functions: WorkerPool[tuple[str, tuple[str, ...], str], float] = WorkerPool(
            partial(_make_reward, function or ""), workers, timeout_s, memory_bytes=None
        )
        self._cache: OrderedDict[_Pair, Equality] = OrderedDict()

    def grade(self, groups: Sequence[Group]) -> list[GradedGroup]:
        """One verdict per response, in order; no response makes it hang or raise.

        Raises:
            R1ZError: the worker processes do not start.
        """
        rows = [(group.prompt, response) for group in groups for response in group.responses]
        verdicts = iter(self._grade_by_function(rows) if self._uses_function else self._grade_by_equality(rows))
        return [GradedGroup(group, tuple(islice(verdicts, len(group.responses)))) for group in groups]

    def self_test(self) -> None:
        """Compare known pairs in the worker processes.

        Raises:
            R1ZError: an outcome is not the known one; training on such rewards would be worthless.
        """
        if self._uses_function:
            return  # nothing is known about its rewards; `check_reward_function` has loaded it
        outcomes = self._comparisons.run([(answer, reference) for answer, reference, _ in _SELF_TEST])
        for (answer, reference, expected), outcome in zip(_SELF_TEST, outcomes, strict=True):
            if outcome.kind is not OutcomeKind.DONE or (outcome.result is Equality.EQUAL) != expected:
                found = outcome.message or str(outcome.result)
                raise R1ZError(f"the grader fails its self-test on '{answer}' against '{reference}' ({found}); check sympy.")

    def close(self) -> None:
        """End the worker processes."""
        self._comparisons.close()
        self._functions.close()

    def _grade_by_equality(self, rows: Sequence[tuple[Prompt, Response]]) -> list[Verdict]:
        found = [self._extract(response.text) for _, response in rows]
        open_pairs = [
            (extraction.answer, reference)
            for (prompt, response), extraction in zip(rows, found, strict=True)
            if response.finish_reason is FinishReason.STOP and extraction.answer is not None
            for reference in prompt.answers
        ]
        judgements = self._judge(open_pairs)
        return [_make_verdict(*row, extraction, judgements) for row, extraction in zip(rows, found, strict=True)]

    def _judge(self, pairs: Iterable[_Pair]) -> dict[_Pair, _Judgement]:
        """The judgement of each different pair: plain to see, remembered, or compared in a worker."""
        judgements: dict[_Pair, _Judgement] = {}
        remaining: list[_Pair] = []
        for pair in dict.fromkeys(pairs):
            settled = settle(*pair) or self._recall(pair)
            if settled is None:
                remaining.append(pair)
            else:
                judgements[pair] = settled
        for pair, outcome in zip(remaining, self._comparisons.run(remaining), strict=True):
            judgements[pair] = self._note(pair, outcome)
        return judgements

    def _recall(self, pair: _Pair) -> Equality | None:
        if pair in self._cache:
            self._cache.move_to_end(pair)
        return self._cache.get(pair)

    def _note(self, pair: _Pair, outcome: Outcome[Equality]) -> _Judgement:
        """Remember an outcome; time-outs and errors are not remembered, since they may be the machine's fault."""
        if outcome.kind is OutcomeKind.DONE and outcome.result is not None:
            self._cache[pair] = outcome.result
            if len(self._cache) > CACHE_SIZE:
                self._cache.popitem(last=False)
            return outcome.result
        return OutcomeKind.TIMEOUT if outcome.kind is OutcomeKind.TIMEOUT else OutcomeKind.ERROR

    def _grade_by_function(self, rows: Sequence[tuple[Prompt, Response]]) -> list[Verdict]:
        outcomes = self._functions.run([(response.text, prompt.answers, response.finish_reason.value) for prompt, response in rows])
        messages = [outcome.message for outcome in outcomes if outcome.kind is OutcomeKind.ERROR]
        if messages:
            _log.warning("the reward function failed on %d of %d responses; the first: %s", len(messages), len(rows), messages[0])
        return [_make_function_verdict(outcome) for outcome in outcomes]


def _make_comparer() -> Callable[[_Pair], Equality]:
    """Set a worker up for comparisons."""
    symbolic.warm_up()
    return _compare_pair


def _compare_pair(pair: _Pair) -> Equality:
    return compare(*pair)


def _make_verdict(prompt: Prompt, response: Response, extraction: Extraction, judgements: dict[_Pair, _Judgement]) -> Verdict:
    answer = extraction.answer
    if response.finish_reason is not FinishReason.STOP:
        return Verdict(VerdictKind.TRUNCATED, 0.0, answer)
    if not extraction.formatted:
        return Verdict(VerdictKind.UNFORMATTED, 0.0, None)
    found = set() if answer is None else {judgements[answer, reference] for reference in prompt.answers}
    if Equality.EQUAL in found:
        return Verdict(VerdictKind.CORRECT, 1.0, answer)
    if OutcomeKind.TIMEOUT in found:
        return Verdict(VerdictKind.TIMEOUT, 0.0, answer)
    if OutcomeKind.ERROR in found:
        return Verdict(VerdictKind.ERROR, 0.0, answer)
    return Verdict(VerdictKind.UNPARSABLE if Equality.UNPARSABLE in found else VerdictKind.WRONG, 0.0, answer)


def _make_function_verdict(outcome: Outcome[float]) -> Verdict:
    if outcome.kind is OutcomeKind.DONE and outcome.result is not None:
        return Verdict(VerdictKind.CORRECT if outcome.result >= 1 else VerdictKind.WRONG, outcome.result, None)
    return Verdict(VerdictKind.TIMEOUT if outcome.kind is OutcomeKind.TIMEOUT else VerdictKind.ERROR, 0.0, None)


def check_reward_function(function: str) -> None:
    """Load `path.py:name` once, so that a mistake shows before a run starts.

    Raises:
        DataError: no such file or name, the file fails to load, the name is not callable or does not take the three arguments.
    """
    _load_reward_function(function)


def _load_reward_function(function: str) -> RewardFunction:
    path, _, name = function.rpartition(":")
    if not path or not name:
        raise DataError(f"grading.function is '{function}'; write it as path.py:name.")
    if not Path(path).is_file():
        raise DataError(f"grading.function: there is no file {path}.")
    spec = importlib.util.spec_from_file_location("r1z_reward_function", path)
    if spec is None or spec.loader is None:
        raise DataError(f"grading.function: {path} is not a Python file; its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise DataError(f"grading.function: {path} fails to load: {type(error).__name__}: {error}.") from error
    return _checked(getattr(module, name, None), path, name)


def _checked(candidate: object, path: str, name: str) -> RewardFunction:
    if candidate is None:
        raise DataError(f"grading.function: {path} defines no '{name}'.")
    if not callable(candidate):
        raise DataError(f"grading.function: '{name}' in {path} is not a function.")
    try:
        inspect.signature(candidate).bind("response", ("answer",), "stop")
    except TypeError as error:
        raise DataError(f"grading.function: '{name}' in {path} must take (response, answers, finish_reason): {error}.") from error
    return candidate


def _make_reward(function: str) -> Callable[[tuple[str, tuple[str, ...], str]], float]:
    """Set a worker up for the user's function."""
    loaded = _load_reward_function(function)

    def reward(task: tuple[str, tuple[str, ...], str]) -> float:
        value: object = loaded(*task)
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"the reward is {value!r}; it must be a finite number")
        return float(value)

    return reward
