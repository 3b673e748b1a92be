r"""The normal form of an answer, and what can be read off it without algebra: numbers, units, names, lists.

A unit is split off, never thrown away: it can be absent on one side, but two different units are two different answers. Single letters
are variables, not units. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

MAX_EXPONENT = 400
"""Powers of ten beyond this are left to algebra (they would be long integers here)."""

_SYMBOLS = str.maketrans(
    {
        "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ",
        "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "√": r"\sqrt ", "°": r"\degree ", "\N{NO-BREAK SPACE}": " ",
    }
)  # fmt: skip

_NOT_AFTER_WORD, _NOT_BEFORE_WORD = r"(?<![A-Za-z\\])", r"(?![A-Za-z])"

_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # Spacing and delimiters that carry no meaning; `,\!` and `{,}` group thousands.
        (r"(?:,\\!|\{,\})(?=\d{3})", ""),
        (r"\\left(?![a-z])|\\right(?![a-z])|\\!|\\displaystyle(?![a-z])|\\?\$|\\[()]", ""),
        (r"(?<!\\)\\[,;: ]|\\q?quad(?![a-z])|~|\s+", " "),
        # One spelling of each thing.
        (r"\\(?:mathrm|mathbf|mathit|textbf|textit|textrm|textnormal|mbox)(?![a-z])", r"\\text"),
        (r",?\s*(?:\\text\s*\{\s*(?:and|or)\s*\}|(?<![A-Za-z{])(?:and|or)(?![A-Za-z}]))", ","),
        (r"\\[dtc]frac(?![a-z])", r"\\frac"),
        (r"\\(le|ge|ne)q(?![a-z])", r"\\\1"),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-z]))|\\degree(?![a-z])", r"\\text{degree}"),
        (r"\\begin\{array\}\s*\{[lcr| ]*\}|\\begin\{bmatrix\}", r"\\begin{pmatrix}"),
        (r"\\end\{(?:array|bmatrix)\}", r"\\end{pmatrix}"),
        (r"\*\*", "^"),
        (r"\*", r"\\cdot "),
        (r"\\%", "%"),
        # Plain text to LaTeX.
        (_NOT_AFTER_WORD + r"sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (_NOT_AFTER_WORD + r"(pi|sin|cos|tan|cot|arcsin|arccos|arctan|log|ln|exp)" + _NOT_BEFORE_WORD, r"\\\1 "),
        (_NOT_AFTER_WORD + r"(?:inf|infinity|oo)" + _NOT_BEFORE_WORD, r"\\infty "),
        # Braces around arguments.
        (r"\\frac\s*(\w)\s*(\w)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\w)\s*\{", r"\\frac{\1}{"),
        (r"\\frac\s*(\{[^{}]*\})\s*(\w)", r"\\frac\1{\2}"),
        (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
        (r"\^\s*(-?\d+|[A-Za-z])", r"^{\1}"),
        (r"\^\s*\(([^()]*)\)", r"^{\1}"),
        (r"_\s*(\w)", r"_{\1}"),
        (r"(?<!\d)\.(?=\d)", "0."),
        # A space stays only between word characters: `3 1/2` is not `31/2`.
        (r"(?<!\w) +| +(?!\w)", ""),
    )
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")

_UNITS = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre", "in": "inch inches",
    "ft": "foot feet", "yd": "yard", "mi": "mile", "mph": "", "kmh": "kmph", "mg": "milligram", "g": "gram", "kg": "kilogram",
    "oz": "ounce", "lb": "pound lbs", "ml": "milliliter millilitre", "l": "liter litre", "s": "sec second", "min": "minute",
    "h": "hr hour", "day": "", "week": "", "month": "", "year": "yr", "degree": "deg", "cent": "", "dollar": "", "unit": "",
}  # fmt: skip
_SPELLINGS = {spelling: unit for unit, others in _UNITS.items() for spelling in (unit, *others.split())}
_SPELLINGS |= {f"{spelling}s": unit for spelling, unit in _SPELLINGS.items() if len(spelling) > 1}
_WORDS = "|".join(sorted((spelling for spelling in _SPELLINGS if len(spelling) > 1), key=len, reverse=True))
_MEASURE = rf"(?:(?:square|cubic) )?(?:{_WORDS})(?:\^\{{[23]\}})?"
_BARE_UNIT = re.compile(rf"(?<=[\d}}]) ?(?P<unit>{_MEASURE}(?:(?: per |/)(?:{_MEASURE}|[smhl]))?|(?:m|km)/[sh])$", re.IGNORECASE)
_TEXT_UNIT = re.compile(r"(?<=[\w})])\\text\{(?P<unit>[^{}]*)\}(?P<power>\^\{[23]\})?$")
_SCALE_WORDS = re.compile(r"hundred|thousand|million|billion|trillion|dozen|percent|pair|half|third|quarter", re.IGNORECASE)

_DECIMAL = r"\d+(?:\.\d*)?"
_GROUPED = r"\d{1,3}(?: \d{3})+"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)(?:"
    rf"(?P<repeating>\d+\.\d*)\\overline\{{(?P<period>\d+)\}}"
    rf"|(?P<mantissa>{_DECIMAL})(?:(?:\\times|\\cdot) ?10\^\{{(?P<power>[+-]?\d+)\}}|[eE](?P<e_power>[+-]?\d+))"
    rf"|10\^\{{(?P<ten_power>[+-]?\d+)\}}"
    rf"|(?:(?P<whole>\d+) ?)??(?:\\frac\{{(?P<top>[+-]?\d+)\}}\{{(?P<bottom>\d+)\}}|(?P<plain_top>\d+)/(?P<plain_bottom>\d+))"
    rf"|(?P<grouped>{_GROUPED})"
    rf"|(?P<decimal>{_DECIMAL})"
    rf")(?P<percent>%?)"
)
_PLAIN_NUMBER = re.compile(r"[+-]?\d{1,100}(?:\.\d{0,100})?")

_NAME = re.compile(
    r"(?:\\text\{[^{}]*\}|(?:[A-Za-z]|[A-Z]{2,3}|[A-Za-z]{5,}|\\[a-z]+)(?:_\{\w+\})?(?:\([a-z]\))?|\([a-z](?:,[a-z])+\))(?:=|\\in(?![a-z]))"
)
"""One letter, a segment such as AB, a word, a Greek letter, a tuple of letters; `xy=1` is an equation about a product."""
_RELATION = re.compile(r"[=<>]|\\(?:le|ge|ne|lt|gt|in|approx)(?![a-z])")


def normalise(text: str) -> str:
    r"""One spelling for what is written in several ways; the meaning is kept.

    >>> normalise(r"$ \dfrac12 $."), normalise("1,000"), normalise(r"2516_8")
    ('\\frac{1}{2}', '1000', '2516_{8}')
    """
    text = text.strip().translate(_SYMBOLS)
    text = re.sub(r"^\\\[(.*)\\\]$", r"\1", text, flags=re.DOTALL)
    if not re.search(r"[(\[]|\\\{", text):  # inside brackets the comma separates
        text = _THOUSANDS.sub(lambda match: match.group().replace(",", ""), text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = re.sub(r"(?:\\|\.|,)+$", "", text.strip())
    while is_enclosed(text, "{", "}"):
        text = text[1:-1].strip()
    inner = re.fullmatch(r"\\text\{([^{}]*)\}", text)
    text = inner.group(1).strip() if inner else text
    return re.sub(r"^\(([A-Za-z])\)$", r"\1", text)


def is_enclosed(text: str, opening: str, closing: str) -> bool:
    """Whether the first bracket is `opening`, the last character `closing`, and the two belong together."""
    if not (len(text) > len(opening) and text.startswith(opening) and text.endswith(closing)):
        return False
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and position >= len(opening) - 1:
            return position == len(text) - 1
    return False


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


def split_unit(text: str) -> tuple[str, str | None]:
    r"""The text without its unit, and the unit in one spelling.

    >>> split_unit("5 cm"), split_unit(r"5\text{ centimeters}"), split_unit("3t")
    (('5', 'cm'), ('5', 'cm'), ('3t', None))
    """
    match = _TEXT_UNIT.search(text) or _BARE_UNIT.search(text)
    if match is None or _SCALE_WORDS.search(match["unit"]):
        return text, None
    words = re.findall(r"[a-z]+|\S", (match["unit"] + (match.groupdict().get("power") or "")).lower())
    return text[: match.start()].strip(), " ".join(_SPELLINGS.get(word, word) for word in words)


def split_name(text: str) -> tuple[str, str | None]:
    r"""What is said of a name and the name: `x=5`, `f(x)=2x`, `x\in[1,2]`; other relations are left alone."""
    match = _NAME.match(text)
    if match is None or _RELATION.search(text, match.end()):
        return text, None
    return text[match.end() :], match.group()


def is_relation(text: str) -> bool:
    """Whether it holds an equation or inequality sign."""
    return _RELATION.search(text) is not None


def is_words(text: str) -> bool:
    r"""Whether it is language rather than mathematics: words only, and `\text`, a word of five letters or a common short one."""
    plain = re.sub(r"\\text\{([^{}]*)\}", r"\1 ", text)
    if not re.fullmatch(r"[^\W\d_][^\W\d_ '.-]*(?:[ '.-]+[^\W\d_]+)*[ .]*", plain):
        return False
    return plain != text or re.search(r"[^\W\d_]{5}|\b(?:yes|no|true|none|odd|even)\b", plain, re.IGNORECASE) is not None


@dataclass(frozen=True, slots=True)
class Parts:
    """A composite answer: `kind` is `set` (order is free), `union` (likewise) or the two brackets of a tuple or interval."""

    kind: str
    items: Sequence[str]

    @property
    def ordered(self) -> bool:
        """Whether the order of the items matters."""
        return self.kind not in ("set", "union")


def split_parts(text: str) -> Parts | None:
    r"""The parts of a list, set, tuple, interval or union in normal form; None for a single thing.

    >>> split_parts("(0,1]"), split_parts(r"\pm 2").items
    (Parts(kind='(]', items=['0', '1']), ['+2', '-2'])
    """
    if text.count(r"\pm") == 1:
        text = ",".join(text.replace(r"\pm", sign).replace("+ ", "+").replace("- ", "-") for sign in "+-")
    if len(items := _split_outside_brackets(text, r"\cup")) > 1:
        return Parts("union", items)
    if len(items := _split_outside_brackets(text, ",")) > 1:
        return Parts("set", items)
    if is_enclosed(text, r"\{", "}"):
        return Parts("set", _split_outside_brackets(text[2:-1].rstrip("\\"), ","))
    for opening, closing in ("()", "[]", "(]", "[)"):
        if is_enclosed(text, opening, closing) and len(items := _split_outside_brackets(text[1:-1], ",")) > 1:
            return Parts(opening + closing, items)
    return None


def _split_outside_brackets(text: str, separator: str) -> list[str]:
    pieces, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and text.startswith(separator, position):
            pieces.append(text[start:position].strip())
            start = position + len(separator)
    return [*pieces, text[start:].strip()]
