"""Reward functions of the user's own: how their files are loaded, what they may be and return, and what is refused before a run."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_r1z.errors import DataError
from megatron_r1z.grading.functions import FunctionPool, check_reward_function, to_number
from megatron_r1z.grading.pool import Outcome, OutcomeKind

Write = Callable[[str], str]
TASK = ("5", ("5",), "stop")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(source: str) -> str:
        (tmp_path / "reward.py").write_text(textwrap.dedent(source), encoding="utf-8")
        return f"{tmp_path / 'reward.py'}:reward"

    return write


def rate(function: str, *responses: str, timeout_s: float = 30.0) -> list[Outcome[float]]:
    """What workers make of responses to a question whose answer is 5."""
    pool = FunctionPool(function, 1, timeout_s)
    try:
        return pool.rate([(response, ("5",), "stop") for response in responses])
    finally:
        pool.close()


GOOD = {
    "a function": "def reward(response, answers, finish_reason): return float(response in answers)",
    "defaults": "reward = lambda response, answers, finish_reason='stop', weight=1.0: weight * (response in answers)",
    "any arguments": "def reward(*arguments): return arguments[0] in arguments[1]",
    "a dataclass with postponed annotations": """
        from __future__ import annotations
        from dataclasses import KW_ONLY, dataclass
        @dataclass
        class Settings:
            _: KW_ONLY
            weight: float = 1.0
        def reward(response, answers, finish_reason): return Settings().weight * (response in answers)
    """,
    "an object": """
        class Reward:
            def __call__(self, response, answers, finish_reason): return response in answers
        reward = Reward()
    """,
    "a bound method": """
        class Reward:
            def rate(self, response, answers, finish_reason): return response in answers
        reward = Reward().rate
    """,
    "a partial": """
        from functools import partial
        def weigh(weight, response, answers, finish_reason): return weight * (response in answers)
        reward = partial(weigh, 1.0)
    """,
    "a partial of an object": """
        from functools import partial
        class Reward:
            def __call__(self, response, answers, finish_reason, weight): return weight * (response in answers)
        reward = partial(Reward(), weight=1.0)
    """,
    "a wrapped function": """
        import functools
        @functools.lru_cache
        def reward(response, answers, finish_reason): return response in answers
    """,
    "a call that is looked up in its own module": """
        import sys
        def reward(response, answers, finish_reason): return sys.modules[reward.__module__].helper(response, answers)
        def helper(response, answers): return response in answers
    """,
}


@pytest.mark.parametrize("source", GOOD.values(), ids=GOOD)
def test_what_can_be_called_is_a_reward_function(write: Write, source: str) -> None:
    function = write(source)
    check_reward_function(function)
    assert [outcome.result for outcome in rate(function, "5", "6")] == [1.0, 0.0]


BAD = {
    "no such name": ("def rewards(response, answers, finish_reason): ...", "defines no 'reward'"),
    "a value": ("reward = 3", "is not a function"),
    "too few arguments": ("def reward(response, answers): ...", "must take"),
    "too many arguments": ("def reward(response, answers, finish_reason, more): ...", "must take"),
    "keywords only": ("def reward(*, response, answers, finish_reason): ...", "must take"),
    "a builtin": ("reward = max", "cannot tell what arguments 'reward' in .* takes; wrap it in a def"),
    "a builtin of one argument": ("reward = len", "must take"),
    "a class": ("class reward:\n    def __init__(self, response, answers, finish_reason): ...", "is a class; name an object of it"),
    "asynchronous": ("async def reward(response, answers, finish_reason): return 1.0", "is asynchronous; write it with def"),
    "an asynchronous object": (
        "class Reward:\n    async def __call__(self, response, answers, finish_reason): return 1.0\nreward = Reward()",
        "is asynchronous",
    ),
    "an asynchronous partial": (
        "from functools import partial\nasync def f(w, response, answers, finish_reason): return 1.0\nreward = partial(f, 1)",
        "is asynchronous",
    ),
    "an asynchronous generator": ("async def reward(response, answers, finish_reason): yield 1.0", "is asynchronous"),
    "a generator": ("def reward(response, answers, finish_reason): yield 1.0", "yields; it must return its one number"),
    "a coroutine in disguise": (
        "async def later(): return 1.0\ndef reward(response, answers, finish_reason): return later()",
        "fails on all of 5 responses .* a coroutine in the place of a number; it must not be asynchronous",
    ),
    "nothing": ("def reward(response, answers, finish_reason): ...", "fails on all of 5 .* the reward is None; it must be a finite number"),
    "text": ("def reward(response, answers, finish_reason): return '1.0'", "the reward is '1.0'; it must be a finite number"),
    "not a number": ("def reward(response, answers, finish_reason): return float('nan')", "the reward is nan; it must be a finite number"),
    "an unknown name": ("def reward(response, answers, finish_reason): return responce", "fails on all of 5 .* NameError: name 'responce'"),
    "the end of the process": (
        "import sys\ndef reward(response, answers, finish_reason): sys.exit(3)",
        "fails on all of 5 .* SystemExit: 3",
    ),
    "too slow": (
        "import time\ndef reward(response, answers, finish_reason): time.sleep(60)",
        r"takes longer than grading\.timeout_s \(2 s\) for a response of .* characters; raise it",
    ),
    "no Python": ("def reward(:", "fails to load: SyntaxError"),
    "a library that is not there": ("import no_such_module_of_ours", "fails to load: ModuleNotFoundError"),
    "the end of the process on loading": ("import sys\nsys.exit('no')", "fails to load: SystemExit: no"),
    "several lines": ("raise ValueError('a\\nb.')", r"fails to load: ValueError: a b\.$"),
}


@pytest.mark.parametrize(("source", "complaint"), BAD.values(), ids=BAD)
def test_what_no_response_could_make_good_is_refused_in_one_sentence(write: Write, source: str, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        check_reward_function(write(source), timeout_s=2.0)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("function", "complaint"), [("reward", "path.py:name"), ("/no/such.py:reward", "no file"), (":x", "path.py:name")])
def test_a_missing_reward_function_is_refused(function: str, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        check_reward_function(function)


@pytest.mark.parametrize(
    "body",
    [
        "response.split('\\\\boxed{')[1].split('}')[0] in answers",
        "response.split('<answer>')[1].partition('</answer>')[0] in answers",
        "float(response) == float(answers[0])",
        "1 / (finish_reason == 'length')",
        "1 / (response == '')",
        "{'7': 1.0}[answers[0]]",
    ],
)
def test_a_function_that_fails_on_some_responses_is_not_refused(write: Write, body: str) -> None:
    """What does not stand in a response may well raise: it has reward 0 and a verdict of its own."""
    check_reward_function(write(f"def reward(response, answers, finish_reason): return {body}"), answers=("7",))


def test_a_file_that_cannot_be_loaded_in_a_run_says_so_at_once(write: Write) -> None:
    with pytest.raises(DataError, match="fails to load: RuntimeError: no GPU here"):
        rate(write("raise RuntimeError('no GPU here')"), "5")


def test_neighbours_are_imported_when_the_file_is_loaded_and_later(write: Write, tmp_path: Path) -> None:
    (tmp_path / "first_neighbour.py").write_text("VALUE = 1\n")
    (tmp_path / "second_neighbour.py").write_text("from first_neighbour import VALUE\n")
    (tmp_path / "packaged").mkdir()
    (tmp_path / "packaged" / "__init__.py").touch()
    (tmp_path / "packaged" / "part.py").write_text("from . import other\nVALUE = other.VALUE\n")
    (tmp_path / "packaged" / "other.py").write_text("VALUE = 10\n")
    (tmp_path / "plain_folder").mkdir()
    (tmp_path / "plain_folder" / "part.py").write_text("VALUE = 100\n")
    function = write("""
        import second_neighbour
        from plain_folder.part import VALUE
        def reward(response, answers, finish_reason):
            from packaged.part import VALUE as late
            return second_neighbour.VALUE + late + VALUE
    """)
    check_reward_function(function)
    assert [outcome.result for outcome in rate(function, "5")] == [111.0]


def test_neighbours_hide_neither_the_standard_library_nor_by_mere_data_a_library(write: Write, tmp_path: Path) -> None:
    (tmp_path / "colorsys.py").write_text("raise RuntimeError('not this one')\n")
    (tmp_path / "yaml").mkdir()
    (tmp_path / "yaml" / "questions.jsonl").touch()
    function = write("""
        import colorsys, yaml
        def reward(response, answers, finish_reason): return colorsys.rgb_to_hsv(0, 0, 1)[2] + yaml.safe_load("1")
    """)
    check_reward_function(function)
    assert [outcome.result for outcome in rate(function, "5")] == [2.0]


def test_a_neighbour_goes_before_a_library_as_it_does_for_a_script(write: Write, tmp_path: Path) -> None:
    (tmp_path / "sympy.py").write_text("VALUE = 3\n")
    function = write("from sympy import VALUE\ndef reward(response, answers, finish_reason): return VALUE")
    assert [outcome.result for outcome in rate(function, "5")] == [3.0]


def test_two_files_with_neighbours_of_one_name_do_not_see_each_other_s(tmp_path: Path) -> None:
    before = set(sys.modules), list(sys.path), list(sys.meta_path)
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "neighbour.py").write_text(f"VALUE = {number}\n")
        (folder / "reward.py").write_text("import neighbour\ndef reward(response, answers, finish_reason): return neighbour.VALUE\n")
    for number in (1, 2):
        function = f"{tmp_path / str(number) / 'reward.py'}:reward"
        check_reward_function(function)
        assert [outcome.result for outcome in rate(function, "5")] == [number]
    assert (set(sys.modules), sys.path, sys.meta_path) == before  # this process has loaded nothing of the user's


NUMBERS = [
    *((value, 1.0) for value in (True, 1, 1.0, Fraction(1), Decimal(1), np.float32(1), np.int64(1), np.bool_(True))),
    *((value, 1.0) for value in (np.array(1.0), np.array([1.0]), np.float16(1), np.array(True))),
    *((value, 0.5) for value in (0.5, Fraction(1, 2), Decimal("0.5"), np.float64(0.5), np.array(0.5, np.float32))),
    *((torch.tensor(value), 0.5) for value in (0.5, [0.5], [[0.5]])),
    *((value, 1.0) for value in (torch.tensor(True), torch.tensor(1), torch.tensor(1.0, requires_grad=True), torch.tensor(1.0).bfloat16())),
    (-(2**70), -(2.0**70)),
]
OTHERS = [
    *(None, "1.0", b"1", [1.0], (1.0,), {"reward": 1.0}, {}, object(), float, np.float64, 1j, np.complex64(1)),
    *(float("nan"), float("inf"), Decimal("NaN"), Decimal("sNaN"), Decimal("Infinity"), 10**400, Fraction(10**400), np.float32("nan")),
    *(np.array([1.0, 2.0]), np.array([]), np.array("1"), np.array(None), torch.tensor([1.0, 2.0]), torch.tensor(float("nan"))),
    *(torch.tensor(1.0, device="meta"), torch.tensor(1j)),
]


@pytest.mark.parametrize(("value", "number"), NUMBERS, ids=lambda value: type(value).__name__)
def test_what_is_a_number_whoever_made_it(value: object, number: float) -> None:
    assert to_number(value) == number
    assert type(to_number(value)) is float


@pytest.mark.parametrize("value", OTHERS, ids=lambda value: type(value).__name__)
def test_what_is_not_a_finite_number_is_told(value: object) -> None:
    with pytest.raises(ValueError, match=r"^the reward is .*; it must be a finite number$"):
        to_number(value)


def test_a_call_that_ends_the_process_is_an_error_that_names_it(write: Write) -> None:
    function = write("import sys\ndef reward(response, answers, finish_reason): return 1.0 if response == '5' else sys.exit(3)")
    assert rate(function, "6", "5") == [Outcome(OutcomeKind.ERROR, None, "SystemExit: 3"), Outcome(OutcomeKind.DONE, 1.0, "")]


def test_a_function_that_prints_does_not_fail_when_nobody_reads_the_output(write: Write, tmp_path: Path) -> None:
    function = write("def reward(response, answers, finish_reason):\n    print(response, flush=True)\n    return 1.0")
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom megatron_r1z.grading.functions import FunctionPool\n"
        "if __name__ == '__main__':\n"
        "    pool = FunctionPool(sys.argv[1], 1, 30.0)\n"
        "    outcomes = pool.rate([('5', ('5',), 'stop')] * 3)\n"
        "    pool.close()\n"
        "    sys.exit([outcome.result for outcome in outcomes] != [1.0] * 3)\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, str(program), function], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
