r"""How fast answers are compared: each mode against plain math-verify, two workers against one, and with hostile answers among the rest.

    python benchmarks/grading.py                        pairs made here
    python benchmarks/grading.py --data FOLDER          pairs from the references of FOLDER/*.jsonl (fields `answer` or `answers`)

Half of the pairs are a reference against itself in another spelling, half a reference against another one of the same file. Plain
math-verify is `parse` on both sides and `verify`, warmed up, in this process and run; all rates are of one core. Times on a shared machine
vary: read the ratios, which are measured side by side, and repeat.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_r1z.grading.equality import compare, warm_up
from megatron_r1z.grading.pool import OutcomeKind, WorkerPool

Pair = tuple[str, str]

POISON = ("(99^9)!", "9^{9^{9^9}}", r"\sum_{k=1}^{10^9} \sin(k)", r"\prod_{k=1}^{999999}(k+x)")
"""The first two hang math-verify and the paper's grader, the last two anything that asks sympy for the value."""
TIMEOUT_S = 1.0
OTHER_SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda answer: rf"$\boxed{{{answer}}}$",
    lambda answer: f" {answer}.",
    lambda answer: answer.replace(r"\frac", r"\dfrac"),
    lambda answer: re.sub(r"\\frac\{(\w+)\}\{(\w+)\}", r"(\1)/(\2)", answer),
    lambda answer: f"{answer}.0" if answer.lstrip("-").isdigit() else f"{answer} ",
    lambda answer: rf"\left({answer[1:-1]}\right)" if answer.startswith("(") and answer.endswith(")") else answer.replace("+", " + "),
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with .jsonl files of references")
    parser.add_argument("--pairs", type=int, default=600, help="pairs timed in each mode")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chooser = random.Random(options.seed)
    files = _read_references(options.data) if options.data else [_own_references(chooser)]
    pairs = make_pairs(files, options.pairs, chooser)
    print(f"{len(pairs)} pairs of {sum(map(len, files))} references" + (f" in {options.data}" if options.data else ", made here"))
    measure_modes(pairs)
    measure_pool(make_pairs(files, 20 * options.pairs, chooser))
    measure_poisoned(make_pairs(files, options.pairs, chooser), chooser)


def make_pairs(files: Sequence[Sequence[str]], num_pairs: int, chooser: random.Random) -> list[Pair]:
    """Half of them equal by design, half between two references of one file; files weigh as many references as they have."""
    weights = [len(references) for references in files]
    pairs = []
    for index in range(num_pairs):
        (references,) = chooser.choices(files, weights)
        reference = chooser.choice(references)
        other = chooser.choice(OTHER_SPELLINGS)(reference) if index % 2 == 0 else chooser.choice(references)
        pairs.append((other, reference))
    return pairs


def measure_modes(pairs: Sequence[Pair]) -> None:
    """Comparisons per second of one core, in this process, and the ratio to plain math-verify."""
    from megatron_r1z.grading.reference import compare_fast, compare_math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    modes: dict[str, Callable[[str, str], object]] = {
        "strict": compare,
        "fast": compare_fast,
        "math_verify": compare_math_verify,
        "plain math-verify": _plain_math_verify,
    }
    rates = {}
    for name, function in modes.items():
        for pair in pairs[:20]:
            function(*pair)
        start = time.perf_counter()
        for pair in pairs:
            function(*pair)
        rates[name] = len(pairs) / (time.perf_counter() - start)
    for name, rate in rates.items():
        print(f"{name:18}{rate:9.0f} comparisons/s{rate / rates['plain math-verify']:9.2f} x plain math-verify")


def measure_pool(pairs: Sequence[Pair]) -> None:
    """Two workers against one: `strict`, where handing a pair over costs more than comparing it, and `math_verify`, where it does not."""
    for mode, setup, some in (("strict", _make_strict, pairs), ("math_verify", _make_math_verify, pairs[: len(pairs) // 10])):
        seconds = {}
        for workers in (1, 2):
            pool = WorkerPool(setup, workers, 10 * TIMEOUT_S)
            pool.run(pairs[-40 * workers :])
            start = time.perf_counter()
            pool.run(some)
            seconds[workers] = time.perf_counter() - start
            pool.close()
        rates = ", ".join(f"{workers} worker(s) {len(some) / elapsed:.0f}/s" for workers, elapsed in seconds.items())
        print(f"pool, {mode}: {rates}; two are {seconds[1] / seconds[2]:.2f} x one")


def measure_poisoned(pairs: Sequence[Pair], chooser: random.Random) -> None:
    """One worker with 5 % poisoned answers: the time that the good pairs take in it, cold caches after restarts included."""
    poison = [(chooser.choice(POISON), chooser.choice(pairs)[1]) for _ in range(len(pairs) // 20)]
    mixed = [(pair, True) for pair in pairs] + [(pair, False) for pair in poison]
    chooser.shuffle(mixed)
    rates = []
    for tasks in ([(pair, is_good) for pair, is_good in mixed if is_good], mixed):
        pool = WorkerPool(_make_timed, 1, TIMEOUT_S)
        pool.run(pairs[:40])
        start = time.perf_counter()
        outcomes = pool.run([pair for pair, _ in tasks])
        wall_s = time.perf_counter() - start
        pool.close()
        killed = sum(outcome.kind is not OutcomeKind.DONE for outcome in outcomes)
        good_s = sum(outcome.result or 0.0 for outcome, (_, is_good) in zip(outcomes, tasks, strict=True) if is_good)
        rates.append(len(pairs) / good_s)
        print(f"poisoned, strict, 1 worker: {len(tasks) - len(pairs)} hostile, {killed} killed, {wall_s:.1f} s; the rest {rates[-1]:.0f}/s")
    print(f"poisoned, strict: rate of the rest {rates[1] / rates[0] - 1:+.0%}")


def _make_strict() -> Callable[[Pair], object]:
    """Set a worker up."""
    warm_up()
    return lambda pair: compare(*pair)


def _make_math_verify() -> Callable[[Pair], object]:
    from megatron_r1z.grading import reference

    reference.warm_up()
    return lambda pair: reference.compare_math_verify(*pair)


def _make_timed() -> Callable[[Pair], float]:
    """Set a worker up that answers with the processor seconds of each comparison, on which other processes have no say."""
    strict = _make_strict()

    def seconds(pair: Pair) -> float:
        start = time.process_time()
        strict(pair)
        return time.process_time() - start

    return seconds


def _plain_math_verify(answer: str, reference: str) -> object:
    from math_verify import parse, verify

    return verify(parse(f"${reference}$", parsing_timeout=None), parse(f"${answer}$", parsing_timeout=None), timeout_seconds=None)


def _read_references(folder: Path) -> list[list[str]]:
    files = []
    for path in sorted(folder.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        files.append([reference for row in rows for reference in row.get("answers") or [row["answer"]]])
    if not files:
        raise SystemExit(f"there is no .jsonl file in {folder}")
    return files


def _own_references(chooser: random.Random) -> list[str]:
    """References as question sets have them: two thirds numbers, the rest expressions, intervals, tuples and units."""

    def small() -> int:
        return chooser.randint(2, 99)

    shapes: tuple[Callable[[], str], ...] = (
        lambda: str(chooser.randint(-50, 2000)),
        lambda: str(small()),
        lambda: rf"\frac{{{small()}}}{{{small()}}}",
        lambda: rf"\frac{{{small()}\pi}}{{{small()}}}",
        lambda: rf"{small()}\sqrt{{{small()}}}",
        lambda: rf"x^2-{small()}x+{small()}",
        lambda: rf"({small()}, {small()})",
        lambda: rf"[{small()},\infty)",
        lambda: rf"{small()}\text{{ cm}}",
        lambda: rf"\frac{{\sqrt{{{small()}}}-{small()}}}{{{small()}}}",
    )
    return [shape() for _ in range(300) for shape in chooser.choices(shapes, (8, 4, 3, 1, 2, 1, 1, 1, 1, 1))]


if __name__ == "__main__":
    main()
