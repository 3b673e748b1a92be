"""Checks that several sections share; each raises `ConfigError` with the field, its value and what it must be."""

from collections.abc import Callable, Sequence
from typing import Any

from megatron_r1z.errors import ConfigError

MIN_TEMPERATURE = 0.01
"""The smallest above 0 that vLLM samples at."""


def check_positive(record: Any, *names: str) -> None:
    """Of the fields `names`."""
    check_range(record, names, "above 0", lambda value: value > 0)


def check_not_negative(record: Any, *names: str) -> None:
    """Of the fields `names`; null passes."""
    check_range(record, names, "at least 0", lambda value: value is None or value >= 0)


def check_top_p(section: str, top_p: float) -> None:
    """A share that is kept."""
    if not 0 < top_p <= 1:
        raise ConfigError(f"{section}.top_p is {top_p}; it must be above 0 and at most 1.")


def check_temperature(section: str, temperature: float) -> None:
    """Refuse what vLLM would raise to its smallest (`SamplingParams`), so that its log-probs would be of another distribution than ours."""
    if temperature < MIN_TEMPERATURE:
        raise ConfigError(
            f"{section} has temperature {temperature}, which vLLM would raise to {MIN_TEMPERATURE} on its own; use at least that."
        )


def check_sampling(section: str, top_p: float, samples: int, temperatures: Sequence[float]) -> None:
    """How held-out questions are asked: greedily, or with a temperature."""
    check_top_p(section, top_p)
    for temperature in temperatures:
        if not temperature >= 0:  # so that nan does not pass
            raise ConfigError(f"{section} has temperature {temperature}; it must be at least 0.")
        if temperature:
            check_temperature(section, temperature)
    if samples > 1 and 0 in temperatures:
        raise ConfigError(
            f"{section}.samples is {samples} at temperature 0, where all responses to a question are the same; set a temperature."
        )


def check_range(record: Any, names: Sequence[str], wanted: str, holds: Callable[[Any], bool]) -> None:
    """That `holds` is true of each of the fields `names`, which must be `wanted`."""
    for name in names:
        if not holds(getattr(record, name)):  # so that nan does not pass
            section = type(record).__name__.removesuffix("Config").lower()
            raise ConfigError(f"{section}.{name} is {getattr(record, name)}; it must be {wanted}.")
