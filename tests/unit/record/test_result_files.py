"""What is written as JSON is JSON, and rows are read as they were written."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import megatron_r1z
from megatron_r1z.record.result_files import append_rows, keep_rows, read_rows, to_json

PACKAGE = Path(megatron_r1z.__file__).parent
OTHER_WRITERS = {
    "record/result_files.py": "the writer itself",
    "weights/hf_files.py": "the formats of Hugging Face, which may hold Infinity",
    "weights/checkpoint.py": "cursors, which are whole numbers",
    "weights/model_folder.py": "a message",
    "layout/families.py": "messages",
    "layout/rope.py": "messages",
    "layout/config_fields.py": "messages",
    "analysis/judge.py": "text that is hashed",
    "data/inputs.py": "digests",
    "assemble.py": "versions",
    "host/segments.py": "numbers of files",
    "fp8/machine.py": "what a child process found",
    "rehearse/engine_role.py": "a model's config.json",
    "rehearse/roles.py": "what goes between processes",
    "host/rank.py": "the error of a rank",
}
"""Files that may call `json.dump` or `json.dumps` themselves: they write no figures."""
FLOATS = st.floats() | st.integers() | st.none() | st.text()
TREES = st.recursive(FLOATS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner), max_leaves=20)


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def cleaned(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: cleaned(item) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        return [cleaned(item) for item in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


@given(tree=TREES)
def test_what_is_not_finite_is_null_and_all_else_is_kept(tree: Any) -> None:
    assert strict(to_json(tree)) == strict(to_json(tree, indent=1, ensure_ascii=False)) == cleaned(tree)


def test_rows_are_appended_and_read(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "rows.jsonl"
    assert read_rows(path) == []
    append_rows(path, [{"a": math.nan}, {"a": "\u2028 is no end of a line"}])
    append_rows(path, [{"a": 3}])
    with path.open("a") as file:
        file.write('{"a": 4')
    assert read_rows(path) == [{"a": None}, {"a": "\u2028 is no end of a line"}, {"a": 3}]
    keep_rows(path, lambda row: row["a"] is not None)
    assert read_rows(path) == [{"a": "\u2028 is no end of a line"}, {"a": 3}]


def test_figures_have_one_writer() -> None:
    """Python's own writes NaN unless it is told not to."""
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps") and ast.unparse(node.value) == "json"
    }
    assert found == set(OTHER_WRITERS)
