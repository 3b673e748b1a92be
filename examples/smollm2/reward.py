"""A reward function of one's own: the number behind "answer is", compared as a number.

Named in the configuration as `grading.function: examples/smollm2/reward.py:answer_is`.
"""

from __future__ import annotations

import re

ANSWER = re.compile(r"answer is:?\s*\$?\s*(-?\d[\d,]*(?:\.\d+)?|-?\.\d+)", re.IGNORECASE)


def answer_is(response: str, answers: tuple[str, ...], finish_reason: str) -> float:
    """1.0 if the number behind the last "answer is" equals any of `answers` and the response was not cut off, else 0.0.

    >>> answer_is(" 3 + 4 = 7. The answer is 7.", ("7.0",), "stop")
    1.0
    """
    found = ANSWER.findall(response)
    if not found or finish_reason != "stop":
        return 0.0
    number = _parse(found[-1])
    return float(any(number == _parse(answer) for answer in answers))


def _parse(text: str) -> float:
    return float(text.replace(",", ""))
