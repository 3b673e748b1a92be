r"""Where the answer is in a response: the `\boxed{...}` and the `<answer>...</answer>` conventions.

They follow the reward functions of oat's math grader to the letter (`boxed`, `answer_tag`, `answer_tag` for ORZ and `r1_distill_qwen`),
oddities included, so that rewards agree with the published runs: braces are counted as text, so that an escaped `\}` closes a box.
"""

from __future__ import annotations

from dataclasses import dataclass

_BOX = r"\boxed"


@dataclass(frozen=True, slots=True)
class Extraction:
    """What was found; `formatted` without an answer is a response in the right form that holds a broken box."""

    formatted: bool
    answer: str | None


UNFORMATTED = Extraction(formatted=False, answer=None)


def extract_boxed(response: str) -> str | None:
    r"""The content of the last `\boxed`, or None where there is none, it is not closed, or it is not exactly `\boxed{`.

    >>> extract_boxed(r"so \boxed{4}, no: \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    start = response.rfind(_BOX)
    opening = start + len(_BOX)
    if start < 0 or not response.startswith("{", opening):
        return None
    depth = 0
    for position in range(opening, len(response)):
        depth += (response[position] == "{") - (response[position] == "}")
        if depth == 0:
            return response[opening + 1 : position]
    return None


def extract_boxed_answer(response: str) -> Extraction:
    """The boxed convention: formatted exactly when there is a box to read."""
    answer = extract_boxed(response)
    return UNFORMATTED if answer is None else Extraction(formatted=True, answer=answer)


def extract_answer_tag(response: str) -> Extraction:
    """The answer-tag convention of the r1 template.

    The response must hold `</think> <answer>` and, anywhere, `</answer>`. The answer is what follows the last `<answer>`, without any
    `</answer>`; a box inside it is opened.

    >>> extract_answer_tag("so</think> <answer> 5</answer>").answer
    ' 5'
    """
    return extract_answer_tag_lenient(response) if "</think> <answer>" in response else UNFORMATTED


def extract_answer_tag_lenient(response: str) -> Extraction:
    """The answer-tag convention for models trained with another template: `<answer>` and `</answer>` are enough.

    >>> extract_answer_tag_lenient("so</think><answer>5</answer>").answer
    '5'
    """
    if "<answer>" not in response or "</answer>" not in response:
        return UNFORMATTED
    answer = response.rpartition("<answer>")[2].replace("</answer>", "")
    return Extraction(formatted=True, answer=extract_boxed(answer) if _BOX in answer else answer)


def extract_think_then_boxed(response: str) -> Extraction:
    r"""The convention of reasoning models: one `</think>`, and a box after it.

    >>> extract_think_then_boxed(r"\boxed{4}?</think> \boxed{5}").answer
    '5'
    """
    return extract_boxed_answer(response.partition("</think>")[2]) if response.count("</think>") == 1 else UNFORMATTED
