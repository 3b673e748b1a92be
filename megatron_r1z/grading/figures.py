r"""Figures: a number is one token before anything else looks at the text, whatever stands between its thousands. Standard library only.

`32,\! 348`, `32{,}348`, `32\,348` and `32 348` become `32348` here, so that no later rule can take a piece of a number for an item of a
list or for a factor. A plain comma groups where no bracket makes it separate items.
"""

from __future__ import annotations

import re
from itertools import accumulate, pairwise

_COMMA = r"(?:\{\\?,(?:\\!)?\} *|\\!,|,(?: ?\\!)+ *)"
"""A comma that is protected from being spaced as a separator: `{,}`, `,\\!`."""
_SPACE = r"(?: ?(?<!\\)\\[,;:>] ?|~|(?<!\\)\\ | ?\\(?:thin|med|thick)space(?![a-z]) ?|\{ \})"
_HEAD = r"(?<![\d._^])(?<!\\frac)(?<!\\sqrt)(?<!\\binom)[1-9]\d{0,2}"
_GROUPED = re.compile(
    "|".join(
        (
            rf"{_HEAD}(?:{_COMMA}\d{{3}})+(?!\d|{_COMMA}\d{{3}})",
            rf"{_HEAD}(?:{_COMMA}\d\d)+{_COMMA}\d{{3}}(?!\d)",  # lakhs and crores
            rf"{_HEAD}(?:{_SPACE}\d{{3}})+(?!\d)",
            rf"{_HEAD}(?:_\d{{3}})+(?![\d_])",
            rf"{_HEAD}(?:'\d{{3}})+(?!\d)",
            rf"{_HEAD}(?: \d{{3}})+(?!\d| ?/)",  # `3 100/7` is a mixed number
            r"(?<=\d)\.\d{3}(?:\\,\d{3})*\\,\d{1,3}(?!\d)",
        )
    )
)
_PLAIN_COMMAS = re.compile(r"(?<![\d.])(?<![^\\],)\d{1,3}(?:,\d{3})+(?![\d,])")
_POINT = re.compile(r"(?<=\d)(?:\{\.\}|\\!\.|\.\\!|\\text\{\.\})(?=\d)")
_NEITHER_DIGIT_NOR_POINT = re.compile(r"[^\d.]+")


def join_figures(text: str) -> str:
    r"""The text with each number in plain digits.

    >>> join_figures(r"(1{,}000, 32,\! 348)"), join_figures(r"\$1,500"), join_figures("(1,500)"), join_figures(r"0{.}5")
    ('(1000, 32348)', '\\$1500', '(1,500)', '0.5')
    """
    return _join_plain_commas(_POINT.sub(".", _GROUPED.sub(_digits, text)))


def _digits(match: re.Match[str]) -> str:
    return _NEITHER_DIGIT_NOR_POINT.sub("", match.group())


def _join_plain_commas(text: str) -> str:
    """Only outside of brackets: `(1,500)` is a pair."""
    if "," not in text:
        return text
    opened = accumulate(_opens(*pair) for pair in pairwise(f" {text}"))
    depths = list(opened)
    return _PLAIN_COMMAS.sub(lambda match: _digits(match) if depths[match.start()] <= 0 else match.group(), text)


def _opens(before: str, character: str) -> int:
    r"""1 for an opening bracket, -1 for a closing one; braces count where they are printed, `\{`, and `\(` begins mathematics."""
    if (before == "\\") != (character in "{}"):
        return 0
    return (character in "([{") - (character in ")]}")
