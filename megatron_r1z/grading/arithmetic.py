r"""What an expression is worth at a few fixed points: exactly where fractions suffice, else to as many digits as asked for.

Sizes are bounded before a power or factorial is taken, so that no expression can hang or exhaust memory. mpmath is imported inside a
function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any
from zlib import crc32

from megatron_r1z.grading.expression import Node, parse

MAX_BITS = 20_000
"""Of a number, above or below the point, and of an exponent times the size of its base; `1000!` has 8530."""
MAX_FACTORIAL = 2000
"""Argument of a factorial or binomial coefficient."""
NUM_POINTS = 5
"""Points at which expressions with variables are compared."""
COARSE_DIGITS = 30
"""Digits of the first comparison; it settles differences, never equality."""

Value = Any
"""A Fraction where exact, else a real or complex number of mpmath."""


class TooLargeError(ArithmeticError):
    """The value, or one on the way, is beyond `MAX_BITS`."""


class UndefinedError(ArithmeticError):
    """There is no value, such as 1/0."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The value at one point, None where undefined.

    `digits` is the size of the largest or smallest value on the way to it; `is_real`: no complex number was on the way.
    """

    value: Value | None
    digits: int
    is_real: bool


def is_real(value: Value) -> bool:
    """Whether it has no imaginary part; rounding errors were removed when it was sampled."""
    return not hasattr(value, "_mpc_")


@lru_cache(maxsize=65536)
def sample(text: str, point: int, common_log: bool = False, digits: int = COARSE_DIGITS) -> Sample:
    """The value at one of the fixed points, computed with so many digits.

    Raises:
        TooLargeError: see `MAX_BITS`.
    """
    expression = parse(text)
    assert expression is not None, "callers parse first"
    evaluation = _Evaluation(make_context(digits), point, common_log)
    try:
        value = _without_rounding_errors(evaluation.context, evaluation.value(expression.tree), digits)
    except (
        UndefinedError,
        ZeroDivisionError,
        ValueError,
        TypeError,
    ):  # mpmath: ValueError at poles, TypeError in orders of complex numbers
        value = None
    return Sample(value, evaluation.digits, evaluation.is_real)


@lru_cache(maxsize=1024)
def point_value(name: str, point: int) -> Fraction:
    """The value of a variable at a point: between 0 and 1, between 1 and 11, negative, of either sign, and large, in this order."""
    code = crc32(f"{name}/{point}".encode())
    small = Fraction(code % 99_991 + 1, 100_003)
    sign = -1 if code >> 20 & 1 else 1
    return (small, 1 + 10 * small, -3 * small, sign * (2 + 3 * small), 40 + 50 * small)[point]


@lru_cache(maxsize=64)
def make_context(digits: int) -> Any:
    """A context of mpmath with its own precision; its global one is left alone."""
    from mpmath import MPContext  # type: ignore[import-untyped]  # the package has no type information

    context = MPContext()
    context.dps = digits
    return context


def inexact(context: Any, value: Value) -> Any:
    """The value as a number of the context."""
    return context.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _without_rounding_errors(context: Any, value: Value, digits: int) -> Value:
    """A number whose imaginary part is nothing but rounding becomes real."""
    if isinstance(value, Fraction) or is_real(value):
        return value
    return value.real if abs(value.imag) <= abs(value) * context.mpf(10) ** (8 - digits) else value


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _exact_root(value: Fraction, index: int) -> Fraction | None:
    """The root of a positive fraction where it is a fraction of moderate size."""
    parts = []
    for part in (value.numerator, value.denominator):
        if part.bit_length() > 900:  # beyond what a float holds
            return None
        near = round(part ** (1 / index))
        exact = next((candidate for candidate in (near - 1, near, near + 1) if candidate**index == part), None)
        if exact is None:
            return None
        parts.append(exact)
    return Fraction(parts[0], parts[1])


class _Evaluation:
    """One walk over a tree at one point; remembers the size of what it met."""

    def __init__(self, context: Any, point: int, common_log: bool) -> None:
        self.context = context
        self.digits = 0
        self.is_real = True
        self._point = point
        self._common_log = common_log

    def value(self, node: Node) -> Value:
        """The value of a node; exact as long as fractions suffice."""
        if node.op == "number":
            result: Value = node.value
        elif node.op == "symbol":
            result = point_value(node.name, self._point)
        elif node.op == "constant":
            result = self._constant(node.name)
        else:
            operator = _OPERATORS.get(node.op)
            arguments = [self.value(argument) for argument in node.args]
            result = self._function(node.op, arguments) if operator is None else operator(self, *arguments)
        return self._checked(result)

    def _checked(self, value: Value) -> Value:
        """Note the size, and refuse what is beyond all bounds."""
        if isinstance(value, Fraction):
            size = abs(value.numerator.bit_length() - value.denominator.bit_length())
            if _bits(value) > MAX_BITS:
                raise TooLargeError
        else:
            if self.context.isnan(value):
                raise UndefinedError
            magnitude = self.context.mag(value)
            size = abs(int(magnitude)) if self.context.isfinite(magnitude) else 0
            self.is_real = self.is_real and is_real(_without_rounding_errors(self.context, value, self.context.dps))
        if size > MAX_BITS:
            raise TooLargeError
        self.digits = max(self.digits, size * 3 // 10)
        return value

    def _constant(self, name: str) -> Any:
        context = self.context
        return {"pi": +context.pi, "e": +context.e, "i": context.mpc(0, 1), "inf": context.inf}[name]

    def _inexact(self, value: Value) -> Any:
        return inexact(self.context, value)

    def add(self, *terms: Value) -> Value:
        if all(isinstance(term, Fraction) for term in terms):
            return sum(terms, Fraction(0))
        return self.context.fsum(map(self._inexact, terms))

    def multiply(self, *factors: Value) -> Value:
        exact, rest = Fraction(1), []
        for factor in factors:
            if isinstance(factor, Fraction):
                exact = self._checked(exact * factor)
            else:
                rest.append(factor)
        return self.context.fprod([self._inexact(exact), *rest]) if rest else exact

    def negate(self, value: Value) -> Value:
        return -value

    def invert(self, value: Value) -> Value:
        return 1 / value

    def fraction(self, top: Value, bottom: Value) -> Value:
        return self.multiply(top, 1 / bottom)

    def power(self, base: Value, exponent: Value) -> Value:
        if isinstance(base, Fraction) and isinstance(exponent, Fraction):
            if exponent.denominator == 1:
                return self._integer_power(base, int(exponent))
            if base > 0 and exponent.denominator < 10 and (root := _exact_root(base, exponent.denominator)) is not None:
                return self._integer_power(root, exponent.numerator)
        base, exponent = self._inexact(base), self._inexact(exponent)
        if base == 0:
            return self._power_of_zero(exponent)
        if abs(exponent) * (abs(self.context.mag(base)) + 1) > MAX_BITS:
            raise TooLargeError
        return self.context.power(base, exponent)

    def _integer_power(self, base: Fraction, exponent: int) -> Value:
        if abs(exponent) * (_bits(base) - 1) <= MAX_BITS:
            return base**exponent
        if base.denominator == 1 or abs(exponent) > MAX_BITS:
            raise TooLargeError
        return self.context.power(self._inexact(base), exponent)

    def _power_of_zero(self, exponent: Any) -> Any:
        if not is_real(exponent) or exponent <= 0:
            raise UndefinedError
        return self.context.mpf(0)

    def root(self, index: Value, value: Value) -> Value:
        """The real root where there is one: the cube root of -8 is -2."""
        is_odd = isinstance(index, Fraction) and index.denominator == 1 and index.numerator % 2 == 1
        if is_odd and is_real(value) and value < 0:
            return -self.power(-value, 1 / index)
        return self.power(value, 1 / index)

    def factorial(self, value: Value) -> Value:
        if abs(value) > MAX_FACTORIAL:
            raise TooLargeError
        if isinstance(value, Fraction) and value.denominator == 1:
            if value < 0:
                raise UndefinedError
            return Fraction(math.factorial(int(value)))
        return self.context.gamma(self._inexact(value) + 1)

    def double_factorial(self, value: Value) -> Value:
        if abs(value) > MAX_FACTORIAL:
            raise TooLargeError
        if isinstance(value, Fraction) and value.denominator == 1 and value >= 0:
            return Fraction(math.prod(range(int(value), 0, -2)))
        return self.context.fac2(self._inexact(value))

    def binomial(self, top: Value, bottom: Value) -> Value:
        if any(not is_real(value) or abs(value) > MAX_FACTORIAL for value in (top, bottom)):
            raise TooLargeError
        if all(isinstance(value, Fraction) and value.denominator == 1 and value >= 0 for value in (top, bottom)):
            return Fraction(math.comb(int(top), int(bottom)))
        return self.context.binomial(self._inexact(top), self._inexact(bottom))

    def modulo(self, value: Value, modulus: Value) -> Value:
        if any(not isinstance(part, Fraction) or part.denominator != 1 for part in (value, modulus)) or modulus == 0:
            raise UndefinedError
        return value % modulus

    def absolute(self, value: Value) -> Value:
        return abs(value)

    def floor(self, value: Value) -> Value:
        return Fraction(math.floor(value)) if isinstance(value, Fraction) else self.context.floor(value)

    def ceil(self, value: Value) -> Value:
        return Fraction(math.ceil(value)) if isinstance(value, Fraction) else self.context.ceil(value)

    def degree(self, value: Value) -> Value:
        return self.multiply(value, +self.context.pi, Fraction(1, 180))

    def exp(self, value: Value) -> Value:
        return self.power(+self.context.e, value)

    def log(self, value: Value, base: Value | None = None) -> Value:
        if base is None and not self._common_log:
            return self.context.ln(self._inexact(value))
        return self.context.log(self._inexact(value), self._inexact(Fraction(10) if base is None else base))

    def lg(self, value: Value) -> Value:
        return self.log(value, Fraction(10))

    def _function(self, name: str, arguments: list[Value]) -> Value:
        """A function that mpmath knows by a name of its own."""
        return getattr(self.context, _NAMES_IN_MPMATH.get(name, name))(*map(self._inexact, arguments))


_NAMES_IN_MPMATH = {f"arc{name}": f"a{name}" for name in "sin cos tan cot sec csc sinh cosh tanh".split()}
_EXACT = "add multiply negate invert fraction power root factorial double_factorial binomial floor ceil degree exp log lg modulo"
_OPERATORS: dict[str, Callable[..., Value]] = {
    "abs": _Evaluation.absolute,
    **{name: getattr(_Evaluation, name) for name in _EXACT.split()},
}
