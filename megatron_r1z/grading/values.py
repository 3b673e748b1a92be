r"""Whether two expressions are worth the same everywhere.

They are compared at a few fixed points. A difference at one point settles the matter; agreement to dozens of digits at all of them is
taken for equality, which covers nested radicals and trigonometric identities that rewriting rules miss.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from megatron_r1z.grading.arithmetic import COARSE_DIGITS, NUM_POINTS, Sample, TooLargeError, Value, inexact, make_context, sample
from megatron_r1z.grading.expression import parse

MAX_DIGITS = 4000
"""Of the second comparison; what would need more is too large to compare."""
SPARE_DIGITS = 80
"""Digits beyond twice the size of the largest value on the way; equality means that all but 15 of them agree."""
DECIMAL_TOLERANCE = 5e-7
"""Relative; a decimal of six or more places stands for what it rounds: `0.707107` is `\\sqrt{2}/2`, `3.14159` is not pi."""


def is_same(left: str, right: str) -> bool | None:
    r"""Whether two texts in normal form have the same value at all points; None where one cannot be read or is too large.

    `\log` without a base is read as natural and as common logarithm; either may make them equal.
    """
    if parse(left) is None or parse(right) is None:
        return None
    readings = (False, True) if r"\log" in left or r"\log" in right else (False,)
    try:
        return any(_is_same(left, right, common_log) for common_log in readings)
    except TooLargeError:
        return None


def constant(text: str) -> Any | None:
    """The real number of mpmath that a text without variables stands for, infinity included; None for anything else."""
    expression = parse(text)
    if expression is None or expression.symbols:
        return None
    try:
        found = sample(text, 0)
    except TooLargeError:
        return None
    return inexact(make_context(COARSE_DIGITS), found.value) if found.is_real and found.value is not None else None


def is_too_large(text: str) -> bool:
    """Whether a text that can be read has a value beyond the bounds of `arithmetic`."""
    if parse(text) is None:
        return False
    try:
        sample(text, 0)
    except TooLargeError:
        return True
    return False


def points(*texts: str) -> range:
    """The points that tell expressions apart; one is enough for constants."""
    return range(NUM_POINTS if any(expression.symbols for expression in map(parse, texts) if expression) else 1)


def multiply(left: Value, right: Value) -> Value:
    """The product of two sampled values."""
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left * right
    context = make_context(COARSE_DIGITS)
    return inexact(context, left) * inexact(context, right)


def divide(left: Value, right: Value) -> Value:
    """The quotient of two sampled values; the right one is not 0."""
    return multiply(left, 1 / right)


def is_close(left: Value, right: Value) -> bool:
    """Whether two sampled values agree, but for rounding of what is not exact."""
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    context = make_context(COARSE_DIGITS)
    left, right = inexact(context, left), inexact(context, right)
    return bool(abs(left - right) <= context.mpf(10) ** (15 - COARSE_DIGITS) * max(abs(left), abs(right)))


def _is_same(left: str, right: str, common_log: bool) -> bool:
    """Agreement wherever both are real; where they never are, agreement everywhere. Undefined points say nothing."""
    real: list[int] = []
    other: dict[int, bool] = {}
    for point in points(left, right):
        first, second = sample(left, point, common_log), sample(right, point, common_log)
        if first.value is None or second.value is None:
            continue
        same = _agrees(first, second, COARSE_DIGITS) or _is_rounded(left, right, first.value, second.value)
        if not (first.is_real and second.is_real):
            other[point] = same
        elif same:
            real.append(point)
        else:
            return False
    if not real and not (other and all(other.values())):
        return False
    return all(_agrees_finely(left, right, point, common_log) for point in (real or list(other))[:2])


def _agrees_finely(left: str, right: str, point: int, common_log: bool) -> bool:
    coarse = sample(left, point, common_log), sample(right, point, common_log)
    if all(isinstance(item.value, Fraction) for item in coarse) or _is_rounded(left, right, coarse[0].value, coarse[1].value):
        return True
    digits = 2 * max(item.digits for item in coarse) + SPARE_DIGITS
    if digits > MAX_DIGITS:
        raise TooLargeError
    return _agrees(sample(left, point, common_log, digits), sample(right, point, common_log, digits), digits)


def _agrees(first: Sample, second: Sample, digits: int) -> bool:
    """Whether two values sampled with so many digits may be the same number."""
    if isinstance(first.value, Fraction) and isinstance(second.value, Fraction):
        return first.value == second.value
    context = make_context(digits)
    left, right = inexact(context, first.value), inexact(context, second.value)
    if not (context.isfinite(left) and context.isfinite(right)):
        return bool(left == right)
    return bool(abs(left - right) <= context.mpf(10) ** (max(first.digits, second.digits) + 15 - digits))


def _is_rounded(left: str, right: str, first: Value, second: Value) -> bool:
    """Whether one holds a long decimal, the other does not, and they are as close as rounding makes them; never for two exact values."""
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return False
    is_decimal, is_other_decimal = (expression is not None and expression.has_long_decimal for expression in (parse(left), parse(right)))
    if is_decimal == is_other_decimal:
        return False
    context = make_context(COARSE_DIGITS)
    first, second = inexact(context, first), inexact(context, second)
    return bool(abs(first - second) <= DECIMAL_TOLERANCE * max(abs(first), abs(second)))
