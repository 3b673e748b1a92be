"""The file of receipts."""

import json
from pathlib import Path

from megatron_r1z.record.receipts import drop_receipts, save_receipt
from megatron_r1z.types import RefitReceipt


def test_a_row_per_refit(tmp_path: Path) -> None:
    for version in (0, 1):
        save_receipt(tmp_path, RefitReceipt(version, 1024, 0.25, (0.125, 0.0625), (("model.norm.weight", "00ff"),)))
    rows = [json.loads(line) for line in (tmp_path / "refits.jsonl").read_text().splitlines()]
    assert [row["policy_version"] for row in rows] == [0, 1]
    assert rows[1] == {
        "policy_version": 1,
        "bytes": 1024,
        "seconds": 0.25,
        "round_seconds": [0.125, 0.0625],
        "digests": {"model.norm.weight": "00ff"},
    }


def test_a_run_that_goes_on_hands_its_version_over_again_and_has_each_once(tmp_path: Path) -> None:
    drop_receipts(tmp_path, 0)
    for first, last in ((0, 5), (3, 4), (4, 6)):
        drop_receipts(tmp_path, first)
        for version in range(first, last):
            save_receipt(tmp_path, RefitReceipt(version, first, 0.25, (), ()))
    with (tmp_path / "refits.jsonl").open("a") as file:
        file.write('{"policy_ver')  # a full disk ends a process within a line
    drop_receipts(tmp_path, 6)
    rows = [json.loads(line) for line in (tmp_path / "refits.jsonl").read_text().splitlines()]
    assert [(row["policy_version"], row["bytes"]) for row in rows] == [(0, 0), (1, 0), (2, 0), (3, 3), (4, 4), (5, 4)]
