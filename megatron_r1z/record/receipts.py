"""`refits.jsonl`: the receipt of every hand-over of weights to the engine, one row each."""

from __future__ import annotations

from pathlib import Path

from megatron_r1z.record.result_files import keep_rows, to_json
from megatron_r1z.types import RefitReceipt

RECEIPTS = "refits.jsonl"


def drop_receipts(folder: Path, version: int) -> None:
    """Take the rows from `version` on out of the file: a run that goes on at it hands it over again, and those after it."""
    if (folder / RECEIPTS).exists():
        keep_rows(folder / RECEIPTS, lambda row: row["policy_version"] < version)


def save_receipt(folder: Path, receipt: RefitReceipt) -> None:
    """Add a row to the file of a run folder."""
    row = {
        "policy_version": receipt.policy_version,
        "bytes": receipt.nbytes,
        **({"bytes_by_format": dict(receipt.nbytes_by_format), "not_in_fp8": receipt.not_in_fp8} if receipt.nbytes_by_format else {}),
        "seconds": round(receipt.seconds, 6),
        "round_seconds": [round(seconds, 6) for seconds in receipt.round_seconds],
        "digests": dict(receipt.digests),
    }
    with (folder / RECEIPTS).open("a", encoding="utf-8") as file:
        file.write(to_json(row) + "\n")
