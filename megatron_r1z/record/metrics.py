"""The figures of a run: what they are called, how they follow from the stages' records, and where they are written.

Names are `stage/quantity_unit`; `docs/metrics.md` lists them.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from megatron_r1z.record.result_files import keep_rows, to_json
from megatron_r1z.types import FinishReason, GradedGroup, RefitReceipt, TokenFigures, UpdateStats, ValueStats, VerdictKind

Metrics = dict[str, float]
"""Figures by name. One that is not finite is written as null; one that is over nothing is left out."""
Stats = TypeVar("Stats", UpdateStats, ValueStats)
EQUAL_RETURNS = 1e-12
"""Returns whose variance is below this share of their mean square are equal: they come in float32, which has seven digits."""


def rollout_metrics(graded: Sequence[GradedGroup], num_rounds: int = 1) -> Metrics:
    """Rewards, lengths and verdicts of one iteration, over all groups of its rounds of sampling."""
    pairs = [pair for item in graded for pair in zip(item.group.responses, item.verdicts, strict=True)]
    lengths = [response.length for response, _ in pairs]
    judged = [pair for pair, is_judged in zip(pairs, (flag for item in graded for flag in item.is_judged), strict=True) if is_judged]
    right = [response.length for response, verdict in judged if verdict.kind is VerdictKind.CORRECT]
    wrong = [response.length for response, verdict in judged if verdict.kind is not VerdictKind.CORRECT]
    kinds = Counter(verdict.kind for _, verdict in pairs)
    metrics = {
        "rollout/reward_mean": _mean([verdict.reward for _, verdict in judged]),
        "rollout/length_mean_tokens": fmean(lengths),
        "rollout/length_max_tokens": float(max(lengths)),
        "rollout/truncated_share": sum(response.finish_reason is FinishReason.LENGTH for response, _ in pairs) / len(pairs),
        "rollout/unjudged_share": (len(pairs) - len(judged)) / len(pairs),
        "rollout/mixed_groups_share": sum(item.is_mixed for item in graded) / len(graded),
        "rollout/sampling_rounds": float(num_rounds),
    }
    if right:
        metrics["rollout/length_right_tokens"] = fmean(right)
    if wrong:
        metrics["rollout/length_wrong_tokens"] = fmean(wrong)
    metrics |= {f"grading/{kind.value}_share": kinds[kind] / len(pairs) for kind in VerdictKind}
    extras = [value for _, verdict in pairs for value in verdict.extra]
    return metrics | {
        f"grading/extra_{name}_mean": fmean(value for other, value in extras if other == name)
        for name in dict.fromkeys(n for n, _ in extras)
    }


def penalty_metrics(penalties: TokenFigures | None) -> Metrics:
    """Divergence from the reference model where rewards have it; nothing elsewhere."""
    values = [value for of_sample in (penalties or {}).values() for value in of_sample]
    return {"rollout/reference_kl_nats": fmean(values)} if values else {}


def update_metrics(steps: Sequence[UpdateStats]) -> Metrics:
    """The figures of one optimizer step, or of the steps of an iteration together; see `_taken` for which of them.

    Figures of tokens are those of all tokens of the steps, but for the percentile: that is the largest of the steps', which 99.9 % of all
    tokens do not exceed either. Loss, gradient norm and learning rate are means over steps. Without tokens there are no figures of tokens.
    """
    taken = _taken(steps)
    trained = [item for item in taken if item.num_tokens]
    metrics = {
        "update/loss": _mean([item.loss for item in taken]),
        "update/grad_norm": _mean([item.grad_norm for item in taken]),
        "update/learning_rate": _mean([item.learning_rate for item in taken]),
        "update/trained_tokens": float(sum(item.num_tokens for item in steps)),
        "update/skipped_steps": float(sum(item.skipped for item in steps)),
    }
    if not trained:
        return metrics
    metrics |= {f"update/{name}": _token_mean(trained, field) for name, field in _TOKEN_MEANS.items()}
    return metrics | {f"update/{name}": _largest([getattr(item, field) for item in trained]) for name, field in _LARGEST.items()}


_TOKEN_MEANS = {
    "clip_fraction": "clip_fraction",
    "clipped_high_share": "clipped_high",
    "clipped_low_share": "clipped_low",
    "dual_clipped_share": "dual_clipped",
    "tis_weight_mean": "tis_weight",
    "tis_truncated_share": "tis_truncated",
    "ratio_mean": "ratio_mean",
    "entropy_nats": "entropy",
    "sampler_kl_nats": "sampler_kl",
    "reference_kl_nats": "reference_kl",
    "mismatch_mean_nats": "mismatch_mean",
}
_LARGEST = {"ratio_max": "ratio_max", "mismatch_p999_nats": "mismatch_p999", "mismatch_max_nats": "mismatch_max"}


def critic_metrics(steps: Sequence[ValueStats]) -> Metrics:
    """The same of the critic."""
    taken = _taken(steps)
    trained = [item for item in taken if item.num_tokens]
    metrics = {
        "critic/loss": _mean([item.loss for item in taken]),
        "critic/grad_norm": _mean([item.grad_norm for item in taken]),
        "critic/learning_rate": _mean([item.learning_rate for item in taken]),
        "critic/skipped_steps": float(sum(item.skipped for item in steps)),
    }
    if not trained:
        return metrics
    names = ("clip_fraction", "value_mean", "return_mean")
    return metrics | {f"critic/{name}": _token_mean(trained, name) for name in names} | {"critic/explained_variance": _explained(trained)}


def _explained(steps: Sequence[ValueStats]) -> float:
    """1 less the variance of return minus value over that of the return, over all tokens; 0 where returns are equal but for rounding."""
    values, returns, squares, errors = (_token_mean(steps, name) for name in ("value_mean", "return_mean", "return_square", "error_square"))
    spread = squares - returns**2
    return 0.0 if spread <= EQUAL_RETURNS * squares else 1 - (errors - (returns - values) ** 2) / spread


def _taken(steps: Sequence[Stats]) -> Sequence[Stats]:
    """The steps that an iteration's figures are over: those that were taken, or all where all were skipped."""
    return [item for item in steps if not item.skipped] or steps


def _token_mean(steps: Sequence[UpdateStats] | Sequence[ValueStats], field: str) -> float:
    return _mean([getattr(item, field) for item in steps], [item.num_tokens for item in steps])


def _mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """Of equal values that value; nan of nothing. Unlike those of `statistics` it takes what is not finite."""
    if not values or len(set(values)) == 1:
        return values[0] if values else math.nan
    weights = weights or [1.0] * len(values)
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def _largest(values: Sequence[float]) -> float:
    """nan where there is one."""
    return max(values, key=lambda value: (math.isnan(value), value))


def refit_metrics(receipt: RefitReceipt) -> Metrics:
    """One hand-over of weights."""
    return {"refit/bytes": float(receipt.nbytes), "refit/seconds_s": receipt.seconds}


def step_metrics(stats: Sequence[UpdateStats], critic_stats: Sequence[ValueStats]) -> Metrics:
    """The figures of optimizer steps together, of policy and, where there is one, critic."""
    return update_metrics(stats) | (critic_metrics(critic_stats) if critic_stats else {})


def table_cells(iteration: int, metrics: Metrics) -> dict[str, str]:
    """What the row of an iteration in the table on the terminal shows."""

    def show(name: str, form: str, unit: str = "") -> str:
        return format(metrics[name], form) + unit if name in metrics else "-"

    return {
        "iteration": str(iteration),
        "reward": show("rollout/reward_mean", ".3f"),
        "length": show("rollout/length_mean_tokens", ".1f"),
        "right": show("rollout/length_right_tokens", ".1f"),
        "wrong": show("rollout/length_wrong_tokens", ".1f"),
        "cut": show("rollout/truncated_share", ".1%"),
        "loss": show("update/loss", ".5f"),
        "gradient": show("update/grad_norm", ".4f"),
        "mismatch": show("update/mismatch_max_nats", ".1e"),
        "rollout": show("time/rollout_s", ".2f", "s"),
        "update": show("time/update_s", ".2f", "s"),
        "refit": show("refit/seconds_s", ".3f", "s"),
    }


class Console:
    """Tells a person what is going on."""

    def __init__(self) -> None:
        self._columns: tuple[str, ...] = ()
        self._live = sys.stdout.isatty()

    def say(self, line: str) -> None:
        """One line for the person who watches."""
        self._clear()
        print(line, flush=True)

    def phase(self, label: str) -> None:
        """What the run is doing now, on a terminal: one live line."""
        if self._live:
            self._clear()
            print(f"  {label} ...", end="", flush=True)

    def row(self, cells: Mapping[str, str]) -> None:
        """A row of the table; the header comes first and again when the columns change."""
        if tuple(cells) != self._columns:
            self._columns = tuple(cells)
            self.say("  ".join(f"{name:>{_width(name)}}" for name in cells))
        self.say("  ".join(f"{text:>{_width(name)}}" for name, text in cells.items()))

    def close(self) -> None:
        """End the live line."""
        self._clear()

    def _clear(self) -> None:
        if self._live:
            print("\r\x1b[2K", end="")


class RunLog(Console):
    """The console of a run that also writes figures to `metrics.jsonl` and tensorboard; rank 0 has one, others `SilentLog`."""

    def __init__(self, folder: Path, finished: Mapping[str, int]) -> None:
        """Open the files of a run that goes on after `finished`: the last finished number of each unit, the main one first.

        What an earlier process logged beyond that is dropped, since it will happen again. Tensorboard shows the main unit.
        """
        from torch.utils.tensorboard import SummaryWriter

        super().__init__()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        keep_rows(path, lambda row: _is_finished(row, finished))
        self._rows = path.open("a")
        self._unit = next(iter(finished))
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=finished[self._unit] + 1)

    def write(self, unit: str, number: int, metrics: Metrics) -> None:
        """Figures of iteration or step `number`; `unit` is `iteration` or `step`. Tensorboard has no point where one is not finite."""
        self._rows.write(to_json({unit: number, "time": round(time.time(), 3), **metrics}) + "\n")
        self._rows.flush()
        for name, value in metrics.items() if unit == self._unit else ():
            if math.isfinite(value):
                self._board.add_scalar(name, value, number)

    def close(self) -> None:
        """Flush everything."""
        super().close()
        self._rows.close()
        self._board.close()


class SilentLog(RunLog):
    """The log of every rank but 0."""

    def __init__(self) -> None:
        pass

    def say(self, line: str) -> None:
        """Nothing."""

    def phase(self, label: str) -> None:
        """Nothing."""

    def row(self, cells: Mapping[str, str]) -> None:
        """Nothing."""

    def write(self, unit: str, number: int, metrics: Metrics) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Stopwatch:
    """Seconds spent in each phase since the last `lap`."""

    def __init__(self, log: RunLog) -> None:
        self._log = log
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside as part of `name`, and show it as the live line."""
        self._log.phase(name)
        start = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def lap(self) -> Metrics:
        """`time/<phase>_s` since the last call."""
        metrics = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        self._seconds = {}
        return metrics


def _is_finished(row: Mapping[str, Any], finished: Mapping[str, int]) -> bool:
    return all(row[unit] <= count for unit, count in finished.items() if unit in row)


def _width(name: str) -> int:
    return max(len(name), 7)
