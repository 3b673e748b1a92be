"""After a transfer, all ranks together: was everything written, and is what was written what was read?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist

from megatron_r1z.errors import RefitError
from megatron_r1z.reshard.digest import Ledger, Piece, as_text
from megatron_r1z.reshard.execute import Executor, attempt


class Compared(NamedTuple):
    """What both sides agree on."""

    nbytes: int
    """Written over all ranks."""
    digests: list[int]
    """Of each tensor, by `Executor.tensors`."""


def compare(executor: Executor, what: str) -> Compared:
    """Compare the digests of both sides over all ranks, which call this after a transfer; `what` begins the sentence of an error.

    Raises:
        RefitError: bytes are missing, or a tensor differs; names the first block, both ranks and the round.
    """
    device = executor.device
    nbytes = torch.tensor([executor.written_bytes], dtype=torch.int64, device=device)
    totals = torch.cat([nbytes, executor.read.digests().to(device), executor.written.digests().to(device)])
    if dist.is_initialized():
        work = dist.all_reduce(totals, group=executor.process_group, async_op=True)
        limit = timedelta(seconds=executor.timeout_s)
        attempt(lambda: work.wait(limit), f"rank {executor.part.rank}: comparing digests", executor.timeout_s)
    found, digests = int(totals[0]), totals[1:].view(2, -1)
    if not torch.equal(digests[0], digests[1]):
        _explain(executor, what, {name for name, index in executor.tensors.items() if digests[0][index] != digests[1][index]})
    expected = executor.dtype.itemsize * sum(math.prod(block.size) for block in executor.part.destination.blocks)
    if found != expected:
        raise RefitError(f"{what} wrote {found} of {expected} bytes; restart from the last checkpoint.")
    return Compared(found, digests[0].tolist())


def _explain(executor: Executor, what: str, tensors: set[str]) -> NoReturn:
    """Find the first piece that was not written as it was read; all ranks come here, because all have seen the same digests."""
    mine = [_pieces_of(ledger, tensors) for ledger in (executor.read, executor.written)]
    everywhere = [mine]
    if dist.is_initialized():
        everywhere = [mine] * dist.get_world_size(executor.process_group)
        dist.all_gather_object(everywhere, mine, group=executor.process_group)
    read, written = ([item for sides in everywhere for item in sides[side]] for side in (0, 1))
    raise RefitError(
        f"{what}: {_first_difference(read, written, executor.part.num_rounds)}; {len(tensors)} of {len(executor.tensors)} tensors differ "
        "from the source's. Restart from the last checkpoint."
    )


def _pieces_of(ledger: Ledger, tensors: set[str]) -> list[tuple[Piece, int]]:
    return [(piece, found) for piece, found in ledger.listed() if piece.place.tensor in tensors]


def _first_difference(read: Sequence[tuple[Piece, int]], written: Sequence[tuple[Piece, int]], num_rounds: int) -> str:
    """What happened to the first piece that changed on its way; both lists have the pieces of a pair of ranks in one order."""

    def by_pair(item: tuple[Piece, int]) -> tuple[int, int]:
        return item[0].source_rank, item[0].destination_rank

    for (left, sent), (arrived, found) in zip(sorted(read, key=by_pair), sorted(written, key=by_pair), strict=False):
        if (left.place, sent) != (arrived.place, found):
            number = "" if left.round_number is None else f" in round {left.round_number + 1} of {num_rounds}"
            return (
                f"{left.place} of rank {left.source_rank} (sum {as_text(sent)}) arrived on rank {left.destination_rank}{number} "
                f"as {arrived.place} (sum {as_text(found)})"
            )
    return "the two sides do not list the same pieces"
