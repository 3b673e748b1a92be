"""Comparisons of answers with references in killable workers, each pair at most once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial

from megatron_r1z.config import GradingMode
from megatron_r1z.errors import R1ZError
from megatron_r1z.grading.equality import Equality
from megatron_r1z.grading.modes import MODES
from megatron_r1z.grading.pool import Outcome, OutcomeKind, WorkerPool
from megatron_r1z.host.rank import StopFlag
from megatron_r1z.types import VerdictKind

CACHE_SIZE = 100_000
"""Pairs whose outcome is kept; most answers have fewer than ten characters."""

Pair = tuple[str, str]
"""Answer and reference."""

_VERDICTS = {Equality.EQUAL: VerdictKind.CORRECT, Equality.DIFFERENT: VerdictKind.WRONG, Equality.UNPARSABLE: VerdictKind.UNPARSABLE}


class Comparer:
    """Compares in one mode; workers start when there is something that needs one."""

    def __init__(self, mode: GradingMode, workers: int, timeout_s: float, stop_flag: StopFlag | None = None) -> None:
        self._mode = MODES[mode]
        self._pool: WorkerPool[Pair, Equality] = WorkerPool(partial(_set_up, mode), workers, timeout_s, stop_flag=stop_flag)
        self._cache: OrderedDict[Pair, VerdictKind] = OrderedDict()

    def judge(self, pairs: Iterable[Pair]) -> dict[Pair, VerdictKind]:
        """The verdict on each different pair: plain to see, remembered, or compared in a worker.

        One of `CORRECT`, `WRONG`, `UNPARSABLE`, `TIMEOUT` and `ERROR`; no text makes it hang or raise.

        Raises:
            R1ZError: the worker processes do not start.
            Interrupted: the flag was set meanwhile.
        """
        verdicts: dict[Pair, VerdictKind] = {}
        remaining: list[Pair] = []
        for pair in dict.fromkeys(pairs):
            settled = self._mode.settle(*pair)
            known = _VERDICTS[settled] if settled is not None else self._recall(pair)
            if known is None:
                remaining.append(pair)
            else:
                verdicts[pair] = known
        for pair, outcome in zip(remaining, self._pool.run(remaining), strict=True):
            verdicts[pair] = self._note(pair, outcome)
        return verdicts

    def self_test(self) -> None:
        """Compare known pairs in the worker processes.

        Raises:
            R1ZError: an outcome is not the known one; training on such rewards would be worthless.
        """
        pairs = [(answer, reference) for answer, reference, _ in self._mode.self_test]
        for (answer, reference, expected), outcome in zip(self._mode.self_test, self._pool.run(pairs), strict=True):
            if outcome.kind is not OutcomeKind.DONE or (outcome.result is Equality.EQUAL) != expected:
                found = outcome.message or str(outcome.result)
                raise R1ZError(f"the grader fails its self-test on '{answer}' against '{reference}' ({found}); check sympy.")

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()

    def _recall(self, pair: Pair) -> VerdictKind | None:
        if pair in self._cache:
            self._cache.move_to_end(pair)
        return self._cache.get(pair)

    def _note(self, pair: Pair, outcome: Outcome[Equality]) -> VerdictKind:
        """Remember an outcome; time-outs and errors are not remembered, since they may be the machine's fault."""
        if outcome.kind is OutcomeKind.DONE and outcome.result is not None:
            self._cache[pair] = _VERDICTS[outcome.result]
            if len(self._cache) > CACHE_SIZE:
                self._cache.popitem(last=False)
            return _VERDICTS[outcome.result]
        return VerdictKind.TIMEOUT if outcome.kind is OutcomeKind.TIMEOUT else VerdictKind.ERROR


def _set_up(mode: GradingMode) -> Callable[[Pair], Equality]:
    """Make a worker ready, before the clock of its first comparison starts."""
    MODES[mode].warm_up()
    compare = MODES[mode].compare
    return lambda pair: compare(*pair)
