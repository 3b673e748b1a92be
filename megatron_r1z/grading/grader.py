"""From groups to graded groups: the built-in rewards of the R1-Zero recipe, or reward functions of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from megatron_r1z.config import ExtraReward, GradingConfig, Template
from megatron_r1z.grading import answers
from megatron_r1z.grading.answers import Extraction
from megatron_r1z.grading.comparer import Comparer, Pair
from megatron_r1z.grading.functions import FunctionPool, Task
from megatron_r1z.grading.pool import Outcome, OutcomeKind
from megatron_r1z.host.rank import StopFlag
from megatron_r1z.types import FinishReason, GradedGroup, Group, Prompt, Response, Verdict, VerdictKind

EXTRACTORS: dict[str, Callable[[str], Extraction]] = {
    "boxed": answers.extract_boxed_answer,
    "answer_tag": answers.extract_answer_tag,
    "answer_tag_lenient": answers.extract_answer_tag_lenient,
    "think_then_boxed": answers.extract_think_then_boxed,
}
"""Where each form of reward looks for the answer."""

_BEST_FIRST = (VerdictKind.CORRECT, VerdictKind.TIMEOUT, VerdictKind.ERROR, VerdictKind.UNPARSABLE)
"""Of an answer's verdicts against several references the first of these counts: right once is right, and a failure is told."""

_Row = tuple[Prompt, Response]


class MathGrader:
    """Implements `protocols.Grader`.

    Built-in rewards (recipe: `boxed_reward_fn` and `answer_tag_reward_fn` of oat's math grader): 1.0 for a finished response in the right
    form whose answer equals a reference, else 0.0. A response that did not finish has reward 0.0 even with the right answer in it.

    With `grading.function`, given as `path.py:name`, the reward is what that function returns; the verdict is `correct` from reward 1 on,
    `wrong` below, and `error` or `timeout` with reward 0.0 where it raises, returns no finite number or takes too long.

    Each function of `grading.extra` adds its weighted value to that reward and leaves the verdict as it is, unless it fails: then the
    verdict is `error` or `timeout` with reward 0.0, because a sum with a hole in it is no reward.
    """

    def __init__(self, config: GradingConfig, template: Template, stop_flag: StopFlag | None = None) -> None:
        """`template` decides what `grading.reward: auto` means: answer tags under r1, a box otherwise.

        `stop_flag` is looked at while responses are graded.
        """
        automatic = "answer_tag" if template == "r1" else "boxed"
        self._extract = EXTRACTORS[automatic if config.reward == "auto" else config.reward]
        self._comparer = Comparer(config.mode, config.workers, config.timeout_s, stop_flag)
        self._function = None if config.function is None else FunctionPool(config.function, config.workers, config.timeout_s, stop_flag)
        self._extra = [(item, FunctionPool(item.function, config.workers, config.timeout_s, stop_flag)) for item in config.extra]

    def grade(self, groups: Sequence[Group]) -> list[GradedGroup]:
        """One verdict per response, in order; no response makes it hang or raise.

        Raises:
            R1ZError: the worker processes do not start.
            Interrupted: the flag was set meanwhile.
        """
        rows = [(group.prompt, response) for group in groups for response in group.responses]
        verdicts = self._by_equality(rows) if self._function is None else self._by_function(rows, self._function)
        for extra, pool in self._extra:
            verdicts = [_add(verdict, outcome, extra) for verdict, outcome in zip(verdicts, pool.rate(_tasks(rows)), strict=True)]
        remaining = iter(verdicts)
        return [GradedGroup(group, tuple(islice(remaining, len(group.responses)))) for group in groups]

    @property
    def finds_answers(self) -> bool:
        """Whether verdicts come with the answer that was found: not under a function of the user's own."""
        return self._function is None

    def judge(self, pairs: Sequence[Pair]) -> dict[Pair, VerdictKind]:
        """The verdict on each pair of answer and reference; see `Comparer.judge`."""
        return self._comparer.judge(pairs)

    def self_test(self) -> None:
        """Compare known pairs; see `Comparer.self_test`. Of a function nothing is known, `check_reward_function` has tried it."""
        if self._function is None:
            self._comparer.self_test()

    def close(self) -> None:
        """End the worker processes."""
        self._comparer.close()
        for pool in [self._function, *(pool for _, pool in self._extra)]:
            if pool is not None:
                pool.close()

    def _by_equality(self, rows: Sequence[_Row]) -> list[Verdict]:
        found = [self._extract(response.text) for _, response in rows]
        judged = self._comparer.judge(
            (extraction.answer, reference)
            for (prompt, response), extraction in zip(rows, found, strict=True)
            if response.finish_reason is FinishReason.STOP and extraction.answer is not None
            for reference in prompt.answers
        )
        return [_make_verdict(*row, extraction, judged) for row, extraction in zip(rows, found, strict=True)]

    def _by_function(self, rows: Sequence[_Row], function: FunctionPool) -> list[Verdict]:
        return [_make_function_verdict(outcome) for outcome in function.rate(_tasks(rows))]


def _tasks(rows: Sequence[_Row]) -> list[Task]:
    return [(response.text, prompt.answers, response.finish_reason.value) for prompt, response in rows]


def _make_verdict(prompt: Prompt, response: Response, extraction: Extraction, judged: Mapping[Pair, VerdictKind]) -> Verdict:
    if response.finish_reason is not FinishReason.STOP:
        return Verdict(VerdictKind.TRUNCATED, 0.0, extraction.answer)
    return make_verdict(extraction, prompt.answers, judged)


def make_verdict(extraction: Extraction, references: Sequence[str], judged: Mapping[Pair, VerdictKind]) -> Verdict:
    """The verdict on a response that finished; `judged` holds the pairs of its answer with each reference."""
    if not extraction.formatted:
        return Verdict(VerdictKind.UNFORMATTED, 0.0, None)
    answer = extraction.answer
    kinds = [] if answer is None else [judged[answer, reference] for reference in references]
    kind = next((kind for kind in _BEST_FIRST if kind in kinds), VerdictKind.WRONG)
    return Verdict(kind, float(kind is VerdictKind.CORRECT), answer)


def _make_function_verdict(outcome: Outcome[float]) -> Verdict:
    if outcome.kind is OutcomeKind.DONE and outcome.result is not None:
        return Verdict(VerdictKind.CORRECT if outcome.result >= 1 else VerdictKind.WRONG, outcome.result, None)
    return Verdict(_failure(outcome), 0.0, None)


def _add(verdict: Verdict, outcome: Outcome[float], extra: ExtraReward) -> Verdict:
    if verdict.kind in (VerdictKind.TIMEOUT, VerdictKind.ERROR):
        return verdict
    if outcome.kind is OutcomeKind.DONE and outcome.result is not None:
        value = (extra.name, outcome.result)
        return replace(verdict, reward=verdict.reward + extra.weight * outcome.result, extra=(*verdict.extra, value))
    return replace(verdict, kind=_failure(outcome), reward=0.0)


def _failure(outcome: Outcome[float]) -> VerdictKind:
    return VerdictKind.TIMEOUT if outcome.kind is OutcomeKind.TIMEOUT else VerdictKind.ERROR
