"""What keeps a run from learning, said after the iteration that shows it and with what to look at next. Standard library only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megatron_r1z.config import TrainConfig
from megatron_r1z.types import FinishReason, GradedGroup, Response, Sample, Verdict, VerdictKind

NEARLY_ALL = 0.9
"""Of the responses: with fewer than one in ten judged by its answer there is next to nothing to learn from."""
MANY_UNGRADED = 0.02
"""Of the responses; hostile answers are rarer, so beyond it the grader or the machine has a problem."""
SILENT_ITERATIONS = 10
"""What was said is said again only after so many iterations without it."""
ENDING_CHARACTERS = 12
"""Of a response, shown as its ending."""

NEXT_STEP = {
    VerdictKind.UNFORMATTED: "no answer stands where grading.reward looks for it: compare it and data.template with what the model writes",
    VerdictKind.TRUNCATED: "they did not end within rollout.max_response_tokens: raise it, or see whether the template's end is one that "
    "the model writes",
    VerdictKind.UNPARSABLE: "what stands for an answer cannot be read: compare data.template with what the model writes",
    VerdictKind.TIMEOUT: "grading took longer than grading.timeout_s: raise it or grading.workers",
    VerdictKind.ERROR: "grading failed: try the reward function on a row of rollouts/; memory may be short, too",
}
"""Verdicts that are not about the answer: what they mean and where to look."""


@dataclass
class Advice:
    """Says each thing once, and again when it comes back; a run that goes on begins anew."""

    config: TrainConfig
    _last: dict[str, int] = field(default_factory=dict)
    """The iteration in which each thing was last the case."""

    def about(self, iteration: int, graded: Sequence[GradedGroup], samples: Sequence[Sample]) -> list[str]:
        """Sentences about iteration number `iteration`: `graded` are all its groups, `samples` those that its steps are over."""
        found = dict(self._found(graded, samples))
        news = [text for topic, text in found.items() if iteration - self._last.get(topic, -SILENT_ITERATIONS - 1) > SILENT_ITERATIONS]
        self._last |= dict.fromkeys(found, iteration)
        return [f"warning: {text}" for text in news]

    def _found(self, graded: Sequence[GradedGroup], samples: Sequence[Sample]) -> Iterator[tuple[str, str]]:
        """What is the case, and what to say of it."""
        pairs = [pair for item in graded for pair in zip(item.group.responses, item.verdicts, strict=True)]
        failed = [(kind, response) for response, verdict in pairs if (kind := _failure(response, verdict)) is not None]
        kinds = Counter(kind for kind, _ in failed)
        if len(failed) >= NEARLY_ALL * len(pairs):
            yield f"nearly all {kinds.most_common(1)[0][0].value}", _sentence_on_failures(failed, len(pairs))
        elif kinds[VerdictKind.TIMEOUT] + kinds[VerdictKind.ERROR] > MANY_UNGRADED * len(pairs):
            yield "ungraded", _sentence_on_grading(kinds, len(pairs))
        if not any(sample.has_gradient for sample in samples):
            yield "untrained", self._sentence_on_groups(graded)

    def _sentence_on_groups(self, graded: Sequence[GradedGroup]) -> str:
        rewards = [reward for item in graded for reward in item.rewards]
        mean = f"whose mean reward is {sum(rewards) / len(rewards):.3g}" if rewards else "none of whose responses was judged"
        rounds = len(graded) // self.config.rollout.prompts_per_iteration
        drawn = f" in {rounds} rounds of sampling" if rounds > 1 else ""
        return (
            f"no sample was trained on, since rewards differ in none of the {len(graded)} groups{drawn}, {mean}; "
            "easier questions, a higher rollout.temperature or more rollout.samples_per_prompt mix them where it is low, harder questions "
            "where it is high (docs/troubleshooting.md)."
        )


def _failure(response: Response, verdict: Verdict) -> VerdictKind | None:
    """The verdict that is not about the answer, None for others; under a function of the user's own it does not say that one was cut."""
    if verdict.kind is VerdictKind.WRONG and response.finish_reason is not FinishReason.STOP:
        return VerdictKind.TRUNCATED
    return verdict.kind if verdict.kind in NEXT_STEP else None


def _sentence_on_failures(failed: Sequence[tuple[VerdictKind, Response]], total: int) -> str:
    """With the commonest verdict, how most of its responses ended and with what."""
    kind, count = Counter(kind for kind, _ in failed).most_common(1)[0]
    responses = [response for other, response in failed if other is kind]
    reason, with_reason = Counter(response.finish_reason.value for response in responses).most_common(1)[0]
    ending, with_ending = Counter(response.text[-ENDING_CHARACTERS:] for response in responses).most_common(1)[0]
    return (
        f"{len(failed)} of {total} responses are unformatted, cut off, unreadable or not graded, {count} of them {kind.value} "
        f"({with_reason} with finish reason {reason}; the commonest ending, of {with_ending}, is {ending!r}); {NEXT_STEP[kind]} "
        "(rollouts/, docs/troubleshooting.md)."
    )


def _sentence_on_grading(kinds: Counter[VerdictKind], total: int) -> str:
    timeouts, errors = (kinds[kind] for kind in (VerdictKind.TIMEOUT, VerdictKind.ERROR))
    kind = VerdictKind.TIMEOUT if timeouts >= errors else VerdictKind.ERROR
    return (
        f"timeout {timeouts / total:.1%}, error {errors / total:.1%} of the responses, which are not trained on whatever they hold; "
        f"{NEXT_STEP[kind]} (docs/grading.md)."
    )
