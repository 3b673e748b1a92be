"""The table of public models, against what their authors say of their size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_r1z.errors import DataError
from megatron_r1z.layout.families import hf_tensors, load_shape
from megatron_r1z.layout.known import find_shape, known_models

# Parameters as the models' cards give them, in billions, and of these outside the embeddings where the card says.
BILLIONS = {
    "Qwen/Qwen2.5-1.5B": (1.54, 1.31),
    "Qwen/Qwen2.5-Math-1.5B": (1.54, 1.31),
    "Qwen/Qwen2.5-7B": (7.61, 6.53),
    "Qwen/Qwen2.5-Math-7B": (7.61, 6.53),
    "Qwen/Qwen2.5-32B": (32.5, 31.0),
    "Qwen/Qwen2.5-72B": (72.7, 70.0),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": (32.8, None),
    "Qwen/Qwen3-4B": (4.0, 3.6),
    "Qwen/Qwen3-8B": (8.2, 6.95),
    "Qwen/Qwen3-8B-Base": (8.2, 6.95),
    "Qwen/Qwen3-32B": (32.8, 31.2),
    "meta-llama/Llama-3.2-3B": (3.21, None),
    "lkevinzc/Llama-3.2-3B-NuminaQA": (3.21, None),
    "meta-llama/Llama-3.1-8B": (8.03, None),
    "meta-llama/Llama-3.1-70B": (70.6, None),
}


@pytest.mark.parametrize("name", known_models())
def test_a_known_model_has_as_many_parameters_as_its_card_says(name: str) -> None:
    shape = find_shape(name).shape
    total = sum(spec.numel for spec in hf_tensors(shape))
    embeddings = sum(spec.numel for spec in hf_tensors(shape) if spec.name in ("model.embed_tokens.weight", "lm_head.weight"))
    said, without_embeddings = BILLIONS[name]
    assert total / 1e9 == pytest.approx(said, rel=0.01)
    if without_embeddings is not None:
        assert (total - embeddings) / 1e9 == pytest.approx(without_embeddings, rel=0.01)


def test_the_last_part_of_a_name_is_enough() -> None:
    assert find_shape("models/Qwen2.5-7B") == find_shape("Qwen/Qwen2.5-7B")
    assert find_shape("models/Qwen2.5-7B").source == "Qwen/Qwen2.5-7B"
    assert len({Path(name).name for name in known_models()}) == len(known_models())


def test_a_folder_comes_before_the_table(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen2.5-7B"
    folder.mkdir()
    config = known_models()["Qwen/Qwen2.5-7B"] | {"num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    found = find_shape(str(folder))
    assert (found.shape, found.source, found.is_local) == (load_shape(folder), str(folder), True)
    (folder / "config.json").unlink()
    with pytest.raises(DataError, match="cannot read"):
        find_shape(str(folder))


def test_a_name_that_is_not_known_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        find_shape("models/Qwen9-7B")
    assert str(caught.value).startswith("there is no model folder models/Qwen9-7B, and its name is not one that is known without it; ")
    assert "Qwen2.5-7B" in str(caught.value)
