"""How long prompts and responses are, as far as time depends on it.

Responses end at random: their length is exponential, cut off at the generation budget. The one parameter is chosen so that the mean is what
was asked for. An exponential has no memory, which is what makes a rollout with a queue easy to add up (`rollout.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_r1z.config import TrainConfig
from megatron_r1z.errors import ConfigError

ALL_CUT = 0.999
"""From this share of the budget on, the mean is the budget: every response is cut off."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of a prompt, mean and limit of the tokens of a response.

    >>> round(Lengths(prompt=100, response=500, budget=1000).mean_square, -2)
    482500.0

    Raises:
        ConfigError: a prompt or response of less than one token, or a mean above the budget.
    """

    prompt: float
    response: float
    """Mean."""
    budget: int
    """`rollout.max_response_tokens`."""

    @classmethod
    def at_most(cls, config: TrainConfig) -> Lengths:
        """Of the longest samples that a configuration allows."""
        budget = config.rollout.max_response_tokens
        return cls(config.data.max_prompt_tokens, budget, budget)

    def __post_init__(self) -> None:
        if not (self.prompt >= 1 and 1 <= self.response <= self.budget):
            raise ConfigError(
                f"mean lengths of {self.prompt:g} tokens for prompts and {self.response:g} for responses cannot be; a prompt has at least "
                f"1, a response 1 to rollout.max_response_tokens {self.budget}."
            )

    @property
    def total(self) -> float:
        """Mean of prompt and response together."""
        return self.prompt + self.response

    @property
    def scale(self) -> float:
        """Mean of the exponential before it is cut off, so that `scale * (1 - exp(-budget / scale))` is the mean; inf: all are cut off."""
        if self.response >= ALL_CUT * self.budget:
            return math.inf
        low, high = self.response, self.budget**2 / (self.budget - self.response)
        while high - low > 1e-9 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if -middle * math.expm1(-self.budget / middle) < self.response else (low, middle)
        return low

    def survival(self, tokens: float) -> float:
        """Share of responses that are longer than so many tokens."""
        return 0.0 if tokens >= self.budget else math.exp(-tokens / self.scale)

    @property
    def mean_square(self) -> float:
        """Mean of the squared length of prompt and response together, which attention costs."""
        budget, scale = self.budget, self.scale
        squared = float(budget**2)
        if math.isfinite(scale):
            squared = 2 * scale**2 * (1 - math.exp(-budget / scale) * (1 + budget / scale))
        return self.prompt**2 + 2 * self.prompt * self.response + squared
