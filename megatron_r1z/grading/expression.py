r"""Reads an answer in normal form into a tree: sums, products, powers, roots, functions.

The grammar knows every token that it accepts and refuses the rest, so that nothing of an answer is dropped in silence: `101_2`, `f'` and
`\phantom{x}` have no tree. Products need no sign (`2xy`), an integer before a fraction of integers is a mixed number (`3\frac{1}{2}`),
`1/2x` is `(1/2)x`. Standard library only; nothing is evaluated here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

MAX_NESTING = 30
"""Brackets within brackets, towers of exponents; no reference of the published question sets has more than a few."""

_TOKEN = re.compile(r"\s*(\\text\{degree\}|\\[A-Za-z]+|\d+(?:\.\d+)?|[A-Za-z]|[-+*/^_!|()\[\]{},])")
_GREEK = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon phi varphi chi psi"
    " omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega hbar ell".split()
)
FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth arcsinh arccosh arctanh log ln lg exp".split()
)
_CONSTANTS = {"e": "e", "i": "i", r"\pi": "pi", r"\infty": "inf"}
_CLOSING = {"(": ")", "[": "]", "{": "}", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil", "|": "|"}
_GROUP_OPERATORS = {r"\lfloor": "floor", r"\lceil": "ceil", "|": "abs"}
_TIMES = frozenset(["*", r"\cdot", r"\times"])
_DIVIDE = frozenset(["/", r"\div"])
_MODULO = r"\bmod"
_DEGREE = r"\text{degree}"
_STARTS_NO_FACTOR = frozenset("+-*/^_!)]},") | frozenset([r"\cdot", r"\times", r"\div", _MODULO, _DEGREE, r"\rfloor", r"\rceil"])


@dataclass(frozen=True, slots=True)
class Node:
    """An operator and its operands; a leaf is `number` (with `value`, written as `name`), `symbol` or `constant` (with `name`)."""

    op: str
    args: tuple[Node, ...] = ()
    name: str = ""
    value: Fraction = Fraction(0)


@dataclass(frozen=True, slots=True)
class Expression:
    """A tree, the names of its variables, and whether a decimal with six or more places occurs, which may be a rounded value."""

    tree: Node
    symbols: frozenset[str]
    has_long_decimal: bool


class ParseError(ValueError):
    """The text is no expression of this grammar."""


@lru_cache(maxsize=16384)
def parse(text: str) -> Expression | None:
    r"""The expression that the whole text is, or None.

    >>> parse("2x") == parse(r"2\cdot x"), parse("2x'")
    (True, None)
    """
    try:
        tree = _Parser(text).parse()
    except ParseError:
        return None
    leaves = list(_leaves(tree))
    symbols = frozenset(leaf.name for leaf in leaves if leaf.op == "symbol")
    return Expression(tree, symbols, any(leaf.op == "number" and len(leaf.name.partition(".")[2]) >= 6 for leaf in leaves))


def _leaves(node: Node) -> Iterator[Node]:
    if not node.args:
        yield node
    for argument in node.args:
        yield from _leaves(argument)


def _tokens(text: str) -> list[str]:
    found, position = [], 0
    while match := _TOKEN.match(text, position):
        found.append(match.group(1))
        position = match.end()
    if text[position:].strip():
        raise ParseError(text)
    return found


def _number(token: str, sign: int = 1) -> Node:
    try:
        return Node("number", name=token, value=sign * Fraction(token))
    except ValueError as error:  # more digits than int() reads
        raise ParseError(token) from error


def _is_integer(node: Node) -> bool:
    return node.op == "number" and "." not in node.name


def _is_integer_fraction(node: Node) -> bool:
    return node.op == "fraction" and all(map(_is_integer, node.args))


class _Parser:
    """Recursive descent over the tokens; every level of brackets or exponents counts against `MAX_NESTING`."""

    def __init__(self, text: str) -> None:
        self._tokens = _tokens(text)
        self._position = 0
        self._nesting = 0
        self._open_bars = 0

    def parse(self) -> Node:
        node = self._sum()
        if self._peek() is not None:
            raise ParseError("something follows the expression")
        return node

    def _peek(self) -> str | None:
        return self._tokens[self._position] if self._position < len(self._tokens) else None

    def _next(self) -> str:
        token = self._peek()
        if token is None:
            raise ParseError("the expression ends early")
        self._position += 1
        return token

    def _accept(self, token: str) -> bool:
        found = self._peek() == token
        self._position += found
        return found

    def _expect(self, token: str) -> None:
        if not self._accept(token):
            raise ParseError(f"{token} is missing")

    def _nested(self, rule: Callable[[], Node]) -> Node:
        self._nesting += 1
        if self._nesting > MAX_NESTING:
            raise ParseError("too deep")
        node = rule()
        self._nesting -= 1
        return node

    def _sum(self) -> Node:
        terms = [self._signed(self._product)]
        if self._peek() == _MODULO and terms[0].op != "negate":  # beside a sum or a sign it is not clear what it divides
            self._next()
            return Node("modulo", (terms[0], self._product()))
        while self._peek() in ("+", "-"):
            terms.append(self._signed(self._product))
        return terms[0] if len(terms) == 1 else Node("add", tuple(terms))

    def _signed(self, rule: Callable[[], Node]) -> Node:
        negative = False
        while self._peek() in ("+", "-"):
            negative ^= self._next() == "-"
        node = rule()
        return Node("negate", (node,)) if negative else node

    def _product(self) -> Node:
        factors = [self._power()]
        while (token := self._peek()) is not None:
            if token in _TIMES:
                self._next()
                factors.append(self._signed(self._power))
            elif token in _DIVIDE:
                self._next()
                factors.append(Node("invert", (self._signed(self._power),)))
            elif self._starts_factor(token):
                self._multiply_by_neighbour(factors)
            else:
                break
        return factors[0] if len(factors) == 1 else Node("multiply", tuple(factors))

    def _multiply_by_neighbour(self, factors: list[Node]) -> None:
        """The factor that follows without a sign; an integer and a fraction of integers are a mixed number."""
        before, token = self._tokens[self._position - 1], self._tokens[self._position]
        factor = self._power()
        if token[0].isdigit() and (before[0].isdigit() or (len(before) == 1 and before.isalpha())):
            raise ParseError("a number follows a number or letter without a sign")
        if before.isdigit() and token == r"\frac" and _is_integer(factors[-1]) and _is_integer_fraction(factor):
            factors[-1] = Node("add", (factors[-1], factor))
        else:
            factors.append(factor)

    def _starts_factor(self, token: str) -> bool:
        return token not in _STARTS_NO_FACTOR and not (token == "|" and self._open_bars)

    def _power(self) -> Node:
        node = self._atom()
        for _ in range(MAX_NESTING):
            if self._accept("!"):
                node = Node("double_factorial" if self._accept("!") else "factorial", (node,))
            elif self._accept("^"):
                node = Node("power", (node, self._exponent()))
            elif self._accept(_DEGREE):
                node = Node("degree", (node,))
            else:
                return node
        raise ParseError("too many signs behind a factor")

    def _exponent(self) -> Node:
        exponent = self._nested(self._argument)
        return Node("power", (exponent, self._nested(self._exponent))) if self._accept("^") else exponent

    def _argument(self) -> Node:
        """What a command or an exponent applies to: a group in braces, or one token."""
        return self._group() if self._peek() == "{" else self._atom()

    def _atom(self) -> Node:
        token = self._next()
        if token[0].isdigit():
            return _number(token)
        if token in _CONSTANTS:
            return Node("constant", name=_CONSTANTS[token])
        if token in _CLOSING:
            self._position -= 1
            return self._group()
        name = token.removeprefix("\\")
        if name == "Gamma" and self._peek() == "(":
            return Node("factorial", (Node("add", (self._group(), _number("1", -1))),))
        if (len(token) == 1 and token.isalpha()) or name in _GREEK:
            return Node("symbol", name=name + self._subscript())
        if name in FUNCTIONS and name != token:
            return self._nested(lambda: self._call(name))
        return self._command(token)

    def _subscript(self) -> str:
        if not self._accept("_"):
            return ""
        start = self._position
        self._argument()
        return "_" + "".join(self._tokens[start : self._position]).strip("{}")

    def _command(self, token: str) -> Node:
        match token:
            case r"\frac":
                return Node("fraction", (self._nested(self._argument), self._nested(self._argument)))
            case r"\binom":
                return Node("binomial", (self._nested(self._argument), self._nested(self._argument)))
            case r"\sqrt":
                index = self._group() if self._peek() == "[" else _number("2")
                return Node("root", (index, self._nested(self._argument)))
            case _:
                raise ParseError(f"{token} starts nothing")

    def _group(self) -> Node:
        opening = self._next()
        bars, self._open_bars = self._open_bars, int(opening == "|")
        node = self._nested(self._sum)
        self._open_bars = bars
        self._expect(_CLOSING[opening])
        operator = _GROUP_OPERATORS.get(opening)
        return node if operator is None else Node(operator, (node,))

    def _call(self, name: str) -> Node:
        r"""A function with its base, power and argument: `\log_2 8`, `\sin^2 x`, `\tan^{-1} 1`, `\ln 2x`, `\cos(x)`."""
        base = self._nested(self._argument) if self._accept("_") else None
        power = self._exponent() if self._accept("^") else None
        argument = self._call_argument()
        if power == Node("negate", (_number("1"),)) and f"arc{name}" in FUNCTIONS:
            return Node(f"arc{name}", (argument,))
        if base is not None and name != "log":
            raise ParseError(f"{name} has no base")
        node = Node(name, (argument,) if base is None else (argument, base))
        return node if power is None else Node("power", (node, power))

    def _call_argument(self) -> Node:
        if self._peek() in ("(", "[", "{"):
            node = self._group()
            return Node("degree", (node,)) if self._accept(_DEGREE) else node
        factors = [self._signed(self._power)]
        while (token := self._peek()) is not None and self._continues_argument(token):
            self._multiply_by_neighbour(factors)
        return factors[0] if len(factors) == 1 else Node("multiply", tuple(factors))

    def _continues_argument(self, token: str) -> bool:
        return self._starts_factor(token) and token not in ("(", "[", "|") and token.removeprefix("\\") not in FUNCTIONS
