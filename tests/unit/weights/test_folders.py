"""What a folder is told to hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1z.weights.folders import Kind, kind_of


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["config.json", "model.safetensors"], "hf"),
        (["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"], "hf"),
        ([".metadata", "common.pt", "state.json"], "megatron"),
        ([".metadata", "common.pt", "weights.json"], "megatron"),
        (["config.json", "tokenizer.json"], None),
        (["model.safetensors"], None),
        ([".metadata", "common.pt"], None),
        (["state.json"], None),
        ([], None),
    ],
)
def test_a_folder_is_told_by_what_is_written_last(tmp_path: Path, names: list[str], kind: Kind | None) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert kind_of(tmp_path) == kind


def test_no_folder_is_no_kind(tmp_path: Path) -> None:
    assert kind_of(tmp_path / "absent") is None
