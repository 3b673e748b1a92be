r"""Units: split off an answer, never thrown away. A unit may be absent on one side; two units that measure different things differ.

A unit is a product of powers of base units and a factor, so that `m/s`, `meters per second` and `m\,s^{-1}` are one unit and `100 cm` is
`1 m`. Things counted (`5 apples`) are units too: nouns are an open class, so a plural that is neither a numeral nor a function word names
what is counted. Any other word is kept, since it may change the value. Standard library only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from megatron_r1z.grading.number_words import is_numeral
from megatron_r1z.grading.numbers import parse_number

# One line per unit: base, how many of the base make one, spellings. Regular plurals are added. `a|b`: the word may mean either base.
_TABLE = """
m         1            m meter metre
m         1/1000000000 nm nanometer nanometre
m         1/1000000    µm um micrometer micrometre micron
m         1/1000       mm millimeter millimetre
m         1/100        cm centimeter centimetre
m         1/10         dm decimeter decimetre
m         1000         km kilometer kilometre
in        1            in inch inches
in        12           ft foot feet
in        36           yd yard
in        63360        mi mile
acre      1            acre
hectare   1            hectare ha
g         1            g gram gm
g         1/1000       mg milligram
g         1000         kg kilogram
g         1000000      tonne
lb        1            lb lbs
lb        1/16         oz ounce
lb|pound  1            pound
ton       1            ton
l         1            l L liter litre
l         1/1000       ml mL milliliter millilitre
cup       1            cup
cup       1/16         tablespoon tbsp
cup       1/48         teaspoon tsp
cup       2            pint
cup       4            quart
cup       16           gallon gal
s         1            s sec second
s         1/1000       ms millisecond
s         1/1000000    µs us microsecond
s         1/1000000000 ns nanosecond
s         60           min minute
s         3600         h hr hour
s         86400        day
s         604800       week
s         1209600      fortnight
month     1            month
month     12           year yr
month     120          decade
month     1200         century centuries
degree    1            degree deg
radian    1            radian rad
celsius   1            celsius
fahrenheit 1           fahrenheit
K         1            K kelvin
dollar    1            dollar usd buck
dollar    1/100        cent
euro      1            euro eur
pound     1            gbp quid
yen       1            yen jpy
rupee     1            rupee inr
A         1            A amp ampere
A         1/1000       mA milliampere
V         1            V volt
ohm       1            ohm
C         1            coulomb
F         1            farad
T         1            tesla
H         1            henry henries
Hz        1            Hz hertz
Hz        1000         kHz kilohertz
Hz        1000000      MHz megahertz
Hz        1000000000   GHz gigahertz
N         1            N newton
N         1000         kN kilonewton
J         1            J joule
J         1000         kJ kilojoule
J         3600000      kWh
cal       1            cal calorie
cal       1000         kcal kilocalorie
eV        1            eV
eV        1000         keV
eV        1000000      MeV
W         1            W watt
W         1000         kW kilowatt
W         1000000      MW megawatt
Pa        1            Pa pascal
Pa        1000         kPa kilopascal
Pa        1000000      MPa megapascal
atm       1            atm atmosphere
mol       1            mol mole
mol       1/1000       mmol millimole
bit       1            bit
bit       8            byte
unit      1            unit
"""
_COMPOUND = {"mph": "mi/h", "kmh": "km/h", "kmph": "km/h", "kph": "km/h", "mps": "m/s"}
_AMBIGUOUS = frozenset(["K"])
"""Kelvin or thousand: never taken for a unit that may be absent on the other side."""
_IRREGULAR_PLURALS = frozenset("people men women children mice feet teeth geese fish sheep dice oxen deer cattle wolves".split())
_FUNCTION_WORDS = frozenset(
    "or and nor not no if is are was were be been more less fewer most least than times minus plus over under about at above below between"
    " almost nearly approximately exactly only just even each every all both either neither some any few many several other others another"
    " this that these those his hers its theirs yours ours us as thus yes versus across always perhaps besides towards unless whereas else"
    " left remaining".split()
)
"""A closed class, as numerals are: words that name nothing."""
_PREPOSITIONS = frozenset("of in on for from to with".split())
_ARTICLES = frozenset("a an the".split())


def _read_table() -> dict[str, tuple[str, Fraction]]:
    units = {}
    for line in _TABLE.split("\n"):
        if line:
            base, factor, *spellings = line.split()
            for spelling in spellings:
                units[spelling] = (base, Fraction(factor))
                if len(spelling) > 2 or spelling in ("yd", "hr", "yr"):
                    units[f"{spelling}s"] = units[spelling]
    return units


_UNITS = _read_table()
_CAPITALISED = frozenset("Kg Km Cm Ft Lb Hr Yd Oz".split())
MAX_CHARACTERS = 200
"""Of a unit; the search for its beginning takes quadratic time."""

_BASES = frozenset(base for base, _ in _UNITS.values())
_LONG = sorted(
    (spelling for spelling in [*_UNITS, *_COMPOUND, "percent"] if len(spelling) > 1 and spelling.isascii()), key=len, reverse=True
)
_LETTERS = "mgshLNJWVK"
"""Single letters that are units behind a number and a space (`5 m`); without the space, and any other letter, they are variables."""
_TIGHT = "(?:cm|mm|km|kg|ft|in|yd|lb|oz|hr|mph|[a-z]{4,})(?![A-Za-z])"
"""What may follow a number without a space; `2mg` may be a weight."""
_WORD = rf"(?:(?i:(?:square|cubic|sq\.?) )?(?i:{'|'.join(_LONG)})(?![A-Za-z])(?i: (?:squared|cubed))?)"
_TEXT = r"\\text\{(?:[^{}]|\{[^{}]*\})*\}"
_POWER = r"(?:\^\{-?\d\})?"
_FRACTION = rf"\\frac\{{(?:{_TEXT}{_POWER} ?)+\}}\{{(?:{_TEXT}{_POWER} ?)+\}}"
_FURTHER = rf"(?: ?/ ?| per | ?\\cdot ?| )?(?:{_TEXT}|{_WORD}|[{_LETTERS}](?![A-Za-z])){_POWER}"
_SUFFIX = re.compile(
    rf"(?:(?<=[\w}})!%]) ?/? ?{_TEXT}{_POWER}|(?<=[\d}})!])(?={_TIGHT}){_WORD}{_POWER}|(?<=[\w}})!]) {_WORD}{_POWER})(?:{_FURTHER})*$"
    rf"|(?<=[\w}})!]) ?{_FRACTION}$|(?<=[\w}})!]) per {_WORD}$"
    rf"|(?<=[\d}})!]) [{_LETTERS}]{_POWER}(?:/[{_LETTERS}]{_POWER})?$"
    r"|(?<=\d)(?:k|c|m)?m/[sh](?:\^\{2\})?$"
)
_COUNTED = re.compile(r"(?<=[\d}]) [A-Za-z]{2,}(?: [A-Za-z]{2,}){0,4}$")
_PHRASE = re.compile(r" [A-Za-z]{3,}(?: [A-Za-z]{2,})+")
_DEGREES_OF = re.compile(r"(?<=[\d}])\\text\{degree\} ?(?:\\text\{ ?)?(?P<scale>[CF]|(?i:celsius|fahrenheit))\}?$")
_ALONE = re.compile(_WORD)
_CURRENCY = re.compile(r"(?P<sign>[+-]?) ?\\text\{(?P<name>dollar|euro|gbp|yen|rupee|cent)\} ?")
_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_TERM = re.compile(r"(?P<word>[^\W\d_]+)(?:\^\{?(?P<power>-?\d)\}?)?|(?P<divide>/)|[ .()~-]|\\[,;:! ]?|(?P<other>.)")


@dataclass(frozen=True, slots=True)
class Unit:
    """What is measured, as sorted pairs of base unit and exponent, and how many of the base make one of this unit.

    `may_be_absent`: it can only be a unit or a thing counted, so the same figure without it means the same. Words that may change the value
    (`tenths`, `pairs`, `K`, `or more`) and what is no noun are kept as they are, and must be on both sides.
    """

    bases: tuple[tuple[str, int], ...]
    factor: Fraction
    may_be_absent: bool = True


def split_unit(text: str) -> tuple[str, Unit | None]:
    r"""The text without its unit, and the unit; a currency may stand in front.

    >>> split_unit("5 cm") == split_unit(r"5\text{ centimeters}"), split_unit("3t")
    (True, ('3t', None))
    """
    if match := _CURRENCY.match(text):
        value, unit = _split_behind(match["sign"] + text[match.end() :])
        return value, _with_currency(match["name"], unit)
    return _split_behind(text)


def is_same_measure(left: Unit, right: Unit) -> bool:
    """Whether both measure the same thing; `pounds` are weights and money."""
    return len(left.bases) == len(right.bases) and all(
        first[1] == second[1] and not set(first[0].split("|")).isdisjoint(second[0].split("|"))
        for first, second in zip(left.bases, right.bases, strict=True)
    )


def in_base(value: str, unit: Unit) -> str:
    """The text of a value of this unit, counted in the base unit."""
    return f"({value or 0})({unit.factor})" if unit.factor != 1 else value


def _with_currency(name: str, unit: Unit | None) -> Unit:
    r"""Dollars, or dollars per what is behind the number; `\$5 dollars` says the same twice."""
    currency = _lookup(name)
    assert currency is not None, "the table holds the currencies"
    if unit is None or unit == currency:
        return currency
    exponents = Counter(dict(unit.bases))
    for base, exponent in currency.bases:
        exponents[base] += exponent
    return Unit(tuple(sorted(exponents.items())), currency.factor * unit.factor, unit.may_be_absent)


def _split_behind(text: str) -> tuple[str, Unit | None]:
    if text[-1:].isdigit():
        return text, None
    if match := _DEGREES_OF.search(text):
        scale = "celsius" if match["scale"].lower().startswith("c") else "fahrenheit"
        return text[: match.start()].strip(), Unit(((scale, 1),), Fraction(1))
    match = _SUFFIX.search(text, max(0, len(text) - MAX_CHARACTERS)) or _COUNTED.search(text) or _ALONE.fullmatch(text)
    if match is None or not _can_be_unit(match, text[: match.start()]):
        return text, None
    number = text[: match.start()].strip()
    unit = _parse_unit(match.group().strip(), _is_at_most_one(number))
    if unit is None or (match.re is _COUNTED and not (unit.may_be_absent or _PHRASE.fullmatch(match.group()))):
        return text, None  # `5 abc` is a product
    return number, unit


def _can_be_unit(match: re.Match[str], before: str) -> bool:
    """Whether a suffix can be a unit of what stands before it."""
    words = match.group().split()
    if len(words[0].partition("^")[0].partition("/")[0]) == 1:  # a letter beside other letters is a variable
        return re.search(r"(?<!\\)\b[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", before)) is None
    return not ("degree" in match.group() and _FUNCTION.search(before))


def _is_at_most_one(text: str) -> bool:
    number = parse_number(text)
    return number is not None and abs(number.value) <= 1


@lru_cache(maxsize=4096)
def _parse_unit(text: str, at_most_one: bool) -> Unit | None:
    """The unit that a text spells, or None where it holds something that is no part of a unit; `at_most_one`: nouns are in the singular."""
    text = re.sub(r"\\text\{((?:[^{}]|\{[^{}]*\})*)\}", r" \1", text)
    text = re.sub(r"\\frac\{((?:[^{}]|\{[^{}]*\})*)\}\{((?:[^{}]|\{[^{}]*\})*)\}", r"\1/\2", text).replace(r"\cdot", " ")
    products: list[list[tuple[str, int]]] = [[]]
    for match in _TERM.finditer(text):
        if match["other"]:
            return None
        if match["divide"] or (match["word"] or "").lower() == "per":
            products.append([])
        elif match["word"]:
            products[-1].append((match["word"], int(match["power"] or 1)))
    exponents: Counter[str] = Counter()
    factor, may_be_absent = Fraction(1), True
    for index, words in enumerate(products):
        part = _known_product(words) or _counted(words, at_most_one or index > 0)
        sign = -1 if index else 1
        for base, exponent in part.bases:
            exponents[base] += sign * exponent
        factor *= part.factor**sign
        may_be_absent = may_be_absent and part.may_be_absent
    return _make_unit(exponents, factor, may_be_absent)


_MODIFIERS = {"square": 2, "sq": 2, "cubic": 3}
_POWERS = {"squared": 2, "cubed": 3}


def _known_product(words: Sequence[tuple[str, int]]) -> Unit | None:
    """The product of known units (`kg m^{2}`, `square meters`, `feet squared`); None where a word is none."""
    exponents: Counter[str] = Counter()
    factor, modifier, last = Fraction(1), 1, ""
    for word, power in words:
        lower = word.lower()
        if lower in _MODIFIERS:
            modifier = _MODIFIERS[lower]
        elif lower in _POWERS and last:
            exponents[last] *= _POWERS[lower]
        elif (unit := _lookup(word)) is None:
            return None
        else:
            for last, exponent in unit.bases:
                exponents[last] += modifier * power * exponent
            factor, modifier = factor * unit.factor ** (modifier * power), 1
    return Unit(tuple(exponents.items()), factor, not any(word in _AMBIGUOUS for word, _ in words))


def _counted(words: Sequence[tuple[str, int]], is_singular: bool) -> Unit:
    """A phrase of other words as a unit of its own: a thing counted (`red apples`, `cups of tea`), or what must not be dropped."""
    phrase = [word.lower() for word, _ in words]
    length = next((index for index, word in enumerate(phrase) if word in _PREPOSITIONS), len(phrase))
    head = words[length - 1][0] if length else ""
    is_noun = _is_plural(head) or (is_singular and _is_word(head)) or _lookup(head) is not None
    others = [word for word in phrase if word not in _ARTICLES and word not in _PREPOSITIONS]
    names_things = is_noun and all(_may_name(word) for word in others)
    spelled = " ".join([*phrase[:-1], phrase[-1].removesuffix("s") or phrase[-1]])
    return Unit(((f"'{spelled}'", 1),), Fraction(1), names_things)


def _may_name(word: str) -> bool:
    """Whether a word in small letters can be part of what is counted: neither a numeral nor a function word, nor one letter such as `k`."""
    is_known = _lookup(word) is not None or word.endswith("s")
    return not (word in _FUNCTION_WORDS or is_numeral(word)) and len(word) > 1 and (is_known or _is_word(word))


def _is_plural(word: str) -> bool:
    """Whether it looks like one: `apples`, `mice`, `CDs`."""
    if word.lower() in _IRREGULAR_PLURALS or (len(word) > 2 and word[:-1].isupper() and word.endswith("s")):
        return True
    return _is_word(word) and word.endswith("s") and not word.endswith("ss")


def _is_word(word: str) -> bool:
    """Whether it is long enough and can be spoken, unlike the abbreviations of scales."""
    return len(word) > 2 and not _VOWELS.isdisjoint(word.lower())


_VOWELS = frozenset("aeiouy")


def _make_unit(exponents: Counter[str], factor: Fraction, may_be_absent: bool) -> Unit | None:
    if "celsius" in exponents or "fahrenheit" in exponents:
        del exponents["degree"]
    bases = tuple(sorted((base, exponent) for base, exponent in exponents.items() if exponent and base != "unit"))
    return Unit(bases, factor, may_be_absent) if exponents else None


def _lookup(word: str) -> Unit | None:
    """One word: a known unit in its own case or, unless that could be another one (`mM`, `Mg`), in small letters; or one such as `mph`."""
    lower = word.lower()
    if lower in _COMPOUND:
        return _parse_unit(_COMPOUND[lower], at_most_one=False)
    found = _UNITS.get(word) or (_UNITS.get(lower) if len(word) > 2 or word.capitalize() in _CAPITALISED else None)
    return None if found is None else Unit(((found[0], 1),), found[1])


_MEASURE = re.compile(r"(?P<figure>\d+(?:\.\d+)?) ?(?P<unit>\\text\{(?P<text>[^{}\d]*)\}|(?P<word>[A-Za-z]+))(?:,|and )?[ ,]*")
MAX_MEASURES = 4
"""Units in one quantity: `2 days 3 hours 4 minutes 5 seconds`."""


def join_measures(text: str) -> str:
    r"""A quantity in several units as one in the last of them: `3 m 50 cm` as `350 cm`; what is no such quantity is left alone.

    The units must measure the same and become smaller, and each figure behind the first one must be less than one of the unit before it.

    >>> join_measures("3 m 50 cm"), join_measures(r"1\text{ hour and }30\text{ minutes}"), join_measures("3 m 150 cm")
    ('350 cm', '90\\text{ minutes}', '3 m 150 cm')
    """
    measures: list[re.Match[str]] = []
    position = 0
    while len(measures) < MAX_MEASURES and (match := _MEASURE.match(text, position)):
        measures.append(match)
        position = match.end()
    if len(measures) < 2 or position < len(text):
        return text
    units = [_lookup(match["word"] or match["text"].strip(" ,").removesuffix("and").strip(" ,.")) for match in measures]
    total, before = Fraction(0), None
    for match, unit in zip(measures, units, strict=True):
        if unit is None or (before is not None and not is_same_measure(unit, before)):
            return text
        size = Fraction(match["figure"]) * unit.factor
        if before is not None and (unit.factor >= before.factor or size >= before.factor or total % before.factor):
            return text
        total, before = total + size, unit
    assert before is not None, "a match has measures"
    figure = total / before.factor
    gap = " " if measures[-1]["word"] else ""
    return f"{figure}{gap}{measures[-1]['unit']}" if figure.denominator == 1 else text
