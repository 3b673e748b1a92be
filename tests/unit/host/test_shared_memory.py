"""Memory that other processes map: its content, and how long it is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from megatron_r1z.host.shared_memory import SharedCopies, SharedFile


def test_copies_have_the_values_and_another_process_changes_them() -> None:
    tensors = {"a": torch.randn(3, 5).bfloat16(), "b": torch.arange(7), "empty": torch.zeros(0, 4)}
    shared = SharedCopies(tensors)
    assert all(torch.equal(shared.tensors[name], tensor) for name, tensor in tensors.items())
    assert all(tensor.data_ptr() % 64 == 0 for tensor in shared.tensors.values())
    storage = shared.tensors["b"].untyped_storage()
    code = (
        "import sys, torch; whole = torch.from_file(sys.argv[1], shared=True, size=int(sys.argv[2]), dtype=torch.int64); "
        "whole[int(sys.argv[3])] = 99"
    )
    place = str(shared.tensors["b"].storage_offset() + 4)
    subprocess.run([sys.executable, "-c", code, str(storage.filename), str(storage.nbytes() // 8), place], check=True)
    assert shared.tensors["b"].tolist() == [0, 1, 2, 3, 99, 5, 6]


def test_a_file_is_gone_with_its_object() -> None:
    file = SharedFile(0)
    file.write(b"first, longer")
    file.write(b"second")
    path = Path(file.path)
    assert path.read_bytes() == b"second"
    del file
    assert not path.exists()
