"""Checkpoints on disk: what is kept, what is refused, and that nobody goes on writing for a rank that was killed."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_r1z import ranks
from megatron_r1z.errors import DataError, ExportError, TrainingError
from megatron_r1z.host import supervisor
from megatron_r1z.policy.cpu import prepare_process
from megatron_r1z.weights.checkpoint import Checkpoints
from megatron_r1z.weights.resume_point import damage_of, steps_of

pytestmark = pytest.mark.filterwarnings("ignore:.*load_state_dict. is deprecated:FutureWarning")  # which megatron-core calls


class OneTensor:
    """A policy of one tensor."""

    has_moments = True

    def __init__(self, *values: float) -> None:
        self.weight = torch.tensor(values)

    def parameters(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight}

    def sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        return {"model": {"weight": ShardedTensor.from_rank_offsets("weight", self.weight)}}

    def load_state(self, state: dict[str, Any]) -> None:
        self.weight = state["model"]["weight"]


@pytest.fixture
def checkpoints(tmp_path: Path, one_rank: None) -> Checkpoints:
    prepare_process()
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def save(checkpoints: Checkpoints, step: int, *values: float) -> None:
    checkpoints.save(step, OneTensor(*values), {"iteration": step})  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_last_ones_are_kept_and_what_lies_beyond_a_run_that_was_gone_back_in_is_left_alone(checkpoints: Checkpoints) -> None:
    for step in (1, 2, 3, 4):
        save(checkpoints, step, step, 2.0)
        assert (checkpoints.folder / "latest").read_text() == f"step_{step:06d}"
    assert list(steps_of(checkpoints.folder)) == [3, 4]
    save(checkpoints, 2, 0.0, 2.0)
    assert list(steps_of(checkpoints.folder)) == [2, 3, 4]
    save(checkpoints, 3, 7.0, 2.0)
    assert list(steps_of(checkpoints.folder)) == [2, 3, 4]
    point = checkpoints.resume_point()
    assert point is not None
    assert checkpoints.load(point.path, policy := OneTensor(0.0, 0.0)) == {"iteration": 3}  # type: ignore[arg-type]
    assert policy.weight.tolist() == [7.0, 2.0]
    assert not list(checkpoints.folder.glob("*.partial")) + list(checkpoints.folder.glob("*.old"))
    assert damage_of(point.path) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_not_saved(checkpoints: Checkpoints, value: float) -> None:
    save(checkpoints, 1, 1.0, 2.0)
    before = contents(checkpoints.folder)
    with pytest.raises(TrainingError, match=r"weights of the policy after step 2 are not finite, in 1 tensors .*, so they are not saved"):
        save(checkpoints, 2, 1.0, value)
    assert contents(checkpoints.folder) == before


def test_a_checkpoint_without_the_files_of_another_host_is_not_named_complete(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(checkpoints, 1, 1.0)
    write = dist_checkpointing.save

    def write_elsewhere(sharded: dict[str, Any], folder: str) -> None:
        write(sharded, folder)
        next(Path(folder).glob("*.distcp")).unlink()

    monkeypatch.setattr(dist_checkpointing, "save", write_elsewhere)
    with pytest.raises(ExportError, match=r"step_000002\.partial is not complete \(__0_\d\.distcp is missing\), so it keeps that name"):
        save(checkpoints, 2, 2.0)
    assert (list(steps_of(checkpoints.folder)), (checkpoints.folder / "latest").read_text()) == ([1], "step_000001")


def test_what_is_said_beside_the_weights_can_be_replaced(checkpoints: Checkpoints) -> None:
    save(checkpoints, 1, 1.0)
    before = contents(checkpoints.folder)
    checkpoints.note(1, {"iteration": 1, "put_off": []})
    after = contents(checkpoints.folder)
    assert json.loads(after.pop("step_000001/state.json")) == {"iteration": 1, "put_off": []}
    del before["step_000001/state.json"]
    assert after == before


def test_contents_that_cannot_be_read_end_in_one_sentence_with_the_checkpoint_before(checkpoints: Checkpoints) -> None:
    for step in (1, 2):
        save(checkpoints, step, 1.0, 2.0)
    path = checkpoints.path(2)
    for file in path.glob("*.distcp"):
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(DataError) as caught:
        checkpoints.load(path, OneTensor(0.0, 0.0))  # type: ignore[arg-type]
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert f"checkpoint {path} cannot be read" in sentence
    assert f"the newest complete one before it is step_000001: write that name into {checkpoints.folder / 'latest'}" in sentence


def test_rank_0_decides(one_rank: None) -> None:
    assert ranks.decide(lambda: 7) == 7
    assert ranks.decide(lambda: None) is None

    def fail() -> None:
        raise DataError("no.")

    with pytest.raises(DataError, match=r"^no\.$"):
        ranks.decide(fail)


# ------------------------------------------------------------------------------------------------------------ a killed supervisor

HOST = "import sys; from megatron_r1z.host.supervisor import run_ranks; run_ranks(1, 1, [], command=[sys.executable, 'rank.py'])"
RANK = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron_r1z.weights.checkpoint import _save
from megatron_r1z.policy.cpu import prepare_process
from megatron_r1z.host.rank import rank_entry

def main():
    dist.init_process_group("gloo")
    prepare_process()
    weight = torch.zeros(64 << 20)
    while True:
        _save(Path("step_000001"), {"weight": ShardedTensor.from_rank_offsets("weight", weight)}, "state.json", {})

sys.exit(rank_entry(main))
"""


def processes_in(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(folder):
                found.append(process)
        except psutil.Error:
            continue
    return found


def writer_of(supervisor_id: int) -> psutil.Process | None:
    """The process that the rank has forked."""
    for rank in psutil.Process(supervisor_id).children():
        return next((child for child in rank.children() if child.cmdline() == rank.cmdline()), None)
    return None


def test_a_writer_of_megatron_dies_with_its_rank_and_that_with_its_supervisor(tmp_path: Path) -> None:
    """It is held in the middle of its writing, so that it cannot come to its end by itself."""
    (tmp_path / "rank.py").write_text(RANK, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "R1Z_SUPERVISOR")}
    environment |= {"PYTHONPATH": str(Path(supervisor.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", HOST], cwd=tmp_path, env=environment) as process:
        try:
            deadline = time.monotonic() + 120
            writer = None
            while writer is None or not any(path.stat().st_size for path in tmp_path.glob("*.partial/*.distcp")):
                assert process.poll() is None
                assert time.monotonic() < deadline
                try:
                    writer = writer_of(process.pid)
                except psutil.NoSuchProcess:
                    writer = None
                time.sleep(0.002)
            writer.suspend()
            process.kill()
            process.wait()
            while processes_in(tmp_path):
                assert time.monotonic() < deadline, [item.cmdline() for item in processes_in(tmp_path)]
                time.sleep(0.05)
        finally:
            for left in processes_in(tmp_path):
                left.send_signal(signal.SIGKILL)
