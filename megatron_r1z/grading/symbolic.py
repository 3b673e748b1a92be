"""What the grammar of `expression` does not read: integrals, sums, limits and products with matrices; latex2sympy reads, sympy decides.

Text is parsed by a LaTeX grammar, never evaluated as Python. There is no time limit here, so callers run this in a process that can be
killed. sympy is imported inside the functions.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from megatron_r1z.grading.brackets import nesting

MAX_NESTING = 10
"""Brackets within brackets; the time of latex2sympy's grammar explodes with them."""
MAX_CHARACTERS = 300
"""Longer texts are not read."""

CLEAR_DIFFERENCE = 1e-6
"""Relative; at a point, well above what rounding can do."""

_BEYOND_GRAMMAR = re.compile(r"\\(?:int|iint|oint|sum|prod|lim|det|partial)(?![a-z])|\\begin\{[pv]matrix\}")
_DROPPED = re.compile(r"['\"]|\d_")
"""Primes and the bases of numbers: latex2sympy reads `f'` as `f` and `101_2` as `101`."""
_IMAGINARY_UNIT = re.compile(r"(?<![A-Za-z\\])i(?![A-Za-z])")


def warm_up() -> None:
    """Import and exercise everything once, so that the first comparison takes as long as any other."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that we run it without its own time limit
    is_same_expression(r"\sum_{k=1}^{n} k", r"\frac{n(n+1)}{2}")
    is_same_expression(r"2\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\4\end{pmatrix}")


def is_beyond_grammar(text: str) -> bool:
    """Whether it holds an operator that only sympy knows."""
    return _BEYOND_GRAMMAR.search(text) is not None


def is_same_expression(answer: str, reference: str) -> bool | None:
    """Whether two texts in normal form are equal for all values of their variables; None where the answer cannot be read or handled."""
    left, right = parse_latex(answer), parse_latex(reference)
    if left is None:
        return None
    try:
        return right is not None and _is_same(left, right)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  (sympy stumbles over nonsense in many ways, such as AttributeError in `simplify`)
        return None


@lru_cache(maxsize=512)
def parse_latex(text: str) -> Any:
    """The sympy object that `text` stands for as a whole, or None."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    if _DROPPED.search(text) or nesting(text) > MAX_NESTING or len(text) > MAX_CHARACTERS:
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


def _is_same(left: Any, right: Any) -> bool:
    from math_verify import verify
    from sympy import Expr, simplify

    if not (isinstance(left, Expr) and isinstance(right, Expr)):
        return bool(verify(right, left, timeout_seconds=None, allow_set_relation_comp=True))
    left, right = left.doit(), right.doit()
    return bool(left == right) or (not _differ_at_a_point(left, right) and bool(simplify(left - right) == 0))


def _differ_at_a_point(left: Any, right: Any) -> bool:
    """Whether they have clearly different values at one arbitrary point, which spares most wrong answers the slow `simplify`."""
    from sympy import Rational, prime

    names = sorted(left.free_symbols | right.free_symbols, key=str)
    point = {symbol: Rational(prime(index + 7), 13) for index, symbol in enumerate(names)}
    first, second = left.evalf(subs=point), right.evalf(subs=point)
    if not (first.is_number and first.is_finite and second.is_number and second.is_finite):
        return False
    return bool(abs(first - second) > CLEAR_DIFFERENCE * max(abs(first), abs(second)))
