r"""Numbers, read and compared exactly and without algebra: decimals, fractions, percentages, numerals of a base, clock times.

Standard library only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_EXPONENT = 400
"""Powers of ten beyond this are left to algebra (they would be long integers here)."""

_DECIMAL = r"\d+(?:\.\d*)?"
_GROUPED = r"\d{1,3}(?: \d{3})+(?:\.\d+)?"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)(?:"
    rf"(?P<repeating>\d+\.\d*)\\overline\{{(?P<period>\d+)\}}"
    rf"|(?P<mantissa>{_DECIMAL})(?: ?(?:\\times|\\cdot) ?10\^\{{(?P<power>[+-]?\d+)\}}|[eE](?P<e_power>[+-]?\d+))"
    rf"|10\^\{{(?P<ten_power>[+-]?\d+)\}}"
    rf"|(?:(?P<whole>\d+) ?)??(?:\\frac\{{(?P<top>[+-]?\d+)\}}\{{(?P<bottom>[+-]?\d+)\}}|(?P<plain_top>\d+)/(?P<plain_bottom>\d+))"
    rf"|(?P<grouped>{_GROUPED})"
    rf"|(?P<decimal>{_DECIMAL})"
    rf")(?P<percent>%?)"
)
_PLAIN_NUMBER = re.compile(r"[+-]?\d{1,100}(?:\.\d{0,100})?")
_NUMERAL = re.compile(
    r"(?P<sign>-?)\(?(?P<digits>\d[\dA-Fa-f]*(?:\.[\dA-Fa-f]+)?|[A-Fa-f][\dA-Fa-f]+(?=\)?_\{1))\)?_\{\(?(?P<base>\d{1,2})\)?\}"
)
_CLOCK = re.compile(r"(?P<hour>\d{1,2})(?::(?P<minute>[0-5]\d))?(?:\\text\{(?P<half>[ap]m)\})?")
_REPEATED = re.compile(r"(\d{1,20}\.\d{0,40}?)(\d{1,20}?)\2+\.\.\.")


@dataclass(frozen=True, slots=True)
class Number:
    """An exact value; `decimals` counts the digits after the point, 0 for anything but a plain decimal."""

    value: Fraction
    decimals: int
    percent: bool


def parse_number(text: str) -> Number | None:
    r"""Integer, decimal, e-notation, scientific, fraction, mixed or repeating number in normal form; None for anything else.

    >>> parse_number(r"-3\frac{1}{2}").value, parse_number("0.25").value
    (Fraction(-7, 2), Fraction(1, 4))
    """
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    try:
        value = _magnitude(match)
    except (ZeroDivisionError, ValueError):  # a denominator of 0; more digits than int() reads
        return None
    if value is None:
        return None
    value = -value if match["sign"] == "-" else value
    decimals = len((match["decimal"] or "").partition(".")[2])
    return Number(value / 100 if match["percent"] else value, decimals, bool(match["percent"]))


def _magnitude(match: re.Match[str]) -> Fraction | None:
    if match["repeating"]:
        digits, period = match["repeating"].partition(".")[2], match["period"]
        return Fraction(match["repeating"]) + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(digits))
    power = match["power"] or match["e_power"] or match["ten_power"]
    if power:
        return Fraction(match["mantissa"] or 1) * Fraction(10) ** int(power) if abs(int(power)) <= MAX_EXPONENT else None
    if match["top"] or match["plain_top"]:
        part = Fraction(int(match["top"] or match["plain_top"]), int(match["bottom"] or match["plain_bottom"]))
        return part + int(match["whole"] or 0)
    return Fraction((match["grouped"] or match["decimal"]).replace(" ", ""))


def is_same_number(answer: Number, reference: Number) -> bool:
    """Exact equality, apart from two customs.

    A percentage on one side only may stand for its value or its figure; a decimal of six or more digits may stand for a fraction that has
    no finite decimal.
    """
    if answer.value == reference.value:
        return True
    if answer.percent != reference.percent:
        return _figure(answer) == _figure(reference)
    return _is_rounding(answer, reference) or _is_rounding(reference, answer)


def _figure(number: Number) -> Fraction:
    return number.value * 100 if number.percent else number.value


def _is_rounding(decimal: Number, fraction: Number) -> bool:
    endless = 10**MAX_EXPONENT % fraction.value.denominator != 0
    return endless and decimal.decimals >= 6 and abs(decimal.value - fraction.value) * 10**decimal.decimals < 1


def settle_plain_numbers(answer: str, reference: str) -> bool | None:
    """The verdict where both are plain integers or decimals of at most 100 digits a part, None otherwise. Takes linear time."""
    if _PLAIN_NUMBER.fullmatch(answer) and _PLAIN_NUMBER.fullmatch(reference):
        return Fraction(answer) == Fraction(reference)
    return None


def spell_repeating(text: str) -> str:
    r"""`0.1666...` as `0.1\overline{6}`, where the digits before the dots repeat."""
    return _REPEATED.sub(r"\1\\overline{\2}", text) if "..." in text else text


def parse_numeral(text: str) -> tuple[str, str] | None:
    """Digits and base of a numeral such as `2516_{8}`; None for anything else.

    A numeral equals only the same numeral: where a question asks for a base, its value in another base is the question, not the answer.
    """
    match = _NUMERAL.fullmatch(text)
    if match is None:
        return None
    digits = match["digits"].upper().lstrip("0") or "0"
    return match["sign"] + ("0" if digits.startswith(".") else "") + digits, match["base"].lstrip("0")


def is_same_time(answer: str, reference: str) -> bool | None:
    r"""Whether two clock times are the same; a missing a.m. or p.m. fits either. None where neither is sure to be a time.

    >>> is_same_time(r"5:30\text{pm}", "17:30"), is_same_time(r"5\text{am}", r"5\text{pm}"), is_same_time("5:30", "1:6")
    (True, False, None)
    """
    matches = _CLOCK.fullmatch(answer), _CLOCK.fullmatch(reference)
    if matches[0] is None or matches[1] is None:
        return None
    if not (matches[0]["half"] or matches[1]["half"]):  # perhaps ratios, but `5:00` is no ratio
        same = [int(match["hour"]) * 60 + int(match["minute"] or -1) for match in matches if match]
        return True if same[0] == same[1] else None
    (minutes, is_sure), (expected, is_expected_sure) = (_minutes(match) for match in matches if match)
    return minutes == expected if is_sure and is_expected_sure else (minutes - expected) % 720 == 0


def _minutes(match: re.Match[str]) -> tuple[int, bool]:
    """Minutes since midnight, and whether the half of the day is known."""
    hour, minute = int(match["hour"]), int(match["minute"] or 0)
    if match["half"]:
        return (hour % 12 + 12 * (match["half"] == "pm")) * 60 + minute, True
    return hour * 60 + minute, hour > 12 or hour == 0
