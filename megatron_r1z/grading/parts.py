r"""Composite answers taken apart: lists, sets, tuples, intervals, unions, matrices, ratios, values with names. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_r1z.grading.brackets import is_enclosed, split_outside
from megatron_r1z.grading.names import Assignment, in_order, read_records, split_name

_MATRIX = re.compile(r"\\begin\{pmatrix\}((?:(?!\\begin).)*)\\end\{pmatrix\}", re.DOTALL)
_UNORDERED = ("list", "set", "union", "named")


@dataclass(frozen=True, slots=True)
class Parts:
    """A composite answer.

    `kind` is `list` (no brackets) or `set` (order is free), `union` and `named` (likewise), `matrix` (of rows), `row`, `ratio`, or the two
    brackets of a tuple or interval.
    """

    kind: str
    items: Sequence[str]

    @property
    def ordered(self) -> bool:
        """Whether the order of the items matters."""
        return self.kind not in _UNORDERED


def split_parts(text: str) -> Parts | None:
    r"""The parts of a composite answer in normal form; None for a single thing.

    >>> split_parts("(0,1]"), split_parts(r"\pm 2").items
    (Parts(kind='(]', items=['0', '1']), ['+2', '-2'])
    """
    if match := _MATRIX.fullmatch(text):
        return Parts("matrix", [row for row in split_outside(match[1], r"\\") if row])
    if len(items := split_outside(text, "&")) > 1:
        return Parts("row", items)
    if len(items := split_outside(text, r"\cup")) > 1:
        return _union(items)
    if len(items := [variant for item in split_outside(text, ",") for variant in both_signs(item)]) > 1:
        return _list_or_records(items)
    if len(records := read_records([text])) == 1:
        return _record(records[0])
    if is_enclosed(text, r"\{", "}"):
        return Parts("set", _elements(text))
    for opening, closing in ("()", "[]", "(]", "[)"):
        if is_enclosed(text, opening, closing) and len(items := split_outside(text[1:-1], ",")) > 1:
            if opening == "[" and all(is_enclosed(item, "[", "]") for item in items):
                return Parts("matrix", ["&".join(split_outside(item[1:-1], ",")) for item in items])
            return Parts(opening + closing, items)
    return _ratio(text)


def as_one_kind(left: Parts, right: Parts) -> tuple[Parts, Parts]:
    """A list without brackets is read as what stands on the other side: a set, or a tuple in round brackets."""
    kinds = {left.kind, right.kind}
    if kinds in ({"list", "set"}, {"list", "()"}):
        (kind,) = kinds - {"list"}
        return Parts(kind, left.items), Parts(kind, right.items)
    return left, right


def without_names(parts: Parts) -> Parts:
    """Values with names as a tuple of the values, in the order of the names."""
    return Parts("()", [split_name(item)[0] for item in parts.items]) if parts.kind == "named" else parts


def ratio_as_fraction(text: str) -> str:
    r"""`1:2` as `\frac{1}{2}`; anything else as it is."""
    terms = split_outside(text, ":")
    return rf"\frac{{{terms[0]}}}{{{terms[1]}}}" if len(terms) == 2 and all(terms) else text


def _ratio(text: str) -> Parts | None:
    terms = split_outside(text, ":")
    if len(terms) < 3 or not all(terms):
        return None
    return Parts("ratio", [rf"\frac{{{term}}}{{{terms[0]}}}" for term in terms])


def _elements(text: str) -> list[str]:
    """The elements of a set in braces, each once."""
    return list(dict.fromkeys(split_outside(text[2:-1].rstrip("\\"), ",")))


def _union(items: list[str]) -> Parts:
    if all(is_enclosed(item, r"\{", "}") for item in items):
        return Parts("set", list(dict.fromkeys(element for item in items for element in _elements(item))))
    return Parts("union", items)


def both_signs(text: str) -> list[str]:
    r"""Both values of an item with one `\pm`."""
    if text.count(r"\pm") != 1:
        return [text]
    return [text.replace(r"\pm", sign).replace(f"{sign} ", sign) for sign in "+-"]


def _list_or_records(items: list[str]) -> Parts:
    r"""Values of different variables, `x=1, y=2`, as one record; `p=5,q=2;p=7,q=2` as a list of those; else a list."""
    records = read_records(items)
    if not records:
        names = [split_name(item)[1] for item in items]
        is_repeated = None not in names and len(set(names)) < len(names)  # no tuple names a place twice
        return Parts("set" if is_repeated else "list", items)
    if len(records) == 1:
        return _record(records[0])
    return Parts("list", [",".join(map(str, in_order(record))) for record in records])


def _record(record: Sequence[Assignment]) -> Parts:
    return Parts("named", [str(assignment) for assignment in in_order(record)])
