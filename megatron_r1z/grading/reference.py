r"""The paper's grader, verdict for verdict, for runs whose numbers are to be compared with the published ones.

Reproduces `grade` of `oat/utils/math_grader.py` (sail-sg/oat c1a074c; the same in sail-sg/understand-r1-zero dfca49d), mistakes
included; `equality` is the mode without them. An answer is right when one of the layers says so:

    string       the same text in a normal form                          fast, math_verify
    sympy        element by element, simplify(reference - answer) == 0   fast, math_verify
    Math-Verify  parsed as LaTeX and compared                            math_verify

A comparison can hang or exhaust memory on hostile text: run it in a `WorkerPool`.
"""

from __future__ import annotations

from megatron_r1z.grading import reference_algebra as algebra
from megatron_r1z.grading import reference_text as text
from megatron_r1z.grading.answers import extract_boxed
from megatron_r1z.grading.equality import Equality


def compare_fast(answer: str, reference: str) -> Equality:
    r"""The fast path: string or sympy layer.

    >>> compare_fast(r"3\frac12", "3.5"), compare_fast(r"\frac{10}{2}", "5")
    (<Equality.EQUAL: 'equal'>, <Equality.DIFFERENT: 'different'>)
    """
    unboxed = _unbox(reference)
    return _equality(unboxed is not None and _is_right_fast(answer, unboxed))


def compare_math_verify(answer: str, reference: str) -> Equality:
    r"""The slow path: string, sympy or Math-Verify layer.

    >>> compare_math_verify(r"\frac{10}{2}", "5"), compare_math_verify(r"101_2", "101")
    (<Equality.EQUAL: 'equal'>, <Equality.EQUAL: 'equal'>)
    """
    unboxed = _unbox(reference)
    return _equality(unboxed is not None and (_is_right_fast(answer, unboxed) or algebra.is_equal_by_math_verify(answer, unboxed)))


def warm_up() -> None:
    """Set a worker process up: import and exercise everything once."""
    algebra.warm_up()
    text.normalise_string(r"\text{cm}")
    text.normalise_expression(r"\frac{1}{2}")


def _unbox(reference: str) -> str | None:
    """The content of the reference's box, None where it is broken; no answer is right then."""
    return extract_boxed(reference) if r"\boxed" in reference else reference


def _equality(is_right: bool) -> Equality:
    return Equality.EQUAL if is_right else Equality.DIFFERENT


def _is_right_fast(answer: str, reference: str) -> bool:
    return text.normalise_string(answer) == text.normalise_string(reference) or _is_equal_by_sympy(answer, reference)


def _is_equal_by_sympy(answer: str, reference: str) -> bool:
    given, expected = text.normalise_expression(answer), text.normalise_expression(reference)
    if given == expected:
        return True
    if not given or not expected:
        return False
    given_elements, expected_elements = text.split_elements(given), text.split_elements(expected)
    if len(given_elements) != len(expected_elements):
        return False
    if len(expected_elements) > 1 and (given[0], given[-1]) != (expected[0], expected[-1]):
        return False
    return all(map(_is_equal_element, given_elements, expected_elements))


def _is_equal_element(given: str, expected: str) -> bool:
    if text.is_integer_fraction(given) and text.is_integer_fraction(expected):
        return given == expected  # so that unreduced fractions are wrong
    if text.is_integer(given) != text.is_integer(expected):
        return False
    return algebra.is_difference_zero(expected, given)
