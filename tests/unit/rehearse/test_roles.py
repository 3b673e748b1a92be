"""A rehearsal as far as it goes without the libraries of a GPU: its roles, its report, and for what it was written."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import megatron_r1z
from megatron_r1z.errors import MissingExtraError, R1ZError, UsageError
from megatron_r1z.layout.topology import Topology
from megatron_r1z.rehearse import roles, versions
from megatron_r1z.rehearse.command import render
from megatron_r1z.rehearse.roles import MARK, Found, Phase, Task, policy_ranks, read_task, rehearse
from megatron_r1z.rehearse.said import EXPLAINED, unexplained
from megatron_r1z.rehearse.versions import WRITTEN_FOR, check_versions

GIB = 1 << 30
TASK = Task("run.yaml", ("a.b=1",), 3, "H100", 80 << 30, (9, 0), 8, 3000)


@given(tp=st.integers(1, 4), pp=st.integers(1, 9), dp=st.integers(1, 3))
def test_a_role_is_a_stage_of_its_own(tp: int, pp: int, dp: int) -> None:
    topology = Topology(tp * pp * dp, tp, pp)
    found = policy_ranks(topology)
    stages = [topology.coordinates(rank).pp_rank for rank in found.values()]
    assert len(found) == min(pp, 3)
    assert stages == sorted(set(stages))
    assert {0, pp - 1} <= set(stages)


def test_a_process_is_told_and_tells(capsys: pytest.CaptureFixture[str]) -> None:
    """A process as such, which plays nothing."""
    assert read_task(["program", json.dumps(TASK.__dict__)]) == TASK
    roles.say(Found("policy", 3, (Phase("weights", 1, 2, 0.5),)))
    assert capsys.readouterr().out.startswith(MARK)


@pytest.mark.parametrize(
    ("program", "kind", "words"),
    [
        ("print('warm up'); print(MARK + json.dumps({'refusal': 'no such thing.'}))", UsageError, "no such thing."),
        (
            "print(MARK + json.dumps({'limit': 'no shape.'}))",
            R1ZError,
            "nothing was refused so far, but a rehearsal of rank 3 cannot go on: no shape.",
        ),
        ("sys.exit('it broke')", R1ZError, "the rehearsal of rank 3 ended with status 1: it broke"),
    ],
)
def test_what_a_process_says_becomes_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, kind: type[R1ZError], words: str
) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!{sys.executable}\nimport json, sys\nMARK = {MARK!r}\n{program}\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    with pytest.raises(kind) as caught:
        rehearse("policy_role", TASK)
    assert str(caught.value) == words


def test_the_report_has_the_plan_beside_what_was_alive() -> None:
    phases = (Phase("weights", 2 * GIB, 2 * GIB, 1.0), Phase("update 2", 3 * GIB, 5 * GIB, 2.0, planned=6 * GIB))
    text = "\n".join(render(Found("policy", 0, phases, 7, attention=("fused",), warnings=("something slow", "GPTModel IS DEPRECATED."))))
    assert re.search(r"update 2 +3\.00 +5\.00 +6\.00", text)
    assert "attention: fused" in text
    assert "WARNING: something slow" in text
    assert "DEPRECATED" not in text


def test_what_is_explained_is_not_told() -> None:
    assert unexplained(["Cannot quantize input tensor. Performing all-gather in high precision."]) != []
    assert all(re.compile(pattern) and reason for pattern, reason in EXPLAINED.items())


def test_another_release_of_a_library_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: dict[str, Any] = {name: f"{release}.1" for name, release in WRITTEN_FOR.items()}
    monkeypatch.setattr(versions, "version", installed.__getitem__)
    check_versions(*WRITTEN_FOR)
    installed["vllm"] = "0.34.0"
    with pytest.raises(MissingExtraError, match=r"written for vllm 0\.33, and 0\.34\.0 is installed; run `make gpu-env`"):
        check_versions(*WRITTEN_FOR)


def test_the_releases_are_those_of_the_extra() -> None:
    text = (Path(megatron_r1z.__file__).parents[1] / "setup.py").read_text(encoding="utf-8")
    pinned = dict(re.findall(r'"(vllm|megatron-core|transformer-engine)==(\d+\.\d+)\.\*"', text))
    assert pinned == {name: release for name, release in WRITTEN_FOR.items() if name != "torch"}
