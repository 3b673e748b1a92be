"""Optimizer steps that were skipped because loss or gradient was not finite: which samples did it, and whether to go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_r1z.errors import TrainingError
from megatron_r1z.types import Sample, UpdateStats, ValueStats

MAX_NAMES = 8
"""Samples that a sentence names; of more it gives the number."""


@dataclass
class Skips:
    """Counts skipped steps in a row, equally on every rank since `UpdateStats` is; a resumed run starts at 0."""

    limit: int
    name: str = ""
    """Whose steps they are, where it is not the policy."""
    in_a_row: int = 0
    too_many: bool = False
    last: str = ""
    """The step that was skipped last, and why."""

    def count(self, step: int, stats: UpdateStats | ValueStats, samples: Sequence[Sample]) -> str | None:
        """Take note of optimizer step `step` over `samples`; returns a sentence for the log where it was skipped."""
        if not stats.skipped:
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        self.too_many |= self.in_a_row >= self.limit
        self.last = f"{self.name}optimizer step {step}: {_reason(stats, samples)}"
        return f"warning: skipped {self.last}; the weights stay as they are."

    def check(self, newest: str | None) -> None:
        """Stop a run that makes no progress; `newest` is the checkpoint that a new start would go on from, None where there is none.

        Raises:
            TrainingError: `limit` steps in a row were skipped.
        """
        if self.too_many:
            kept = "there is no checkpoint yet" if newest is None else f"the newest is {newest}"
            raise TrainingError(
                f"{self.limit} optimizer steps in a row were skipped, the last of them {self.last}; no checkpoint was written, {kept}: "
                "look at these samples, lower optimizer.lr, or raise optimizer.max_skipped_steps, before the run is started again."
            )


def _reason(stats: UpdateStats | ValueStats, samples: Sequence[Sample]) -> str:
    trained = [sample for sample in samples if sample.has_gradient]
    culprits = [sample.sample_id for sample in trained if sample.sample_id in stats.non_finite]
    if culprits:
        return f"the loss was not finite for {len(culprits)} of {len(trained)} samples ({_names(culprits)})"
    return f"the gradient was not finite, over {len(trained)} samples ({_names([sample.sample_id for sample in trained])})"


def _names(sample_ids: Sequence[str]) -> str:
    """The first few.

    >>> _names(["0/1", "0/3"])
    '0/1, 0/3'
    """
    more = f" and {len(sample_ids) - MAX_NAMES} more" if len(sample_ids) > MAX_NAMES else ""
    return ", ".join(sample_ids[:MAX_NAMES]) + more
