"""What a model folder must be so that every reader of it computes the same model: tensors, tokenizer, generation_config.json.

`layout/families.py` judges config.json. Here headers are read and, only where the output layer is stored beside an embedding that it is
tied to, the two tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_r1z.errors import DataError
from megatron_r1z.layout.families import ModelShape, hf_tensors
from megatron_r1z.layout.fp8 import BLOCK, SCALES
from megatron_r1z.weights.hf_files import FORMATS, TensorReader
from megatron_r1z.weights.hf_headers import Stored, read_headers

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_HARMLESS = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
"""Tables that older exports kept and that every reader computes from config.json."""
_FP8 = "F8_E4M3"


def check_tensors(folder: str | Path, shape: ModelShape) -> None:
    """Refuse a folder whose files do not hold exactly the tensors that its config.json describes.

    transformers puts random numbers where a tensor is missing and leaves out those it has no place for, with a report that few read.

    Raises:
        DataError: names the file and the tensor.
    """
    found = read_headers(folder)
    expected = {spec.name: spec.shape for spec in hf_tensors(shape)}
    missing = [name for name in expected if name not in found]
    if missing:
        raise DataError(f"{folder} has no tensor {missing[0]}{_and_more(missing)}, which its config.json asks for; copy the files again.")
    is_fp8 = bool(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("quantization_config"))
    scales = {name + SCALES: _num_blocks(size) for name, size in expected.items() if found[name].dtype == _FP8}
    for name, size in (expected | scales).items():
        _check_tensor(name, size, found, is_scale=name in scales)
    quantised = next((name for name in expected if found[name].dtype == _FP8), None)
    if quantised is not None and not is_fp8:
        raise DataError(f"{found[quantised].path}: {quantised} is in FP8, and config.json has no quantization_config that says so.")
    if shape.tied_embeddings and HEAD in found:
        _check_head(found)
    _refuse_further(found, {*expected, *scales, *((HEAD,) if shape.tied_embeddings else ())})


def _check_tensor(name: str, size: tuple[int, ...], found: Mapping[str, Stored], *, is_scale: bool) -> None:
    if name not in found:
        raise DataError(
            f"{found[name.removesuffix(SCALES)].path}: {name.removesuffix(SCALES)} is in FP8, but there is no {name}; only blocks of "
            f"{BLOCK} x {BLOCK} can be read."
        )
    stored = found[name]
    if stored.shape != size:
        raise DataError(f"{stored.path}: {name} has shape {list(stored.shape)}; config.json says {list(size)}.")
    if stored.dtype not in FORMATS or (is_scale and stored.dtype == _FP8):
        raise DataError(f"{stored.path}: {name} is stored as {stored.dtype}; formats that can be read are {', '.join(FORMATS)}.")
    if stored.dtype == _FP8 and len(size) != 2:
        raise DataError(f"{stored.path}: {name} is in FP8, and only matrices can be.")


def _check_head(found: Mapping[str, Stored]) -> None:
    """That an output layer stored beside the embedding it is tied to is that embedding; otherwise transformers keeps the two apart."""
    head, embedding = found[HEAD], found[EMBEDDING]
    if head.shape != embedding.shape or head.dtype != embedding.dtype or not _are_equal(head.path, embedding.path):
        raise DataError(
            f"{head.path} has a {HEAD} that differs from {EMBEDDING}, and config.json says tie_word_embeddings true: some readers take one "
            "and some the other; set it to false, or take the tensor out."
        )


def _are_equal(head_path: Path, embedding_path: Path) -> bool:
    with TensorReader(head_path) as head, TensorReader(embedding_path) as embedding:
        size = head.shape(HEAD)
        start = (0,) * len(size)
        pairs = zip(head.pieces(HEAD, start, size), embedding.pieces(EMBEDDING, start, size), strict=True)
        return all(mine.equal(theirs) for (_, mine), (_, theirs) in pairs)


def _refuse_further(found: Mapping[str, Stored], known: Iterable[str]) -> None:
    further = sorted(name for name in found.keys() - known if not _HARMLESS.search(name))
    if further:
        raise DataError(
            f"{found[further[0]].path} has a tensor {further[0]}{_and_more(further)}, for which the model of config.json has no place; "
            "correct config.json, or take it out of the file."
        )


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} others)" if len(names) > 1 else ""


def _num_blocks(size: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-number // BLOCK) for number in size)


def check_tokens(folder: str | Path, shape: ModelShape, tokenizer: Any) -> None:
    """Refuse a tokenizer that writes ids for which the model has no embedding, and a generation_config.json that cannot be read.

    Fewer ids than rows are usual: rows are padded to a round number.

    Raises:
        DataError: names the token, or the file.
    """
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: int(item[1]), default=("", -1))
    if highest >= shape.vocab_size:
        raise DataError(
            f"the tokenizer of {folder} has token {token!r} with id {highest}, and the model has {shape.vocab_size} rows (vocab_size); "
            "take the token out of the tokenizer, or add rows to the embedding."
        )
    _check_generation_config(Path(folder) / "generation_config.json", shape)


def _check_generation_config(path: Path, shape: ModelShape) -> None:
    """The ids that end a response are read from it; vLLM goes on without them where it cannot read the file."""
    if not path.is_file():
        return
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not valid JSON ({error}), and the tokens that end a response are read from it; repair it.") from error
    ends = tree.get("eos_token_id") if isinstance(tree, dict) else ()
    ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not isinstance(tree, dict) or not all(type(item) is int and 0 <= item < shape.vocab_size for item in ids):
        raise DataError(
            f"{path} must hold an object in which eos_token_id is an id below {shape.vocab_size} or a list of them, not "
            f"{json.dumps(ends if isinstance(tree, dict) else tree)}."
        )
