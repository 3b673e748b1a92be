"""The puzzles of the quickstart, and the folder that holds them."""

import importlib
import json
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart"
sys.path.insert(0, str(EXAMPLE))
make_task = importlib.import_module("make_task")
task = importlib.import_module("task")

LEVELS = list(task.LEVELS)


def draw(level: str, count: int, seed: int = 0) -> list[tuple[Any, str]]:
    """Puzzles and a noisy worked solution of each."""
    generator = Random(seed)
    puzzles = [task.LEVELS[level].make(generator) for _ in range(count)]
    return [(puzzle, task.LEVELS[level].write(puzzle, generator)) for puzzle in puzzles]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task")
    make_task.make_task(path, num_documents=700, num_questions=50)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder / "model")


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("level", ["sum-3", "sum-4", "sum-5", "sum-6"])
def test_the_answer_of_a_sum(level: str) -> None:
    for puzzle, _ in draw(level, 50):
        digits = puzzle.prompt.removeprefix(" Sum").removesuffix("?").split("+")
        assert len(digits) == int(level[-1])
        assert set(digits) <= set("123456789")
        assert sum(map(int, digits)) == int(puzzle.answer)


@pytest.mark.parametrize("level", ["pick-4", "pick-5", "pick-6"])
def test_the_answer_of_a_pick_is_the_only_one(level: str) -> None:
    for puzzle, _ in draw(level, 50):
        digits, target = puzzle.prompt.removeprefix(" Pick").removesuffix("?").split(" make")
        assert len(set(digits)) == int(level[-1])
        subsets = ["".join(subset) for size in range(2, len(digits) + 1) for subset in combinations(digits, size)]
        assert [subset for subset in subsets if sum(map(int, subset)) == int(target)] == [puzzle.answer]


def test_a_sum_document_boxes_the_end_of_its_own_chain() -> None:
    for _, text in draw("sum-5", 200):
        chain, box = text.split(".")
        assert box == f"\\boxed{{{chain.rpartition('=')[2]}}}"


@pytest.mark.parametrize(("level", "share"), [("sum-3", 0.57), ("sum-6", 0.43)])
def test_share_of_right_sum_documents(level: str, share: float) -> None:
    """Careful ones (0.35), those that happen to have no slip (0.65 x 0.55^(size-1)) and a few in which slips cancel."""
    documents = draw(level, 4000)
    assert sum(f"\\boxed{{{puzzle.answer}}}" in text for puzzle, text in documents) / 4000 == pytest.approx(share, abs=0.03)


def test_a_pick_document_tells_the_truth_about_its_attempt() -> None:
    rechecks: dict[str, list[int]] = {"ok": [], "no": []}
    for puzzle, text in draw("pick-5", 2000):
        first, *others = text.removeprefix(" try").split(".")[:-1]
        attempt, need = first.split(" need")
        digits, total = attempt.split("=")
        target, verdict = need.split(" ")
        assert sum(map(int, digits.split("+"))) == int(total)
        assert f" make{target}?" in puzzle.prompt
        assert verdict == ("ok" if total == target else "no")
        assert all(other == f" recheck{first}" for other in others)
        assert text.endswith(f"\\boxed{{{digits.replace('+', '')}}}")
        assert (digits.replace("+", "") == puzzle.answer) == (verdict == "ok")
        rechecks[verdict].append(len(others))
    assert sum(rechecks["ok"]) / len(rechecks["ok"]) == pytest.approx(0.25, abs=0.08)
    assert sum(rechecks["no"]) / len(rechecks["no"]) == pytest.approx(1.5, abs=0.2)


def test_drawn_puzzles_differ_and_avoid() -> None:
    avoid = frozenset(puzzle.prompt for puzzle in task.draw_puzzles("sum-3", 300, Random(0)))
    drawn = [puzzle.prompt for puzzle in task.draw_puzzles("sum-3", 400, Random(1), avoid)]
    assert len(set(drawn)) == 400
    assert avoid.isdisjoint(drawn)
    with pytest.raises(ValueError, match="sum-3: found 729 different puzzles and 730 were asked for"):
        task.draw_puzzles("sum-3", 730, Random(0))


def test_held_out_questions_occur_nowhere_else(folder: Path) -> None:
    held_out = {row["problem"] for path in (folder / "held_out").iterdir() for row in read(path)}
    assert len(held_out) == 900
    assert held_out.isdisjoint(row["problem"] for row in read(folder / "questions.jsonl"))
    assert held_out.isdisjoint(row["prompt"] for row in read(folder / "corpus.jsonl"))


def test_levels_of_the_files(folder: Path) -> None:
    for level in make_task.QUESTION_LEVELS:
        assert [row["level"] for row in read(folder / "held_out" / f"{level}.jsonl")] == [level] * 300
    assert Counter(row["level"] for row in read(folder / "questions.jsonl")) == dict.fromkeys(make_task.QUESTION_LEVELS, 50)
    corpus = Counter(row["level"] for row in read(folder / "corpus.jsonl"))
    assert set(corpus) == set(LEVELS)
    assert all(60 <= count <= 140 for count in corpus.values())


def test_questions_of_other_levels_with_none_held_out(tmp_path: Path) -> None:
    """As the length bias example asks for them: nearly all the puzzles of pick-6 that there are."""
    make_task.make_task(tmp_path, num_documents=10, num_questions=400, num_held_out=0, levels=("sum-5", "pick-6"))
    questions = read(tmp_path / "questions.jsonl")
    assert Counter(row["level"] for row in questions) == {"sum-5": 400, "pick-6": 400}
    assert len({row["problem"] for row in questions}) == 800
    assert [read(path) for path in sorted((tmp_path / "held_out").iterdir())] == [[], []]


def test_the_seed_decides_every_byte(folder: Path, tmp_path: Path) -> None:
    make_task.make_task(tmp_path / "again", num_documents=700, num_questions=50)
    make_task.make_task(tmp_path / "other", seed=1, num_documents=700, num_questions=50)
    for name in ("corpus.jsonl", "questions.jsonl", "held_out/sum-4.jsonl", "model/tokenizer.json", "model/config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert (tmp_path / "other" / "corpus.jsonl").read_bytes() != (folder / "corpus.jsonl").read_bytes()


class TestModelFolder:
    """What AutoTokenizer and AutoModelForCausalLM make of the folder."""

    def test_every_document_survives_a_round_trip(self, folder: Path, tokenizer: Any) -> None:
        texts = [row["prompt"] + row["response"] + task.EOS for row in read(folder / "corpus.jsonl")]
        for text, token_ids in zip(texts, tokenizer(texts).input_ids, strict=True):
            assert tokenizer.decode(token_ids) == text
            assert tokenizer.decode(token_ids, skip_special_tokens=True) == text.removesuffix(task.EOS)

    def test_words_are_tokens(self, tokenizer: Any) -> None:
        words = [" try", "9", "+", "4", "=", "1", "3", " need", "2", "1", " no", ".", " recheck", "\\boxed{", "9", "4", "}", "<eos>"]
        assert tokenizer("".join(words)).input_ids == [task.TOKENS.index(word) for word in words]

    def test_special_tokens(self, tokenizer: Any) -> None:
        assert len(tokenizer) == len(task.TOKENS) == 27
        assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<eos>", "<pad>", None)

    def test_parameters(self, folder: Path) -> None:
        torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
        config = transformers.AutoConfig.from_pretrained(folder / "model")
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        assert sum(parameter.numel() for parameter in model.parameters()) == 607_616
        assert transformers.GenerationConfig.from_pretrained(folder / "model").eos_token_id == 1
