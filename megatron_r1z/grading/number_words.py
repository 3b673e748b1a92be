r"""Words that are numbers or change the number before them: `five`, `3 million`, `two thirds`, `3 tenths`, `5 squared`.

Numerals are a closed class of words, unlike nouns, so all of them can be known: cardinals, ordinals, fractions, scales, collectives. Those
whose value is plain are read here; `is_numeral` tells the rest, which must never be taken for the name of a thing counted. Standard library
only.
"""

from __future__ import annotations

import re
from fractions import Fraction

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_SMALL = {word: value for value, word in enumerate(_UNITS)} | {word: 10 * value for value, word in enumerate(_TENS, 2)}
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_SCALES_OF_FIGURES = _SCALES | {"lakh": 10**5, "lac": 10**5, "crore": 10**7, "quadrillion": 10**15}
_SCALES_OF_FIGURES |= {f"{word}s": value for word, value in _SCALES_OF_FIGURES.items()} | {"gross": 144, "score": 20}
_IRREGULAR_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}


def _ordinal(word: str) -> str:
    return _IRREGULAR_ORDINALS.get(word, f"{word[:-1]}ieth" if word.endswith("y") else f"{word}th")


_CARDINALS = _SMALL | {word: value for word, value in _SCALES.items() if word != "dozen"}
_PARTS = {_ordinal(word): value for word, value in _CARDINALS.items() if value > 2} | {"half": 2, "quarter": 4}
_PARTS |= {"halves" if word == "half" else f"{word}s": value for word, value in _PARTS.items()}
_POWERS = {"squared": 2, "cubed": 3}

_WORD = "|".join([*_SMALL, *_SCALES])
_PART = "|".join(sorted(_PARTS, key=len, reverse=True))
_SCALE = "|".join(sorted(_SCALES_OF_FIGURES, key=len, reverse=True))
_PHRASE = re.compile(
    rf"(?<![A-Za-z\\])(?P<sign>(?:minus|negative) )?"
    rf"(?P<words>(?:{'|'.join(_SMALL)})(?:(?:[ -]|(?<=hundred) and |(?<=thousand) and )(?:{_WORD}))*)"
    rf"(?:[ -](?P<part>{_PART}))?(?!-?[A-Za-z])",
    re.IGNORECASE,
)
_GAP = r"(?P<gap>(?: |-|\\text ?\{)*)"
_CLOSE = r"(?![A-Za-z])(?P<close> ?\})?"
_SCALED = re.compile(
    rf"(?P<figure>(?<![\d./^_])(?<!frac)(?<!frac )(?<!sqrt)\d{{1,30}}(?:\.\d{{1,30}})?|(?<=[\d}}])){_GAP}(?P<scale>{_SCALE})"
    rf"(?![ -](?:{_PART})){_CLOSE}",  # `5 hundred thousandths` is 500/1000 or 5/100000
    re.IGNORECASE,
)
_PARTED = re.compile(
    rf"(?<![\d.,/^_}}] )(?<![\d.,/^_}}])(?<!frac)(?<!frac )(?<!sqrt)(?P<figure>\d{{1,30}}){_GAP}(?P<part>{_PART}){_CLOSE}", re.IGNORECASE
)
_RAISED = re.compile(rf"(?<=\d){_GAP}(?P<power>{'|'.join(_POWERS)}){_CLOSE}(?! ?[A-Za-z\\])", re.IGNORECASE)


def replace_number_words(text: str) -> str:
    r"""Number words as figures: `five` as `5`, `3 million` as `3000000`, `two thirds` as `\frac{2}{3}`; what makes no sense is left alone.

    >>> replace_number_words("three hundred and five apples"), replace_number_words("five and six"), replace_number_words("3 tenths")
    ('305 apples', '5 and 6', '\\frac{3}{10}')
    """
    text = _PARTED.sub(_parted_figure, _SCALED.sub(_scaled_figure, _PHRASE.sub(_figure_of_phrase, text)))
    return _RAISED.sub(lambda match: f"^{{{_POWERS[match['power'].lower()]}}}{_closing(match)}", text)


def _figure_of_phrase(match: re.Match[str]) -> str:
    value = _value_of_words(re.findall(r"[a-z]+", match["words"].lower()))
    part = (match["part"] or "").lower()
    if value is None or (part and not _agree(value, part)):  # `twenty fifth` is no fraction
        return match.group()
    sign = "-" if match["sign"] else ""
    return rf"{sign}\frac{{{value}}}{{{_PARTS[part]}}}" if part else f"{sign}{value}"


def _agree(value: int, part: str) -> bool:
    """Singular after one, plural after all else: `one half`, `two thirds`."""
    return (value == 1) != part.endswith("s")


def _value_of_words(words: list[str]) -> int | None:
    """The number, or None where the order of the words is none of English (`five six`, `ten twenty`)."""
    total, current, room = 0, 0, 10**15
    for word in words:
        if word == "and":
            continue
        if word in _SMALL:
            room_here = 1 if current == 0 else 100 if current % 100 == 0 else 10 if current % 10 == 0 and current % 100 >= 20 else 0
            if current and _SMALL[word] >= room_here:
                return None
            current += _SMALL[word]
        elif _SCALES[word] in (100, 12):
            current = max(current, 1) * _SCALES[word]
        elif _SCALES[word] < room:
            room = _SCALES[word]
            total, current = total + max(current, 1) * room, 0
        else:
            return None
    return total + current


def _scaled_figure(match: re.Match[str]) -> str:
    scale = _SCALES_OF_FIGURES[match["scale"].lower()]
    if not match["figure"]:  # behind a fraction, a power or the like
        return rf"\cdot {scale}{_closing(match)}"
    value = Fraction(match["figure"]) * scale
    figure = str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    return figure + _closing(match)


def _parted_figure(match: re.Match[str]) -> str:
    if not _agree(int(match["figure"]), match["part"].lower()):
        return match.group()
    return rf"\frac{{{match['figure']}}}{{{_PARTS[match['part'].lower()]}}}{_closing(match)}"


def _closing(match: re.Match[str]) -> str:
    r"""What is left of the `\text{...}` in which a word stands: nothing, its end or its beginning."""
    if "{" in match["gap"]:
        return "" if match["close"] else r"\text{"
    return match["close"] or ""


_COLLECTIVES = (
    "pair couple brace dozen score gross trio triple triplet quartet quintet double half halve quarter myriad lakh lac crore ream million"
    " billion trillion quadrillion googol mil mln bn kilo mega giga tera milli micro nano hundredweight"
).split()
_OPERATIONS = (
    "squared cubed factorial choose mod modulo modulus percent percentage pct basis mille permille fold time twice thrice doubled tripled"
    " halved inverses reciprocals negatives positives opposites conjugates"
).split()
_STEMS = frozenset([*_CARDINALS, *map(_ordinal, _CARDINALS), *_COLLECTIVES, *_OPERATIONS]) - {"zero"}


def is_numeral(word: str) -> bool:
    """Whether a word in small letters carries or changes a value: `tenths`, `pairs`, `hundreds`, `squared`, `negatives`, `threefold`.

    >>> is_numeral("sixes"), is_numeral("zillions"), is_numeral("apples")
    (True, True, False)
    """
    stems = {word, word.removesuffix("s"), word.removesuffix("es"), word.removesuffix("fold")}
    return not _STEMS.isdisjoint(stems) or re.search("illion(?:th)?s?$", word) is not None
