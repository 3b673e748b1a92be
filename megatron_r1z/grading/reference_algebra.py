r"""The two algebraic layers of the paper's grader: `simplify(reference - answer) == 0` with sympy, and Math-Verify.

Reproduces `are_equal_under_sympy` and `is_latex_equal` of `oat/utils/math_grader.py` (sail-sg/oat c1a074c), by other means in one place:
the original hands what the model wrote to sympy's `parse_expr`, which is `eval` with all of sympy and the builtins in reach. It admits
two different letters only, but a string needs none, since `\textbackslash{}137` becomes an escape, and functions of sympy evaluate
strings once more: a box with `frac("...")` runs any command there. Here text is evaluated only if each of its tokens is a number, a
symbol, an operator or one of a few functions that do nothing but compute, and then nothing else is in reach. Math-Verify needs no such
guard: it reads LaTeX by a grammar and evaluates only text without letters.

There is no time limit here; callers run this in a process that can be killed. Heavy libraries are imported inside the functions.
"""

from __future__ import annotations

import builtins
import io
import keyword
import logging
import re
import tokenize
from functools import lru_cache
from typing import Any

FUNCTIONS = frozenset("csc eye ff fft frac fu gff hn1 hn2 im jn li ln nan ntt oo pi re rf sqrt yn zoo".split())
"""All of sympy that can be called with the letters the original admits: at most two, besides those of "sqrt" and "frac", in lower case."""
_MAX_LETTERS = 2
_SLOW_POWERS = re.compile(r"\^[{(]|\^[0-9]+\^|\^[0-9][0-9]+")

_WRITTEN_BY_SYMPY = "Integer Float Number Rational Symbol Function I factorial factorial2".split()
"""The names that `parse_expr` puts into the text before it evaluates it."""
_OPERATORS = frozenset([*"+ - * / // % ** ( ) , < > <= >= == != & | ~ << >> ! or in is".split(), " "])  # a space before "!" is a token
_PASSED = frozenset({tokenize.NUMBER, tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER})
_REPEATING_DECIMAL = re.compile(r"\.\d*\[\d+\]")

_REPETITIVE_LENGTH = 128
_REPETITIVE_SHARE = 0.2


def is_difference_zero(reference: str, answer: str) -> bool:
    """Whether sympy simplifies the difference of two texts in the normal form of the sympy layer to 0.

    >>> is_difference_zero("2x", "x+x"), is_difference_zero("x+y+z", "z+y+x")  # three letters are too many
    (True, False)
    """
    difference = f"({reference})-({answer})"
    if not _is_attempted(difference):
        return False
    source = difference.replace("^", "**")
    if not is_harmless(source):
        return False
    from sympy import simplify
    from sympy.parsing.sympy_parser import implicit_multiplication_application, parse_expr, standard_transformations

    transformations = (*standard_transformations, implicit_multiplication_application)
    try:
        return bool(simplify(parse_expr(source, transformations=transformations, global_dict=_names_in_reach())) == 0)
    except Exception:  # noqa: BLE001  (whatever it is, the original says no)
        return False


def _is_attempted(difference: str) -> bool:
    """Whether the original tries at all: it leaves out words, most functions and powers that might hang."""
    letters = {character for character in difference.replace("sqrt", "").replace("frac", "") if character.isalpha()}
    return len(letters) <= _MAX_LETTERS and _SLOW_POWERS.search(difference) is None


def is_harmless(source: str) -> bool:
    """Whether evaluating `source` can do nothing but compute.

    No strings, since sympy evaluates those again; no attributes, items or keyword arguments, through which everything can be reached;
    no keywords, builtins or names with two underscores. sympy's notation for repeating decimals, `0.1[6]`, is the one use of brackets.

    >>> is_harmless("(sqrt(2)*x!)-(0.1[6])"), is_harmless("x.n()"), is_harmless("sqrt('2')"), is_harmless("id(x)")
    (True, False, False, False)
    """
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(_REPEATING_DECIMAL.sub(".0 ", source)).readline))
    except (tokenize.TokenError, SyntaxError):
        return False
    return all(token.type in _PASSED or token.string in _OPERATORS or _is_harmless_name(token) for token in tokens)


def _is_harmless_name(token: tokenize.TokenInfo) -> bool:
    name = token.string
    return token.type == tokenize.NAME and not ("__" in name or keyword.iskeyword(name) or hasattr(builtins, name))


@lru_cache(maxsize=1)
def _names_in_reach() -> dict[str, Any]:
    import sympy

    return {"__builtins__": {}} | {name: getattr(sympy, name) for name in (*_WRITTEN_BY_SYMPY, *FUNCTIONS)}


def is_equal_by_math_verify(answer: str, reference: str) -> bool:
    r"""Whether Math-Verify finds the answer in one text equal to that in the other.

    >>> is_equal_by_math_verify("(1+x)/2", r"\frac{x+1}{2}"), is_equal_by_math_verify("1", "xy = 1")
    (True, True)
    """
    if is_repetitive(answer) or is_repetitive(reference):
        return False
    from math_verify import verify

    try:
        return bool(verify(_parse(reference), _parse(answer), timeout_seconds=None))
    except Exception:  # noqa: BLE001  (whatever it is, the original says no)
        return False


@lru_cache(maxsize=512)
def _parse(text: str) -> Any:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # A newline keeps Math-Verify from seeing `$...$` as LaTeX. The original means to delete newlines, but drops the result.
    return parse(
        text if "$" in text else f"${text}$",
        extraction_config=(LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()),
        fallback_mode="no_fallback",
        extraction_mode=["first_match"],  # a list is not "first_match", so that any match will do: again the original's
        parsing_timeout=None,
    )


def is_repetitive(text: str) -> bool:
    """Whether a long text is mostly repetition: over a fifth of its substrings, counted by position, occur earlier in it.

    The original adds up the common prefixes of neighbours in the suffix array, which is the same number: all substrings less the
    different ones.
    """
    if len(text) <= _REPETITIVE_LENGTH:
        return False
    num_substrings = len(text) * (len(text) + 1) // 2
    return (num_substrings - _num_different_substrings(text)) / num_substrings > _REPETITIVE_SHARE


def _num_different_substrings(text: str) -> int:
    """By the suffix automaton, in linear time: a state stands for as many substrings as it is longer than its suffix link."""
    lengths, links, edges = [0], [-1], [dict[str, int]()]

    def add_state(length: int, link: int, outgoing: dict[str, int]) -> int:
        lengths.append(length)
        links.append(link)
        edges.append(outgoing)
        return len(lengths) - 1

    last = 0
    for character in text:
        state, last = last, add_state(lengths[last] + 1, 0, {})
        while state >= 0 and character not in edges[state]:
            edges[state][character] = last
            state = links[state]
        if state < 0:
            continue
        target = edges[state][character]
        if lengths[target] != lengths[state] + 1:
            copy = add_state(lengths[state] + 1, links[target], dict(edges[target]))
            links[target] = copy
            while state >= 0 and edges[state].get(character) == target:
                edges[state][character] = copy
                state = links[state]
            target = copy
        links[last] = target
    return sum(length - lengths[link] for length, link in zip(lengths[1:], links[1:], strict=True))


def warm_up() -> None:
    """Import and exercise everything once, so that the first comparison takes as long as any other."""
    for name in ("math_verify", "pylatexenc"):  # one warns that it runs without a time limit of its own, the other of broken LaTeX
        logging.getLogger(name).setLevel(logging.ERROR)
    is_difference_zero("sqrt(4)*x", "2x")
    is_equal_by_math_verify(r"\frac{\sqrt{x}}{2}", r"\frac{1}{2}\sqrt{x}")
