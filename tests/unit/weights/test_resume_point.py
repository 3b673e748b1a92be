"""Which checkpoint a run goes on from, whatever became of its folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

from megatron_r1z.errors import DataError
from megatron_r1z.weights.resume_point import damage_of, find_resume_point, holds_checkpoints, steps_of

MakeCheckpoint = Callable[[Path], Path]


@pytest.fixture
def folder(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> Path:
    """Checkpoints 2, 10 and 1000000, the second of them pointed at, beside one that is being written and one that is set aside."""
    folder = tmp_path / "checkpoints"
    for name in ("step_000002", "step_000010", "step_1000000"):
        make_checkpoint(folder / name)
    for name in ("step_000012.partial", "step_000010.old"):
        (folder / name).mkdir()
    (folder / "latest").write_text("step_000010\n")
    return folder


def sentence_of(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        find_resume_point(folder)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


def test_a_folder_without_checkpoints_starts_a_run(tmp_path: Path) -> None:
    assert find_resume_point(tmp_path / "none") is None
    (tmp_path / "step_000001.partial").mkdir()
    assert find_resume_point(tmp_path) is None
    assert not holds_checkpoints(tmp_path)


def test_the_pointer_decides(folder: Path) -> None:
    assert list(steps_of(folder)) == [2, 10, 1_000_000]
    point = find_resume_point(folder)
    assert point is not None
    assert (point.path, point.note) == (folder / "step_000010", None)
    shutil.copytree(folder / "step_000002", folder / "best")
    (folder / "latest").write_text("best")
    point = find_resume_point(folder)
    assert point is not None
    assert point.path == folder / "best"


@pytest.mark.parametrize(
    ("pointer", "why"),
    [
        (None, "has no file 'latest'"),
        (b"", "has an empty file 'latest'"),
        (b" \n", "has an empty file 'latest'"),
        (b"\xff\xfe", "has an empty file 'latest'"),
        (b"step_000011", "has a file 'latest' that names 'step_000011'"),
    ],
)
def test_without_a_pointer_that_holds_the_newest_complete_one_is_taken_and_told(folder: Path, pointer: bytes | None, why: str) -> None:
    (folder / "latest").unlink() if pointer is None else (folder / "latest").write_bytes(pointer)
    point = find_resume_point(folder)
    assert point is not None
    assert point.path == folder / "step_1000000"
    assert point.note == f"warning: {folder} {why}; its newest complete checkpoint is taken, step_1000000"
    (folder / "step_1000000" / "state.json").unlink()
    point = find_resume_point(folder)
    assert point is not None
    assert point.path == folder / "step_000010"
    assert holds_checkpoints(folder)


@pytest.mark.parametrize("name", ["../elsewhere/step_000010", "/tmp", "step_000002/", ".", ".."])
def test_a_pointer_that_leads_outside_is_refused(folder: Path, name: str) -> None:
    shutil.copytree(folder, folder.parent / "elsewhere")
    (folder / "latest").write_text(name)
    assert f"names {name!r}, which is not a folder beside it; write the name of one that is (the newest complete one is" in sentence_of(
        folder
    )


def test_where_no_checkpoint_is_complete_nothing_is_begun(folder: Path) -> None:
    (folder / "latest").unlink()
    for path in steps_of(folder).values():
        (path / ".metadata").unlink()
    assert "holds no complete checkpoint (step_1000000: .metadata is missing)" in sentence_of(folder)
    for path in steps_of(folder).values():
        shutil.rmtree(path)
    (folder / "latest").write_text("step_000010")
    assert "holds no complete checkpoint (latest names 'step_000010', which is not there)" in sentence_of(folder)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no metadata": (lambda path: (path / ".metadata").unlink(), ".metadata is missing"),
    "cut metadata": (lambda path: cut(path / ".metadata", 100), ".metadata cannot be read"),
    "no common.pt": (lambda path: (path / "common.pt").unlink(), "common.pt is missing"),
    "cut common.pt": (lambda path: cut(path / "common.pt", 100), "common.pt cannot be read"),
    "no metadata.json": (lambda path: (path / "metadata.json").unlink(), "metadata.json is missing"),
    "no state": (lambda path: (path / "state.json").unlink(), "state.json is missing, which is written last"),
    "broken state": (lambda path: (path / "state.json").write_text("{"), "state.json cannot be read"),
    "state of another kind": (lambda path: (path / "state.json").write_text("[1]"), "state.json cannot be read"),
    "no tensors": (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_with_its_file_and_the_one_before_it(folder: Path, name: str) -> None:
    spoil, what = DAMAGES[name]
    spoil(folder / "step_000010")
    sentence = sentence_of(folder)
    assert f"{folder / 'step_000010'} is damaged: {what}" in sentence
    assert f"the newest complete one before it is step_000002: write that name into {folder / 'latest'}" in sentence
    spoil(folder / "step_000002")
    assert "there is no complete one before it" in sentence_of(folder)


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_a_file_of_tensors_that_is_cut_anywhere_is_seen(folder: Path, data: st.DataObject) -> None:
    path = folder / "step_000010" / "__0_0.distcp"
    whole = path.read_bytes()
    try:
        kept = data.draw(st.integers(0, len(whole) - 1))
        cut(path, kept)
        assert damage_of(path.parent) == f"__0_0.distcp has {kept} of {len(whole)} bytes"
    finally:
        path.write_bytes(whole)
    assert damage_of(path.parent) is None
