"""Reading in pieces, writing by appending, and what the check of a written file finds."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, safe_open, save_file

from megatron_r1z.errors import DataError, ExportError
from megatron_r1z.layout.families import TensorSpec
from megatron_r1z.weights import hf_files
from megatron_r1z.weights.hf_files import TensorReader, TensorWriter
from megatron_r1z.weights.hf_headers import read_header

SPECS = [TensorSpec("b", (40, 6)), TensorSpec("a", (17,)), TensorSpec("c", (3, 2))]


def tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {spec.name: torch.randn(spec.shape, generator=generator).to(dtype) for spec in SPECS}


def written(path: Path, dtype: torch.dtype, rows: int) -> TensorWriter:
    """A file whose tensors came in pieces of `rows` rows."""
    writer = TensorWriter(path, SPECS, dtype)
    writer.create()
    for name, tensor in tensors(dtype).items():
        for piece in tensor.split(rows):
            writer.append(name, piece)
    return writer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_the_library_reads_what_was_appended(tmp_path: Path, dtype: torch.dtype, rows: int) -> None:
    written(tmp_path / "file", dtype, rows).check()
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors(dtype).keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(dtype).items())
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert int.from_bytes((tmp_path / "file").read_bytes()[:8], "little") % 8 == 0


def test_pieces_make_up_a_box_and_the_file_is_opened_again_when_enough_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_files, "PIECE_BYTES", 100)  # four rows of b, of which 24 bytes are in the file
    opened = []
    monkeypatch.setattr(hf_files, "safe_open", lambda *args, **kwargs: opened.append(1) or safe_open(*args, **kwargs))
    save_file(tensors(torch.float32), tmp_path / "file")
    with TensorReader(tmp_path / "file") as file:
        pieces = [(first, rows.clone()) for first, rows in file.pieces("b", (3, 2), (21, 3))]
    assert [(first, len(rows)) for first, rows in pieces] == [(0, 4), (4, 4), (8, 4), (12, 4), (16, 4), (20, 1)]
    assert torch.equal(torch.cat([rows for _, rows in pieces]), tensors(torch.float32)["b"][3:24, 2:5])
    assert len(opened) == 6


def flip(position: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[position] ^= 1
        path.write_bytes(data)

    return change


def rename(path: Path) -> None:
    found = load_file(path)
    save_file({name + "_": tensor for name, tensor in found.items()}, path)


def reshape(path: Path) -> None:
    found = load_file(path)
    save_file(found | {"b": found["b"].view(6, 40)}, path)


def widen(path: Path) -> None:
    save_file({name: tensor.float() for name, tensor in load_file(path).items()}, path)


def swap(path: Path) -> None:
    found = load_file(path)
    save_file(found | {"b": found["b"].flip(0)}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip(-1), r"file: c reads back as \[3, 2\] bfloat16 with checksum \w+; \[3, 2\] bfloat16 with checksum \w+ was written"),
        (flip(-60), r"file: b reads back as"),
        (swap, r"file: b reads back as \[40, 6\] bfloat16 with checksum"),
        (reshape, r"file: b reads back as \[6, 40\] bfloat16"),
        (widen, r"file: b reads back as \[40, 6\] float32"),
        (rename, r"holds 3 tensors where 3 were written; a differs"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"cannot be read back: cannot read .*file"),
        (lambda path: path.unlink(), r"No such file"),
    ],
    ids=["last byte", "some byte", "rows in another order", "shape", "format", "names", "cut off", "gone"],
)
def test_a_file_that_is_not_what_was_written_is_found(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    writer = written(tmp_path / "file", torch.bfloat16, 5)
    damage(tmp_path / "file")
    with pytest.raises((ExportError, OSError), match=message):
        writer.check()


def cut_off(data: bytes, length: int, _bits: int) -> bytes:
    return data[: max(0, len(data) - 1 - length)]


def lengthened(data: bytes, length: int, _bits: int) -> bytes:
    return data + bytes(1 + length)


def changed(data: bytes, position: int, bits: int) -> bytes:
    position %= len(data)
    return data[:position] + bytes([data[position] ^ bits]) + data[position + 1 :]


@given(damage=st.sampled_from([cut_off, lengthened, changed, changed]), position=st.integers(0, 1000), bits=st.integers(0, 255))
def test_a_damaged_header_is_refused_in_one_sentence_or_says_what_it_said(
    tmp_path_factory: pytest.TempPathFactory, damage: Callable[[bytes, int, int], bytes], position: int, bits: int
) -> None:
    """Never another exception, and never other sizes than the file has."""
    path = tmp_path_factory.mktemp("damaged") / "file"
    save_file(tensors(torch.bfloat16), path)
    assert {name: (item.dtype, item.shape) for name, item in read_header(path).items()} == {
        spec.name: ("BF16", spec.shape) for spec in SPECS
    }
    path.write_bytes(damage(path.read_bytes(), position, bits))
    refusal, num_elements = "", None
    try:
        num_elements = sum(math.prod(item.shape) for item in read_header(path).values())
    except DataError as error:
        refusal = str(error)
    if refusal or damage is not changed:
        assert str(path) in refusal
        assert "\n" not in refusal
    else:
        assert num_elements == sum(spec.numel for spec in SPECS)


def test_formats_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3)}, tmp_path / "file")
    with (
        TensorReader(tmp_path / "file") as file,
        pytest.raises(DataError, match=r"file: a is stored as I64; formats that can be read are F64"),
    ):
        list(file.pieces("a", (0,), (3,)))
