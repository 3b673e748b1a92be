r"""Answers by the thousand whose meaning is known: every way of writing a number, in every kind of answer, beside every other.

`pairs(seed, count)` draws two answers around the same figures, one kind each, and says whether they are equal. A kind is one small
function from figures to an `Answer`: a text and what it means. `are_equal` holds the rules of docs/grading.md for meanings, with no text
in sight.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Quantity:
    """A number and what it counts: a unit by its base name, `%`, a word that must not be dropped (`!K`), or nothing; perhaps a name."""

    value: Fraction
    measure: str = ""
    name: str = ""


@dataclass(frozen=True)
class Collection:
    """`list` (no brackets), `set`, `tuple` or the two brackets of an interval; a name, or the names of the items."""

    kind: str
    items: tuple[Meaning, ...]
    name: str = ""


@dataclass(frozen=True)
class Choice:
    """The letter of an option with its text."""

    letter: str
    content: Quantity


@dataclass(frozen=True)
class Text:
    """What equals only itself: an equation such as `2x=7`, a letter, a word."""

    text: str


Meaning = Quantity | Collection | Choice | Text


@dataclass(frozen=True)
class Answer:
    """A text and its meaning."""

    text: str
    meaning: Meaning
    kind: str


def are_equal(left: Meaning, right: Meaning) -> bool:
    """Whether two meanings are equal under docs/grading.md."""
    if isinstance(left, Choice) or isinstance(right, Choice):
        return _are_equal_choices(left, right)
    if isinstance(left, Text) or isinstance(right, Text):
        return left == right
    if left.name and right.name and left.name != right.name:
        return False
    if isinstance(left, Quantity) and isinstance(right, Quantity):
        return _are_equal_quantities(left, right)
    return isinstance(left, Collection) and isinstance(right, Collection) and _are_equal_collections(left, right)


def _are_equal_choices(left: Meaning, right: Meaning) -> bool:
    if isinstance(left, Choice) and isinstance(right, Choice):
        return left.letter == right.letter and are_equal(left.content, right.content)
    choice, other = (left, right) if isinstance(left, Choice) else (right, left)
    assert isinstance(choice, Choice)
    return other == Text(choice.letter) or are_equal(choice.content, other)


def _are_equal_quantities(left: Quantity, right: Quantity) -> bool:
    if left.measure == right.measure:
        return left.value == right.value
    if left.measure and right.measure:
        return False
    measured, bare = (left, right) if left.measure else (right, left)
    if measured.measure == "%":
        return bare.value in (measured.value, measured.value / 100)
    return not measured.measure.startswith("!") and measured.value == bare.value


def _are_equal_collections(left: Collection, right: Collection) -> bool:
    if len(left.items) != len(right.items):
        return False
    kinds = {left.kind, right.kind}
    if len(kinds) == 2 and kinds not in ({"list", "set"}, {"list", "tuple"}):
        return False
    if kinds & {"set"} or kinds == {"list"}:
        remaining = list(right.items)
        for item in left.items:
            partner = next((other for other in remaining if are_equal(item, other)), None)
            if partner is None:
                return False
            remaining.remove(partner)
        return True
    return all(map(are_equal, left.items, right.items))


# Numbers: a value and one of its spellings.

GROUPINGS = ("{,}", r",\!", r",\! ", r"\,", r"\;", r"\ ", "~", " ", "_", "{,}", r"\thinspace ")
"""What may stand between thousands anywhere; a plain comma may where no bracket makes it separate items."""


def grouped(digits: str, separator: str) -> str:
    """Digits in groups of three."""
    head = len(digits) % 3 or 3
    return separator.join([digits[:head], *(digits[start : start + 3] for start in range(head, len(digits), 3))])


def spell_integer(chooser: random.Random, value: int, is_open: bool) -> str:
    digits = str(abs(value))
    if len(digits) < 4 or chooser.random() < 0.25:
        return digits
    return grouped(digits, chooser.choice((*GROUPINGS, ",", ",") if is_open else GROUPINGS))


def spell_number(chooser: random.Random, value: Fraction, is_open: bool = False) -> str:
    """Digits, decimals, fractions, mixed numbers and scale words; `is_open`: no bracket is around it."""
    sign, size = "-" if value < 0 else "", abs(value)
    whole, part = divmod(size, 1)
    if not part:
        return sign + chooser.choice((spell_integer, spell_integer, spell_integer, _spell_scaled))(chooser, int(size), is_open)
    forms = [rf"\frac{{{size.numerator}}}{{{size.denominator}}}", rf"\dfrac{{{size.numerator}}}{{{size.denominator}}}"]
    if whole:
        mixed = spell_integer(chooser, int(whole), is_open)
        forms += [rf"{mixed}\frac{{{part.numerator}}}{{{part.denominator}}}", rf"{mixed}\tfrac{{{part.numerator}}}{{{part.denominator}}}"]
    if 10**4 % size.denominator == 0:
        decimals = f"{float(part):.4f}".rstrip("0").partition(".")[2]
        point = chooser.choice((".", ".", "{.}"))
        forms += [spell_integer(chooser, int(whole), is_open) + point + decimals] * 4
    return sign + chooser.choice(forms)


def _spell_scaled(chooser: random.Random, value: int, is_open: bool) -> str:
    scales = [(10**6, "million"), (10**9, "billion"), (1000, "thousand"), (10**5, "lakh"), (10**7, "crore")]
    fitting = [(scale, word) for scale, word in scales if value and value * 10 % scale == 0]
    if not fitting:
        return spell_integer(chooser, value, is_open)
    scale, word = chooser.choice(fitting)
    figure = f"{value // scale}" if value % scale == 0 else f"{value / scale:.1f}"
    return figure + chooser.choice((rf"\text{{ {word}}}", f" {word}", rf"\ \text{{{word}}}", rf"\,\mathrm{{{word}}}"))


# Kinds of answers. Each takes a value, or several, and writes it in one of its ways.

SPACES = ("", " ", r"\,", r"\ ", "~", r"\;", r"\quad ")
UNITS = {
    "m": (r"\text{ m}", " m", r"\text{ meters}", " meters", r"\mathrm{~m}", r"\,\text{m}"),
    "s": (r"\text{ s}", " seconds", r"\text{ sec}", r"\ \text{seconds}"),
    "kg": (r"\text{ kg}", " kg", r"\,\mathrm{kg}", " kilograms"),
    "m^2": (r"\text{ m}^2", " square meters", r"\text{ square meters}", r"\,\text{m}^{2}"),
    "m/s": (r"\text{ m/s}", r"\frac{\text{m}}{\text{s}}", " meters per second"),
    "degree": (r"^\circ", r"^{\circ}", r"\text{ degrees}", " degrees", r"\degree"),
    "apples": (" apples", r"\text{ apples}", r"\ \text{apples}", r"\mbox{ apples}"),
    "students": (" students", r"\text{ students}", r"\,\text{students}"),
    "dollar/h": (r"\text{ dollars per hour}", " dollars per hour", r"\text{ dollars}/\text{hour}"),
}
CURRENCIES = {
    "dollar": ((r"\$", r"\text{\$}", r"US\$", "USD "), (r"\text{ dollars}", " dollars", r"\ \text{USD}", r"\$")),
    "euro": (("\N{EURO SIGN}", "EUR "), (" euros", r"\text{ euros}", "\N{EURO SIGN}")),
    "pound": (("\N{POUND SIGN}", r"\pounds "), (r"\text{ pounds}", "\N{POUND SIGN}", " GBP")),
}
PERCENTS = (r"\%", "%", r"\ \%", r"\,\%", r"\text{\%}", r"\text{ percent}", " percent", "-percent", " pct", r"\text{ per cent}", r"~\%")
FACTORS = {
    "tenths": Fraction(1, 10),
    "hundredths": Fraction(1, 100),
    "thirds": Fraction(1, 3),
    "fifths": Fraction(1, 5),
    "twelfths": Fraction(1, 12),
    "halves": Fraction(1, 2),
    "dozen": Fraction(12),
    "gross": Fraction(144),
    "score": Fraction(20),
    "lakh": Fraction(10**5),
    "crore": Fraction(10**7),
    "hundred": Fraction(100),
    "thousand": Fraction(1000),
    "trillion": Fraction(10**12),
}
"""Words that multiply what stands before them."""
OPAQUE = (
    "K M B k bn pairs couples half quarter per~hundred per~thousand per~mille or~more times more less plus pairs~of~shoes ones"
    "  factorial doubled tripled negatives percentage~points basis~points fold choose~two mod~three pair brace squared~plus"
    " to~the~third twos minus~one over~two th nd times~ten ths approximately in~base~two below~zero myriads trios triples"
).split()
"""Words that change a value in a way that is not read, or that are no nouns at all; they must not be dropped."""


def bare(chooser: random.Random, value: Fraction) -> Answer:
    text = spell_number(chooser, value, is_open=True)
    wrapped = chooser.choice(("{}", "{}", "${}$", r"\boxed{{{}}}", r"\( {} \)", "{}.", r"\ {}", r"\displaystyle {}", "= {}"))
    return Answer(wrapped.format(text), Quantity(value), "bare")


def with_currency(chooser: random.Random, value: Fraction, is_open: bool = True) -> Answer:
    name = chooser.choice(list(CURRENCIES))
    before, behind = CURRENCIES[name]
    number = spell_number(chooser, abs(value), is_open)
    if chooser.random() < 0.65:
        text = chooser.choice(before) + chooser.choice(("", "", r"\,", " ", r"\ ")) + number
    else:
        text = number + chooser.choice(behind)
    return Answer(("-" if value < 0 else "") + text, Quantity(value, name), "currency")


def with_unit(chooser: random.Random, value: Fraction, is_open: bool = True) -> Answer:
    name = chooser.choice(list(UNITS))
    return Answer(spell_number(chooser, value, is_open) + chooser.choice(UNITS[name]), Quantity(value, name), "unit")


def with_percent(chooser: random.Random, value: Fraction, is_open: bool = True) -> Answer:
    return Answer(spell_number(chooser, value, is_open) + chooser.choice(PERCENTS), Quantity(value, "%"), "percent")


def with_factor(chooser: random.Random, value: Fraction) -> Answer:
    word = chooser.choice(list(FACTORS))
    size = abs(value.numerator)  # `5 tenths`
    factor = FACTORS[word]
    text = f"{size}" + chooser.choice(
        (f" {word}", rf"\text{{ {word}}}", rf"\ \text{{{word}}}", rf"\,\mathrm{{{word}}}", rf"~\mbox{{ {word}}}")
    )
    return Answer(text, Quantity(size * factor, f"!{word}" if size == 1 and factor < 1 else ""), "factor")


def with_power_word(chooser: random.Random, value: Fraction) -> Answer:
    size, (word, power) = abs(value.numerator), chooser.choice((("squared", 2), ("cubed", 3)))
    text = f"{size}" + chooser.choice((f" {word}", rf"\text{{ {word}}}", rf"\ \text{{{word}}}"))
    return Answer(text, Quantity(Fraction(size) ** power), "power")


def with_opaque_word(chooser: random.Random, value: Fraction) -> Answer:
    word = chooser.choice(OPAQUE).replace("~", " ")
    number = spell_number(chooser, abs(value), is_open=True)
    text = number + chooser.choice((rf"\text{{ {word}}}", rf"\text{{{word}}}", rf"\ \text{{{word}}}", rf"\,\mathrm{{{word}}}"))
    return Answer(text, Quantity(abs(value), f"!{word}"), "opaque")


def compound(chooser: random.Random, value: Fraction) -> Answer:
    large, small = int(abs(value)) % 40 + 1, int(abs(value)) % 11 + 1
    base, factor, name, part = chooser.choice((("m", 100, "m", "cm"), ("s", 60, "hours", "minutes"), ("in", 12, "feet", "inches")))
    text = chooser.choice(
        (rf"{large}\text{{ {name} }}{small}\text{{ {part}}}", f"{large} {name} {small} {part}", f"{large} {name} and {small} {part}")
    )
    per_base = {"m": Fraction(1, 100), "s": Fraction(60), "in": Fraction(1)}[base]
    total = (large * factor + small) * per_base
    if chooser.random() < 0.5:
        text = f"{large * factor + small} {part}"
    return Answer(text, Quantity(total, f"!{base}"), "compound")


NAMES = (
    "x",
    "n",
    r"\theta",
    "AB",
    "f(2)",
    "f(-1)",
    "g(0)",
    "m+n",
    "a+b+c",
    "AB+BC",
    r"\frac{m}{n}",
    "P(A)",
    r"\text{Area}",
    "S_3",
    r"\angle ABC",
)
NOT_NAMES = ("2x", "x^2", "xy", "3x+1", r"\sqrt{x}", "2m+1", "x+y", r"\sin x", "x!", "|x|", "-x", "5n", "x^2+y^2")


def named(chooser: random.Random, value: Fraction) -> Answer:
    name, number = chooser.choice(NAMES), spell_number(chooser, value, is_open=True)
    middle = f"{value.numerator - 3 * value.denominator}/{value.denominator}+3={number}" if value > 3 and chooser.random() < 0.3 else number
    return Answer(f"{name}{chooser.choice(('=', ' = ', '= '))}{middle}", Quantity(value, name=name), "named")


def ratio_named(chooser: random.Random, value: Fraction) -> Answer:
    size = abs(value)
    top, bottom = size.numerator, size.denominator
    name = chooser.choice(("", "", "S:T", "AB:BC", "a:b"))
    colon = chooser.choice((":", " : ", r"\colon "))
    sign = chooser.choice(("=", " = ")) if name else ""
    return Answer(f"{name}{sign}{top}{colon}{bottom}", Quantity(size, name=name), "ratio")


def equation(chooser: random.Random, value: Fraction) -> Answer:
    name = chooser.choice(NOT_NAMES)
    return Answer(f"{name}={spell_number(chooser, value, is_open=True)}", Text(f"{name}={value}"), "equation")


def choice(chooser: random.Random, value: Fraction) -> Answer:
    letter = chooser.choice("ABCDE")
    label = chooser.choice((r"\textbf{(%s)}\ ", r"\text{(%s)} ", r"\textbf{(%s) }", r"\mathrm{(%s)}~", "(%s) ", "%s) ", "%s. ")) % letter
    return Answer(label + spell_number(chooser, abs(value), is_open=True), Choice(letter, Quantity(abs(value))), "choice")


def letter(chooser: random.Random, value: Fraction) -> Answer:
    name = chooser.choice("ABCDE")
    return Answer(chooser.choice((name, f"({name})", rf"\text{{({name})}}", rf"\textbf{{{name}}}")), Text(name), "letter")


SEPARATORS = (",", ", ", r",\,", r",\ ", r",\;", r",~")


def _joined(chooser: random.Random, items: Sequence[str]) -> str:
    return chooser.choice(SEPARATORS).join(items)


def _items(chooser: random.Random, values: Sequence[Fraction]) -> list[str]:
    return [spell_number(chooser, value) for value in values]


def _quantities(values: Sequence[Fraction]) -> tuple[Quantity, ...]:
    return tuple(map(Quantity, values))


def pair_tuple(chooser: random.Random, values: Sequence[Fraction]) -> Answer:
    first, second = _items(chooser, values)
    body = _joined(chooser, (first, second))
    names = chooser.choice((("x", "y"), ("p", "q"), ("a", "b")))
    unnamed = (f"({body})", rf"\left( {body} \right)")
    forms = [
        f"({names[0]},{names[1]})=({body})",
        f"{names[0]}={first}, {names[1]}={second}",
        rf"{names[1]}={second} \text{{ and }} {names[0]}={first}",
        rf"\begin{{cases}}{names[0]}={first}\\{names[1]}={second}\end{{cases}}",
        rf"\left\{{\begin{{array}}{{l}} {names[0]} = {first} \\ {names[1]} = {second} \end{{array}}\right.",
    ]
    if values[0] == values[1]:
        forms.append(f"{names[0]}={names[1]}={first}")
    text, name = chooser.choice(
        [(form, "".join(names)) for form in forms] + [(form, "") for form in unnamed] * 2 + [(f"M({body})", "M"), (f"M=({body})", "M")]
    )
    return Answer(text, Collection("tuple", _quantities(values), name), "tuple")


def tuple_of_quantities(chooser: random.Random, values: Sequence[Fraction]) -> Answer:
    kinds = [chooser.choice((with_percent, with_unit, with_currency)) for _ in values]
    items = [kind(chooser, value, is_open=False) for kind, value in zip(kinds, values, strict=True)]
    body = _joined(chooser, [item.text for item in items])
    return Answer(f"({body})", Collection("tuple", tuple(item.meaning for item in items)), "quantities")


def braced_set(chooser: random.Random, values: Sequence[Fraction]) -> Answer:
    values = list(dict.fromkeys(values))
    items = _items(chooser, chooser.sample(values, len(values)))
    left, right = chooser.choice(((r"\{", r"\}"), (r"\left\{ ", r" \right\}"), (r"x\in\{", r"\}")))
    kind = "set" if len(values) > 1 else ""
    meaning = Collection(kind, _quantities(values)) if kind else Quantity(values[0])
    return Answer(left + _joined(chooser, items) + right, meaning, "set")


def open_list(chooser: random.Random, values: Sequence[Fraction]) -> Answer:
    items = _items(chooser, values)
    joint = chooser.choice((", ", r" \text{ and } ", " and ", " or ", r"\text{ or }", "; ", r",\quad ", r",\ "))
    return Answer(joint.join(items), Collection("list", _quantities(values)), "list")


def interval(chooser: random.Random, values: Sequence[Fraction]) -> Answer:
    low, high = sorted(values)
    if low == high:
        high += 1
    left, right = chooser.choice(("[]", "[)", "(]"))
    first, second = _items(chooser, (low, high))
    below, above = (r"\le" if left == "[" else "<"), (r"\le" if right == "]" else "<")
    forms = (
        f"{left}{_joined(chooser, (first, second))}{right}",
        f"{first} {below} x {above} {second}",
        rf"x\in {left}{first}, {second}{right}",
    )
    return Answer(chooser.choice(forms), Collection(left + right, _quantities((low, high))), "interval")


def list_of_tuples(chooser: random.Random, values: Sequence[Fraction]) -> Answer:
    """Two tuples, `(a,b)` and `(b,a+1)`."""
    rows = [(values[0], values[1]), (values[1], values[0] + 1)]
    texts = [_items(chooser, row) for row in rows]
    forms = (
        ",".join(f"({first}, {second})" for first, second in texts),
        r"\text{ and }".join(f"({first},{second})" for first, second in texts),
        ";".join(f"p={first},q={second}" for first, second in texts),
        " or ".join(f"(p,q)=({first},{second})" for first, second in texts),
    )
    index = chooser.randrange(len(forms))
    meaning = Collection("list", tuple(Collection("tuple", _quantities(row), "pq" if index > 1 else "") for row in rows))
    return Answer(forms[index], meaning, "tuples")


SINGLE: tuple[Callable[[random.Random, Fraction], Answer], ...] = (
    *(
        bare,
        bare,
        with_currency,
        with_currency,
        with_unit,
        with_unit,
        with_percent,
        with_factor,
        with_power_word,
        with_opaque_word,
        compound,
    ),
    *(named, ratio_named, equation, choice, letter),
)
SEVERAL: tuple[Callable[[random.Random, Sequence[Fraction]], Answer], ...] = (
    *(pair_tuple, pair_tuple, tuple_of_quantities, braced_set, open_list, interval, list_of_tuples),
)


def draw_value(chooser: random.Random) -> Fraction:
    """Small and large integers, decimals, fractions; seldom negative."""
    value = chooser.choice(
        (
            lambda: Fraction(chooser.randint(1, 99)),
            lambda: Fraction(chooser.choice((1500, 32348, 1000, 2000, 10234, 123456, 1234567, 50000, 1500000, 2000000, 30000000))),
            lambda: Fraction(chooser.randint(1000, 999_999)),
            lambda: Fraction(chooser.randint(1, 4000), chooser.choice((2, 4, 5, 10, 20))),
            lambda: Fraction(chooser.randint(1, 40), chooser.choice((3, 6, 7, 9))),
        )
    )()
    return -value if chooser.random() < 0.08 else value


def _neighbour(chooser: random.Random, value: Fraction) -> Fraction:
    """A value that careless reading takes for this one."""
    return chooser.choice((value * 100, value / 100, value * 1000, value / 1000, value * 10, value / 10, value + 1, -value, value**2))


def _pieces(value: Fraction) -> tuple[Fraction, Fraction]:
    """`1` and `500` of 1500: what a thousands separator makes of a number that is read as a list."""
    return Fraction(int(abs(value)) // 1000), Fraction(int(abs(value)) % 1000)


def _draw(chooser: random.Random, values: Sequence[Fraction]) -> Answer:
    if chooser.random() < 0.65:
        return chooser.choice(SINGLE)(chooser, values[0])
    return chooser.choice(SEVERAL)(chooser, values)


def pairs(seed: int, count: int) -> Iterator[tuple[Answer, Answer, bool]]:
    """Pairs of answers and whether they are equal; half of them are meant to be of one kind."""
    chooser = random.Random(seed)
    for _ in range(count):
        values = (draw_value(chooser), draw_value(chooser))
        other = chooser.choice((values, values, values, values[::-1], _pieces(values[0]), (_neighbour(chooser, values[0]), values[1])))
        if chooser.random() < 0.3:
            kind = chooser.choice(SINGLE)
            left, right = kind(chooser, values[0]), kind(chooser, other[0])
        elif chooser.random() < 0.3:
            several = chooser.choice(SEVERAL)
            left, right = several(chooser, values), several(chooser, other)
        else:
            left, right = _draw(chooser, values), _draw(chooser, other)
        yield left, right, are_equal(left.meaning, right.meaning)
