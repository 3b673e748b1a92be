"""What the comparison of engine and policy says, keeps and refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_r1z.certificate import LIMIT_NATS, LIMIT_NATS_TF32, Certificate
from megatron_r1z.errors import RefitError

EXACT = Certificate(5.8e-6, 1.8e-7, 5576, "fp32", "fp32", is_whole_distribution=True)
WRONG = dataclasses.replace(EXACT, max_nats=0.9)


def test_rounding_passes_and_is_kept(tmp_path: Path) -> None:
    EXACT.check()
    EXACT.save(tmp_path / "certificate.json")
    assert json.loads((tmp_path / "certificate.json").read_text())["max_nats"] == 5.8e-6
    assert "max difference 5.8e-06" in EXACT.sentence()


@pytest.mark.parametrize("difference", [LIMIT_NATS * 1.01, 0.9, float("nan")])
def test_other_weights_are_refused_with_the_numbers(difference: float) -> None:
    with pytest.raises(RefitError, match=r"in float32 \(limit 0\.0001\)"):
        dataclasses.replace(EXACT, max_nats=difference).check()


@pytest.mark.parametrize(
    "change", [{"engine": "bf16"}, {"policy": "bf16"}, {"is_whole_distribution": False}], ids=["engine", "policy", "top-p"]
)
def test_where_rounding_or_a_cut_distribution_may_differ_more_nothing_is_refused(change: dict[str, object]) -> None:
    dataclasses.replace(WRONG, **change).check()


def test_products_that_are_rounded_to_tf32_have_a_limit_of_their_own() -> None:
    rounded = dataclasses.replace(EXACT, max_nats=LIMIT_NATS_TF32, is_tf32=True)
    rounded.check()
    with pytest.raises(RefitError, match=r"in float32 \(limit 0\.05\)"):
        dataclasses.replace(rounded, max_nats=LIMIT_NATS_TF32 * 1.01).check()
