"""Algebraic equality by sympy; latex2sympy reads, Math-Verify compares relations, sets and matrices.

Text is parsed by a LaTeX grammar, never evaluated as Python. There is no time limit here: a power tower hangs, so callers run this in
a process that can be killed. sympy is imported inside the functions.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from itertools import accumulate
from typing import Any

FLOAT_TOLERANCE = 5e-7
"""Relative; where a decimal is involved: `0.707107` is the square root of 1/2, `3.14159` is not pi (Math-Verify: six decimals)."""
EXACT_TOLERANCE = 1e-60
"""Relative; for constants written exactly, whose difference sympy evaluates with up to 100 digits: `2^{100}+1` is not `2^{100}`."""
MAX_NESTING = 30
"""Brackets within brackets; the time of the grammar explodes beyond, and no reference has more than a few."""

_DROPPED_BY_GRAMMAR = re.compile(r"['\"]|\d_")
"""Primes and the bases of numbers: latex2sympy reads `f'` as `f` and `101_2` as `101`."""
_IMAGINARY_UNIT = re.compile(r"(?<![A-Za-z\\])i(?![A-Za-z])")


def warm_up() -> None:
    """Import and exercise everything once, so that the first comparison takes as long as any other."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that we run it without its own time limit
    is_same_expression(r"\frac{\sqrt{x}}{2}", r"\frac{1}{2}\sqrt{x}")
    is_same_expression(r"2\le x\le 5", "[2,5]")


def is_same_expression(answer: str, reference: str) -> bool | None:
    """Whether two texts in normal form are equal for all values of their variables; None where the answer cannot be read."""
    left, right = parse_latex(answer), parse_latex(reference)
    if left is None:
        return None
    return right is not None and _is_same(left, right)


@lru_cache(maxsize=512)
def parse_latex(text: str) -> Any:
    """The sympy object that `text` stands for as a whole, or None."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    if _DROPPED_BY_GRAMMAR.search(text) or _nesting(text) > MAX_NESTING:
        return None
    is_complex = _IMAGINARY_UNIT.search(text) is not None
    try:
        return latex2sympy(
            text,
            is_real=not is_complex,
            convert_degrees=False,
            normalization_config=NormalizationConfig(units=False, malformed_operators=True, boxed="none"),
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  (the grammar raises plain Exception, and RecursionError on deep nesting)
        return None


def _nesting(text: str) -> int:
    return max(accumulate((character in "([{") - (character in ")]}") for character in text), default=0)


def _is_same(left: Any, right: Any) -> bool:
    from math_verify import verify
    from sympy import Expr, simplify

    if not (isinstance(left, Expr) and isinstance(right, Expr)):
        return bool(verify(right, left, timeout_seconds=None, allow_set_relation_comp=True))
    left, right = left.doit(), right.doit()
    if left == right:
        return True
    if left.is_number and right.is_number:
        return _is_same_constant(left, right)
    return not _differ_at_a_point(left, right) and bool(simplify(left - right) == 0)


def _differ_at_a_point(left: Any, right: Any) -> bool:
    """Whether they have clearly different values at one arbitrary point, which settles most wrong answers without `simplify`."""
    from sympy import Rational, prime

    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    point = {symbol: Rational(prime(index + 7), 13) for index, symbol in enumerate(symbols)}
    values = left.evalf(subs=point), right.evalf(subs=point)
    if not all(value.is_number and value.is_finite for value in values):
        return False
    return bool(abs(values[0] - values[1]) > FLOAT_TOLERANCE * max(abs(value) for value in values))


def _is_same_constant(left: Any, right: Any) -> bool:
    from sympy import Float

    if left.is_Rational and right.is_Rational:
        return bool(left == right)
    tolerance = FLOAT_TOLERANCE if left.has(Float) or right.has(Float) else EXACT_TOLERANCE
    sizes = abs(left.evalf(30)), abs(right.evalf(30))
    if not all(size.is_finite for size in sizes):
        return False
    return bool(abs((left - right).evalf(30)) <= tolerance * max(sizes))
