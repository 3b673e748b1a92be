"""A file is recognised by what it holds, whatever it is called and whenever it was written; an untouched one is not read again."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1z.data import fingerprint
from megatron_r1z.data.fingerprint import Part, code_parts, differing, digest_indexed, digest_texts, mark_all, settings_parts, weights_parts

TEXT = st.text(st.characters(), max_size=6)  # lone surrogates among them, which JSON can hold
ROWS = st.lists(st.lists(TEXT, max_size=3), max_size=4)


@given(ROWS, ROWS)
def test_rows_have_the_same_digest_exactly_when_they_are_the_same(rows: list[list[str]], others: list[list[str]]) -> None:
    assert (digest_texts(rows) == digest_texts(others)) == (rows == others)
    assert digest_texts(iter(rows)) == digest_texts(rows)


@given(st.binary(max_size=40), st.integers(0, 39), st.integers(1, 255))
def test_one_changed_byte_anywhere_is_another_file(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, place: int, change: int
) -> None:
    path = tmp_path_factory.mktemp("file") / "file"
    path.write_bytes(content)
    before = Part(path).mark()
    if place < len(content):
        path.write_bytes(content[:place] + bytes([content[place] ^ change]) + content[place + 1 :])
        assert Part(path).mark().digest != before.digest
    path.write_bytes(content)
    assert Part(path).mark().digest == before.digest


def test_an_untouched_file_is_not_read_and_a_copy_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, copy = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"weights")
    known = mark_all({"x": Part(path)})
    shutil.copyfile(path, copy)
    assert differing(known, mark_all({"x": Part(copy)})) == []
    monkeypatch.setattr(fingerprint, "new_digest", lambda: pytest.fail("read"))
    assert mark_all({"x": Part(path)}, known) == known
    with pytest.raises(BaseException, match="read"):
        mark_all({"x": Part(copy)}, known)


def test_a_file_replaced_by_one_of_the_same_size_and_date_is_another(tmp_path: Path) -> None:
    """`cp -p`, `rsync -a` and `tar` set the date of contents; that of the entry nobody can set."""
    path = tmp_path / "a"
    path.write_bytes(b"weights 1")
    known = mark_all({"x": Part(path)})
    status = path.stat()
    time.sleep(0.05)  # longer than a tick of the clock by which a file system dates entries
    path.write_bytes(b"weights 2")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert differing(known, mark_all({"x": Part(path)}, known)) == ["x"]


def test_files_that_come_or_go_differ(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    marks = mark_all({"a": Part(tmp_path / "a")})
    assert differing(marks, {}) == differing({}, marks) == ["a"]


def test_a_model_folder_is_its_settings_and_its_weights(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json", "model.safetensors", "notes.txt"):
        (tmp_path / name).write_text(name)
    assert set(settings_parts(tmp_path)) == {"config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"}
    assert set(weights_parts(tmp_path, None)) == {"model.safetensors"}
    index = {"weight_map": {"x": "part-1.safetensors", "y": "part-2.safetensors", "z": "part-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(weights_parts(tmp_path, None)) == {"part-1.safetensors", "part-2.safetensors"}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # as it should be for one process
def test_a_checkpoint_is_its_weights_without_the_state_of_optimizer_and_critic(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from torch.distributed.checkpoint.state_dict_saver import save

    def marks(**changed: float) -> dict[str, fingerprint.FileMark]:
        names = {"weights": "decoder.x", "optimizer": "optimizer.state.exp_avg.decoder.x", "critic": "critic.decoder.x"}
        tensors = {key: torch.full((500,), changed.get(name, 0.0)) for name, key in names.items()}
        folder = tmp_path / f"{changed}"
        save(tensors, checkpoint_id=folder, no_dist=True)
        return mark_all(weights_parts(tmp_path, folder))

    whole = marks()
    assert sum(mark.num_bytes for mark in whole.values()) > 3 * 500 * 4
    assert differing(whole, marks(optimizer=1.0)) == differing(whole, marks(critic=1.0)) == []
    assert differing(whole, marks(weights=1.0)) != []


def test_code_is_a_file_and_what_it_imports_from_its_folder(tmp_path: Path) -> None:
    texts = {
        "reward.py": "import json, helper\nfrom package import part\ndef reward(a, b, c):\n    from late import x\n    return 1.0\n",
        "helper.py": "import deeper.inner as inner\nimport reward\n",
        "late.py": "",
        "package/__init__.py": "from . import sibling\n",
        "package/part.py": "from .other import thing\n",
        "package/other.py": "",
        "package/sibling.py": "",
        "deeper/inner.py": "",
        "unused.py": "",
        "json5.py": "",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert set(code_parts(f"{tmp_path / 'reward.py'}:reward")) == set(texts) - {"unused.py", "json5.py"}
    (tmp_path / "reward.py").write_text("def (")
    assert set(code_parts(f"{tmp_path / 'reward.py'}:reward")) == {"reward.py"}


def test_an_indexed_dataset_is_read_in_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "SAMPLE_BYTES", 4)
    monkeypatch.setattr(fingerprint, "SAMPLES", 3)
    index, tokens = tmp_path / "a.idx", tmp_path / "a.bin"
    index.write_bytes(b"lengths")
    tokens.write_bytes(bytes(100))
    found = digest_indexed(index, 0, None)
    for place in (0, 3, 48, 51, 96, 99):
        tokens.write_bytes(bytes(place) + b"\1" + bytes(99 - place))
        assert digest_indexed(index, 0, None) != found
    tokens.write_bytes(bytes(20) + b"\1" + bytes(79))
    assert digest_indexed(index, 0, None) == found  # between the samples: what large files cost
    tokens.write_bytes(bytes(101))
    assert digest_indexed(index, 0, None) != found
    tokens.write_bytes(bytes(100))
    assert digest_indexed(index, 1, None) != found != digest_indexed(index, 0, 5)
    index.write_bytes(b"Lengths")
    assert digest_indexed(index, 0, None) != found
