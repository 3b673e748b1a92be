"""Reward functions of the user's own: a Python file and a name in it, tried out before a run and called in killable workers."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import logging
import math
import reprlib
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_r1z.config import GradingConfig
from megatron_r1z.errors import DataError
from megatron_r1z.grading.pool import Outcome, OutcomeKind, WorkerPool
from megatron_r1z.host.rank import StopFlag

RewardFunction = Callable[[str, tuple[str, ...], str], Any]
"""`(response, answers, finish_reason)` to any finite number; `finish_reason` is `stop` or `length` (`abort`: the engine gave up)."""

Task = tuple[str, tuple[str, ...], str]
"""The arguments of one call."""

_log = logging.getLogger(__name__)


class FunctionPool:
    """One reward function in workers of its own."""

    def __init__(self, function: str, workers: int, timeout_s: float, stop_flag: StopFlag | None = None) -> None:
        self.function = function
        self._timeout_s = timeout_s
        # It may load a model of its own, so its memory is its own affair.
        self._pool: WorkerPool[Task, float] = WorkerPool(
            partial(_set_up, function), workers, timeout_s, memory_bytes=None, stop_flag=stop_flag
        )

    def rate(self, tasks: Sequence[Task]) -> list[Outcome[float]]:
        """What the function returns for each task; a call that raises, returns no finite number or takes too long is not `DONE`.

        Raises:
            UsageError: the file cannot be loaded, or the function cannot be called.
            R1ZError: the worker processes do not start.
            Interrupted: the flag was set meanwhile.
        """
        outcomes = self._pool.run(tasks)
        messages = [outcome.message for outcome in outcomes if outcome.kind is OutcomeKind.ERROR]
        if messages:
            _log.warning("%s failed on %d of %d responses; the first: %s", self.function, len(messages), len(tasks), messages[0])
        num_late = sum(outcome.kind is OutcomeKind.TIMEOUT for outcome in outcomes)
        if num_late:
            limit = f"grading.timeout_s ({self._timeout_s:g} s)"
            _log.warning("%s took longer than %s on %d of %d responses", self.function, limit, num_late, len(tasks))
        return outcomes

    def try_out(self, answers: tuple[str, ...]) -> None:
        """Call the function with responses made up for a question with these answers, until one gets a number.

        Raises:
            DataError: none does, or the first takes too long: no response of a run would fare better.
        """
        first, *others = _make_up(answers)
        outcomes = self._pool.run([first])
        if outcomes[0].kind is OutcomeKind.TIMEOUT:
            raise DataError(
                f"reward function {self.function} takes longer than grading.timeout_s ({self._timeout_s:g} s) for a response of "
                f"{len(first[0])} characters; raise it, or load what the function needs when the file is loaded."
            )
        if outcomes[0].kind is OutcomeKind.DONE:
            return
        outcomes += self._pool.run(others)
        if all(outcome.kind is not OutcomeKind.DONE for outcome in outcomes):
            raise DataError(
                f"reward function {self.function} fails on all of {len(outcomes)} responses made up for a question with the answer "
                f"{reprlib.repr(answers[0])}, the first time with {outcomes[0].message.rstrip('.')}; correct it (docs/grading.md)."
            )

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()


def check_reward_function(function: str, timeout_s: float = GradingConfig.timeout_s, answers: tuple[str, ...] = ("5",)) -> None:
    """Load `path.py:name` and call it in a worker, so that a mistake shows before a run starts; `answers` are those of some question.

    Raises:
        DataError: no such file or name, the file fails to load, the name is nothing that can be called with the three arguments or it is
            asynchronous, or calls give no number.
    """
    pool = FunctionPool(function, 1, timeout_s)
    try:
        pool.try_out(answers)
    finally:
        pool.close()


def _make_up(answers: tuple[str, ...]) -> list[Task]:
    """Responses in every form that a reward may look for: a right answer in a box and in tags, alone, nothing, and one that is cut off."""
    right = answers[0]
    texts = (f" So.</think> <answer>\\boxed{{{right}}}</answer>", f"It is \\boxed{{{right}}}.", right, "")
    return [*((text, answers, "stop") for text in texts), ("It is", answers, "length")]


def to_number(value: object) -> float:
    """The reward that a function returned: a finite number, of Python, numpy or torch, or a tensor or array that holds one.

    >>> to_number(True), to_number(Decimal("0.5"))
    (1.0, 0.5)

    Raises:
        ValueError: anything else.
    """
    item = getattr(value, "item", None)
    number = value
    try:
        if callable(item) and not isinstance(value, type):
            number = item()
        if isinstance(number, Real | Decimal) and math.isfinite(number):
            return float(number)
    except (ValueError, TypeError, RuntimeError, OverflowError):  # several numbers, one on no device, one beyond float64
        pass
    if inspect.isawaitable(value) or inspect.isgenerator(value) or inspect.isasyncgen(value):
        if inspect.iscoroutine(value):
            value.close()  # or Python warns that it was never awaited
        raise ValueError(f"the function returned a {type(value).__name__} in the place of a number; it must not be asynchronous or yield")
    raise ValueError(f"the reward is {reprlib.repr(value)}; it must be a finite number")


def _set_up(function: str) -> Callable[[Task], float]:
    """Make a worker ready for the function."""
    loaded = _load(function)
    return lambda task: to_number(loaded(*task))


def _load(function: str) -> RewardFunction:
    """The function of a worker that has no other: its folder stays importable for what it imports when it is called."""
    path, _, name = function.rpartition(":")
    if not path or not name:
        raise DataError(f"the reward function is given as '{function}'; write it as path.py:name.")
    if not Path(path).is_file():
        raise DataError(f"reward function {function}: there is no file {path}.")
    module = _load_module(Path(path).resolve(), function)
    return _checked(getattr(module, name, None), path, name)


def _load_module(path: Path, function: str) -> ModuleType:
    # A name of its own: the same stem may be that of a library or of another reward file.
    name = f"r1z_reward_{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise DataError(f"reward function {function}: {path} is not a Python file; its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    sys.meta_path.insert(0, _Neighbours(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise DataError(f"reward function {function}: {path} fails to load: {type(error).__name__}: {reason}.") from error
    return module


class _Neighbours(MetaPathFinder):
    """Finds what stands in a folder as Python does beside a script, except that nothing there hides the standard library.

    A folder without `__init__.py` (a namespace package) is found only where no library has its name: it may hold data.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if path is not None or fullname in sys.stdlib_module_names:
            return None
        spec = PathFinder.find_spec(fullname, [self._folder], target)
        is_namespace = spec is not None and spec.loader is None
        return None if is_namespace and PathFinder.find_spec(fullname, None, target) is not None else spec


def _checked(candidate: object, path: str, name: str) -> RewardFunction:
    if candidate is None:
        raise DataError(f"reward function: {path} defines no '{name}'.")
    if inspect.isclass(candidate):
        raise DataError(f"reward function: '{name}' in {path} is a class; name an object of it, or a function.")
    if not callable(candidate):
        raise DataError(f"reward function: '{name}' in {path} is not a function.")
    called = _innermost(candidate)
    if inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called):
        raise DataError(
            f"reward function: '{name}' in {path} is asynchronous; write it with def, and asyncio.run inside where it must wait."
        )
    if inspect.isgeneratorfunction(called):
        raise DataError(f"reward function: '{name}' in {path} yields; it must return its one number.")
    try:
        signature = inspect.signature(candidate)
    except ValueError as error:
        raise DataError(f"reward function: Python cannot tell what arguments '{name}' in {path} takes; wrap it in a def.") from error
    try:
        signature.bind("response", ("answer",), "stop")
    except TypeError as error:
        raise DataError(f"reward function: '{name}' in {path} must take (response, answers, finish_reason): {error}.") from error
    return candidate


def _innermost(candidate: Callable[..., Any]) -> Callable[..., Any]:
    """The function that a call runs, behind partials and the `__call__` of an object."""
    while isinstance(candidate, partial):
        candidate = candidate.func
    return candidate if inspect.isroutine(candidate) else type(candidate).__call__
