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
from megatron_r1z.cost.cluster import load_cluster
from megatron_r1z.errors import ConfigError, MissingExtraError, R1ZError, UsageError
from megatron_r1z.layout.topology import Topology
from megatron_r1z.rehearse import command, roles, versions
from megatron_r1z.rehearse.command import PROVEN, UNSEEN, rehearse_run, render, summary
from megatron_r1z.rehearse.roles import MARK, Found, Phase, Task, policy_ranks, read_task, rehearse
from megatron_r1z.rehearse.said import EXPLAINED, unexplained
from megatron_r1z.rehearse.versions import WRITTEN_FOR, check_versions

GIB = 1 << 30
CONFIGS = Path(megatron_r1z.__file__).parents[1] / "configs"
FIGURES = {"tokens": 4096, "responses": 3000, "micro_batches": 8}
TASK = Task("run.yaml", ("a.b=1",), 3, "H100", 80 << 30, (9, 0), 8, 3000)


@given(tp=st.integers(1, 4), pp=st.integers(1, 9), dp=st.integers(1, 3))
def test_a_role_is_a_stage_of_its_own(tp: int, pp: int, dp: int) -> None:
    topology = Topology(tp * pp * dp, tp, pp)
    found = policy_ranks(topology)
    stages = [topology.coordinates(rank).pp_rank for rank in found.values()]
    assert len(found) == min(pp, 3)
    assert stages == sorted(set(stages))
    assert {0, pp - 1} <= set(stages)
    assert list(found)[-1] == ("policy, only stage" if pp == 1 else "policy, last stage")


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
        (
            "os.kill(os.getpid(), 9)",
            R1ZError,
            "the rehearsal of rank 3 was ended by SIGKILL from outside, as where memory runs out: it needs about 1.5 GB.",
        ),
        ("sys.exit('it broke')", R1ZError, "the rehearsal of rank 3 ended with status 1: it broke"),
    ],
)
def test_what_a_process_says_becomes_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, kind: type[R1ZError], words: str
) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!{sys.executable}\nimport json, os, sys\nMARK = {MARK!r}\n{program}\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    with pytest.raises(kind) as caught:
        rehearse("policy_role", TASK)
    assert str(caught.value) == words


def test_the_report_has_the_plan_beside_what_was_alive() -> None:
    phases = (Phase("weights", 2 * GIB, 2 * GIB, 1.0), Phase("update 2", 3 * GIB, 5 * GIB, 2.0, planned=6 * GIB))
    said = ("something slow", "GPTModel IS DEPRECATED.")
    text = "\n".join(render(Found("policy", 0, phases, 7, attention=("fused",), warnings=said, figures=FIGURES)))
    assert re.search(r"update 2 +3\.00 +5\.00 +6\.00", text)
    assert "takes its fused attention" in text
    assert "8 micro-batches of 4096 tokens, 3000 of them of responses" in text
    assert "WARNING: something slow" in text
    assert "DEPRECATED" not in text


def test_the_end_adds_up_what_a_device_holds_and_says_what_that_proves() -> None:
    policy = Found("policy", 0, (Phase("update 2", 3 * GIB, 5 * GIB, 2.0),), figures=FIGURES)
    engine = Found("engine", 0, (Phase("refit", 2 * GIB, 4 * GIB, 1.0),), figures={"kv_cache_bytes": GIB})
    cluster = load_cluster(CONFIGS / "clusters" / "h100-8.yaml")
    first, *rest = summary([policy, engine], cluster)
    assert first == "on a device: 5.0 GiB of the policy, 2.0 of the engine and 1.0 of its cache, together 8.0 of 79.6"
    assert rest == list(summary([policy], cluster)) == [PROVEN, UNSEEN]


@pytest.mark.parametrize(
    ("cluster", "overrides", "words"),
    [
        ("h100-8", (), "parallel.num_ranks is 64, but the cluster has 1 x 8 GPUs"),
        (
            "h100-64",
            ("rollout.kv_cache_bytes=42949672960",),
            r"a rank of pipeline stage 0 needs 9\d\.\d GiB .* has 79\.6; `megatron-r1z plan`",
        ),
    ],
)
def test_what_plan_refuses_is_not_rehearsed(monkeypatch: pytest.MonkeyPatch, cluster: str, overrides: tuple[str, ...], words: str) -> None:
    monkeypatch.setattr(command, "check_versions", lambda *_names: None)
    with pytest.raises(ConfigError, match=words):
        rehearse_run(str(CONFIGS / "llama3.1-70b-h100-fp8.yaml"), overrides, str(CONFIGS / "clusters" / f"{cluster}.yaml"))


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
