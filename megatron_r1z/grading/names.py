r"""Names before an equation sign: what is asked for in `x=5`, `S:T=7:32`, `f(2)=7`, `AB+BC=7`, as opposed to an equation such as `2x=7`.

A name is one thing (a letter, a segment, an angle, a word, a value of a function, a tuple of letters), or a ratio, sum, difference or
fraction of such things. Where letters are added or divided, x, y and z are no names, because `x+y=1` and `y/x=2` are lines; nor is anything
with a coefficient, a power or a product of letters, because such an equation asks to be solved. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_r1z.grading.brackets import is_enclosed, split_outside

_MARKS = r"(?:_\{(?:[^{}]|\{[^{}]*\})*\}|'|\^\{-1\})*"
_CONSTANT = r"(?:[-+\d./%]|\\(?:frac|sqrt|pi|infty)(?![a-z])|[{}])+"
_FUNCTION = rf"(?:[fghpqrFGHQRSTVE]|\\(?:phi|varphi|psi|sigma|Phi)){_MARKS}"
_VALUE = rf"{_FUNCTION}\({_CONSTANT}(?:,{_CONSTANT})*\)"
_CALL = rf"(?:{_VALUE}|{_FUNCTION}\({_VALUE}\)|(?:P|\\Pr)\((?:[^()]|\([^()]*\))*\)|E\[[^\[\]]*\])"
_SHAPE = (
    r"(?:m ?)?(?:\\(?:angle|triangle) ?)?[A-Z]{2,4}(?![A-Za-z])|(?:m ?)?\\angle ?(?:[A-Z]|\d)"
    r"|\\overline ?\{[A-Z]{2}\}|\|[A-Z]{2}\||\\\|[A-Z]{2}\\\||\[[A-Z]{3,}\]"
)
_WORD = rf"(?:\\text\{{[^{{}}]*\}}|[A-Za-z]{{5,}}){_MARKS}"
_LETTER = rf"(?:[A-Za-z]|\\[a-z]+){_MARKS}(?:\([A-Za-z](?:,[a-z])*\))?"
_KNOWN_LETTER = rf"(?:[A-Wa-w]|\\[a-z]+){_MARKS}"
_TUPLE = r"\([a-z](?:,[a-z])+\)"
_THING = rf"(?>{_CALL}|{_SHAPE}|{_WORD}|{_LETTER}|{_TUPLE}|\\frac\{{d[A-Za-z]\}}\{{d[A-Za-z]\}})"
_KNOWN = rf"(?>{_CALL}|{_SHAPE}|{_WORD}|{_KNOWN_LETTER})"
_NAME = rf"(?:{_KNOWN}(?: ?[+-] ?{_KNOWN})+|{_KNOWN} ?/ ?{_KNOWN}|\\frac\{{{_KNOWN}\}}\{{{_KNOWN}\}}|{_THING}(?: ?: ?{_THING})*)"
_NAMED = re.compile(rf"(?P<name>{_NAME}) ?(?:=|\\approx|\\in(?![a-z])) ?")
_NAMED_BEHIND = re.compile(r"(?P<value>.*[^\s=]) ?= ?(?P<name>[A-Za-z])")
_NAMED_POINT = re.compile(rf"(?P<name>[A-Z]{_MARKS}) ?(?P<point>\(.*,.*\))")
_WEIGHTED = re.compile(rf"\d*{_KNOWN}(?: ?[+-] ?\d*{_KNOWN})+ ?= ?")
_RELATION = re.compile(r"[=<>]|\\(?:le|ge|ne|in|approx)(?![a-z])")


def split_name(text: str) -> tuple[str, str | None]:
    r"""What is said of a name and the name: `x=5`, `5=x`, `f(x)=2x`, `x\in[1,2]`, `M(1,2)`; other relations are left alone.

    >>> split_name("S:T=7:32"), split_name("x+y=1"), split_name("M(1,2)")
    (('7:32', 'S:T'), ('x+y=1', None), ('(1,2)', 'M'))
    """
    match = _NAMED.match(text)
    if match is not None and not is_relation(text[match.end() :]):
        return text[match.end() :], match["name"].strip()
    match = _NAMED_BEHIND.fullmatch(text)
    if match is not None and not is_relation(match["value"]):
        return match["value"], match["name"]
    match = _NAMED_POINT.fullmatch(text)
    if match is not None and is_enclosed(match["point"], "(", ")"):
        return match["point"], match["name"]
    return _split_common_name(text) if text.count("=") > 1 else (text, None)


def _split_common_name(text: str) -> tuple[str, str | None]:
    """`x=1, x=2` as a set of values of `x`, which has no order."""
    items = split_outside(text, ",")
    if len(items) < 2:
        return text, None
    said = [split_name(item) for item in items]
    names = {name for _, name in said}
    if len(names) > 1 or None in names:
        return text, None
    return rf"\{{{','.join(value for value, _ in said)}\}}", names.pop()


def split_chain(text: str) -> tuple[str, list[str]]:
    r"""The name before a chain of equations with its equation sign, if it has one, and the sides behind it.

    Here a name may be a sum with coefficients, since its value is worked out from it: `100m+n=2500+37=2537`. Such a name is not given back.

    >>> split_chain("m+n=256+37=293"), split_chain("100m+n=2500+37=2537"), split_chain(r"\frac{3}{5}=0.6")
    (('m+n=', ['256+37', '293']), ('', ['2500+37', '2537']), ('', ['\\frac{3}{5}', '0.6']))
    """
    match = _NAMED.match(text)
    name = "" if match is None else match.group()
    if match is None:
        match = _WEIGHTED.match(text)
    behind = text if match is None else text[match.end() :]
    sides = [side.strip() for side in re.split(r"=|\\approx(?![a-z])", behind)]
    return name, sides


def is_relation(text: str) -> bool:
    """Whether it holds an equation or inequality sign, the lower bounds of sums aside."""
    return _RELATION.search(re.sub(r"_\{[^{}]*\}", "", text)) is not None


@dataclass(frozen=True, slots=True)
class Assignment:
    """A name and its value."""

    name: str
    value: str

    def __str__(self) -> str:
        return f"{self.name}={self.value}"


def read_records(items: Sequence[str]) -> list[list[Assignment]]:
    r"""Assignments as records with each name once: `x=1, y=2` and `x=y=2` are one, `p=5,q=2;p=7,q=2` two; none where it is anything else.

    >>> [[str(item) for item in record] for record in read_records(["p=5", "q=2", "p=7", "q=2"])]
    [['p=5', 'q=2'], ['p=7', 'q=2']]
    """
    found = [_read_assignments(item) for item in items]
    assignments = [assignment for several in found for assignment in several]
    names = [assignment.name for assignment in assignments]
    size = len({name.partition("_")[0] for name in names})
    if not all(found) or size < 2 or len(names) % size:
        return []
    records = [assignments[start : start + size] for start in range(0, len(names), size)]
    expected = {assignment.name for assignment in records[0]}
    return records if all({assignment.name for assignment in record} == expected for record in records) and len(expected) == size else []


def in_order(record: Sequence[Assignment]) -> list[Assignment]:
    """In the order in which a tuple has them: by the alphabet, Latin letters first."""
    return sorted(record, key=lambda assignment: (assignment.name.startswith("\\"), assignment.name))


def _read_assignments(text: str) -> list[Assignment]:
    """`x=5`, `x=y=5` and `(x,y)=(1,2)`; empty for anything else."""
    *names, value = [side.strip() for side in text.split("=")]
    if names and all(re.fullmatch(_LETTER, name) for name in names) and value and not is_relation(value):
        return [Assignment(name, value) for name in names]
    said, name = split_name(text)
    if name is not None and len(name) > 2 and re.fullmatch(_TUPLE, name) and is_enclosed(said, "(", ")"):
        letters, values = name[1:-1].split(","), split_outside(said[1:-1], ",")
        return [Assignment(*pair) for pair in zip(letters, values, strict=True)] if len(letters) == len(values) else []
    return []
