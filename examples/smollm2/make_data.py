"""Split a question file into training and held-out questions, keeping the rows whose answer is a plain number.

    python examples/smollm2/make_data.py path/to/asdiv.jsonl runs/smollm2/data

The file is JSONL with the columns `problem` and `answer`. The same file and seed give the same split.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from random import Random
from typing import Any

NUM_HELD_OUT = 200
NUMBER = re.compile(r"-?\d[\d,]*(\.\d+)?")


def main() -> None:
    """Parse the command line and write train.jsonl and held_out.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.questions.read_text(encoding="utf-8").splitlines() if line.strip()]
    train, held_out = split(rows, arguments.seed)
    if not train:
        sys.exit(f"{arguments.questions} holds {len(held_out)} usable rows; it takes more than {NUM_HELD_OUT}.")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("held_out", held_out)):
        text = "".join(json.dumps({"problem": row["problem"].strip(), "answer": row["answer"]}) + "\n" for row in part)
        (arguments.folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    print(f"wrote {len(train)} training and {len(held_out)} held-out questions to {arguments.folder}")


def split(rows: list[dict[str, Any]], seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out rows, both in the order of the file."""
    usable = [row for row in rows if NUMBER.fullmatch(str(row["answer"]).strip())]
    generator = Random(f"split/{seed}")
    keys = [generator.random() for _ in usable]
    held_out = set(sorted(range(len(usable)), key=keys.__getitem__)[:NUM_HELD_OUT])
    return (
        [row for index, row in enumerate(usable) if index not in held_out],
        [row for index, row in enumerate(usable) if index in held_out],
    )


if __name__ == "__main__":
    main()
