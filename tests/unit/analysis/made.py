"""Hand-made responses: what each of them is stands in the call."""

from __future__ import annotations

from megatron_r1z.analysis.examine import Examined, ExaminedQuestion, Judgement, find_keywords
from megatron_r1z.config import REFLECTION_KEYWORDS
from megatron_r1z.evaluation.scores import Attempt
from megatron_r1z.types import FinishReason, VerdictKind

LETTERS = {
    "r": (VerdictKind.CORRECT, FinishReason.STOP, "7"),
    "w": (VerdictKind.WRONG, FinishReason.STOP, "8"),
    "u": (VerdictKind.UNFORMATTED, FinishReason.STOP, None),
    "c": (VerdictKind.TRUNCATED, FinishReason.LENGTH, None),
}


def make_response(letter: str, text: str = "", length: int = 1, judgement: Judgement | None = None) -> Examined:
    kind, finish_reason, extracted = LETTERS[letter]
    attempt = Attempt(text, length, finish_reason, kind, extracted)
    return Examined(attempt, find_keywords(text, REFLECTION_KEYWORDS), judgement)


def make_question(letters: str, level: str | None = None, place: int = 0) -> ExaminedQuestion:
    """Capital letters reflect on themselves: `"rRw"` is right, right with a keyword, wrong."""
    responses = [make_response(letter.lower(), "Let me recheck." if letter.isupper() else "") for letter in letters]
    return ExaminedQuestion(f"set/{place}", level, tuple(responses))
