"""What the comparison of engine and policy says, keeps and refuses."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from megatron_r1z.errors import RefitError
from megatron_r1z.record.certificate import LIMIT_NATS, LIMIT_NATS_TF32, MEAN_LIMIT_NATS, Certificate

EXACT = Certificate(
    **{"max_nats": 5.8e-6, "mean_nats": 1.8e-7, "num_tokens": 5576, "engine": "fp32", "policy": "fp32"},
    **{"temperature": 1.0, "top_p": 1.0, "top_k": -1, "has_digests": True},
)
FORMATS = [(engine, policy) for engine in ("fp32", "bf16", "fp8") for policy in ("fp32", "bf16", "fp8")]


def test_rounding_passes_and_is_kept(tmp_path: Path) -> None:
    EXACT.check()
    EXACT.save(tmp_path / "certificate.json")
    kept = json.loads((tmp_path / "certificate.json").read_text())
    assert (kept["max_nats"], kept["is_whole_distribution"]) == (5.8e-6, True)
    assert "at equal weights (engine fp32, policy fp32, 5576 tokens): max difference 5.8e-06" in EXACT.sentence()


@pytest.mark.parametrize("difference", [LIMIT_NATS * 1.01, 0.9])
def test_float32_is_held_to_its_largest_difference(difference: float) -> None:
    with pytest.raises(RefitError, match=r"in float32 \(limit 0\.0001\)"):
        dataclasses.replace(EXACT, max_nats=difference).check()


@pytest.mark.parametrize(("engine", "policy"), FORMATS)
def test_every_format_is_held_to_a_mean_above_its_rounding(engine: str, policy: str) -> None:
    """Measured: 0.025 in bf16, 0.125 where FP8 meets another format; 1.9 with a rotary embedding that one side ignores."""
    found = dataclasses.replace(EXACT, engine=engine, policy=policy, max_nats=0.0)
    rounding = 0.125 if "fp8" in (engine, policy) else 0.025 if "bf16" in (engine, policy) else 1e-5
    dataclasses.replace(found, mean_nats=rounding).check()
    dataclasses.replace(found, mean_nats=rounding / 0.6, temperature=0.6).check()
    with pytest.raises(RefitError, match=r"disagree by 1\.90e\+00 nats in the mean .*digests agree.*config\.json.*rotary"):
        dataclasses.replace(found, mean_nats=1.9).check()


def test_without_digests_the_weights_are_not_said_to_be_equal() -> None:
    with pytest.raises(RefitError, match="they should hold the same weights but compute"):
        dataclasses.replace(EXACT, mean_nats=1.9, has_digests=False).check()


@pytest.mark.parametrize(("engine", "policy"), FORMATS)
def test_what_is_not_finite_is_no_matter_of_a_limit(engine: str, policy: str) -> None:
    with pytest.raises(RefitError, match=r"not finite .*NaN"):
        dataclasses.replace(EXACT, engine=engine, policy=policy, max_nats=math.nan, mean_nats=math.nan).check()


def test_top_p_adds_no_more_than_the_share_that_it_leaves() -> None:
    """A token's log-prob rises by -log of the kept share, which is at least p."""
    found = dataclasses.replace(EXACT, engine="bf16", policy="bf16", top_p=0.5)
    dataclasses.replace(found, mean_nats=math.log(2), max_nats=math.log(2)).check()
    with pytest.raises(RefitError, match="in the mean"):
        dataclasses.replace(found, mean_nats=math.log(2) + MEAN_LIMIT_NATS["bf16"] + 0.01).check()


def test_top_k_leaves_an_unknown_share() -> None:
    dataclasses.replace(EXACT, top_k=5, max_nats=2.3, mean_nats=1.1).check()


@pytest.mark.parametrize(
    ("top_p", "top_k", "said"), [(0.9, -1, "rollout.top_p 0.9 leave"), (0.9, 5, "rollout.top_p 0.9 and rollout.top_k 5")]
)
def test_a_cut_distribution_is_not_said_to_differ(top_p: float, top_k: int, said: str) -> None:
    sentence = dataclasses.replace(EXACT, top_p=top_p, top_k=top_k).sentence()
    assert said in sentence
    assert "equal weights" not in sentence
    assert sentence.endswith("the cut alone makes them differ")


def test_products_that_are_rounded_to_tf32_have_a_limit_of_their_own() -> None:
    rounded = dataclasses.replace(EXACT, max_nats=LIMIT_NATS_TF32, is_tf32=True)
    rounded.check()
    with pytest.raises(RefitError, match=r"in float32 \(limit 0\.05\)"):
        dataclasses.replace(rounded, max_nats=LIMIT_NATS_TF32 * 1.01).check()
