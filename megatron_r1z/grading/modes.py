"""The three ways of comparing an answer with a reference, as one table; docs/grading.md says how they differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_r1z.config import GradingMode
from megatron_r1z.grading import equality, reference
from megatron_r1z.grading.equality import Equality

Comparison = Callable[[str, str], Equality]


@dataclass(frozen=True, slots=True)
class Mode:
    """One way of comparing."""

    compare: Comparison
    """`(answer, reference)`; may hang on hostile text, so it runs in a worker process."""
    settle: Callable[[str, str], Equality | None]
    """The outcome where it is plain to see, in time linear in the text; else None."""
    warm_up: Callable[[], None]
    """Imports and exercises everything once, so that the first comparison takes as long as any other."""
    self_test: tuple[tuple[str, str, bool], ...]
    """Answers, references and whether they are equal: what a working grader says."""


def _same_text(answer: str, reference: str) -> Equality | None:
    return Equality.EQUAL if answer == reference else None


_ALWAYS = (
    ("5", "5.0", True),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", True),
    ("x^2-1", "(x-1)(x+1)", True),
    ("x^2+1", "x^2-1", False),
)

MODES: Mapping[GradingMode, Mode] = {
    "strict": Mode(equality.compare, equality.settle, equality.warm_up, (*_ALWAYS, ("2^3", "8", True), ("5 cm", "5 m", False))),
    "fast": Mode(reference.compare_fast, _same_text, reference.warm_up, (*_ALWAYS, ("5 cm", "5 m", True), ("2^3", "8", False))),
    "math_verify": Mode(
        reference.compare_math_verify, _same_text, reference.warm_up, (*_ALWAYS, ("5 cm", "5 m", True), ("2^3", "8", True))
    ),
}
