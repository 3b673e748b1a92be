"""`refits.jsonl`: the receipt of every hand-over of weights to the engine, one row each."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_r1z.types import RefitReceipt


def save_receipt(folder: Path, receipt: RefitReceipt) -> None:
    """Add a row to the file of a run folder; a run that goes on hands its last version over again, which is a row of its own."""
    row = {
        "policy_version": receipt.policy_version,
        "bytes": receipt.nbytes,
        **({"bytes_by_format": dict(receipt.nbytes_by_format), "not_in_fp8": receipt.not_in_fp8} if receipt.nbytes_by_format else {}),
        "seconds": round(receipt.seconds, 6),
        "round_seconds": [round(seconds, 6) for seconds in receipt.round_seconds],
        "digests": dict(receipt.digests),
    }
    with (folder / "refits.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
