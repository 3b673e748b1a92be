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
NEEDS_A_GPU = {"transformer engine"}


def test_the_quick_checks_pass_on_a_cpu_but_for_what_is_transformer_engines(tmp_path: Path) -> None:
    command = ["bash", "tools/gpu_check.sh", "--quick", "--minutes", "30", "--out", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, timeout=1800, check=False
    )
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    ended = {line["check"]: line for line in lines if "status" in line}
    figures: dict[str, dict[str, float]] = {}
    for line in lines:
        figures.setdefault(line.get("check", ""), {}).update(line.get("figures", {}))
    print(done.stdout)
    assert {name for name, line in ended.items() if line["status"] == "failed"} == NEEDS_A_GPU, done.stdout
    assert done.returncode == 1
    assert {name for name, line in ended.items() if line["status"] == "skipped"} == {
        *(
            f"{check} {prefix}{recipe}"
            for check, prefix in (("fp8", ""), ("steps", "fp8-"))
            for recipe in ("tensorwise", "delayed", "mxfp8")
        ),
        "scales",
    }
    for family in ("llama", "qwen2", "qwen3"):
        assert figures["steps fp32"][f"{family} logprobs_max"] < 2e-5
        assert figures["steps fp32"][f"{family} again_updates"] == 0
    assert figures["steps fp8-blockwise"]["llama shared_with_fp8"] > 0.4
    assert figures["refit"]["gbytes"] > 0
