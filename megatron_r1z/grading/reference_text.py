r"""The two normal forms of the paper's grader: of its string layer, after Hendrycks' MATH code, and of its sympy layer, after PRM800K's.

Reproduces the normalisation of `oat/utils/math_grader.py` (sail-sg/oat c1a074c, the same in sail-sg/understand-r1-zero dfca49d) to the
letter and in its order. What looks like a mistake in here is one of the original, and the published numbers rest on it: units go
wherever they stand, thousands are only partly joined, LaTeX is flattened until `\frac{x+1}{2}` reads `x+1/2`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

_Rewrites = tuple[tuple[re.Pattern[str], str], ...]


def _compile(*rewrites: tuple[str, str]) -> _Rewrites:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rewrites)


def _rewrite(text: str, rewrites: Iterable[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in rewrites:
        text = pattern.sub(replacement, text)
    return text


_WHOLLY_TEXT = re.compile(r"^\\text\{(?P<text>.+?)\}$")

# The string layer

_SPELLINGS = _compile(
    (r"\n", ""),
    (r"\\!", ""),
    (r"\\\\", r"\\"),
    (r"\\begin\{array\}\{.*?\}", r"\\begin{pmatrix}"),
    (r"\\end\{array\}", r"\\end{pmatrix}"),
    ("bmatrix", "pmatrix"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    (r"\\neq", r"\\ne"),
    (r"\\leq", r"\\le"),
    (r"\\geq", r"\\ge"),
    (r"\\left", ""),
    (r"\\right", ""),
)
_CLOSING_TEXT = re.compile(r"\\text\{.*?\}$")
_UNITS = (
    "east|degree|mph|kmph|ft|m sqaure| m east|sq m|deg|mile|q .|monkey|prime|ratio|profit of rs|rd|o|gm|p . m|lb|tile|per|dm|lt|gain|ab|"
    "way|west|a .|b .|c .|d .|e .|f .|g .|h .|t|a|h|no change|men|soldier|pie|bc|excess|st|inches|noon|percent|by|gal|kmh|c|acre|rise|"
    "a . m|th|π r 2|sq|mark|l|toy|coin|sq . m|gallon|° f|profit|minw|yr|women|feet|am|pm|hr|cu cm|square|v â € ™|are|rupee|rounds|cubic|"
    "cc|mtr|s|ohm|number|kmph|day|hour|minute|min|second|man|woman|sec|cube|mt|sq inch|mp|∏ cm ³|hectare|more|sec|unit|cu . m|cm 2|rs .|"
    "rs|kg|g|month|km|m|cm|mm|apple|liter|loss|yard|pure|year|increase|decrease|d|less|Surface|litre|pi sq m|s .|metre|meter|inch"
).split("|")
"""The unit words of the original, mostly from MathQA. They are regular expressions, so that a dot is any character; order and repetition
matter, since one deletion can expose or hide the next word."""
_SIGNS = _compile((r"\^\{\\circ\}", ""), (r"\^\\circ", ""), (r"\\\$", ""))
_PERCENT_AND_POINT = _compile((r"\\%", ""), (r" \.", " 0."), (r"\{\.", "{0."))
_BARE_SQRT = re.compile(r"\\sqrt([^{])")
_SQRT_OF_NOTHING = re.compile(r"\\sqrt(?:\\sqrt|\Z)")
_INTEGER_RATIO = re.compile(r"(0|-?[1-9][0-9]{0,4299})/(0|-?[1-9][0-9]{0,4299})")
"""Python refuses to read longer integers, and the original then leaves the text alone."""


def normalise_string(text: str) -> str:
    r"""The normal form of the string layer; text that the original stumbles over is only trimmed and taken out of `\text{}`.

    >>> normalise_string(r"\text{ x = \sqrt3 }"), normalise_string("3/4 cm"), normalise_string(r"\frac12 a + b")
    ('\\sqrt{3}', '\\frac{3}{4}', '\\frac{1}{2}b')
    """
    text = text.strip()
    wholly = _WHOLLY_TEXT.search(text)
    text = wholly["text"].strip() if wholly else text
    try:
        return _fix_notation(_drop_units(_rewrite(text, _SPELLINGS)))
    except _StumbledError:
        return text


class _StumbledError(Exception):
    """The original raises here, and catches it."""


def _drop_units(text: str) -> str:
    text = _CLOSING_TEXT.sub("", text).strip() or text
    for _ in range(2):
        for hint, pattern in _unit_patterns():
            if hint in text:
                text = pattern.sub(r"\1\2", text) or text
    text = _rewrite(text, _SIGNS)
    kept, *rest = text.split(r"\text{ ")
    if len(rest) > 1:
        raise _StumbledError
    return kept


@lru_cache(maxsize=1)
def _unit_patterns() -> tuple[tuple[str, re.Pattern[str]], ...]:
    """Each unit as a pattern, with its literal beginning: a search for that is far cheaper, and mostly fails."""
    units = [*_UNITS, *(f"{unit}s" for unit in _UNITS)]
    return tuple((unit.partition(".")[0], re.compile(rf"(^|\W){unit}($|\W)")) for unit in units)


def _fix_notation(text: str) -> str:
    text = _rewrite(text, _PERCENT_AND_POINT)
    if text.startswith("."):
        text = f"0{text}"
    if text.count("=") == 1 and text.index("=") <= 2:
        text = text.partition("=")[2]
    if _SQRT_OF_NOTHING.search(text):
        raise _StumbledError
    text = _BARE_SQRT.sub(r"\\sqrt{\1}", text)
    text = _brace_fractions(text.replace(" ", ""))
    if text == "0.5":
        return r"\frac{1}{2}"
    ratio = _INTEGER_RATIO.fullmatch(text)
    return rf"\frac{{{ratio[1]}}}{{{ratio[2]}}}" if ratio else text


def _brace_fractions(text: str) -> str:
    r"""`\frac12` and `\frac1{2}` with all their braces; one that ends too early leaves the whole text as it is."""
    head, *pieces = text.split(r"\frac")
    braced = [head]
    for piece in pieces:
        if not piece:
            raise _StumbledError
        if piece.startswith("{"):
            braced.append(piece)
        elif len(piece) == 1:
            return text
        else:
            denominator = piece[1:] if piece[1] == "{" else f"{{{piece[1]}}}{piece[2:]}"
            braced.append(f"{{{piece[0]}}}{denominator}")
    return r"\frac".join(braced)


# The sympy layer

_WORDS = _compile(
    (r"\\%", "%"),
    (r"\\\$", "$"),
    (r"[$%]", ""),
    (" or ", " , "),
    (" and ", " , "),
    ("million", "*10^6"),
    ("billion", "*10^9"),
    ("trillion", "*10^12"),
    *(
        (rf"{unit}(es)?(s)? *(\^[0-9]+)?", "")
        for unit in "degree cm centimeter meter mile second minute hour day week month year foot feet inch yard".split()
    ),
    (r"\^ *\\circ", ""),
)
_GROUPING = re.compile(r",\\! *")
_LATEX_FRACTIONS = _compile((r"\\tfrac", r"\\frac"), (r"\\dfrac", r"\\frac"), (r"\\frac", r" \\frac"))
_SYMBOLS = str.maketrans({"√": "sqrt", "π": "pi", "∞": "inf", "∪": "U", "·": "*", "×": "*"})
_ASCII = _compile((r"- *", "-"), (r"([0-9]) +([0-9])", r"\1+\2"), (r"[ {}]", ""))
_THOUSANDS = re.compile(r"(\d),(\d\d\d)($|\D)")
_FRACTION = re.compile(r"^-?[0-9]+.?/0*[1-9][0-9]*.?$")
_BRACKETS = frozenset("()[]")


def normalise_expression(text: str) -> str:
    r"""The normal form of the sympy layer: plain text in Python's notation, except that `^` stays.

    >>> normalise_expression(r"2\frac{1}{2}"), normalise_expression("5 cm^2"), normalise_expression(r"\sqrt{2}\pi")
    ('2+1/2', '5', 'sqrt(2)pi')
    """
    wholly = _WHOLLY_TEXT.search(text)
    text = _rewrite(wholly["text"] if wholly else text, _WORDS)
    if text.startswith("{") and text.endswith("}"):
        text = text[1:-1]
    text = _GROUPING.sub("", text)
    value = _read_whole(text)
    if value is not None:
        text = str(round(value))
    if "\\" in text:
        text = _flatten_latex(text)
    text = _rewrite(text, _ASCII).lower()
    value = _read_whole(join_thousands(text))
    return text if value is None else str(int(value))


def _flatten_latex(text: str) -> str:
    r"""The text that the LaTeX shows, as pylatexenc sees it; unchanged where pylatexenc fails.

    The stored verdicts were made with pylatexenc 2.10; up to 2.11 only `\ensuremath{...}` changed, which used to vanish.
    """
    from pylatexenc.latex2text import LatexNodes2Text

    known_to_parser, known_to_converter = _latex_definitions()
    try:
        converter = LatexNodes2Text(latex_context=known_to_converter)
        shown: str = converter.latex_to_text(_rewrite(text, _LATEX_FRACTIONS), latex_context=known_to_parser)
    except Exception:  # noqa: BLE001  (whatever it is, the original goes on)
        return text
    return shown.translate(_SYMBOLS).strip()


@lru_cache(maxsize=1)
def _latex_definitions() -> tuple[Any, Any]:
    """The default definitions of pylatexenc's parser and converter, which it builds anew for each text unless given."""
    from pylatexenc import latex2text, latexwalker

    return latexwalker.get_default_latex_context_db(), latex2text.get_default_latex_context_db()


def _read_whole(text: str) -> float | None:
    """The value of a number within 1e-7 of an integer, however it is written; None for anything else."""
    try:
        value = float(text)
        return value if abs(value - round(value)) <= 1e-7 else None
    except (ValueError, OverflowError):  # no number, not a number; infinite
        return None


def join_thousands(text: str) -> str:
    """Without the commas that group digits by three, as far as the original gets: in `1,234,567,890` the last one stays.

    >>> join_thousands("1,000,000"), join_thousands("1,234,567,890"), join_thousands("1,2")
    ('1000000', '1234,567890', '1,2')
    """
    while (joined := _THOUSANDS.sub(r"\1\2\3", text)) != text:
        text = joined
    return text


def split_elements(text: str) -> list[str]:
    """The elements of a tuple or interval without brackets inside; anything else is one element, and nothing is none.

    >>> split_elements("(1,2]"), split_elements("1,2"), split_elements("")
    (['1', '2'], ['1,2'], [])
    """
    text = join_thousands(text)
    if len(text) > 2 and text[0] in _BRACKETS and text[-1] in _BRACKETS and _BRACKETS.isdisjoint(text[1:-1]):
        return [element.strip() for element in text[1:-1].split(",")]
    return [text] if text else []


def is_integer(text: str) -> bool:
    """Whether it is a number within 1e-7 of an integer, such as `5`, `5.0` or `1,000`."""
    return _read_whole(join_thousands(text)) is not None


def is_integer_fraction(text: str) -> bool:
    """Whether it is one integer over another; the original allows one more character after each."""
    return _FRACTION.search(text) is not None
