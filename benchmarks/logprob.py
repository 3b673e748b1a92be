"""Log-probs of response tokens by tiles (`policy/logprob.py`) beside the plain way that makes all logits: time and peak memory.

    python benchmarks/logprob.py                               # SmolLM2-135M's head, then Qwen2.5-0.5B's; float32 and bfloat16
    python benchmarks/logprob.py --heads SmolLM2-135M --threads 2

Both ways take random hidden states through the head and give the gradients of weight and hidden states; all matrix products are counted.
The plain way is `log_softmax((hidden @ weight.t()).float()).gather(targets)` under autograd: no entropy, no temperature. The tiles compute
both, and a matrix product more, because they make each tile of logits twice.

Times are of 2048 tokens, both ways in turn in one process, the fastest of each pass: CPU seconds with one thread, which other work on
the machine hardly touches, seconds on the clock with more. Memory is measured in a process of its own for each line: what it has at most
beyond weight, hidden states and libraries. "Beyond gradients" leaves out the gradients of weight and hidden states (these in float32),
which both ways have to make. Where the plain way would take more than 12 GiB, its line is of fewer tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from measuring import read_status, reset_peak
from torch import Tensor

from megatron_r1z.policy.logprob import vocab_parallel_logprobs
from megatron_r1z.record.tables import align

TIMED_TOKENS = 2048
TOKENS = (2048, 8192)
"""Of the lines about memory."""
LIMIT_BYTES = 12 << 30
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Head:
    """Sizes of a language-model head."""

    hidden: int
    vocab: int


HEADS = {"SmolLM2-135M": Head(576, 49152), "Qwen2.5-0.5B": Head(896, 151936)}


@dataclass(frozen=True)
class Case:
    """Tensors of one measurement, R tokens."""

    hidden_RH: Tensor
    weight_VH: Tensor
    targets_R: Tensor
    factors_R: Tensor
    """Gradient of the log-probs."""


def make_case(head: Head, tokens: int, dtype: torch.dtype) -> Case:
    """Random logits with a standard deviation of about 2.5."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(head.vocab, head.hidden, generator=generator, dtype=dtype).mul_(2.5 / head.hidden**0.5)
    hidden = torch.randn(tokens, head.hidden, generator=generator, dtype=dtype)
    targets = torch.randint(head.vocab, (tokens,), generator=generator)
    return Case(hidden.requires_grad_(), weight.requires_grad_(), targets, torch.randn(tokens, generator=generator))


def all_logits(case: Case) -> Tensor:
    """The plain way."""
    logits_RV = (case.hidden_RH @ case.weight_VH.t()).float()
    return torch.log_softmax(logits_RV, dim=1).gather(1, case.targets_R[:, None]).squeeze(1)


def tiles(case: Case) -> Tensor:
    """The package's way."""
    size = case.weight_VH.shape[0]
    logprobs, _ = vocab_parallel_logprobs(
        case.hidden_RH, case.weight_VH, case.targets_R, temperature=1.0, vocab_size=size, vocab_start=0, group=None
    )
    return logprobs


WAYS: dict[str, Callable[[Case], Tensor]] = {"all logits": all_logits, "tiles": tiles}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="passes timed, of which the fastest counts")
    parser.add_argument("--peak", nargs=4, metavar=("WAY", "HEAD", "DTYPE", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        way, name, dtype, tokens = options.peak
        print(json.dumps(measure_peak(way, HEADS[name], DTYPES[dtype], int(tokens))))
        return
    for name in options.heads:
        for dtype in DTYPES:
            title = f"{name}'s head, {HEADS[name].hidden} x {HEADS[name].vocab}, {dtype}, {options.threads} thread(s)"
            print("\n".join([title, *align(time_table(HEADS[name], DTYPES[dtype], options)), ""]), flush=True)
            print("\n".join([*align(memory_table(name, dtype, options)), ""]), flush=True)


def time_table(head: Head, dtype: torch.dtype, options: argparse.Namespace) -> list[tuple[str, ...]]:
    """A line for each way."""
    case = make_case(head, TIMED_TOKENS, dtype)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    passes: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(options.repeats):
        for way in WAYS:
            passes[way].append(time_passes(way, case, clock))
    best = {way: tuple(min(values) for values in zip(*times, strict=True)) for way, times in passes.items()}
    rows: list[tuple[str, ...]] = [("way", "tokens", "forward s", "backward s", "sum s", "ratio")]
    for way, (forward, backward) in best.items():
        ratio = (forward + backward) / sum(best["all logits"])
        rows.append((way, str(TIMED_TOKENS), f"{forward:.2f}", f"{backward:.2f}", f"{forward + backward:.2f}", f"{ratio:.2f}"))
    return rows


def time_passes(way: str, case: Case, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of forward and backward."""
    case.hidden_RH.grad = case.weight_VH.grad = None
    start = clock()
    logprobs = WAYS[way](case)
    middle = clock()
    torch.autograd.backward(logprobs, case.factors_R)
    return middle - start, clock() - middle


def memory_table(name: str, dtype: str, options: argparse.Namespace) -> list[tuple[str, ...]]:
    """A line for each way and number of tokens; the ratio is to the plain way above it."""
    rows: list[tuple[str, ...]] = [("way", "tokens", "peak MB", "ratio", "beyond gradients MB", "ratio")]
    for tokens in TOKENS:
        plain_tokens = tokens
        while 3 * 4 * plain_tokens * HEADS[name].vocab > LIMIT_BYTES:  # logits or their gradient, log-probs, gradient of those
            plain_tokens //= 2
        plain = in_fresh_process("all logits", name, dtype, plain_tokens, options.threads)
        tiled = in_fresh_process("tiles", name, dtype, tokens, options.threads)
        rows.append(("all logits", str(plain_tokens), f"{plain[0] / 1e6:.0f}", "1.00", f"{plain[1] / 1e6:.0f}", "1.00"))
        ratios = [f"{ours / theirs:.3f}" for ours, theirs in zip(tiled, plain, strict=True)]
        rows.append(("tiles", str(tokens), f"{tiled[0] / 1e6:.0f}", ratios[0], f"{tiled[1] / 1e6:.0f}", ratios[1]))
    return rows


def in_fresh_process(way: str, name: str, dtype: str, tokens: int, threads: int) -> list[int]:
    """What `measure_peak` returns, from a new interpreter."""
    command: list[Any] = [sys.executable, __file__, "--threads", threads, "--peak", way, name, dtype, tokens]
    output = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True).stdout
    return [int(value) for value in json.loads(output.splitlines()[-1])]


def measure_peak(way: str, head: Head, dtype: torch.dtype, tokens: int) -> tuple[int, int]:
    """Bytes at most beyond what was there before forward and backward, and without the gradients."""
    time_passes(way, make_case(Head(head.hidden, 256), 64, dtype), time.perf_counter)  # libraries load what they need
    case = make_case(head, tokens, dtype)
    before = reset_peak()
    time_passes(way, case, time.perf_counter)
    peak = read_status("VmHWM") - before
    return peak, peak - case.weight_VH.nbytes - case.hidden_RH.numel() * 4


if __name__ == "__main__":
    main()
