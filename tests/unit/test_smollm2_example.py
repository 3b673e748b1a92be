"""The reward function, the split and the shots of the SmolLM2 example."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from megatron_r1z.config import DataConfig, QuestionSource
from megatron_r1z.data.templates import make_template
from megatron_r1z.grading.answers import extract_boxed_answer

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"smollm2_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reward, make_data = load("reward"), load("make_data")


@pytest.mark.parametrize(
    ("response", "answers", "expected"),
    [
        (" 3 + 4 = 7. The answer is 7.\n", ("7",), 1.0),
        (" The answer is 7.0", ("7",), 1.0),
        (" The answer is 7", ("7.00", "8"), 1.0),
        (" The answer is 1,234.", ("1234",), 1.0),
        (" The answer is $4.50.", ("4.5",), 1.0),
        (" The answer is -3.", ("-3",), 1.0),
        (" The answer is 6. The answer is 7.", ("7",), 1.0),
        (" The answer is 7. The answer is 6.", ("7",), 0.0),
        (" The answer is 70.", ("7",), 0.0),
        (" 7", ("7",), 0.0),
        ("", ("7",), 0.0),
        (" The answer is seven.", ("7",), 0.0),
    ],
)
def test_the_number_behind_answer_is(response: str, answers: tuple[str, ...], expected: float) -> None:
    assert reward.answer_is(response, answers, "stop") == expected


def test_a_cut_response_earns_nothing() -> None:
    assert reward.answer_is(" The answer is 7", ("7",), "length") == 0.0


def test_the_split_is_a_partition_that_repeats() -> None:
    rows = [{"problem": f"p{index}", "answer": "1/6" if index % 50 == 0 else str(index)} for index in range(1000)]
    train, held_out = make_data.split(rows, seed=0)
    assert len(held_out) == make_data.NUM_HELD_OUT
    assert sorted(int(row["answer"]) for row in [*train, *held_out]) == [index for index in range(1000) if index % 50]
    assert make_data.split(rows, seed=0) == (train, held_out)
    assert make_data.split(rows, seed=1)[1] != held_out


def test_the_shots_end_where_the_answer_starts() -> None:
    config = DataConfig(train=(QuestionSource(path="unused.jsonl"),), template="few_shot", shots_path=str(EXAMPLE / "shots.txt"))
    text = make_template(config, tokenizer=None).render("How many?")  # type: ignore[arg-type]  # only `chat` needs one
    assert text.endswith("\n\nQuestion: How many?\nAnswer:")
    shots = [line for line in text.splitlines() if line.startswith("Answer: ")]
    assert len(shots) == 4
    assert all(reward.answer_is(shot, (shot.split("= ")[1].split(".")[0],), "stop") == 1.0 for shot in shots)


def test_the_boxed_shots_are_a_template_whose_answers_the_grader_finds() -> None:
    template = make_template(DataConfig(template="few_shot", shots_path=str(EXAMPLE / "boxed_shots.txt")), tokenizer=object())  # type: ignore[arg-type]
    text = template.render("What is $1 + 1$?")
    assert text.endswith("Question: What is $1 + 1$?\nAnswer: We")
    answers = [line for line in text.splitlines() if line.startswith("Answer: We ")]
    assert [extract_boxed_answer(line).answer for line in answers] == ["17", "\\frac{2}{5}", "8", "27"]
