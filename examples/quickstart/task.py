r"""Two families of arithmetic puzzles that a model of half a million parameters can learn: Sum and Pick.

    Sum-5   " Sum7+5+8+1+2?"       "7+5=12+8=20+1=21+2=23.\boxed{23}"
    Pick-4  " Pick2489 make21?"    " try4+8+9=21 need21 ok.\boxed{489}"

Sum is solvable: the running chain leads to the answer, and the documents differ in how carelessly it is added up. Pick (subset sum) is
hard: a document shows one attempt, its sum beside the target, and after a failed attempt mostly rechecks of the same text, which cost
tokens and cannot change the answer. What a response looks like never tells how careful the rest of its document is.
Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from random import Random

PAD, EOS = "<pad>", "<eos>"
TOKENS = (
    *(PAD, EOS),
    *"0123456789",
    *"+=,.?",
    *(" Sum", " Pick", " make", " try", " ok", " no", " recheck", " need"),
    *("\\boxed{", "}"),
)
"""The whole vocabulary, in the order of the token ids; a leading space is part of the token."""

CAREFUL_SHARE = 0.35
"""Sum documents without a slip."""
SLIP_CHANCE = 0.45
"""Of each partial sum in the other Sum documents."""
SLIPS = (-2, -1, 1, 2, 10)
RIGHT_PICK_SHARE = 0.35
"""Pick documents that try the right subset."""
RECHECK_CHANCE = {True: 0.2, False: 0.6}
"""Chance of one more recheck after an attempt that was right or wrong."""


@dataclass(frozen=True, slots=True)
class Puzzle:
    """A prompt and its answer."""

    level: str
    """Family and size, such as `sum-4`."""
    prompt: str
    answer: str


def make_sum(size: int, generator: Random) -> Puzzle:
    """Add up `size` digits from 1 to 9."""
    digits = [generator.randint(1, 9) for _ in range(size)]
    return Puzzle(f"sum-{size}", f" Sum{_join(digits)}?", str(sum(digits)))


def write_sum(puzzle: Puzzle, generator: Random) -> str:
    """A running chain and the box, right in somewhat more than `CAREFUL_SHARE` of the cases; slips carry on to the end."""
    digits = [int(digit) for digit in puzzle.prompt.removeprefix(" Sum").removesuffix("?").split("+")]
    careful = generator.random() < CAREFUL_SHARE
    total, chain = digits[0], str(digits[0])
    for digit in digits[1:]:
        total += digit
        if not careful and generator.random() < SLIP_CHANCE:
            total = max(0, total + generator.choice(SLIPS))
        chain += f"+{digit}={total}"
    return f"{chain}.{_box(str(total))}"


def make_pick(size: int, generator: Random) -> Puzzle:
    """Find the one subset, of at least two of `size` different digits, that adds up to the target."""
    while True:
        digits = sorted(generator.sample(range(1, 10), size))
        subset = _draw_subset(digits, generator)
        target = sum(subset)
        if _count_subsets(digits, target) == 1:
            return Puzzle(f"pick-{size}", f" Pick{_write(digits)} make{target}?", _write(subset))


def write_pick(puzzle: Puzzle, generator: Random) -> str:
    """One attempt, its verdict, rechecks, the box."""
    digits, target = puzzle.prompt.removeprefix(" Pick").removesuffix("?").split(" make")
    right = generator.random() < RIGHT_PICK_SHARE
    attempt = puzzle.answer if right else _write(_draw_subset([int(digit) for digit in digits], generator))
    total = sum(map(int, attempt))
    hit = total == int(target)
    claim = f"{'+'.join(attempt)}={total} need{target} {'ok' if hit else 'no'}."
    text = f" try{claim}"
    while generator.random() < RECHECK_CHANCE[hit]:
        text += f" recheck{claim}"
    return text + _box(attempt)


@dataclass(frozen=True, slots=True)
class Level:
    """One size of one family."""

    name: str
    make: Callable[[Random], Puzzle]
    write: Callable[[Puzzle, Random], str]
    """A noisy worked solution of a puzzle, for the pre-training corpus."""


def _make_levels() -> dict[str, Level]:
    sums = [Level(f"sum-{size}", lambda generator, size=size: make_sum(size, generator), write_sum) for size in (3, 4, 5, 6)]
    picks = [Level(f"pick-{size}", lambda generator, size=size: make_pick(size, generator), write_pick) for size in (4, 5, 6)]
    return {level.name: level for level in (*sums, *picks)}


LEVELS = _make_levels()
"""All levels by name."""


def draw_puzzles(level: str, count: int, generator: Random, avoid: frozenset[str] = frozenset()) -> list[Puzzle]:
    """`count` puzzles with different prompts, none of them in `avoid`.

    Raises:
        ValueError: the level has too few puzzles.
    """
    found: dict[str, Puzzle] = {}
    for _ in range(100 * count):
        puzzle = LEVELS[level].make(generator)
        if puzzle.prompt not in avoid:
            found[puzzle.prompt] = puzzle
        if len(found) == count:
            break
    if len(found) < count:
        raise ValueError(f"{level}: found {len(found)} different puzzles and {count} were asked for; ask for fewer.")
    return list(found.values())


def _draw_subset(digits: list[int], generator: Random) -> list[int]:
    return sorted(generator.sample(digits, generator.randint(2, len(digits) - 1)))


def _count_subsets(digits: list[int], target: int) -> int:
    return sum(sum(subset) == target for size in range(2, len(digits) + 1) for subset in combinations(digits, size))


def _join(digits: list[int]) -> str:
    return "+".join(map(str, digits))


def _write(digits: list[int]) -> str:
    return "".join(map(str, digits))


def _box(answer: str) -> str:
    return f"\\boxed{{{answer}}}"
