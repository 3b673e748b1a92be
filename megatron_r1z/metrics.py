"""The figures of a run: what they are called, how they follow from the stages' records, and where they are written.

Names are `stage/quantity_unit`; `docs/metrics.md` lists them.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

from megatron_r1z.result_files import replace_text
from megatron_r1z.types import FinishReason, GradedGroup, RefitReceipt, TokenFigures, UpdateStats, ValueStats, VerdictKind

Metrics = dict[str, float]
MAX_UNGRADED_SHARE = 0.02
"""Of the responses of an iteration; hostile answers are rarer, so beyond it the grader or the machine has a problem."""


def rollout_metrics(graded: Sequence[GradedGroup], num_rounds: int = 1) -> Metrics:
    """Rewards, lengths and verdicts of one iteration, over all groups of its rounds of sampling."""
    pairs = [pair for item in graded for pair in zip(item.group.responses, item.verdicts, strict=True)]
    lengths = [response.length for response, _ in pairs]
    right = [response.length for response, verdict in pairs if verdict.kind is VerdictKind.CORRECT]
    wrong = [response.length for response, verdict in pairs if verdict.kind is not VerdictKind.CORRECT]
    kinds = Counter(verdict.kind for _, verdict in pairs)
    metrics = {
        "rollout/reward_mean": fmean(verdict.reward for _, verdict in pairs),
        "rollout/length_mean_tokens": fmean(lengths),
        "rollout/length_max_tokens": float(max(lengths)),
        "rollout/truncated_share": sum(response.finish_reason is FinishReason.LENGTH for response, _ in pairs) / len(pairs),
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


def grading_warning(metrics: Metrics) -> str | None:
    """A sentence where more than `MAX_UNGRADED_SHARE` of the responses were not judged but given up, else None."""
    given_up = {kind: metrics[f"grading/{kind.value}_share"] for kind in (VerdictKind.TIMEOUT, VerdictKind.ERROR)}
    if sum(given_up.values()) <= MAX_UNGRADED_SHARE:
        return None
    shares = ", ".join(f"{kind.value} {share:.1%}" for kind, share in given_up.items())
    advice = {
        VerdictKind.TIMEOUT: "raise grading.timeout_s",
        VerdictKind.ERROR: "see the first error of the reward function above, or whether the grader's workers run out of memory",
    }
    what = "; ".join(advice[kind] for kind, share in given_up.items() if share)
    return f"warning: {shares} of the responses, which have reward 0 whatever they hold; {what} (docs/grading.md)."


def update_metrics(stats: UpdateStats) -> Metrics:
    """One optimizer step."""
    return {
        "update/loss": stats.loss,
        "update/grad_norm": stats.grad_norm,
        "update/learning_rate": stats.learning_rate,
        "update/clip_fraction": stats.clip_fraction,
        "update/clipped_high_share": stats.clipped_high,
        "update/clipped_low_share": stats.clipped_low,
        "update/dual_clipped_share": stats.dual_clipped,
        "update/tis_weight_mean": stats.tis_weight,
        "update/tis_truncated_share": stats.tis_truncated,
        "update/ratio_mean": stats.ratio_mean,
        "update/ratio_max": stats.ratio_max,
        "update/entropy_nats": stats.entropy,
        "update/sampler_kl_nats": stats.sampler_kl,
        "update/reference_kl_nats": stats.reference_kl,
        "update/mismatch_mean_nats": stats.mismatch_mean,
        "update/mismatch_p999_nats": stats.mismatch_p999,
        "update/mismatch_max_nats": stats.mismatch_max,
        "update/trained_tokens": float(stats.num_tokens),
        "update/skipped_steps": float(stats.skipped),
    }


def critic_metrics(stats: ValueStats) -> Metrics:
    """One optimizer step of the critic."""
    return {
        "critic/loss": stats.loss,
        "critic/grad_norm": stats.grad_norm,
        "critic/learning_rate": stats.learning_rate,
        "critic/clip_fraction": stats.clip_fraction,
        "critic/value_mean": stats.value_mean,
        "critic/return_mean": stats.return_mean,
        "critic/explained_variance": stats.explained_variance,
        "critic/skipped_steps": float(stats.skipped),
    }


def refit_metrics(receipt: RefitReceipt) -> Metrics:
    """One hand-over of weights."""
    return {"refit/bytes": float(receipt.nbytes), "refit/seconds_s": receipt.seconds}


def combine_steps(rows: Sequence[Metrics]) -> Metrics:
    """Each figure over the optimizer steps of an iteration: maxima stay maxima, counts add up, the rest is a mean."""
    return {name: _COMBINE.get(name, fmean)([row[name] for row in rows]) for name in rows[0]}


_COMBINE: dict[str, Callable[[list[float]], float]] = {
    "update/ratio_max": max,
    "update/mismatch_max_nats": max,
    "update/trained_tokens": sum,
    "update/skipped_steps": sum,
    "critic/skipped_steps": sum,
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
        kept = [line for line in (path.read_text().splitlines() if path.exists() else []) if _is_finished(line, finished)]
        replace_text(path, "".join(f"{line}\n" for line in kept))
        self._rows = path.open("a")
        self._unit = next(iter(finished))
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=finished[self._unit] + 1)

    def write(self, unit: str, number: int, metrics: Metrics) -> None:
        """Figures of iteration or step `number`; `unit` is `iteration` or `step`."""
        self._rows.write(json.dumps({unit: number, "time": round(time.time(), 3), **metrics}) + "\n")
        self._rows.flush()
        for name, value in metrics.items() if unit == self._unit else ():
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


def _is_finished(line: str, finished: Mapping[str, int]) -> bool:
    try:
        row = json.loads(line)
    except ValueError:  # cut off by the end of the earlier process
        return False
    return all(row[unit] <= count for unit, count in finished.items() if unit in row)


def _width(name: str) -> int:
    return max(len(name), 7)
