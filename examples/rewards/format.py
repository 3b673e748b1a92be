"""Two reward functions of one's own, to add to the reward for a right answer.

    grading:
      extra:
        - {function: examples/rewards/format.py:is_boxed, weight: 0.1}
        - {function: examples/rewards/format.py:excess_length, weight: -0.5}

The paper has neither. A format reward pays whatever is in the box, so it can be collected without solving anything; a length penalty
changes what is optimised, where Dr. GRPO takes out the bias of the objective under which wrong answers grow.
"""

from __future__ import annotations

BUDGET = 400
"""Words that a solution may have at no cost."""


def is_boxed(response: str, answers: tuple[str, ...], finish_reason: str) -> float:
    r"""1.0 for a finished response with a box.

    >>> is_boxed(r"so \boxed{5}", ("6",), "stop"), is_boxed("so 5", ("5",), "stop"), is_boxed(r"\boxed{5}", ("5",), "length")
    (1.0, 0.0, 0.0)
    """
    return float(finish_reason == "stop" and r"\boxed{" in response)


def excess_length(response: str, answers: tuple[str, ...], finish_reason: str) -> float:
    """Words beyond the budget over the budget, at most 1.

    >>> excess_length("word " * 500, ("5",), "stop")
    0.25
    """
    return min(1.0, max(0, len(response.split()) - BUDGET) / BUDGET)
