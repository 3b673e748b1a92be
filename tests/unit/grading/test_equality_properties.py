"""Properties of strict equality: it always has a verdict, is reflexive and symmetric, and keeps different values apart.

Answers come from arbitrary text, from text made of the pieces that answers are made of, and from a grammar that knows each answer's value.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megatron_r1z.grading.equality import Equality, compare, settle

PIECES = (
    r"\frac \frac{1}{2} \sqrt \sqrt{2} \text{ } \text{cm} { } ( ) [ ] \{ \} \left( \right) \cup \pm \le < > = \in \ne , : ; . ... ! |"
    r" ^ ^{2} _ _{8} % \% $ \$ ** * / + - x y e i \pi \infty \circ \overline{3} \binom \log \ln \sin \tan 0 1 2 10 1000 0.5 5 m cm"
    r" and or no yes five million"
    r" \begin{pmatrix} \end{pmatrix} & \\ \mathbb{R} \emptyset \setminus p.m. dollars per square apples ½ √ ² × − ° € ∞ ≤"
).split(" ")
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])

any_text = st.text(max_size=40)
answer_like = st.lists(st.sampled_from([*PIECES, " "]), max_size=14).map("".join)
texts = st.one_of(any_text, answer_like)


@dataclass(frozen=True)
class Answer:
    """A text, and what it is worth; equal worth means equal answers."""

    text: str
    worth: tuple[object, ...]


def _number_spellings(value: Fraction) -> list[str]:
    top, bottom = value.numerator, value.denominator
    spellings = [rf"\frac{{{top}}}{{{bottom}}}", f"{top}/{bottom}", rf"\dfrac{{{3 * top}}}{{{3 * bottom}}}"]
    if bottom == 1:
        spellings += [str(top), f"{top}.0", f"{top:,}"]
    elif value > 1:
        spellings.append(rf"{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}")
    return spellings


@st.composite
def numbers(draw: st.DrawFn) -> Answer:
    value = draw(st.fractions(min_value=-3000, max_value=3000, max_denominator=12))
    return Answer(draw(st.sampled_from(_number_spellings(value))), ("number", value))


@st.composite
def surds(draw: st.DrawFn) -> Answer:
    whole, factor, radicand = draw(st.integers(-9, 9)), draw(st.integers(1, 9)), draw(st.sampled_from([2, 3, 5, 7]))
    forms = [
        rf"{whole}+{factor}\sqrt{{{radicand}}}",
        rf"\sqrt{{{factor**2 * radicand}}}+({whole})",
        rf"{whole}+\frac{{{factor * radicand}}}{{\sqrt{{{radicand}}}}}",
    ]
    return Answer(draw(st.sampled_from(forms)), ("surd", whole, factor, radicand))


@st.composite
def polynomials(draw: st.DrawFn) -> Answer:
    first, second = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    forms = [
        f"(x+{first})(x+{second})",
        f"x^2+{first + second}x+{first * second}",
        rf"{first}\cdot {second}+x^{{2}}+({first}+{second})x",
    ]
    return Answer(draw(st.sampled_from(forms)), ("polynomial", first + second, first * second))


@st.composite
def intervals(draw: st.DrawFn) -> Answer:
    low = draw(st.integers(-50, 50))
    high, closed_low, closed_high = low + draw(st.integers(1, 50)), draw(st.booleans()), draw(st.booleans())
    below, above = (r"\le" if closed_low else "<"), (r"\leq" if closed_high else "<")
    forms = [
        f"{'[' if closed_low else '('}{low},{high}{']' if closed_high else ')'}",
        f"{low} {below} x {above} {high}",
        f"{high} {'>=' if closed_high else '>'} x {'>=' if closed_low else '>'} {low}",
    ]
    return Answer(draw(st.sampled_from(forms)), ("interval", low, high, closed_low, closed_high))


@st.composite
def sets(draw: st.DrawFn) -> Answer:
    members = draw(st.lists(st.integers(0, 30), min_size=2, max_size=4, unique=True))
    body = ", ".join(map(str, members))
    return Answer(draw(st.sampled_from([body, rf"\{{{body}\}}", rf"\left\{{ {body} \right\}}"])), ("set", frozenset(members)))


@st.composite
def tuples(draw: st.DrawFn) -> Answer:
    members = tuple(draw(st.lists(st.integers(0, 30), min_size=3, max_size=4)))  # a pair might be an interval
    body = ",".join(map(str, members))
    return Answer(draw(st.sampled_from([f"({body})", rf"\left( {body} \right)"])), ("tuple", members))


@st.composite
def quantities(draw: st.DrawFn) -> Answer:
    """Numbers with a unit that neither the other units nor the other kinds of answers can be."""
    value, unit = draw(st.integers(1, 200)), draw(st.sampled_from(["cm", "kg", "hours", "dollars", "apples"]))
    return Answer(draw(st.sampled_from([f"{value} {unit}", rf"{value}\text{{ {unit}}}"])), ("quantity", value, unit))


@st.composite
def words(draw: st.DrawFn) -> Answer:
    word = draw(st.sampled_from(["Monday", "Tuesday", "yes", "no", "Evelyn", "even", "odd", "rectangle"]))
    return Answer(draw(st.sampled_from([word, rf"\text{{{word}}}", f"{word}.", word.lower()])), ("word", word))


pure = st.one_of(numbers(), surds(), polynomials(), intervals(), sets(), tuples(), words())
answers = st.one_of(pure, quantities())


@QUICK
@given(texts, texts)
def test_there_is_always_a_verdict_and_equality_is_symmetric(left: str, right: str) -> None:
    outcome, reverse = compare(left, right), compare(right, left)
    assert isinstance(outcome, Equality)
    assert isinstance(reverse, Equality)
    assert (outcome is Equality.EQUAL) == (reverse is Equality.EQUAL)
    assert settle(left, right) in (None, outcome)


@QUICK
@given(texts)
def test_any_text_equals_itself(text: str) -> None:
    assert compare(text, text) is Equality.EQUAL
    assert compare(f"  {text}\n", text) is Equality.EQUAL


@QUICK
@given(answers, st.sampled_from(["{}", " {}  ", "${}$", r"\boxed{{{}}}", r"$\boxed{{{}}}$", r"\[ {} \]", "{}.", "**{}**"]))
def test_an_answer_equals_itself_in_any_enclosure(answer: Answer, enclosure: str) -> None:
    enclosed = enclosure.format(answer.text)
    assert compare(enclosed, answer.text) is Equality.EQUAL
    assert compare(answer.text, enclosed) is Equality.EQUAL


@settings(QUICK, max_examples=400)
@given(st.one_of(st.tuples(pure, pure), st.tuples(quantities(), quantities())))
def test_answers_are_equal_exactly_when_their_worth_is(pair: tuple[Answer, Answer]) -> None:
    left, right = pair
    expected = left.worth == right.worth
    assert (compare(left.text, right.text) is Equality.EQUAL) == expected
    assert (compare(right.text, left.text) is Equality.EQUAL) == expected


@QUICK
@given(st.one_of(*(st.tuples(kind(), kind()) for kind in (numbers, surds, polynomials, intervals, sets, tuples, words))))
def test_answers_of_one_kind_with_different_worth_are_different(pair: tuple[Answer, Answer]) -> None:
    left, right = pair
    assume(left.worth != right.worth)
    assert compare(left.text, right.text) is Equality.DIFFERENT


@QUICK
@given(st.integers(1, 500), st.sampled_from(["^", "!"]), st.integers(5, 60))
def test_towers_and_factorials_beyond_all_bounds_are_refused_at_once(base: int, kind: str, height: int) -> None:
    tower = f"{base + 1}^{{" * 4 + "9" + "}" * 4 if kind == "^" else f"({base + 1}^{{{height}}})!"
    assume(kind == "^" or (base + 1) ** height > 2000)
    assert compare(tower, "5") is Equality.UNPARSABLE
    assert compare(tower, f" {tower} ") is Equality.EQUAL
