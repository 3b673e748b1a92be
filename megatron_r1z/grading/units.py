r"""Units: split off an answer, never thrown away. A unit may be absent on one side; two units that measure different things differ.

A unit is a product of powers of base units and a factor, so that `m/s`, `meters per second` and `m\,s^{-1}` are one unit and `100 cm` is
`1 m`. Things counted (`5 apples`) are units too. Standard library only.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

# One line per unit: base, how many of the base make one, spellings. Regular plurals are added.
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
g         1            g gram gm
g         1/1000       mg milligram
g         1000         kg kilogram
lb        1            lb pound lbs
lb        1/16         oz ounce
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
s         60           min minute
s         3600         h hr hour
s         86400        day
s         604800       week
month     1            month
month     12           year yr
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
V         1            V volt
ohm       1            ohm
Hz        1            Hz hertz
N         1            N newton
J         1            J joule
J         1000         kJ kilojoule
J         3600000      kWh
eV        1            eV
W         1            W watt
W         1000         kW kilowatt
Pa        1            Pa pascal
Pa        1000         kPa kilopascal
mol       1            mol mole
unit      1            unit
"""
_COMPOUND = {"mph": "mi/h", "kmh": "km/h", "kmph": "km/h", "kph": "km/h", "mps": "m/s"}
_IRREGULAR_PLURALS = frozenset("people men women children mice feet teeth geese fish sheep".split())
_NO_UNIT = frozenset("or and not if is are was more less than times minus plus over under at least most about junk".split())


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
    rf"(?:(?<=[\w}})!]) ?{_TEXT}{_POWER}|(?<=[\d}})!])(?={_TIGHT}){_WORD}{_POWER}|(?<=[\w}})!]) {_WORD}{_POWER})(?:{_FURTHER})*$"
    rf"|(?<=[\w}})!]) ?{_FRACTION}$|(?<=[\w}})!]) per {_WORD}$"
    rf"|(?<=[\d}})!]) [{_LETTERS}]{_POWER}(?:/[{_LETTERS}]{_POWER})?$"
    r"|(?<=\d)(?:k|c|m)?m/[sh](?:\^\{2\})?$"
)
_COUNTED = re.compile(r"(?<=[\d}]) (?P<words>[A-Za-z]+(?: [A-Za-z]+){0,2})$")
_DEGREES_OF = re.compile(r"(?<=[\d}])\\text\{degree\} ?(?:\\text\{ ?)?(?P<scale>[CF]|(?i:celsius|fahrenheit))\}?$")
_ALONE = re.compile(_WORD)
_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_TERM = re.compile(r"(?P<word>[^\W\d_]+)(?:\^\{?(?P<power>-?\d)\}?)?|(?P<divide>/)|[ .,()~-]|\\[,;:! ]?|(?P<other>.)")


@dataclass(frozen=True, slots=True)
class Unit:
    """What is measured, as sorted pairs of base unit and exponent, and how many of the base make one of this unit."""

    bases: tuple[tuple[str, int], ...]
    factor: Fraction


def split_unit(text: str) -> tuple[str, Unit | None]:
    r"""The text without its unit, and the unit.

    >>> split_unit("5 cm") == split_unit(r"5\text{ centimeters}"), split_unit("3t")
    (True, ('3t', None))
    """
    if text[-1:].isdigit():
        return text, None
    if match := _DEGREES_OF.search(text):
        scale = "celsius" if match["scale"].lower().startswith("c") else "fahrenheit"
        return text[: match.start()].strip(), Unit(((scale, 1),), Fraction(1))
    match = _SUFFIX.search(text, max(0, len(text) - MAX_CHARACTERS)) or _COUNTED.search(text) or _ALONE.fullmatch(text)
    if match is None or not _is_unit(match, text[: match.start()]):
        return text, None
    unit = _parse_unit(match.group().strip())
    return (text, None) if unit is None else (text[: match.start()].strip(), unit)


def in_base(value: str, unit: Unit) -> str:
    """The text of a value of this unit, counted in the base unit."""
    return f"({value or 0})({unit.factor})" if unit.factor != 1 else value


def _is_unit(match: re.Match[str], before: str) -> bool:
    """Whether a suffix can be a unit of what stands before it."""
    words = match.group().split()
    if match.re is _COUNTED:
        return _is_counted([word.lower() for word in words], before)
    if len(words[0].partition("^")[0].partition("/")[0]) == 1:  # a letter beside other letters is a variable
        return re.search(r"(?<!\\)\b[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", before)) is None
    return not ("degree" in match.group() and _FUNCTION.search(before))


def _is_counted(words: list[str], number: str) -> bool:
    """Whether the words name things that can be counted: plurals, or anything after a 1; `5 junk` and `5 or more` do not."""
    last = words[-1]
    is_plural = len(last) > 3 and last.endswith("s") and not last.endswith("ss")
    is_singular = number == "1" and len(last) > 3
    return not _NO_UNIT & set(words) and (is_plural or is_singular or last in _IRREGULAR_PLURALS)


@lru_cache(maxsize=1024)
def _parse_unit(text: str) -> Unit | None:
    """The unit that a text spells, or None where it holds something that is no part of a unit."""
    text = re.sub(r"\\text\{((?:[^{}]|\{[^{}]*\})*)\}", r" \1", text)
    text = re.sub(r"\\frac\{((?:[^{}]|\{[^{}]*\})*)\}\{((?:[^{}]|\{[^{}]*\})*)\}", r"\1/\2", text).replace(r"\cdot", " ")
    exponents: Counter[str] = Counter()
    factor, sign, pending, last = Fraction(1), 1, 1, ""
    for match in _TERM.finditer(text):
        word = (match["word"] or "").lower()
        if match["other"] or word in _NO_UNIT:
            return None
        if match["divide"] or word == "per":
            sign = -1
        elif word in _MODIFIERS:
            pending = _MODIFIERS[word]
        elif word in ("squared", "cubed"):
            exponents[last] *= 2 if word == "squared" else 3
        elif word:
            power = sign * pending * int(match["power"] or 1)
            part = _lookup(match["word"])
            for last, exponent in part.bases:
                exponents[last] += power * exponent
            factor, pending = factor * part.factor**power, 1
    return _make_unit(exponents, factor)


_MODIFIERS = {"square": 2, "sq": 2, "cubic": 3}


def _make_unit(exponents: Counter[str], factor: Fraction) -> Unit | None:
    if "celsius" in exponents or "fahrenheit" in exponents:
        del exponents["degree"]
    bases = tuple(sorted((base, exponent) for base, exponent in exponents.items() if exponent and base != "unit"))
    return Unit(bases, factor) if exponents else None


def _lookup(word: str) -> Unit:
    """One word: a known unit in its own case or in small letters, a compound such as `mph`, else the name of a thing in the singular."""
    lower = word.lower()
    if lower in _COMPOUND:
        compound = _parse_unit(_COMPOUND[lower])
        assert compound is not None, "the table holds known units"
        return compound
    base, factor = _UNITS.get(word) or _UNITS.get(lower) or (lower.removesuffix("s") or lower, Fraction(1))
    return Unit(((base, 1),), factor)
