"""What `tools/gpu_check.sh --quick` does on a GPU, done on the CPU: the same script, the same checks, the layers that stand in there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
NEEDS_A_GPU = {"transformer engine": "failed", "scales": "skipped", "fp8 delayed": "skipped"}
PASSES = ("machine", "fp8 blockwise", "reference", "steps fp32", "steps fp8-blockwise", "checkpoint", "refit", "memory bf16")


def test_checks_pass_on_a_cpu_but_for_what_is_transformer_engines(tmp_path: Path) -> None:
    options = ["--quick", "--minutes", "200", "--patience", "20", "--out", str(tmp_path), "--only", *PASSES, "scales", "fp8 delayed"]
    command = ["bash", "tools/gpu_check.sh", *options]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    figures: dict[str, dict[str, float]] = {}
    for line in lines:
        figures.setdefault(line.get("check", ""), {}).update(line.get("figures", {}))
    assert {line["check"]: line["status"] for line in lines if "status" in line} == NEEDS_A_GPU | dict.fromkeys(PASSES, "passed"), lines
    assert (done.returncode, done.stdout.splitlines()[-1].split(";")[0]) == (1, "1 of 11 failed: transformer engine")
    for family in ("llama", "qwen2", "qwen3"):
        assert figures["steps fp32"][f"{family} logprobs_max"] < 2e-5
        assert figures["steps fp32"][f"{family} again_updates"] == 0
    assert figures["steps fp8-blockwise"]["llama shared_with_fp8"] > 0.4
    assert figures["refit"]["gbytes"] > 0
