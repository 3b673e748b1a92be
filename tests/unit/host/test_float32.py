"""Who multiplies float32 numbers in float32, and who says so."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_r1z.host.float32 import VARIABLES, keep_float32, may_round_float32


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.usefixtures("unset")
@pytest.mark.parametrize(("policy", "engine", "is_set"), [("fp32", "fp32", True), ("bf16", "fp32", True), ("bf16", "bf16", False)])
def test_libraries_are_told_where_a_side_is_in_float32(policy: str, engine: str, is_set: bool) -> None:
    keep_float32(policy, engine)
    assert {name: os.environ.get(name) for name in VARIABLES} == (VARIABLES if is_set else dict.fromkeys(VARIABLES))


def test_what_the_user_has_set_stays_and_is_told(unset: pytest.MonkeyPatch) -> None:
    unset.setattr(torch.cuda, "is_available", lambda: True)
    unset.setenv("TRITON_F32_DEFAULT", "tf32x3")
    keep_float32("fp32", "fp32")
    assert os.environ["TRITON_F32_DEFAULT"] == "tf32x3"
    assert may_round_float32()
    unset.setenv("TRITON_F32_DEFAULT", "ieee")
    assert not may_round_float32()


@pytest.mark.usefixtures("unset")
def test_a_cpu_rounds_nothing() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert not may_round_float32()
