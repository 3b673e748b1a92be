"""Write everything the quickstart trains on: model folder, pre-training corpus, questions, held-out questions.

    python examples/quickstart/make_task.py [folder]

The same seed writes the same bytes. Takes some seconds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from task import EOS, LEVELS, PAD, TOKENS, Puzzle, draw_puzzles

NUM_DOCUMENTS = 45_000
QUESTION_LEVELS = ("sum-4", "sum-5", "sum-6")
NUM_QUESTIONS = 2_000
"""Of each level, different from one another."""
NUM_HELD_OUT = 300
"""Of each level; neither in the questions nor in the corpus."""

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": len(TOKENS),
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 352,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "use_cache": True,
    "use_sliding_window": False,
    "bos_token_id": None,
    "eos_token_id": TOKENS.index(EOS),
    "pad_token_id": TOKENS.index(PAD),
    "dtype": "float32",
}
"""607,616 parameters."""
FP8_CONFIG = {name: value for name, value in CONFIG.items() if name != "use_sliding_window"} | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "intermediate_size": 256,
    "attention_bias": False,
    "mlp_bias": False,
}
"""For configs/quickstart-fp8-emulated.yaml: no bias, and every matrix of each of two ranks is a multiple of 128. 889,088 parameters."""
MODELS = {"qwen2": CONFIG, "llama-fp8": FP8_CONFIG}


def main() -> None:
    """Parse the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/quickstart/task"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", choices=MODELS, default="qwen2", help="llama-fp8: one whose matrices FP8 blocks fit")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=QUESTION_LEVELS, help="of the questions; the corpus has all")
    parser.add_argument("--questions", type=int, default=NUM_QUESTIONS, metavar="N", help="of each level (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=NUM_HELD_OUT, metavar="N", help="of each level (default: %(default)s)")
    arguments = parser.parse_args()
    make_task(
        arguments.folder,
        arguments.seed,
        num_questions=arguments.questions,
        num_held_out=arguments.held_out,
        levels=arguments.levels,
        config=MODELS[arguments.model],
    )
    print(f"wrote model/, corpus.jsonl, questions.jsonl and held_out/ to {arguments.folder}")


def make_task(
    folder: Path,
    seed: int = 0,
    num_documents: int = NUM_DOCUMENTS,
    num_questions: int = NUM_QUESTIONS,
    num_held_out: int = NUM_HELD_OUT,
    levels: Sequence[str] = QUESTION_LEVELS,
    config: Mapping[str, Any] = CONFIG,
) -> None:
    """Write the whole task into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder / "model", config)
    held_out = {level: draw_puzzles(level, num_held_out, Random(f"{seed}/held_out/{level}")) for level in levels}
    avoid = frozenset(puzzle.prompt for puzzles in held_out.values() for puzzle in puzzles)
    questions = [puzzle for level in levels for puzzle in draw_puzzles(level, num_questions, Random(f"{seed}/questions/{level}"), avoid)]
    for level, puzzles in held_out.items():
        _save_rows(folder / "held_out" / f"{level}.jsonl", map(_make_question, puzzles))
    _save_rows(folder / "questions.jsonl", map(_make_question, questions))
    _save_rows(folder / "corpus.jsonl", make_documents(num_documents, Random(f"{seed}/corpus"), avoid))


def make_documents(count: int, generator: Random, avoid: frozenset[str]) -> Iterable[dict[str, str]]:
    """Prompt and noisy worked response of `count` puzzles over all levels in equal shares, none of them with a prompt in `avoid`."""
    levels = list(LEVELS.values())
    while count:
        level = generator.choice(levels)
        puzzle = level.make(generator)
        if puzzle.prompt not in avoid:
            yield {"prompt": puzzle.prompt, "response": level.write(puzzle, generator), "level": level.name}
            count -= 1


def save_model(folder: Path, config: Mapping[str, Any] = CONFIG) -> None:
    """A model folder without weights: configuration and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {"eos_token_id": CONFIG["eos_token_id"], "pad_token_id": CONFIG["pad_token_id"]}
    _save_json(folder / "config.json", dict(config))
    _save_json(folder / "generation_config.json", special)
    _save_json(folder / "tokenizer.json", _make_tokenizer())
    _save_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": EOS,
            "pad_token": PAD,
            "unk_token": EOS,
            "clean_up_tokenization_spaces": False,
        },
    )


def _make_tokenizer() -> dict[str, Any]:
    """The tokenizer.json of a table of whole words, put together without separators.

    Every word is an added token: those are cut out of the text before anything else happens. transformers 5 loads a `qwen2` folder with
    Qwen's own pre-tokenizer and decoder in place of the ones written here, and added tokens are what both treat alike.
    """
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_make_added_token(index, word) for index, word in enumerate(TOKENS)],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {"type": "BPE", "vocab": {word: index for index, word in enumerate(TOKENS)}, "merges": []},
    }


def _make_added_token(index: int, word: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": word, **flags, "special": word in (PAD, EOS)}


def _make_question(puzzle: Puzzle) -> dict[str, str]:
    return {"problem": puzzle.prompt, "answer": puzzle.answer, "level": puzzle.level}


def _save_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def _save_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
