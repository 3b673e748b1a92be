"""CPU memory that the other processes of a machine can map, so that ranks read each other's weights where they are."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor


class SharedFile:
    """An anonymous file in memory, which is gone with the last process that has it mapped or open."""

    def __init__(self, nbytes: int) -> None:
        self._file = os.memfd_create("megatron-r1z")
        self.path = f"/proc/{os.getpid()}/fd/{self._file}"
        """Where other processes find it while this object lives."""
        os.ftruncate(self._file, nbytes)
        weakref.finalize(self, os.close, self._file)
        self.tensor = torch.from_file(self.path, shared=True, size=nbytes, dtype=torch.uint8) if nbytes else torch.empty(0)
        """uint8."""

    def write(self, content: bytes) -> None:
        """Replace the whole content."""
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, content, 0)


class SharedTensors:
    """Tensors in memory that other processes can map, zeros at first; other processes see them while this object lives.

    They are in one anonymous file, so neither a limit of open files nor the size of /dev/shm matters. A page takes no memory before it is
    written.

    Args:
        like: shapes and number formats, by name; values do not matter, and there may be none (`meta`).
    """

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        offsets, end = {}, 0
        for name, tensor in like.items():
            offsets[name], end = end, end + aligned(tensor.nbytes)
        self._file = SharedFile(end)
        self.tensors = {
            name: self._file.tensor[offset : offset + like[name].nbytes].view(like[name].dtype).view(like[name].shape)
            for name, offset in offsets.items()
        }
        """By the names given."""


class SharedCopies(SharedTensors):
    """Copies of CPU tensors in such memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)


def aligned(nbytes: int) -> int:
    """Room for so many bytes, so that what follows begins where any number format may, and a cache line does."""
    return -(-nbytes // 64) * 64
