r"""Amounts of money in one spelling: the currency as `\text{dollar}` where its sign stood. Standard library only."""

from __future__ import annotations

import re

_SIGNS = {r"\$": "dollar", "$": "dollar", "€": "euro", "£": "gbp", "¥": "yen", "₹": "rupee", "¢": "cent"}
_COMMANDS = {"textdollar": "$", "mathdollar": "$", "pounds": "£", "textsterling": "£", "mathsterling": "£", "euro": "€", "texteuro": "€"}
_CODES = {"USD": "dollar", "EUR": "euro", "GBP": "gbp", "JPY": "yen", "INR": "rupee", "Rs": "rupee"}
_MAGNITUDES = {"k": 10**3, "m": 10**6, "mn": 10**6, "mln": 10**6, "b": 10**9, "bn": 10**9}

_PLAIN_DOLLAR = re.compile(r"(?<!\\)\$")
_SIGN = re.compile(r"\\\$|[$€£¥₹¢]")
_COMMAND = re.compile(rf"\\({'|'.join(_COMMANDS)})(?![A-Za-z])")
_CODE = re.compile(rf"(?<![A-Za-z])(?:\\text ?\{{ ?)?({'|'.join(_CODES)})\.? ?\}}? ?(?=[\d.]|\\frac)")
_IN_TEXT = re.compile(rf"\\text ?\{{ ?((?:US ?)?(?:{_SIGN.pattern})) ?([^{{}}]*)\}}")
_AMERICAN = re.compile(r"(?<![A-Za-z])US ?(?=\\?\$)")
_MAGNITUDE = re.compile(
    rf"(?P<amount>\\text\{{(?:{'|'.join(_SIGNS.values())})\}} ?\d+(?:\.\d+)?) ?(?:\\text\{{ ?)?(?P<word>{'|'.join(_MAGNITUDES)})(?: ?\}})?"
    r"(?![A-Za-z^_])",
    re.IGNORECASE,
)
_CURRENCY = re.compile(r"[$€£¥₹¢]|\\(?:text|math)?(?:dollar|pounds|sterling|euro)|USD|EUR|GBP|JPY|INR|Rs")


def spell_money(text: str) -> str:
    r"""Currencies as text. A plain `$` is one only where it stands alone; two enclose mathematics and go.

    >>> spell_money(r"\$5.50"), spell_money("$5$"), spell_money("$5"), spell_money(r"\$5K")
    ('\\text{dollar}5.50', '5', '\\text{dollar}5', '\\text{dollar}5\\cdot 1000')
    """
    if _CURRENCY.search(text) is None:
        return text
    if len(_PLAIN_DOLLAR.findall(text)) != 1:
        text = _PLAIN_DOLLAR.sub("", text)
    text = _COMMAND.sub(lambda match: _COMMANDS[match[1]], text)
    text = _AMERICAN.sub("", _IN_TEXT.sub(r"\1\2", text))
    text = _SIGN.sub(lambda match: rf"\text{{{_SIGNS[match.group()]}}}", text)
    text = _CODE.sub(lambda match: rf"\text{{{_CODES[match[1]]}}}", text)
    return _MAGNITUDE.sub(lambda match: rf"{match['amount']}\cdot {_MAGNITUDES[match['word'].lower()]}", text)
