"""Reward functions of the user's own: a Python file and a name in it, checked before a run and called in killable workers."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from pathlib import Path

from megatron_r1z.errors import DataError
from megatron_r1z.grading.pool import Outcome, OutcomeKind, WorkerPool
from megatron_r1z.supervisor import StopFlag

RewardFunction = Callable[[str, tuple[str, ...], str], float]
"""`(response, answers, finish_reason)` to any finite number; `finish_reason` is `stop` or `length` (`abort`: the engine gave up)."""

Task = tuple[str, tuple[str, ...], str]
"""The arguments of one call."""

_log = logging.getLogger(__name__)


class FunctionPool:
    """One reward function in workers of its own."""

    def __init__(self, function: str, workers: int, timeout_s: float, stop_flag: StopFlag | None = None) -> None:
        self.function = function
        # It may load a model of its own, so its memory is its own affair.
        self._pool: WorkerPool[Task, float] = WorkerPool(
            partial(_set_up, function), workers, timeout_s, memory_bytes=None, stop_flag=stop_flag
        )

    def rate(self, tasks: Sequence[Task]) -> list[Outcome[float]]:
        """What the function returns for each task; a call that raises, returns no finite number or takes too long is not `DONE`.

        Raises:
            R1ZError: the worker processes do not start.
            Interrupted: the flag was set meanwhile.
        """
        outcomes = self._pool.run(tasks)
        messages = [outcome.message for outcome in outcomes if outcome.kind is OutcomeKind.ERROR]
        if messages:
            _log.warning("%s failed on %d of %d responses; the first: %s", self.function, len(messages), len(tasks), messages[0])
        return outcomes

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()


def check_reward_function(function: str) -> None:
    """Load `path.py:name` once, so that a mistake shows before a run starts.

    Raises:
        DataError: no such file or name, the file fails to load, the name is not callable or does not take the three arguments.
    """
    _load(function)


def _set_up(function: str) -> Callable[[Task], float]:
    """Make a worker ready for the function."""
    loaded = _load(function)

    def rate(task: Task) -> float:
        value: object = loaded(*task)
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"the reward is {value!r}; it must be a finite number")
        return float(value)

    return rate


def _load(function: str) -> RewardFunction:
    path, _, name = function.rpartition(":")
    if not path or not name:
        raise DataError(f"the reward function is given as '{function}'; write it as path.py:name.")
    if not Path(path).is_file():
        raise DataError(f"reward function {function}: there is no file {path}.")
    spec = importlib.util.spec_from_file_location("r1z_reward_function", path)
    if spec is None or spec.loader is None:
        raise DataError(f"reward function {function}: {path} is not a Python file; its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise DataError(f"reward function {function}: {path} fails to load: {type(error).__name__}: {error}.") from error
    return _checked(getattr(module, name, None), path, name)


def _checked(candidate: object, path: str, name: str) -> RewardFunction:
    if candidate is None:
        raise DataError(f"reward function: {path} defines no '{name}'.")
    if not callable(candidate):
        raise DataError(f"reward function: '{name}' in {path} is not a function.")
    try:
        inspect.signature(candidate).bind("response", ("answer",), "stop")
    except TypeError as error:
        raise DataError(f"reward function: '{name}' in {path} must take (response, answers, finish_reason): {error}.") from error
    return candidate
