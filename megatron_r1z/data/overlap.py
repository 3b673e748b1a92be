r"""Evaluation questions that also stand in a training set, word for word or nearly so. Standard library only.

Two questions are compared as lists of words: lower case, without LaTeX's dollar signs, braces, spacing and font commands, without
punctuation; numbers and operators are words of their own.

- `exact`: the same words.
- `near`: an answer in common, the same numbers in the same order, and at least `MIN_SHARE` of the runs of `NUM_WORDS` words of the longer
  question are also in the other one.

Questions made from one template differ in their numbers; those that ask something else about the same figure differ in their answer.
docs/data.md has what either condition leaves out of the question sets of the paper.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_r1z.data.questions import Question

NUM_WORDS = 4
MIN_SHARE = 0.4

LAYOUT = re.compile(
    r"\\(?:[,;:! ()\[\]]|(?:left|right|[bB]ig|q?quad|displaystyle|text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|emph)(?![a-zA-Z]))"
    r"|[\^_]\{\}"
)
"""LaTeX that changes the look only."""
SYNONYMS = (("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("{,}", ","), ("\\!", ""), ("−", "-"), ("–", "-"))
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
WORD = re.compile(r"[^\W\d_]+|\d+(?:\.\d+)?|\.\d+|[^\s.,;:?!'\"`’‘“”$~{}&\\]")

Kind = Literal["exact", "near"]
Gram = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Overlap:
    """An evaluation question that a training question repeats.

    >>> Overlap("math_train/12", "math/3", "near", 0.83).share
    0.83
    """

    train_id: str
    evaluation_id: str
    kind: Kind
    share: float
    """Runs of words in common over those of the longer question; 1 for an exact one."""


def split_words(text: str) -> list[str]:
    r"""The words by which questions are compared.

    >>> split_words("What is $\\left( x+1 \\right)$ for \\(x = 1,000\\)?")
    ['what', 'is', '(', 'x', '+', '1', ')', 'for', 'x', '=', '1000']
    """
    for old, new in SYNONYMS:
        text = text.replace(old, new)
    return WORD.findall(THOUSANDS.sub("", LAYOUT.sub(" ", text)).lower())


def normalise(text: str) -> str:
    """The words of a question on one line: the same for questions that are the same. A text without words is left as it is."""
    return " ".join(split_words(text)) or text.strip()


def find_overlaps(train: Iterable[Question], evaluation: Sequence[Question]) -> list[Overlap]:
    """Every pair of a training and an evaluation question that are the same or nearly so, in the order of the training questions."""
    index = _Index(evaluation)
    return [overlap for question in train for overlap in index.find(question)]


class _Index:
    """Evaluation questions by their text and by each of their runs of words."""

    def __init__(self, evaluation: Sequence[Question]) -> None:
        self._ids = [question.question_id for question in evaluation]
        self._same: dict[str, list[int]] = defaultdict(list)
        self._by_gram: dict[Gram, list[int]] = defaultdict(list)
        self._sizes: list[int] = []
        self._numbers: list[list[str]] = []
        self._answers: list[set[str]] = []
        for place, question in enumerate(evaluation):
            words = split_words(question.problem)
            grams = _grams(words)
            self._same[normalise(question.problem)].append(place)
            self._sizes.append(len(grams))
            self._numbers.append(_numbers(words))
            self._answers.append(_answers(question))
            for gram in grams:
                self._by_gram[gram].append(place)

    def find(self, question: Question) -> list[Overlap]:
        """The evaluation questions that `question` repeats."""
        words = split_words(question.problem)
        same = self._same.get(normalise(question.problem), [])
        exact = [Overlap(question.question_id, self._ids[place], "exact", 1.0) for place in same]
        near = [
            Overlap(question.question_id, self._ids[place], "near", share)
            for place, share in self._shares(_grams(words)).items()
            if place not in same and self._numbers[place] == _numbers(words) and self._answers[place] & _answers(question)
        ]
        return exact + near

    def _shares(self, grams: set[Gram]) -> dict[int, float]:
        """Evaluation questions with enough of `grams`, and how much."""
        found = Counter(place for gram in self._by_gram.keys() & grams for place in self._by_gram[gram])
        shares = {place: count / max(len(grams), self._sizes[place]) for place, count in found.items()}
        return {place: share for place, share in shares.items() if share >= MIN_SHARE}


def _grams(words: Sequence[str]) -> set[Gram]:
    return set(zip(*(words[start:] for start in range(NUM_WORDS)), strict=False))


def _numbers(words: Iterable[str]) -> list[str]:
    return [word for word in words if word[-1].isdigit()]


def _answers(question: Question) -> set[str]:
    return {normalise(answer) for answer in question.answers}
