r"""Equations and inequalities: the same relation in another form, and the part of the number line that inequalities and intervals name.

`x\ge 2`, `[2,\infty)` and `\{x\mid x\ge2\}` are one region; `x<1` or `x>3` is two stretches. Regions are read for one variable and linear
inequalities; others are compared as relations between two sides.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

from megatron_r1z.grading import arithmetic, values
from megatron_r1z.grading.brackets import is_enclosed, split_outside
from megatron_r1z.grading.expression import parse
from megatron_r1z.grading.parts import both_signs

MAX_PIECES = 16
"""Stretches of one region."""

_SIGN = re.compile(r"=|<|>|\\(?:le|ge|ne|approx)(?![a-z])")
_FLIPPED = {">": "<", r"\ge": r"\le"}
_SET_BUILDER = re.compile(r"\\\{ ?([A-Za-z])(?:\\in ?\\mathbb\{?R\}?)? ?(?:\\mid|\||:) ?(?P<condition>.*?)\\?\}")
_MEMBER = re.compile(r"(?P<name>[A-Za-z]) ?\\in(?![a-z]) ?(?P<region>.*)")
_REALS = re.compile(r"\\mathbb ?\{?R\}?")
_FUNCTION_VALUE = re.compile(r"(?<![A-Za-z\\])([fghFGH])\(([a-z])\)")
_LOOKS_LIKE_REGION = re.compile(r"[<>]|\\(?:le|ge|ne|in|cup|setminus|mathbb|mid)(?![a-z])")


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of the number line; its ends as texts in normal form, and their values."""

    lower: str
    upper: str
    closed: tuple[bool, bool]
    low: Any
    high: Any


@dataclass(frozen=True, slots=True)
class Region:
    """Stretches in order, none touching the next; `name` is the variable, if any is named."""

    name: str | None
    pieces: tuple[Piece, ...]


def is_same_region(left: str, right: str) -> bool | None:
    """Whether two texts name the same part of the number line; None where one is no region or neither looks like more than a tuple."""
    if not (_LOOKS_LIKE_REGION.search(left) or _LOOKS_LIKE_REGION.search(right)):
        return None
    try:
        first, second = (_read(_FUNCTION_VALUE.sub(r"\1_{\2}", side)) for side in (left, right))
    except arithmetic.TooLargeError:
        return None
    if first is None or second is None:
        return None
    if first.name and second.name and first.name != second.name:
        return False
    return len(first.pieces) == len(second.pieces) and all(map(_is_same_piece, first.pieces, second.pieces))


def is_same_relation(left: str, right: str) -> bool | None:
    """Whether two relations are the same up to order, side and a constant factor; None where the left one cannot be read."""
    first, second = _split(left), _split(right)
    if first is None or second is None or any(parse(side) is None for side in first[0]):
        return None
    if first[1] != second[1] or any(parse(side) is None for side in second[0]):
        return False
    if all(values.is_same(*pair) for pair in zip(first[0], second[0], strict=True)):
        return True
    if first[1] in (["="], [r"\ne"]) and all(values.is_same(*pair) for pair in zip(first[0], reversed(second[0]), strict=True)):
        return True
    return len(first[1]) == 1 and _is_multiple(_difference(first[0]), _difference(second[0]), first[1] not in (["="], [r"\ne"]))


def _split(text: str) -> tuple[list[str], list[str]] | None:
    r"""Sides and signs between them, turned so that `<` and `\le` point to the right."""
    signs = [match.group() for match in _SIGN.finditer(text)]
    if not signs or r"\in" in text.replace(r"\infty", ""):
        return None
    sides = [side.strip() for side in _SIGN.split(text)]
    signs = ["=" if sign == r"\approx" else sign for sign in signs]
    if all(sign in (*_FLIPPED, "=") for sign in signs) and any(sign in _FLIPPED for sign in signs):
        return sides[::-1], [_FLIPPED.get(sign, sign) for sign in signs[::-1]]
    return sides, signs


def _difference(sides: list[str]) -> str:
    return f"({sides[0]})-({sides[1]})"


def _is_multiple(left: str, right: str, positive: bool) -> bool:
    """Whether one is the other times a constant other than 0 (above 0 for inequalities); both must have variables."""
    if parse(left) is None or parse(right) is None or len(values.points(left)) == 1 or len(values.points(right)) == 1:
        return False
    try:
        samples = [(arithmetic.sample(left, point), arithmetic.sample(right, point)) for point in values.points(left, right)]
    except arithmetic.TooLargeError:
        return False
    pairs = [(first.value, second.value) for first, second in samples if first.value is not None and second.value is not None]
    if len(pairs) < 3 or not all(pairs[0]):
        return False
    factor = values.divide(*pairs[0])
    if positive and not (arithmetic.is_real(factor) and factor > 0):
        return False
    return all(values.is_close(values.multiply(factor, second), first) for first, second in pairs[1:])


def _read(text: str) -> Region | None:
    text = text.strip()
    if match := _SET_BUILDER.fullmatch(text):
        return _read(match["condition"])
    if match := _MEMBER.fullmatch(text):
        region = _read(match["region"])
        return region and Region(match["name"], region.pieces)
    if len(items := split_outside(text, r"\cup")) > 1:
        return _combine([_read_piece(item) for item in items])
    if len(items := split_outside(text, ",")) > 1:
        return _read_conditions(items)
    return _read_piece(text)


def _read_conditions(texts: list[str]) -> Region | None:
    """Several inequalities: what fulfils all of them, or where nothing can, what fulfils any."""
    regions = [_read_relation(text) for text in texts]
    if len(regions) > MAX_PIECES:
        return None
    common = regions[0]
    for region in regions:
        if region is None or common is None or region.name != common.name:
            return None
        pieces = [piece for left in common.pieces for right in region.pieces if (piece := _intersect(left, right)) is not None]
        common = Region(region.name, tuple(pieces))
    return common if common is not None and common.pieces else _combine(regions)


def _read_piece(text: str) -> Region | None:
    if _REALS.fullmatch(text):
        return _region(None, r"-\infty", r"\infty", (False, False))
    if match := re.fullmatch(rf"(?:{_REALS.pattern}|\(-\\infty,\\infty\)) ?(?:\\setminus|\\backslash|-) ?(\\\{{.*\}})", text):
        return _without_points(None, split_outside(match[1][2:-1].rstrip("\\"), ","))
    if is_enclosed(text, r"\{", "}"):
        return _combine([_region(None, item, item, (True, True)) for item in split_outside(text[2:-1].rstrip("\\"), ",")])
    for opening, closing in ("()", "[]", "(]", "[)"):
        if is_enclosed(text, opening, closing) and len(ends := split_outside(text[1:-1], ",")) == 2:
            return _region(None, ends[0], ends[1], (opening == "[", closing == "]"))
    return _read_relation(text)


def _region(name: str | None, lower: str, upper: str, closed: tuple[bool, bool]) -> Region | None:
    low, high = values.constant(lower), values.constant(upper)
    if low is None or high is None:
        return None
    is_empty = low > high or (low == high and closed != (True, True))
    return Region(name, () if is_empty else (Piece(lower, upper, closed, low, high),))


def _without_points(name: str | None, points: list[str]) -> Region | None:
    known = {point: value for point in points if (value := values.constant(point)) is not None}
    if not known or len(known) < len(set(points)):
        return None
    ordered = sorted(known, key=lambda point: known[point])
    ends = [r"-\infty", *ordered, r"\infty"]
    return _combine([_region(name, lower, upper, (False, False)) for lower, upper in pairwise(ends)])


def _combine(regions: list[Region | None]) -> Region | None:
    """The union, with stretches that touch made one."""
    known = [region for region in regions if region is not None]
    if len(known) < len(regions) or len({region.name for region in known}) != 1:
        return None
    pieces: list[Piece] = []
    for piece in sorted((piece for region in known for piece in region.pieces), key=lambda piece: (piece.low, not piece.closed[0])):
        last = pieces[-1] if pieces else None
        if last is None or piece.low > last.high or (piece.low == last.high and not (piece.closed[0] or last.closed[1])):
            pieces.append(piece)
            continue
        ending = max(last, piece, key=lambda item: (item.high, item.closed[1]))
        start = last.closed[0] or (piece.low == last.low and piece.closed[0])
        pieces[-1] = Piece(last.lower, ending.upper, (start, ending.closed[1]), last.low, ending.high)
    return Region(known[0].name, tuple(pieces))


def _intersect(left: Piece, right: Piece) -> Piece | None:
    start = max(left, right, key=lambda piece: (piece.low, not piece.closed[0]))
    end = min(left, right, key=lambda piece: (piece.high, piece.closed[1]))
    closed = (start.closed[0], end.closed[1])
    if start.low > end.high or (start.low == end.high and closed != (True, True)):
        return None
    return Piece(start.lower, end.upper, closed, start.low, end.high)


def _read_relation(text: str) -> Region | None:
    r"""A chain of inequalities about one variable, or `x\ne a`."""
    split = _split(text)
    if split is None or len(split[1]) > 2:
        return None
    sides, signs = split
    names = {name for side in sides for name in _symbols(side)}
    if len(names) != 1:
        return None
    name, middle = names.pop(), next(index for index, side in enumerate(sides) if _symbols(side))
    if sum(bool(_symbols(side)) for side in sides) != 1 or (len(sides) == 3 and middle != 1):
        return None
    if signs == [r"\ne"]:
        solved = [_solve(sides[middle], name, end) for end in both_signs(sides[1 - middle])]
        return _without_points(name, [solution[0] for solution in solved if solution is not None])
    if not set(signs) <= {"<", r"\le"}:
        return None
    lower, upper = (sides[0] if middle else None), (sides[-1] if middle < len(sides) - 1 else None)
    return _between(sides[middle], name, (lower, upper), (signs[0] == r"\le", signs[-1] == r"\le"))


def _between(text: str, name: str, ends: tuple[str | None, str | None], closed: tuple[bool, bool]) -> Region | None:
    """Where `text` lies between the ends, None being infinitely far."""
    if is_enclosed_by_bars(text) and (ends[0] is None) != (ends[1] is None):
        bound = ends[0] or ends[1] or ""
        if ends[0] is None:
            return _between(text[1:-1], name, (f"-({bound})", bound), (closed[1], closed[1]))
        outside = [_between(text[1:-1], name, (None, f"-({bound})"), closed), _between(text[1:-1], name, (bound, None), closed)]
        return _combine([outside[0] and Region(name, _reclosed(outside[0], closed[0])), outside[1]])
    infinite = (r"-\infty", r"\infty")
    bounds: list[str] = []
    slope = Fraction(1)
    for end, far in zip(ends, infinite, strict=True):
        solved = (far, None) if end is None or end.lstrip("+") == far else _solve(text, name, end)
        if solved is None:
            return None
        bounds.append(solved[0])
        slope = solved[1] if solved[1] is not None else slope
    flags = (closed[0] and ends[0] is not None, closed[1] and ends[1] is not None)
    if slope < 0:
        turned = {infinite[0]: infinite[1], infinite[1]: infinite[0]}
        bounds, flags = [turned.get(bound, bound) for bound in reversed(bounds)], (flags[1], flags[0])
    return _region(name, bounds[0], bounds[1], flags)


def _reclosed(region: Region, closed: bool) -> tuple[Piece, ...]:
    return tuple(Piece(piece.lower, piece.upper, (False, closed), piece.low, piece.high) for piece in region.pieces)


def is_enclosed_by_bars(text: str) -> bool:
    """Whether the text is one absolute value."""
    return len(text) > 2 and text[0] == text[-1] == "|" and "|" not in text[1:-1]


def _symbols(text: str) -> frozenset[str]:
    expression = parse(text)
    return frozenset() if expression is None else expression.symbols


def _solve(text: str, name: str, end: str) -> tuple[str, Fraction] | None:
    """Where a linear expression takes the value `end`, and its slope; None where it is not linear with rational coefficients."""
    if text == name:
        return end, Fraction(1)
    places = [arithmetic.point_value(name, point) for point in range(3)]
    heights = [height for point in range(3) if isinstance(height := arithmetic.sample(text, point).value, Fraction)]
    if len(heights) < 3:
        return None
    slope = (heights[1] - heights[0]) / (places[1] - places[0])
    offset = heights[0] - slope * places[0]
    if slope == 0 or heights[2] != offset + slope * places[2]:
        return None
    return f"(({end})-({offset}))/({slope})", slope


def _is_same_piece(left: Piece, right: Piece) -> bool:
    ends = ((left.lower, right.lower), (left.upper, right.upper))
    return left.closed == right.closed and all(values.is_same(*pair) is True for pair in ends)
