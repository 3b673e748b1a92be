"""`megatron-r1z rehearse` as a user types it."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

COMMAND = (sys.executable, "-m", "megatron_r1z", "rehearse")


def rehearse(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)


def test_every_role_of_a_configuration_is_played() -> None:
    child = rehearse("configs/qwen2.5-7b-b200-fp8.yaml", "--cluster", "configs/clusters/b200-8.yaml", "--every-role")
    assert child.returncode == 0, child.stderr[-2000:]
    assert re.findall(r"^(\w.*), rank 0 \.\.\.$", child.stdout, re.MULTILINE) == ["policy, only stage", "engine of 1"]
    assert re.search(r"^  update 2( +\d+\.\d\d){3}$", child.stdout, re.MULTILINE)
    assert re.search(r"^  refit( +\d+\.\d\d){3}$", child.stdout, re.MULTILINE)
    assert "takes its fused attention" in child.stdout
    assert "float8_e4m3fn" in child.stdout
    assert "WARNING" not in child.stdout
    assert child.stdout.splitlines()[-1].startswith("not seen without a device: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--cluster", "configs/clusters/h100-64.yaml", "--rank", "64"), "rank 64 does not exist; there are 64 ranks."),
        (("--cluster", "configs/clusters/h100-8.yaml"), "parallel.num_ranks is 64, but the cluster has 1 x 8 GPUs"),
        (("--cluster", "configs/clusters/none.yaml"), "cannot read the configuration configs/clusters/none.yaml"),
    ],
)
def test_what_is_refused_is_one_sentence(arguments: tuple[str, ...], words: str) -> None:
    child = rehearse("configs/llama3.1-70b-h100.yaml", *arguments)
    assert child.returncode == 2
    assert child.stdout == ""
    (line,) = child.stderr.splitlines()
    assert words in line
