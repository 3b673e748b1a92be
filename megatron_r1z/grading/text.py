r"""The normal form of an answer: one spelling for what is written in several ways, with the meaning kept. Standard library only."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache

from megatron_r1z.grading.brackets import is_enclosed, replace_calls
from megatron_r1z.grading.figures import join_figures
from megatron_r1z.grading.money import spell_money
from megatron_r1z.grading.number_words import replace_number_words
from megatron_r1z.grading.numbers import spell_repeating
from megatron_r1z.grading.units import join_measures

Rule = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]

_GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho _ sigma tau upsilon phi chi psi omega"
_SYMBOLS = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "∞": r"\infty ", "∪": r"\cup ",
        "∈": r"\in ", "∅": r"\emptyset ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ",
        "√": "sqrt", "∛": "cbrt", "°": r"\degree ", "℃": r"\degree C", "℉": r"\degree F", "ℝ": r"\mathbb{R}", "±": r"\pm ", "…": "...",
        "’": "'", "‘": "'", "“": '"', "”": '"', "∠": r"\angle ", "⟨": r"\langle ", "⟩": r"\rangle ", "⁄": "/", "∶": ":", "∖": r"\setminus ",
        **{chr(0x3B1 + index): rf"\{name} " for index, name in enumerate(_GREEK.split()) if name != "_"},
    }
)  # fmt: skip
_SUPERSCRIPT, _SUBSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+"), re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_SCRIPT_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ₀₁₂₃₄₅₆₇₈₉", "0123456789+-n0123456789")
_VULGAR = re.compile("[¼½¾⅐-⅞]")

_NOT_AFTER_WORD, _NOT_BEFORE_WORD = r"(?<![A-Za-z\\])", r"(?![A-Za-z])"
_FUNCTIONS = "pi|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|lg|exp"


def _rules(*rules: tuple[str, str]) -> tuple[Rule, ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rules)


_MARKDOWN = tuple(re.compile(rf"\s*{mark}(?!\s)((?:(?!{mark}).)+){mark}\s*", re.DOTALL) for mark in (r"\*\*", "__", r"\*", "`"))
_SYSTEM = re.compile(
    r"(?:\\left ?\\\{ ?|\\\{ ?)?\\begin\{(?P<name>[d]?cases|aligned|array|gathered)\}(?:\{[lcr|@ ]*\})?(?P<body>(?:(?!\\begin).)*)"
    r"\\end\{(?P=name)\}(?: ?\\right ?\.)?",
    re.DOTALL,
)
_PERCENT = r"(?:\\%|%|(?i:per[ -]?cent|pct\.?)(?![A-Za-z]))"
_LABEL = re.compile(
    r"\s*(?:\\text ?\{ ?\(?([A-J])[.)] ?\}|\(([A-J])\)(?= *[:.] | +[^\s+*/^-])|([A-J])(?:[.)](?= )|:(?= [\d\\$-])))(?: *[:.] )? *"
    r"(?=[^\s,;=])(?!(?:\\text ?\{ ?)?(?:and|or)(?![a-z])|\\c[au]p)"
)
_LABELLED = re.compile(r"\\text\{\(([A-J])\)\}(?=.)")
_COMMANDS = _rules(
    # Spacing, boxes and delimiters that carry no meaning.
    (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-z])|\\!|\\(?:displaystyle|limits)(?![a-z])|(?<!\\)\\[()\[\]]|\\(?:boxed|fbox)(?![a-z])", ""),
    (r"(?<!\\)\\[,;:> ]|\\(?:q?quad|(?:en|thin|med|thick)space)(?![a-z])|\\[hm]space\*? ?\{[^{}]*\}|~|\{ +\}|\s+", " "),
    # One spelling of each command.
    (r"\\(?:mathbf|boldsymbol|bm|vec|mathit) ?\{? ?([A-Za-z])(?![A-Za-z]) ?\}?", r"\1"),
    (r"\\(?:math(?:rm|bf|it|sf)|text(?:bf|it|rm|sf|normal)|emph|[mh]box|operatorname)(?![a-z])", r"\\text"),
    (rf"\\text ?\{{ *({_FUNCTIONS}|e|i) *\}}", r" \1 "),
    (r"\\text ?\{ *(\d+(?:\.\d+)?) *\}", r"\1"),
    (r"\\[dtc](frac|binom)(?![a-z])", r"\\\1"),
    (r"\\(le|ge|ne)(?:q|qslant)(?![a-z])", r"\\\1"),
    (r"\\lt(?![a-z])", "<"),
    (r"\\gt(?![a-z])", ">"),
    (r" *<= *", r"\\le "),
    (r" *>= *", r"\\ge "),
    (r"(?<!\d)!=", r"\\ne "),
    (r"\\[lr]?[vV]ert(?![a-z])", "|"),
    (r"\\varnothing(?![a-z])", r"\\emptyset"),
    (r"\\langle(?![a-z])", "("),
    (r"\\rangle(?![a-z])", ")"),
    (r"\\colon(?![a-z])", ":"),
    (r"\\[cl]?dots(?![a-z])", "..."),
    (r"\^ *(?:\{ *\\circ *\}|\\circ(?![a-z]))|\\degree(?![a-z])", r"\\text{degree}"),
    (r"\\begin\{array\} *\{[lcr| ]*\}|\\begin\{(?:[bB]|small)?matrix\}", r"\\begin{pmatrix}"),
    (r"\\end\{(?:array|(?:[bB]|small)?matrix)\}", r"\\end{pmatrix}"),
    (rf"(?:\\text ?\{{[ -]*{_PERCENT}[ .]*\}}|(?<=[\w}})!|])[ -]*{_PERCENT})", "%"),
    (r"(?:\\text ?\{ ?mod ?\}|\\mod|(?<= )mod)(?![A-Za-z])", r"\\bmod "),
    (r"(?<!\*)\*(?!\*)", r"\\cdot "),
    (r"\*\*", "^"),
    (r"(?<=\d) ?[xX] ?(?=10 ?\^)", r"\\times "),
    (r"\\(?:land|lor|wedge|vee)(?![a-z])|;", ","),
)
_FIGURES = _rules(
    (r"(?<=\d) ?e\{?(?=-?\d)", "e"),
    (r"\\(?:bar|overline) ?\{? ?(\d+) ?\}?", r"\\overline{\1}"),
    (r"(?<=\.)(\d*)\((\d+)\)", r"\1\\overline{\2}"),
    (r"\\dot ?\{?(\d)\}?(?:(\d*)\\dot ?\{?(\d)\}?)?", r"\\overline{\1\2\3}"),
    (r"(?<!\d)\.(?=\d)", "0."),
    (r"(?<![\d./^_])(\d+) (\d+)/(\d+)(?![\d/])", r"\1\\frac{\2}{\3}"),
    (r"(\d+) and an? half(?![a-z])", r"\1\\frac{1}{2}"),
    (r"^(?i:an? )?[hH]alf$", r"\\frac{1}{2}"),
    (r"(?<=\d)(?: ?\\text ?\{ *to *\} ?| to )(?=\d)", ":"),
    (r"_ ?\{ ?(?:\\text ?\{|\() ?(\w+) ?[})] ?\}", r"_{\1}"),
    (r"(?<=[\dA-F]) ?\(? ?(?:\\text ?\{ *)?base ?\}? ?(\d+)\)?", r"_{\1}"),
)
_LIST_WORDS = re.compile(r",?\s*(?:\\text\s*\{\s*(?:and|or)\s*\}|(?<![A-Za-z{])(?:and|or)(?![A-Za-z}]))\s*,?")
_PLAIN_TO_LATEX = _rules(
    (_NOT_AFTER_WORD + r"sqrt ?(\d+(?:\.\d+)?|[A-Za-z])" + _NOT_BEFORE_WORD, r"\\sqrt{\1}"),
    (_NOT_AFTER_WORD + r"cbrt ?(\d+|[A-Za-z])" + _NOT_BEFORE_WORD, r"\\sqrt[3]{\1}"),
    (_NOT_AFTER_WORD + r"sqrt(?=\\|\{)", r"\\sqrt"),
    (_NOT_AFTER_WORD + rf"(pi|(?:{_FUNCTIONS})(?= ?[\w(\\{{|^]))" + _NOT_BEFORE_WORD, r"\\\1 "),
    (_NOT_AFTER_WORD + r"(?:inf|infinity|oo)" + _NOT_BEFORE_WORD, r"\\infty "),
    # Binomial coefficients: C(4,2), {4 \choose 2}, {}_4C_2, C_4^2, 4C2.
    (_NOT_AFTER_WORD + r"C ?\( ?(\w+) ?, ?(\w+) ?\)", r"\\binom{\1}{\2}"),
    (r"\{ ?(\w+) ?\\choose ?(\w+) ?\}", r"\\binom{\1}{\2}"),
    (r"(?:\{\})? ?(?<!\w)[_^] ?\{?(\w+?)\}? ?C ?_ ?\{?(\w+)\}?", r"\\binom{\1}{\2}"),
    (_NOT_AFTER_WORD + r"C ?_ ?\{?(\d+)\}? ?\^ ?\{?(\d+)\}?", r"\\binom{\1}{\2}"),
    (r"(?<![\w.])(\d+)C(\d+)(?!\w)", r"\\binom{\1}{\2}"),
    # Braces around arguments.
    (r"\\(frac|binom) ?(\w) ?(\w)", r"\\\1{\2}{\3}"),
    (r"\\(frac|binom) ?(\w) ?\{", r"\\\1{\2}{"),
    (r"\\(frac|binom) ?(\{[^{}]*\}) ?(\w)", r"\\\1\2{\3}"),
    (r"\\sqrt ?(\d+|[A-Za-z])", r"\\sqrt{\1}"),
    (r"\^ ?([+-]?\d+|[A-Za-z])", r"^{\1}"),
    (r"\^ ?\(([^()]*)\)", r"^{\1}"),
    (r"_ ?(\d+|[A-Za-z])", r"_{\1}"),
    # A space stays where it may part a number from a fraction or a unit: `3 1/2` is not `31/2`, `5 m` is not `5m`.
    (r"(?<![\w})]) +| +(?![A-Za-z0-9])|(?<=[})]) +(?=\d)", ""),
)
_TIME = re.compile(
    r"(?P<time>\d{1,2}(?P<colon>:\d\d)?)(?P<gap>(?: |\\text ?\{)*)(?P<half>[apAP])(?P<dot>\.?) ?[mM]\.?(?: *\})?(?![A-Za-z])"
)

_NOTHING = re.compile(
    r"(?:there (?:is|are) )?no (?:(?:real|integer|integral|such|possible|valid) )*(?:solutions?|values?|numbers?|roots?)(?: exists?)?"
    r"|none|(?:the )?empty set|\\emptyset|\\\{\\\}"
)
_ALIASES = (
    (_NOTHING, r"\emptyset"),
    (re.compile(r"(?:all |the |set of |the set of )*(?:all reals|real numbers)|\\mathbb\{?r\}?"), r"(-\infty,\infty)"),
    (re.compile("dne|(?:it )?does not exist"), "does not exist"),
    (re.compile("(?:12 )?noon"), r"12:00\text{pm}"),
    (re.compile("(?:12 )?midnight"), r"12:00\text{am}"),
)
_OPTION = re.compile(r"\(([A-Za-z])\)|([A-Z])\)|(?i:option|choice|answer):? ?\(?([A-Z])\)?")


@lru_cache(maxsize=16384)
def normalise(text: str) -> str:
    r"""One spelling for what is written in several ways; the meaning is kept.

    >>> normalise(r"$ \dfrac12 $."), normalise("1,000"), normalise(r"2516_8")
    ('\\frac{1}{2}', '1000', '2516_{8}')
    """
    text = text.strip()
    if not text.isascii():
        text = _spell_unicode(text)
    text = join_figures(_SYSTEM.sub(_spell_system, _strip_markdown(text)))
    text = _unwrap_text(spell_money(_apply(_COMMANDS, text)).strip())
    if (label := _LABEL.match(text)) and (content := _finish(text[label.end() :])):
        return rf"\text{{({label[label.lastindex or 0]})}}" + content
    return _finish(text)


def split_label(text: str) -> tuple[str | None, str]:
    r"""The letter and the text of an option in normal form, `\textbf{(C)}\ 5`; anything else has no letter."""
    match = _LABELLED.match(text)
    return (None, text) if match is None else (match[1], text[match.end() :])


def _finish(text: str) -> str:
    """The normal form of a text whose commands are spelled alike."""
    text = _TIME.sub(_spell_time, replace_number_words(_apply(_FIGURES, spell_repeating(text))))
    text = replace_calls(_LIST_WORDS.sub(",", text), {"sqrt": r"\sqrt{", "cbrt": r"\sqrt[3]{"})
    return unwrap(join_measures(_apply(_PLAIN_TO_LATEX, text)))


def unwrap(text: str) -> str:
    r"""Without what encloses or ends an answer as a whole: braces, `\text{}`, full stops, the brackets of an option; synonyms as one word.

    >>> unwrap(r"\text{(A)}."), unwrap(r"\text{no solution}")
    ('A', '\\emptyset')
    """
    text = re.sub(r"^(?:(?:=|\\approx|\\therefore)\s*)+|(?:\\|[.,:\s])+$", "", text.strip())
    while is_enclosed(text, "{", "}"):
        text = text[1:-1].strip()
    if (content := _unwrap_text(text)) != text:
        return unwrap(content)
    if option := _OPTION.fullmatch(text):
        return option.group().strip("()")[-1]
    folded = " ".join(text.casefold().split())
    return next((alias for pattern, alias in _ALIASES if pattern.fullmatch(folded)), text)


def _unwrap_text(text: str) -> str:
    r"""The content where the whole text is one `\text{...}`, full stops aside."""
    stripped = text.rstrip(". ")
    return stripped[6:-1].strip() if stripped.startswith(r"\text{") and is_enclosed(stripped[5:], "{", "}") else text


def _apply(rules: tuple[Rule, ...], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _spell_unicode(text: str) -> str:
    text = text.replace("³√", "∛")
    text = _SUPERSCRIPT.sub(lambda match: f"^{{{match.group().translate(_SCRIPT_DIGITS)}}}", text)
    text = _SUBSCRIPT.sub(lambda match: f"_{{{match.group().translate(_SCRIPT_DIGITS)}}}", text)
    text = _VULGAR.sub(_spell_vulgar_fraction, text)
    text = unicodedata.normalize("NFKC", text.translate(_SYMBOLS)).translate(_SYMBOLS)
    return "".join(character for character in text if unicodedata.category(character) != "Cf")


def _spell_vulgar_fraction(match: re.Match[str]) -> str:
    top, bottom = unicodedata.normalize("NFKC", match.group()).split("⁄")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _strip_markdown(text: str) -> str:
    for pattern in _MARKDOWN:
        if match := pattern.fullmatch(text):
            return match[1].strip()
    return text


def _spell_system(match: re.Match[str]) -> str:
    """Equations among one another as equations beside one another; rows that are something else (a matrix, cases of a function) stay."""
    rows = [row.replace("&", " ").strip(" ,;\n") for row in re.split(r"\\\\(?:\[[^\]]*\])?", match["body"])]
    rows = [row for row in rows if row]
    return ", ".join(rows) if rows and all(row.count("=") == 1 for row in rows) else match.group()


def _spell_time(match: re.Match[str]) -> str:
    if not (match["colon"] or match["dot"] or match["gap"]):
        return match.group()  # `3am` may be a product
    closing = "}" if match.group().endswith("}") and "{" not in match["gap"] else ""
    return rf"{match['time']}\text{{{match['half'].lower()}m}}{closing}"


_WORDS = re.compile(r"[^\W\d_](?:[^\W\d_]|[ '.-])*")
_SHORT_WORD = re.compile(
    r"[^\W\d_]{5}|(?<![^\W\d_])(?:(?=[A-Za-z]*[aeiouyAEIOUY])[A-Z][a-z]{2,}|(?i:yes|no|true|none|odd|even))(?![^\W\d_])"
)


def is_language(text: str) -> bool:
    r"""Whether it is words rather than mathematics: only letters, and `\text`, a word of five letters, a name or a common short one."""
    return spell_words(text) is not None and (r"\text" in text or _SHORT_WORD.search(text) is not None)


def spell_words(text: str) -> str | None:
    r"""Words in small letters with single spaces; None where there is more than letters and what stands between words."""
    plain = re.sub(r"\text\{([^{}]*)\}", r"\1 ", text)
    return " ".join(re.findall(r"[^\W\d_']+", plain.casefold())) if _WORDS.fullmatch(plain) else None
