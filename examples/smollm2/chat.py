"""Ask an exported model in transformers and in vLLM and compare the greedy answers, token by token.

    python examples/smollm2/chat.py runs/smollm2/rl/hf/final ["a question" ...]

Without questions it asks three of its own, in the prompt that the model was trained with. Exit status 1 when an answer differs.
Both sides compute in float32: in bfloat16 two libraries round differently, and a near tie may fall either way.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

SHOTS = Path(__file__).with_name("shots.txt")
QUESTIONS = (
    "Mia had 17 apples and gave 9 to her brother. How many apples does she have left?",
    "A bus has 6 rows of 4 seats. How many seats are there?",
    "Sam read 12 pages on Monday and 15 pages on Tuesday. How many pages did he read in all?",
)
MAX_TOKENS = 48


def main() -> int:
    """Print each question and both answers."""
    folder, questions = sys.argv[1], sys.argv[2:] or QUESTIONS
    shots = SHOTS.read_text(encoding="utf-8").removesuffix("\n")
    prompts = [shots.replace("{question}", question) for question in questions]
    differing = 0
    for question, one, other in zip(questions, ask_transformers(folder, prompts), ask_vllm(folder, prompts), strict=True):
        differing += one != other
        print(f"\n{question}\n  transformers:{one}\n  vLLM:        {other}" + ("" if one == other else "\n  they differ"))
    print(f"\n{len(questions) - differing} of {len(questions)} greedy answers are equal")
    return 1 if differing else 0


def ask_transformers(folder: str, prompts: list[str]) -> list[str]:
    """Greedy answers up to the end of the line."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return [_first_line(tokenizer, _generate(model, tokenizer, prompt)) for prompt in prompts]


def _generate(model: Any, tokenizer: Any, prompt: str) -> list[int]:
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_TOKENS, pad_token_id=tokenizer.eos_token_id)
    tokens: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens


def _first_line(tokenizer: Any, tokens: list[int]) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text.split("\n", 1)[0]


def ask_vllm(folder: str, prompts: list[str]) -> list[str]:
    """Greedy answers up to the end of the line."""
    from vllm import LLM, SamplingParams

    engine = LLM(model=folder, dtype="float32", enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=256 << 20)
    outputs = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, stop="\n"), use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


if __name__ == "__main__":
    sys.exit(main())
