"""What kind of weights a folder holds, told by the files in it. Standard library only."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Kind = Literal["hf", "megatron"]
"""A model folder in Hugging Face format, or a checkpoint by Megatron's `dist_checkpointing`."""

STATE_FILE = "state.json"
"""Written last into a checkpoint of a run: where the run stood."""
WEIGHTS_FILE = "weights.json"
"""Written last into a checkpoint of weights alone: where they come from."""
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
    "*.jinja",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)
"""Files that go along with the weights, as patterns in the model's folder."""
_CODE_KEY = "auto_map"
"""Where config.json or tokenizer_config.json name classes in Python files of the folder: `modeling_x.XForCausalLM`."""

_SIGNS: dict[Kind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "hf": (("config.json",), (SINGLE_FILE, INDEX_FILE)),
    "megatron": ((".metadata",), (STATE_FILE, WEIGHTS_FILE)),
}
"""Files of which a folder has all, and files of which it has one at least."""


def kind_of(folder: str | Path) -> Kind | None:
    """What a complete folder of weights holds; None for anything else."""
    for kind, (all_of, one_of) in _SIGNS.items():
        if all((Path(folder) / name).exists() for name in all_of) and any((Path(folder) / name).exists() for name in one_of):
            return kind
    return None


def companions(model_folder: Path) -> list[Path]:
    """The files that go along with the weights of a folder and say how they are used, but for config.json.

    Python files do if a configuration names some in `auto_map`; those may import one another, so all of them.
    """
    patterns = [*_COMPANIONS, *(["*.py"] if _names_code(model_folder) else [])]
    return sorted({path for pattern in patterns for path in model_folder.glob(pattern) if path.is_file()})


def _names_code(model_folder: Path) -> bool:
    paths = (model_folder / "config.json", model_folder / "tokenizer_config.json")
    return any(f'"{_CODE_KEY}"' in path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file())
