"""The file of receipts."""

import json
from pathlib import Path

from megatron_r1z.receipts import save_receipt
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
