"""Tokens per second of one policy step beside a plain transformers model, and packed beside padded, in one run.

    python benchmarks/train_step.py

A step is forward pass, backward pass and optimizer step over the same samples with the same loss and the same float32 weights: loss and
gradient norm of all ways are compared before anything is timed. The model is a random Llama; the samples are as long as word problems:
prompts of 60 to 200 tokens (few-shot) or 20 to 60 (chat), responses of mostly 10 to 60, cut at 128. Tokens are those of the samples,
prompts included, whatever a way adds to them.

- `packed`, `padded`: `MegatronPolicy`, as in the loop and with `parallel.pad_sequences`.
- `transformers`: sdpa attention, samples sorted by length and padded on the right in micro-batches of the same token budget, where causal
  attention needs no mask; logits of all positions, cross-entropy, torch's fused AdamW and gradient clipping. It runs on one thread.
- `transformers, response rows`: the same, but only the positions that predict a response token go through the output layer.

Ranks have one thread each. Ways take turns, and the fastest step of each counts. CPU time is the first rank's and leaves out waiting: where
it is well below the time of the step, other processes had the cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from measuring import run_ranks
from torch import Tensor
from torch.nn import functional as F

from megatron_r1z.assemble import make_policy, plan_weights
from megatron_r1z.config import AlgorithmConfig, ModelConfig, OptimizerConfig, ParallelConfig, PrecisionConfig
from megatron_r1z.objective import OBJECTIVES, clipped_losses, make_loss
from megatron_r1z.packing import PackingRules, pack
from megatron_r1z.policy.parallel import start_process_group
from megatron_r1z.policy.policy import MegatronPolicy, TrainBatch
from megatron_r1z.record.tables import align
from megatron_r1z.types import Sample

VOCAB = 8192
BUDGET_TOKENS = 1024
LONGEST_RESPONSE = 128
PROMPTS = {"few-shot": (60, 200), "chat": (20, 60)}
"""Shortest and longest prompt."""
OPTIMIZER = OptimizerConfig(lr=1e-6)
DENOMINATOR = OBJECTIVES["drgrpo"].denominator

Step = Callable[[], tuple[float, float]]
"""Takes one optimizer step; returns loss and gradient norm."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """What was measured under one split."""

    tokens: int
    """Of all samples."""
    seconds: dict[str, tuple[float, float]]
    """Of the fastest step by way: until all ranks were through, and of the first rank's CPU time."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a policy is built from."""

    model: ModelConfig
    parallel: ParallelConfig
    precision: PrecisionConfig


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="steps timed of each way, of which the fastest counts")
    parser.add_argument("--samples", type=int, default=32, help="samples of a step")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=384, help="a multiple of 128: heads have 64 dimensions")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--prompts", choices=PROMPTS, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        print(json.dumps(dataclasses.asdict(measure(options))))
        return
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), options.layers, options.hidden)
        for num_ranks, prompts in ((1, "few-shot"), (1, "chat"), (2, "few-shot")):
            print_table(prompts, num_ranks, measure_prompts(folder, num_ranks, prompts))


def save_model(folder: Path, layers: int, hidden: int) -> None:
    """A random Llama in Hugging Face format."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def print_table(prompts: str, num_ranks: int, result: Figures) -> None:
    """One line per way, with the ratio of the packed way to it."""
    tokens, packed = result.tokens, result.seconds["packed"][0]
    rows = [("way", "ms a step", "CPU ms", "tokens/s", "packed is faster by")]
    rows += [
        (way, f"{wall * 1e3:.0f}", f"{cpu * 1e3:.0f}", f"{tokens / wall:.0f}", f"{wall / packed:.2f}" if way != "packed" else "-")
        for way, (wall, cpu) in result.seconds.items()
    ]
    split = "one process" if num_ranks == 1 else f"TP{num_ranks}"
    print("\n".join([f"{prompts} prompts, {tokens} tokens, {split}", *align(rows), ""]), flush=True)


def measure_prompts(model: str, num_ranks: int, prompts: str) -> Figures:
    """From fresh processes; the first rank speaks for all."""
    arguments = [*sys.argv[1:], "--model", model, "--ranks", str(num_ranks), "--prompts", prompts]
    return Figures(**json.loads(run_ranks(__file__, arguments, num_ranks, threads=1)[0]))


def measure(options: argparse.Namespace) -> Figures:
    """One rank: every way takes a first step that is compared, then its turns."""
    torch.set_num_threads(1)
    samples = draw_samples(options.samples, *PROMPTS[options.prompts])
    start_process_group(600)
    steps = make_steps(options, samples)
    check_equal({way: step() for way, step in steps.items()})
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in steps}
    for _ in range(options.repeats):
        for way, step in steps.items():
            seconds[way].append(timed(step))
    dist.destroy_process_group()
    return Figures(sum(len(sample.token_ids) for sample in samples), {way: min(values) for way, values in seconds.items()})


def draw_samples(count: int, shortest: int, longest: int) -> list[Sample]:
    """Groups of four responses to a prompt; lengths of responses are log-normal with median 28, cut."""
    draw = random.Random(0)
    samples = []
    prompt: list[int] = []
    for index in range(count):
        if index % 4 == 0:
            prompt = [draw.randrange(VOCAB) for _ in range(draw.randint(shortest, longest))]
        length = min(max(int(draw.lognormvariate(3.33, 0.6)), 4), LONGEST_RESPONSE)
        response = [draw.randrange(VOCAB) for _ in range(length)]
        samples.append(Sample(str(index), (*prompt, *response), len(prompt), draw.choice((-0.25, 0.75)), 1.0, (), 0))
    return samples


def make_steps(options: argparse.Namespace, samples: Sequence[Sample]) -> dict[str, Step]:
    """The ways that are compared; transformers works on the first rank while the others wait."""
    parallel = ParallelConfig(num_ranks=options.ranks, tensor_parallel_size=options.ranks, micro_batch_tokens=BUDGET_TOKENS)
    settings = Settings(ModelConfig(path=options.model), parallel, PrecisionConfig(policy="fp32"))
    policy: Any = make_policy(settings, plan_weights(settings))
    policy.start_training(make_loss(AlgorithmConfig(iterations=1)), OPTIMIZER)
    rules = policy.packing_rules()
    steps = {"packed": megatron_step(policy, samples, rules)}
    if options.ranks == 1:
        steps["padded"] = megatron_step(policy, samples, dataclasses.replace(rules, pad_sequences=True))
    for way, all_rows in (("transformers", True), ("transformers, response rows", False)):
        steps[way] = transformers_step(options.model, samples, all_rows=all_rows) if options.rank == 0 else lambda: (0.0, 0.0)
    return steps


def megatron_step(policy: MegatronPolicy, samples: Sequence[Sample], rules: PackingRules) -> Step:
    """The package's own step."""

    def step() -> tuple[float, float]:
        batch = pack(samples, rules, 0, 0, token_weight=lambda _length: 1.0, denominator=denominator(samples))
        stats = policy.update(TrainBatch(batch))
        return stats.loss, stats.grad_norm

    return step


def denominator(samples: Sequence[Sample]) -> int:
    """That of Dr. GRPO."""
    return DENOMINATOR([sample.response_length for sample in samples], LONGEST_RESPONSE)


def transformers_step(folder: str, samples: Sequence[Sample], *, all_rows: bool) -> Step:
    """What one would write with transformers and torch alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, weight_decay=OPTIMIZER.weight_decay, fused=True
    )

    def step() -> tuple[float, float]:
        total = 0.0
        for batch in padded_batches(samples):
            loss = batch_loss(model, batch, all_rows=all_rows) / denominator(samples)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        return total, norm.item()

    return step


def padded_batches(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Neighbours in length, together at most the budget when padded to the longest."""
    batch: list[Sample] = []
    for sample in sorted(samples, key=lambda sample: -len(sample.token_ids)):
        if batch and (len(batch) + 1) * len(batch[0].token_ids) > BUDGET_TOKENS:
            yield batch
            batch = []
        batch.append(sample)
    yield batch


def batch_loss(model: Any, batch: Sequence[Sample], *, all_rows: bool) -> Tensor:
    """The summed loss of a micro-batch [B, L]."""
    lengths = [len(sample.token_ids) for sample in batch]
    tokens_BL = torch.tensor([[*sample.token_ids, *[0] * (max(lengths) - len(sample.token_ids))] for sample in batch])
    places_BL = torch.arange(max(lengths))[None]
    starts_B1 = torch.tensor([[sample.prompt_length - 1] for sample in batch])
    rows_BL = (places_BL >= starts_B1) & (places_BL < torch.tensor(lengths)[:, None] - 1)
    advantages_BL = torch.tensor([[sample.advantage] for sample in batch]).expand_as(tokens_BL)
    targets_BL = tokens_BL.roll(-1, 1)
    if all_rows:
        logits = model(tokens_BL, use_cache=False).logits
        logprobs_R = -F.cross_entropy(logits.flatten(0, 1), targets_BL.flatten(), reduction="none").view_as(tokens_BL)[rows_BL]
    else:
        hidden_BLH = model.model(tokens_BL, use_cache=False).last_hidden_state
        logprobs_R = -F.cross_entropy(model.lm_head(hidden_BLH[rows_BL]), targets_BL[rows_BL], reduction="none")
    terms = clipped_losses(logprobs_R, logprobs_R.detach(), advantages_BL[rows_BL], torch.ones(()), 0.2, 0.2)
    return terms.losses_R.sum()


def check_equal(results: Mapping[str, tuple[float, float]]) -> None:
    """All ways are about to do the same work."""
    if dist.get_rank() != 0:
        return
    for way, found in results.items():
        if any(abs(one / other - 1) > 1e-3 for one, other in zip(found, results["packed"], strict=True)):
            raise SystemExit(f"loss and gradient norm are {found} by '{way}' and {results['packed']} packed")


def timed(step: Step) -> tuple[float, float]:
    """Seconds until all ranks are through, and of this rank's CPU time."""
    dist.barrier()
    start, used = time.perf_counter(), time.process_time()
    step()
    dist.barrier()
    return time.perf_counter() - start, time.process_time() - used


if __name__ == "__main__":
    main()
