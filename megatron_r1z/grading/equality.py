r"""Whether an answer equals a reference: text first, then numbers, then parts one by one, then algebra.

The order makes the cheap and exact test speak first and the last word only where nothing cheaper applies: two numbers that differ are
different, whatever algebra within a tolerance would say.
"""

from __future__ import annotations

from enum import Enum

from megatron_r1z.grading import symbolic, text
from megatron_r1z.grading.answers import extract_boxed

MAX_LENGTH = 2000
"""Longer answers are compared as text only; the longest reference of the published question sets has 204 characters."""
MAX_ITEMS = 32
"""Longer lists are compared as text only: in a set each item may be compared with each."""
MAX_DEPTH = 5
"""Nesting of lists."""


class Equality(Enum):
    """The outcome of one comparison; `UNPARSABLE`: the answer is neither the same text nor something that can be read."""

    EQUAL = "equal"
    DIFFERENT = "different"
    UNPARSABLE = "unparsable"


def is_equal(answer: str, reference: str) -> bool:
    r"""Whether the two mean the same.

    >>> is_equal("0.5", r"\frac12"), is_equal("5 cm", "5 m"), is_equal("2,1", "1, 2")
    (True, False, True)
    """
    return compare(answer, reference) is Equality.EQUAL


def compare(answer: str, reference: str) -> Equality:
    """The full comparison. It can hang or exhaust memory on hostile text: run it in a `WorkerPool`."""
    settled = settle(answer, reference)
    return settled if settled is not None else _compare(_canonical(answer), _canonical(reference), MAX_DEPTH)


def settle(answer: str, reference: str) -> Equality | None:
    """The outcome where it is plain to see, in time linear in the text: same text, plain numbers, empty or overlong; else None."""
    answer, reference = answer.strip(), reference.strip()
    if answer == reference:
        return Equality.EQUAL
    if not answer or not reference:
        return Equality.DIFFERENT
    if len(answer) > MAX_LENGTH or len(reference) > MAX_LENGTH:
        return Equality.UNPARSABLE
    same = text.settle_plain_numbers(answer, reference)
    return None if same is None else _equality(same)


def _canonical(raw: str) -> str:
    boxed = extract_boxed(raw)
    return text.normalise(raw if boxed is None else boxed)


def _equality(same: bool) -> Equality:
    return Equality.EQUAL if same else Equality.DIFFERENT


def _compare(answer: str, reference: str, depth: int) -> Equality:
    """Compare two texts in normal form."""
    if answer == reference:
        return Equality.EQUAL
    if not answer or not reference:
        return Equality.DIFFERENT
    answer, reference = _without_names(answer, reference)
    left, right = text.split_parts(answer), text.split_parts(reference)
    if left is None and right is None:
        return _compare_single(answer, reference)
    if text.is_relation(answer) != text.is_relation(reference):  # an interval against an inequality
        return _compare_algebra(answer, reference)
    left, right = left or text.Parts("set", [answer]), right or text.Parts("set", [reference])
    if left.kind != right.kind or len(left.items) != len(right.items):
        return Equality.DIFFERENT
    if depth == 0 or len(left.items) > MAX_ITEMS:
        return Equality.UNPARSABLE
    return _compare_parts(left, right, depth - 1)


def _without_names(answer: str, reference: str) -> tuple[str, str]:
    """Drop `x=` where both have the same name, or only one side has a name and the other is no relation; else both stay equations."""
    (said, name), (expected, expected_name) = text.split_name(answer), text.split_name(reference)
    if name == expected_name or (name is None and not text.is_relation(said)) or (expected_name is None and not text.is_relation(expected)):
        return said, expected
    return answer, reference


def _compare_parts(left: text.Parts, right: text.Parts, depth: int) -> Equality:
    """Pair the items off; equality is transitive, so the first partner that fits is as good as any."""
    remaining = list(right.items)
    for item in left.items:
        outcomes = [_compare(item, candidate, depth) for candidate in (remaining[:1] if left.ordered else remaining)]
        if Equality.EQUAL not in outcomes:
            return Equality.UNPARSABLE if Equality.UNPARSABLE in outcomes else Equality.DIFFERENT
        del remaining[outcomes.index(Equality.EQUAL)]
    return Equality.EQUAL


def _compare_single(answer: str, reference: str) -> Equality:
    (left, unit), (right, expected_unit) = text.split_unit(answer), text.split_unit(reference)
    if unit is not None and expected_unit is not None and unit != expected_unit:
        return Equality.DIFFERENT
    number, expected = text.parse_number(left), text.parse_number(right)
    if number is not None and expected is not None:
        return _equality(text.is_same_number(number, expected))
    if text.is_words(left) or text.is_words(right):
        return _equality(left.casefold() == right.casefold())
    if text.is_relation(left) != text.is_relation(right):
        return Equality.DIFFERENT
    return _compare_algebra(left, right)


def _compare_algebra(answer: str, reference: str) -> Equality:
    same = symbolic.is_same_expression(answer, reference)
    return Equality.UNPARSABLE if same is None else _equality(same)
