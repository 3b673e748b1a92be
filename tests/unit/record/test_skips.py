"""Which samples a sentence names, and when a run stops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1z.errors import TrainingError
from megatron_r1z.record.skips import Skips
from megatron_r1z.types import Sample, UpdateStats

TAKEN = UpdateStats(
    loss=0.1,
    grad_norm=1.0,
    learning_rate=1e-6,
    clip_fraction=0.0,
    clipped_high=0.0,
    clipped_low=0.0,
    dual_clipped=0.0,
    tis_weight=1.0,
    tis_truncated=0.0,
    ratio_mean=1.0,
    ratio_max=1.0,
    entropy=0.5,
    sampler_kl=0.0,
    reference_kl=0.0,
    mismatch_mean=0.0,
    mismatch_p999=0.0,
    mismatch_max=0.0,
    num_tokens=8,
    skipped=False,
)
SAMPLES = [Sample(f"{index}/0", (index, 7, 8), 1, 0.5 if index else 0.0, 1.0, (), 0) for index in range(12)]
NO_GRADIENT = replace(TAKEN, grad_norm=math.inf, skipped=True)
NO_LOSS = replace(NO_GRADIENT, loss=math.nan, non_finite=("9/0", "3/0"))


def test_a_step_that_was_taken_has_nothing_to_tell() -> None:
    skips = Skips(limit=1)
    assert skips.count(1, TAKEN, SAMPLES) is None
    skips.check("iteration 1")


def test_samples_whose_loss_was_not_finite_are_named() -> None:
    assert Skips(limit=3).count(14, NO_LOSS, SAMPLES) == (
        "warning: skipped optimizer step 14: the loss was not finite for 2 of 11 samples (3/0, 9/0); the weights stay as they are."
    )


def test_where_only_the_gradient_was_not_finite_the_first_of_all_samples_are_named() -> None:
    """But not the one without an advantage: it was in no forward pass."""
    assert Skips(limit=3).count(14, NO_GRADIENT, SAMPLES) == (
        "warning: skipped optimizer step 14: the gradient was not finite, over 11 samples "
        "(1/0, 2/0, 3/0, 4/0, 5/0, 6/0, 7/0, 8/0 and 3 more); the weights stay as they are."
    )


def test_the_run_stops_with_one_sentence() -> None:
    skips = Skips(limit=2)
    skips.count(1, NO_GRADIENT, SAMPLES)
    skips.check("iteration 1")
    skips.count(2, NO_LOSS, SAMPLES)
    with pytest.raises(TrainingError) as caught:
        skips.check("iteration 2")
    assert str(caught.value) == (
        "2 optimizer steps in a row were skipped, the last of them optimizer step 2: the loss was not finite for 2 of 11 samples "
        "(3/0, 9/0); no checkpoint was written, the newest is iteration 2: look at these samples, lower optimizer.lr, or raise "
        "optimizer.max_skipped_steps, before the run is started again."
    )
    with pytest.raises(TrainingError, match=r"\(3/0, 9/0\); no checkpoint was written, there is no checkpoint yet: look at these samples"):
        skips.check(None)


@given(skipped=st.lists(st.booleans(), max_size=20), limit=st.integers(1, 4))
def test_only_steps_in_a_row_count(skipped: list[bool], limit: int) -> None:
    skips = Skips(limit)
    for number, flag in enumerate(skipped):
        skips.count(number, NO_GRADIENT if flag else TAKEN, SAMPLES)
    assert skips.too_many == ("x" * limit in "".join("x" if flag else "." for flag in skipped))
