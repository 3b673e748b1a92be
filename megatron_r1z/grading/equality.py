r"""Whether an answer equals a reference: text first, then numbers, then parts one by one, then values.

The order makes the cheap and exact test speak first and the last word only where nothing cheaper applies: two numbers that differ are
different, whatever a comparison within a tolerance would say. docs/grading.md lists what is equal to what.
"""

from __future__ import annotations

from enum import Enum

from megatron_r1z.grading import names, numbers, relations, symbolic, text, units, values
from megatron_r1z.grading.answers import extract_boxed
from megatron_r1z.grading.brackets import nesting
from megatron_r1z.grading.expression import parse
from megatron_r1z.grading.parts import Parts, as_one_kind, ratio_as_fraction, split_parts, without_names

MAX_LENGTH = 2000
"""Longer answers are compared as text only; the longest reference of the published question sets has 204 characters."""
MAX_ITEMS = 32
"""Longer lists are compared as text only: in a set each item may be compared with each."""
MAX_NESTING = 60
"""Brackets within brackets; deeper answers are compared as text only."""
MAX_DEPTH = 5
"""Nesting of lists."""


class Equality(Enum):
    """The outcome of one comparison; `UNPARSABLE`: the answer is neither the same text nor something that can be read."""

    EQUAL = "equal"
    DIFFERENT = "different"
    UNPARSABLE = "unparsable"


_ONE_OF_EACH_KIND = (
    *("5", "0.5", r"\frac{1}{2}", r"3\frac{1}{2}", "1,000", r"4.5\times10^7", "five million", r"50\%", "101_2", "5:30 p.m.", "1:2"),
    *("5 cm", r"5\text{ meters per second}", r"\$5", "x^2-1", "(x-1)(x+1)", r"\sqrt{12}", r"\tan 45^\circ", r"\log 100", r"\binom{4}{2}"),
    *("x=5", "2x+y=3", r"x\ge2", r"[2,\infty)", r"(0,1]\cup\{2\}", r"\{2,1\}", "(1,2)", r"\pm2", r"\text{Yes}", "Monday", r"\emptyset"),
    r"\begin{pmatrix}1\\2\end{pmatrix}",
)


def warm_up() -> None:
    """Import and exercise everything once, so that the first comparison takes as long as any other."""
    symbolic.warm_up()
    for answer in _ONE_OF_EACH_KIND:
        for reference in _ONE_OF_EACH_KIND:
            compare(answer, reference)


def is_equal(answer: str, reference: str) -> bool:
    r"""Whether the two mean the same.

    >>> is_equal("0.5", r"\frac12"), is_equal("5 cm", "5 m"), is_equal("2,1", "1, 2")
    (True, False, True)
    """
    return compare(answer, reference) is Equality.EQUAL


def compare(answer: str, reference: str) -> Equality:
    """The full comparison. Integrals, sums and limits go to sympy and may hang: run it in a `WorkerPool`."""
    settled = settle(answer, reference)
    return settled if settled is not None else _compare_options(_canonical(answer), _canonical(reference))


def settle(answer: str, reference: str) -> Equality | None:
    """The outcome where it is plain to see, in time linear in the text: same text, plain numbers, empty or overlong; else None."""
    answer, reference = answer.strip(), reference.strip()
    if answer == reference:
        return Equality.EQUAL
    if max(len(answer), len(reference)) > MAX_LENGTH or max(nesting(answer), nesting(reference)) > MAX_NESTING:
        return Equality.UNPARSABLE if answer and reference else Equality.DIFFERENT
    if not answer or not reference:
        return _equality(_is_nothing(_canonical(answer or reference)))
    same = numbers.settle_plain_numbers(answer, reference)
    return None if same is None else _equality(same)


def _canonical(raw: str) -> str:
    boxed = extract_boxed(raw)
    return text.normalise(raw if boxed is None else boxed)


def _equality(same: bool) -> Equality:
    return Equality.EQUAL if same else Equality.DIFFERENT


def _is_nothing(normal: str) -> bool:
    """Whether no more is left than a unit without a number."""
    return not units.split_unit(normal)[0]


def _compare_options(answer: str, reference: str) -> Equality:
    r"""An option is told by its letter, by its text or by both, `\textbf{(C)}\ 5`; a letter on both sides must be the same."""
    (letter, said), (expected_letter, expected) = text.split_label(answer), text.split_label(reference)
    if letter is not None and expected_letter is not None and letter != expected_letter:
        return Equality.DIFFERENT
    if (letter is None) != (expected_letter is None) and (letter or answer) == (expected_letter or reference):
        return Equality.EQUAL
    return _compare(said, expected, MAX_DEPTH)


def _compare(answer: str, reference: str, depth: int) -> Equality:
    """Compare two texts in normal form."""
    answer, reference = text.unwrap(answer), text.unwrap(reference)
    if answer == reference:
        return Equality.EQUAL
    if not answer or not reference:
        return _equality(_is_nothing(answer or reference))
    answer, reference = _without_names(_end_of_chain(answer), _end_of_chain(reference))
    if (same_region := relations.is_same_region(answer, reference)) is not None:
        return _equality(same_region)
    left, right = split_parts(answer), split_parts(reference)
    if left is None and right is None:
        return _compare_single(answer, reference)
    if (left is None or right is None) and symbolic.is_beyond_grammar(answer) and symbolic.is_beyond_grammar(reference):
        return _compare_values(answer, reference)  # a matrix against a product with one
    opened = _without_set_of_one(answer, left, right), _without_set_of_one(reference, right, left)
    if opened != (answer, reference) and depth > 0:
        return _compare(*opened, depth - 1)
    return _compare_composites(left or Parts("set", [answer]), right or Parts("set", [reference]), depth)


def _without_set_of_one(whole: str, parts: Parts | None, other: Parts | None) -> str:
    r"""The element of a set of one where the other side is a composite but no set: `\{(1,2)\}` for `(1,2)`; else the text as it is."""
    is_set_of_one = parts is not None and parts.kind == "set" and len(parts.items) == 1
    return parts.items[0] if parts and is_set_of_one and other is not None and other.kind not in ("set", "list") else whole


def _compare_composites(left: Parts, right: Parts, depth: int) -> Equality:
    if (left.kind == "named") != (right.kind == "named"):
        left, right = without_names(left), without_names(right)
        left, right = (Parts("()", side.items) if side.kind == "list" else side for side in (left, right))
    left, right = as_one_kind(left, right)
    if left.kind != right.kind or len(left.items) != len(right.items):
        return Equality.DIFFERENT
    if depth == 0 or len(left.items) > MAX_ITEMS:
        return Equality.UNPARSABLE
    return _compare_parts(left, right, depth - 1)


def _without_names(answer: str, reference: str) -> tuple[str, str]:
    """Drop `x=` where both have the same name, or only one side has a name and the other is no relation; else both stay equations."""
    (said, name), (expected, expected_name) = names.split_name(answer), names.split_name(reference)
    if (
        name == expected_name
        or (name is None and not names.is_relation(said))
        or (expected_name is None and not names.is_relation(expected))
    ):
        return text.unwrap(said), text.unwrap(expected)
    return answer, reference


def _end_of_chain(relation: str) -> str:
    r"""The last side of a chain whose sides are equal, `\frac{3}{5}=0.6`, behind its name, `x=1+1=2`; without a name, constants."""
    if "=" not in relation and r"\approx" not in relation:
        return relation
    name, sides = names.split_chain(relation)
    if len(sides) < 2 or not all(sides) or any(names.is_relation(side) for side in sides):
        return relation
    if not name and any(values.constant(units.split_unit(side)[0].rstrip("%")) is None for side in sides):
        return relation
    return name + sides[-1] if all(_compare_quantities(side, sides[-1]) is Equality.EQUAL for side in sides) else relation


def _compare_parts(left: Parts, right: Parts, depth: int) -> Equality:
    """Pair the items off; equality is transitive, so the first partner that fits is as good as any."""
    remaining = list(right.items)
    for item in left.items:
        outcomes = [_compare(item, candidate, depth) for candidate in (remaining[:1] if left.ordered else remaining)]
        if Equality.EQUAL not in outcomes:
            return Equality.UNPARSABLE if Equality.UNPARSABLE in outcomes else Equality.DIFFERENT
        del remaining[outcomes.index(Equality.EQUAL)]
    return Equality.EQUAL


def _compare_single(answer: str, reference: str) -> Equality:
    """Compare two texts that have no parts: by the first of the kinds below that either of them is."""
    if (same_time := numbers.is_same_time(answer, reference)) is not None:
        return _equality(same_time)
    numerals = numbers.parse_numeral(answer), numbers.parse_numeral(reference)
    if any(numerals):
        return _equality(numerals[0] == numerals[1])
    if text.is_language(answer) or text.is_language(reference):
        words = text.spell_words(answer)
        if words is not None and words == text.spell_words(reference):
            return Equality.EQUAL
    if names.is_relation(answer) or names.is_relation(reference):
        return _compare_relations(answer, reference)
    return _compare_quantities(ratio_as_fraction(answer), ratio_as_fraction(reference))


def _compare_relations(answer: str, reference: str) -> Equality:
    if not (names.is_relation(answer) and names.is_relation(reference)):
        return Equality.DIFFERENT
    same = relations.is_same_relation(answer, reference)
    return Equality.UNPARSABLE if same is None else _equality(same)


def _compare_quantities(answer: str, reference: str) -> Equality:
    """Numbers or expressions with or without a unit; a percentage has none and measures nothing else."""
    (left, unit), (right, expected_unit) = units.split_unit(answer), units.split_unit(reference)
    if unit is not None and expected_unit is not None:
        if not units.is_same_measure(unit, expected_unit):
            return Equality.DIFFERENT
        if unit.factor != expected_unit.factor:
            left, right = units.in_base(left, unit), units.in_base(right, expected_unit)
    elif (only := unit or expected_unit) is not None:
        if _is_same_value(answer, reference) is True:
            return Equality.EQUAL  # `5 m` as the product that `5m` is
        if not only.may_be_absent or (right if unit else left).endswith("%"):
            return Equality.DIFFERENT
    if not left or not right:
        return _equality(left == right)
    return _compare_values(left, right)


def _compare_values(left: str, right: str) -> Equality:
    number, expected = numbers.parse_number(left), numbers.parse_number(right)
    if number is not None and expected is not None:
        return _equality(numbers.is_same_number(number, expected))
    if text.is_language(left) or text.is_language(right):
        return Equality.DIFFERENT
    outcomes = [_is_same_value(*pair) for pair in _percentage_readings(left, right)]
    return _equality(True in outcomes) if True in outcomes or None not in outcomes else Equality.UNPARSABLE


def _percentage_readings(left: str, right: str) -> list[tuple[str, str]]:
    r"""A percentage against a figure stands for its value or its figure; against another percentage, for its figure."""
    if left.endswith("%") == right.endswith("%"):
        return [(left.rstrip("%"), right.rstrip("%"))]
    figures = left.rstrip("%"), right.rstrip("%")
    return [figures, (figures[0], rf"100({figures[1]})") if left.endswith("%") else (rf"100({figures[0]})", figures[1])]


def _is_same_value(left: str, right: str) -> bool | None:
    if parse(left) is not None and parse(right) is not None:
        return values.is_same(left, right)
    if values.is_too_large(left) or values.is_too_large(right):  # sympy would try
        return None
    is_left_read, is_right_read = (parse(side) is not None or symbolic.is_beyond_grammar(side) for side in (left, right))
    if is_left_read and is_right_read:
        return symbolic.is_same_expression(left, right)
    return False if is_left_read else None
