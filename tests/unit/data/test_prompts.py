"""Question files, templates and prompts."""

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1z.config import DataConfig, EvaluationConfig, QuestionSource
from megatron_r1z.data.naming import name_sources
from megatron_r1z.data.prompts import PromptStream, load_prompts, make_prompts
from megatron_r1z.data.questions import Message, Question, load_question_sets, load_questions, mark_questions, read_questions
from megatron_r1z.data.templates import FEW_SHOT_STOP, TEMPLATES, make_stops, make_template
from megatron_r1z.data.tokenizer import added_tokens, load_tokenizer, tokenise
from megatron_r1z.errors import ConfigError, DataError

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the question sets are not at {SHARED}")

PATHS = st.sampled_from(["a.jsonl", "./a.jsonl", "b/a.jsonl", "c/../b/a.jsonl", "a.parquet", "b/a.parquet", "b.jsonl", "/a.jsonl"])

SHA256 = {
    "r1": "56213732da87e12ace60a2b88a16df0af18280fb0563a957cbecc938a6a2ac0e",
    "qwen_math": "18573f432dabf242e42a91807e54bc60f5d513fe596a741aa5a81c7ff4a9f712",
    "no": "bf085a6e12c9d0e23a9dd157df084f933b2ef021caba82def1494bfb84a723c9",
}


@dataclass
class Encoding:
    input_ids: list[list[int]]


class ByteTokenizer:
    """One token per byte, behind a BOS of its own."""

    eos_token_id: int | None = 1
    bos = 2

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Encoding:
        start = [self.bos] if add_special_tokens else []
        return Encoding([[*start, *entry.encode()] for entry in text])

    def apply_chat_template(self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        assert add_generation_prompt
        return "".join(f"[{turn['role']}]{turn['content']}" for turn in conversation) + "[assistant]"


class NoChatTokenizer(ByteTokenizer):
    def apply_chat_template(self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool) -> str:
        raise ValueError("there is no chat template")


def make_config(**fields: Any) -> DataConfig:
    return DataConfig(train=(QuestionSource(path="unused.jsonl"),), **fields)


def write_rows(path: Path, rows: list[Any]) -> QuestionSource:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return QuestionSource(path=str(path))


class TestTemplates:
    @pytest.mark.parametrize("name", SHA256)
    def test_the_papers_bytes(self, name: str) -> None:
        assert hashlib.sha256(TEMPLATES[name][0].encode()).hexdigest() == SHA256[name]

    @pytest.mark.parametrize(("name", "stop"), [("r1", ("</answer>",)), ("qwen_math", ()), ("no", ())])
    def test_stop_strings(self, name: Any, stop: tuple[str, ...]) -> None:
        assert make_template(make_config(template=name), ByteTokenizer()).stop == stop

    @pytest.mark.parametrize("question", ["1 + 1?", r"\frac{1}{2} {0} {} {question} %s", "", "two\nlines"])
    @pytest.mark.parametrize("name", SHA256)
    def test_the_question_goes_in_unread(self, name: Any, question: str) -> None:
        before, after = TEMPLATES[name][0].split("{question}")
        assert make_template(make_config(template=name), ByteTokenizer()).render(question) == before + question + after

    def test_shots_come_first_and_the_line_ends_the_answer(self, tmp_path: Path) -> None:
        shots = tmp_path / "shots.txt"
        shots.write_text("Q: 1 {+} 1\nA: 2\n\nQ: {question}\nA:\n")
        template = make_template(make_config(template="few_shot", shots_path=str(shots)), ByteTokenizer())
        assert template.render("2 + 2") == "Q: 1 {+} 1\nA: 2\n\nQ: 2 + 2\nA:"
        assert template.stop == FEW_SHOT_STOP

    @pytest.mark.parametrize(("text", "count"), [("Q:\nA:", 0), ("{question}{question}", 2)])
    def test_shots_hold_the_question_once(self, tmp_path: Path, text: str, count: int) -> None:
        shots = tmp_path / "shots.txt"
        shots.write_text(text)
        with pytest.raises(DataError, match=f"contains {{question}} {count} times"):
            make_template(make_config(template="few_shot", shots_path=str(shots)), ByteTokenizer())

    def test_missing_shots(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"cannot read the shots file .*: No such file"):
            make_template(make_config(template="few_shot", shots_path=str(tmp_path / "none.txt")), ByteTokenizer())

    @pytest.mark.parametrize(("system", "text"), [(None, "[user]2 + 2[assistant]"), ("Box it.", "[system]Box it.[user]2 + 2[assistant]")])
    def test_chat(self, system: str | None, text: str) -> None:
        template = make_template(make_config(template="chat", system_prompt=system), ByteTokenizer())
        assert template.render("2 + 2") == text
        assert template.stop == ()
        assert not template.add_special_tokens

    def test_a_tokenizer_without_chat_template(self) -> None:
        with pytest.raises(DataError, match="cannot apply its chat template"):
            make_template(make_config(template="chat"), NoChatTokenizer())


class TestQuestions:
    def test_rows_of_jsonl(self, tmp_path: Path) -> None:
        source = write_rows(tmp_path / "sums.jsonl", [{"problem": "1 + 1", "answer": "2"}, "", {"problem": "2 + 2", "answer": "4", "x": 1}])
        assert load_questions(source) == [Question("sums/0", "1 + 1", ("2",), "sums"), Question("sums/1", "2 + 2", ("4",), "sums")]

    def test_rows_of_parquet(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        path = tmp_path / "sums.parquet"
        parquet.write_table(pyarrow.table({"prompt": ["1 + 1", "2 + 2"], "solution": [["2", "two"], ["4"]]}), path)
        source = QuestionSource(path=str(path), problem_column="prompt", answer_column="solution", offset=1)
        assert load_questions(source) == [Question("sums/1", "2 + 2", ("4",), "sums")]
        with pytest.raises(DataError, match=r"sums.parquet: row 0: no column 'problem'; the columns are 'prompt', 'solution'\."):
            load_questions(QuestionSource(path=str(path)))

    @pytest.mark.parametrize(
        ("answer", "answers"),
        [("7", ("7",)), (7, ("7",)), (142.0, ("142.0",)), (["1", 2], ("1", "2")), ("025", ("025",)), ("a\n", ("a\n",))],
    )
    def test_answers(self, tmp_path: Path, answer: Any, answers: tuple[str, ...]) -> None:
        assert load_questions(write_rows(tmp_path / "q.jsonl", [{"problem": "p", "answer": answer}]))[0].answers == answers

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ('{"problem": "p",', "not valid JSON"),
            ("[1]", "must be a JSON object, not list"),
            ({"question": "p", "answer": "1"}, "no column 'problem'; the columns are 'question', 'answer'"),
            ({"problem": "p"}, "no column 'answer'; the columns are 'problem'"),
            ({"problem": " ", "answer": "1"}, "'problem' is empty"),
            ({"problem": 3, "answer": "1"}, "'problem' must be text, not 3"),
            ({"problem": "p", "answer": ""}, "'answer' has no answer"),
            ({"problem": "p", "answer": None}, "'answer' has no answer"),
            ({"problem": "p", "answer": []}, "'answer' is an empty list"),
            ({"problem": "p", "answer": ["1", ""]}, "'answer' has no answer"),
            ('{"problem": "p", "answer": NaN}', "'answer' has no answer"),
            ({"problem": "p", "answer": True}, "'answer' must be text, a number or a list"),
            ({"problem": "p", "answer": {"a": 1}}, "'answer' must be text, a number or a list"),
        ],
    )
    def test_a_bad_row_is_named(self, tmp_path: Path, row: Any, message: str) -> None:
        source = write_rows(tmp_path / "q.jsonl", [{"problem": "p", "answer": "1"}, row])
        with pytest.raises(DataError, match=r"q\.jsonl:2: ") as caught:
            load_questions(source)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_bytes_that_are_not_text(self, tmp_path: Path) -> None:
        path = tmp_path / "q.jsonl"
        path.write_bytes(b'{"problem": "\xff"}\n')
        with pytest.raises(DataError, match=r"q\.jsonl:1: not UTF-8"):
            load_questions(QuestionSource(path=str(path)))

    def test_offset_and_limit(self, tmp_path: Path) -> None:
        path = tmp_path / "q.jsonl"
        write_rows(path, [{"problem": f"p{index}", "answer": index} for index in range(10)])
        chosen = load_questions(QuestionSource(path=str(path), offset=3, limit=2))
        assert [question.question_id for question in chosen] == ["q/3", "q/4"]
        with pytest.raises(DataError, match="holds no questions from row 10"):
            load_questions(QuestionSource(path=str(path), offset=10))

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("empty.jsonl", r"empty\.jsonl holds no questions\."),
            ("missing.jsonl", r"there is no file .*missing\.jsonl"),
            *(
                (name, f"cannot tell the format of .*{name}; use a file that ends in .jsonl, .json, .csv, .parquet ")
                for name in ("table.tsv", "table.xlsx", "rows.jsonl.zst", "rows.txt", "rows", "rows.gz", "rows.parquet.gz")
            ),
        ],
    )
    def test_unusable_files(self, tmp_path: Path, name: str, message: str) -> None:
        (tmp_path / "empty.jsonl").touch()
        with pytest.raises(DataError, match=message):
            load_questions(QuestionSource(path=str(tmp_path / name)))

    def test_a_broken_parquet_file(self, tmp_path: Path) -> None:
        pytest.importorskip("pyarrow")
        (tmp_path / "q.parquet").write_bytes(b"not parquet")
        with pytest.raises(DataError, match="not a readable Parquet file"):
            load_questions(QuestionSource(path=str(tmp_path / "q.parquet")))

    @needs_shared
    @pytest.mark.parametrize(("path", "count"), [("eval/math.jsonl", 500), ("eval/aime.jsonl", 30), ("train/asdiv_2k.jsonl", 1788)])
    def test_the_papers_sets(self, path: str, count: int) -> None:
        assert len(load_questions(QuestionSource(path=str(SHARED / path)))) == count

    @needs_shared
    def test_levels_of_math(self) -> None:
        source = QuestionSource(path=str(SHARED / "eval/math.jsonl"), where={"level": (3, 4)})
        assert len(load_questions(source)) == 105 + 128

    @needs_shared
    def test_several_answers(self) -> None:
        questions = load_questions(QuestionSource(path=str(SHARED / "eval/minerva.jsonl"), answer_column="answers"))
        assert sorted({len(question.answers) for question in questions}) == [1, 2, 3]


MESSAGES = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1"}]
LONG = [*MESSAGES, {"role": "assistant", "content": "2"}, {"role": "user", "content": "And 2 + 2?"}]


def shipped(prompt: Any, ground_truth: Any = "2") -> dict[str, Any]:
    """A row as verl and the data sets made for it have it."""
    model = {"style": "rule", "ground_truth": ground_truth}
    return {"data_source": "math", "prompt": prompt, "ability": "math", "reward_model": model, "extra_info": {"index": 0, "split": "train"}}


class TestConversations:
    @pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
    def test_the_layout_that_the_field_ships_is_read_as_it_is(self, tmp_path: Path, form: str) -> None:
        rows = [shipped(MESSAGES), shipped(LONG, "4")]
        path = tmp_path / f"train.{form}"
        if form == "jsonl":
            write_rows(path, rows)
        elif form == "json":
            path.write_text(json.dumps(rows))
        else:
            pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        found = load_questions(QuestionSource(path=str(path)))
        assert [(question.problem, question.answers) for question in found] == [("1 + 1", ("2",)), ("And 2 + 2?", ("4",))]
        assert found[1].messages == tuple(Message(**turn) for turn in LONG)
        assert [question.where for question in found] == [
            f"{path}:{line}" if form == "jsonl" else f"{path}: row {line - 1}" for line in (1, 2)
        ]

    def test_nested_columns_have_dotted_names_and_a_dot_in_a_name_comes_first(self, tmp_path: Path) -> None:
        rows = [{"q": {"text": "1 + 1"}, "a": {"b": {"c": "2"}}}, {"q.text": "flat", "q": {"text": "nested"}, "a": {"b.c": "4"}}]
        source = replace(write_rows(tmp_path / "q.jsonl", rows), problem_column="q.text", answer_column="a.b.c")
        assert [(item.problem, item.answers) for item in load_questions(source)] == [("1 + 1", ("2",)), ("flat", ("4",))]
        assert len(load_questions(replace(source, where={"a.b.c": ("2",)}, limit=1))) == 1
        with pytest.raises(DataError, match=r"no column 'a\.b\.d'; the columns are 'q\.text', 'a\.b\.c'\.$"):
            load_questions(replace(source, answer_column="a.b.d"))

    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": MESSAGES, "reward_model": {"style": "rule"}},
            {"prompt": MESSAGES, "answer": "2"},
            {"problem": "1 + 1", "prompt": MESSAGES, "reward_model": {"ground_truth": "2"}},
        ],
    )
    def test_other_columns_are_not_guessed_but_named(self, tmp_path: Path, row: dict[str, Any]) -> None:
        with pytest.raises(DataError, match=r"q\.jsonl:1: no column '(problem|answer)'; the columns are .*'prompt'"):
            load_questions(write_rows(tmp_path / "q.jsonl", [row]))

    def test_names_that_are_given_are_not_replaced(self, tmp_path: Path) -> None:
        source = replace(write_rows(tmp_path / "q.jsonl", [shipped(MESSAGES)]), answer_column="solution")
        with pytest.raises(
            DataError, match=r"no column 'problem'; the columns are 'data_source', 'prompt', 'ability', 'reward_model\.style', "
        ):
            load_questions(source)

    @pytest.mark.parametrize(
        ("prompt", "complaint"),
        [
            ([], "the last message of 'prompt' is missing"),
            (LONG[:3], "the last message of 'prompt' is of role 'assistant'; the question must be one of role 'user', and stand there"),
            ([{"role": "user", "content": " "}], "the last message of 'prompt' is empty"),
            ([{"role": "user", "content": None}], "entry 0 is {'content': None, 'role': 'user'}"),
            ([{"role": "user", "content": [{"type": "text", "text": "?"}]}], "'role' and a 'content' of text each; entry 0 is"),
            (["1 + 1"], "entry 0 is '1 + 1'"),
            ([{"from": "human", "value": "1 + 1"}], "entry 0 is {'from': 'human', 'value': '1 + 1'}"),
            ({"role": "user", "content": "1 + 1"}, "'prompt' must be text, not {"),
        ],
    )
    def test_a_conversation_that_asks_nothing_is_named(self, tmp_path: Path, prompt: Any, complaint: str) -> None:
        with pytest.raises(DataError, match=r"q\.jsonl:1: ") as caught:
            load_questions(write_rows(tmp_path / "q.jsonl", [shipped(prompt)]))
        assert complaint in str(caught.value)

    @pytest.mark.parametrize(
        ("settings", "texts", "remark"),
        [
            (
                {"template": "chat"},
                ["[system]Add.[user]1 + 1[assistant]", "[system]Add.[user]1 + 1[assistant]2[user]And 2 + 2?[assistant]"],
                None,
            ),
            (
                {"template": "chat", "system_prompt": "Box it."},
                ["[system]Box it.[user]1 + 1[assistant]", "[system]Box it.[user]1 + 1[assistant]2[user]And 2 + 2?[assistant]"],
                "2 turns of 2 conversations are not shown under template chat, the first in {path}:1; data.system_prompt takes their place",
            ),
            (
                {"template": "no"},
                ["1 + 1", "And 2 + 2?"],
                "4 turns of 2 conversations are not shown under template no, the first in {path}:1; "
                "only the last user turn is the question",
            ),
        ],
    )
    def test_what_the_model_sees_of_a_conversation_and_what_it_does_not(
        self, tmp_path: Path, settings: Any, texts: list[str], remark: str | None
    ) -> None:
        source = write_rows(tmp_path / "q.jsonl", [shipped(MESSAGES), shipped(LONG, "4")])
        (found,) = load_prompts(make_config(**settings), (source,), ByteTokenizer())
        assert [prompt.text for prompt in found.prompts] == texts
        assert found.remarks == (() if remark is None else (remark.format(path=source.path),))

    def test_a_conversation_that_the_chat_template_does_not_take_is_named(self, tmp_path: Path) -> None:
        class NoSystem(ByteTokenizer):
            def apply_chat_template(self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool) -> str:
                if conversation[0]["role"] == "system":
                    raise ValueError("System role\nnot supported")
                return super().apply_chat_template(conversation, tokenize=tokenize, add_generation_prompt=add_generation_prompt)

        source = write_rows(tmp_path / "q.jsonl", [shipped(MESSAGES[1:]), shipped(MESSAGES)])
        with pytest.raises(DataError) as caught:
            load_prompts(make_config(template="chat"), (source,), NoSystem())
        assert str(caught.value) == (
            f"{source.path}:2: template chat: the tokenizer's chat template does not take these messages (System role not supported)."
        )


@dataclass(frozen=True)
class Added:
    content: str
    special: bool


class MarkTokenizer(ByteTokenizer):
    """Takes `<eos>` and `<think>` for a token each, of which one is special; `<bos>` is special and text does not spell it out."""

    added_tokens_decoder: ClassVar[dict[int, Added]] = {1: Added("<eos>", True), 2: Added("<bos>", True), 300: Added("<think>", False)}

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Encoding:
        encoded = super().__call__(text, add_special_tokens=add_special_tokens).input_ids
        return Encoding([[1, *ids] if "<eos>" in entry else ids for entry, ids in zip(text, encoded, strict=True)])


class TestSpecialTokens:
    def remarks(self, path: Path, *prompts: Any, template: Any = "no") -> tuple[str, ...]:
        source = write_rows(path, [shipped(prompt) for prompt in prompts])
        return load_prompts(make_config(template=template), (source,), MarkTokenizer())[0].remarks

    def test_control_tokens_in_a_question_are_counted_and_the_first_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "q.jsonl"
        assert self.remarks(path, "1 + 1", "2<eos>", "3 < 4", "<eos>?") == (
            f"2 of 4 questions hold text that becomes a special token, the first '<eos>' in {path}:2; "
            "the model sees a control token there, so take it out unless it is meant",
        )

    @pytest.mark.parametrize("text", ["1 + 1", "<think>", "<bos>", "< eos >"])
    def test_what_only_looks_like_one_is_not(self, tmp_path: Path, text: str) -> None:
        assert self.remarks(tmp_path / "q.jsonl", text) == ()

    def test_only_what_is_shown_counts(self, tmp_path: Path) -> None:
        prompt = [{"role": "system", "content": "<eos>"}, {"role": "user", "content": "1 + 1"}]
        assert [remark.split()[1] for remark in self.remarks(tmp_path / "q.jsonl", prompt)] == ["turns"]
        assert [remark.split()[1] for remark in self.remarks(tmp_path / "q.jsonl", prompt, template="chat")] == ["of"]

    def test_a_real_tokenizer(self, tmp_path: Path) -> None:
        pytest.importorskip("transformers")
        sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "quickstart"))
        importlib.import_module("make_task").save_model(tmp_path / "model")
        source = write_rows(tmp_path / "q.jsonl", [shipped(" Sum7+5?"), shipped(" Sum7<eos>?"), shipped("<pad>")])
        (found,) = load_prompts(make_config(template="no"), (source,), load_tokenizer(tmp_path / "model"))
        assert found.remarks[0].startswith(
            f"2 of 3 questions hold text that becomes a special token, the first '<eos>' in {source.path}:2;"
        )


class TestSelection:
    ROWS = tuple({"problem": f"p{index}", "answer": index, "level": index % 3, "hard": index > 5} for index in range(10))

    @pytest.mark.parametrize(
        ("where", "indices"),
        [
            ({}, range(10)),
            ({"level": (1,)}, (1, 4, 7)),
            ({"level": (1.0, 2)}, (1, 2, 4, 5, 7, 8)),
            ({"level": (1,), "hard": (True,)}, (7,)),
            ({"problem": ("p3", "p4", "p99")}, (3, 4)),
            ({"level": (0, True)}, (0, 3, 6, 9)),
        ],
    )
    def test_where_leaves_rows_out_and_ids_as_they_are(self, tmp_path: Path, where: Any, indices: Any) -> None:
        source = replace(write_rows(tmp_path / "q.jsonl", list(self.ROWS)), where=where)
        reading = read_questions(source)
        assert [question.question_id for question in reading.questions] == [f"q/{index}" for index in indices]
        assert reading.num_filtered == 10 - len(indices)
        assert reading.faults == []

    def test_offset_and_limit_count_the_rows_that_are_left(self, tmp_path: Path) -> None:
        source = write_rows(tmp_path / "q.jsonl", list(self.ROWS))
        parts = [replace(source, where={"level": (0,)}, offset=offset, limit=2) for offset in (0, 2)]
        assert [[question.problem for question in load_questions(part)] for part in parts] == [["p0", "p3"], ["p6", "p9"]]

    @pytest.mark.parametrize(
        ("where", "message"),
        [
            ({"level": (3, "1")}, "q.jsonl holds no questions: where allows 3, '1' and 'level' is 0, 1, 2."),
            ({"problem": ("p",)}, "'problem' is 'p0', 'p1', 'p2', 'p3', 'p4', 'p5', 'p6', 'p7', 'p8', 'p9'."),
            ({"level": (1,), "problem": ("p2",)}, "holds no questions: no row has all that where asks for (level, problem)."),
            ({"lvl": (1,)}, "q.jsonl:1: no column 'lvl'; the columns are 'problem', 'answer', 'level', 'hard'."),
        ],
    )
    def test_a_filter_that_leaves_nothing_is_explained(self, tmp_path: Path, where: Any, message: str) -> None:
        source = replace(write_rows(tmp_path / "q.jsonl", list(self.ROWS)), where=where)
        with pytest.raises(DataError) as caught:
            load_questions(source)
        assert message in str(caught.value)

    @pytest.mark.parametrize(
        ("answer", "answers"),
        [
            ("48 / 2 = <<48/2=24>>24\n#### 72", ("72",)),
            ("#### 1\n#### 1,000 ", ("1,000",)),
            (["#### 1", "so #### 2"], ("1", "2")),
        ],
    )
    def test_the_answer_stands_behind_the_last_marker(self, tmp_path: Path, answer: Any, answers: tuple[str, ...]) -> None:
        source = replace(write_rows(tmp_path / "q.jsonl", [{"problem": "p", "answer": answer}]), answer_after="####")
        assert load_questions(source)[0].answers == answers

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            ("The answer is 72", "'answer' has no '####' ('The answer is 72'); change answer_after, or remove the row."),
            (72, "'answer' has no '####' (72)"),
            (["#### 1", "2"], "'answer' has no '####' ('2')"),
            ("#### ", "'answer' has no answer ('')"),
        ],
    )
    def test_a_row_without_the_marker_is_named(self, tmp_path: Path, answer: Any, message: str) -> None:
        source = replace(write_rows(tmp_path / "q.jsonl", [{"problem": "p", "answer": answer}]), answer_after="####")
        with pytest.raises(DataError) as caught:
            load_questions(source)
        assert f"q.jsonl:1: {message}" in str(caught.value)

    def test_all_unfit_rows_are_found_in_one_reading(self, tmp_path: Path) -> None:
        rows = [{"problem": "p", "answer": 1}, "{", {"problem": "", "answer": 1}, {"problem": "p"}, {"problem": "q", "answer": 2}]
        source = write_rows(tmp_path / "q.jsonl", rows)
        reading = read_questions(source)
        assert [question.question_id for question in reading.questions] == ["q/0", "q/4"]
        assert [fault.split("q.jsonl:")[1][0] for fault in reading.faults] == ["2", "3", "4"]
        with pytest.raises(DataError) as caught:
            load_questions(source)
        assert str(caught.value) == reading.faults[0]

    def test_rows_that_are_not_chosen_are_not_judged(self, tmp_path: Path) -> None:
        source = write_rows(tmp_path / "q.jsonl", ["{", {"problem": "p", "answer": 1}, "{"])
        assert [question.question_id for question in load_questions(replace(source, offset=1, limit=1))] == ["q/1"]
        assert len(read_questions(replace(source, offset=1)).faults) == 1

    def test_sets_are_named_as_in_the_run(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            write_rows(tmp_path / name / "q.jsonl", [{"problem": name, "answer": 1}])
        sets = load_question_sets([QuestionSource(path=str(tmp_path / name / "q.jsonl")) for name in ("a", "b")])
        assert [(item.name, item.questions[0].question_id) for item in sets] == [("a-q", "a-q/0"), ("b-q", "b-q/0")]


class TestPrompts:
    QUESTIONS = (Question("q/0", "1 + 1", ("2",), "q"), Question("q/1", "a much longer question", ("3",), "q"))

    def test_the_tokenizer_adds_its_own_special_tokens(self) -> None:
        template = make_template(make_config(template="no"), ByteTokenizer())
        prompts, num_dropped = make_prompts(self.QUESTIONS, template, ByteTokenizer(), 100)
        assert num_dropped == 0
        assert prompts[0].token_ids == (ByteTokenizer.bos, *b"1 + 1")
        assert (prompts[0].prompt_id, prompts[0].text, prompts[0].answers, prompts[0].source) == ("q/0", "1 + 1", ("2",), "q")

    def test_except_where_the_chat_template_wrote_them(self) -> None:
        template = make_template(make_config(template="chat"), ByteTokenizer())
        prompts, _ = make_prompts(self.QUESTIONS, template, ByteTokenizer(), 100)
        assert prompts[0].token_ids == tuple(b"[user]1 + 1[assistant]")

    def test_long_prompts_are_dropped_and_counted(self) -> None:
        template = make_template(make_config(template="no"), ByteTokenizer())
        kept, num_dropped = make_prompts(self.QUESTIONS, template, ByteTokenizer(), 6)
        assert [prompt.prompt_id for prompt in kept] == ["q/0"]
        assert num_dropped == 1
        assert make_prompts(self.QUESTIONS, template, ByteTokenizer(), 5) == ([], 2)
        assert make_prompts((), template, ByteTokenizer(), 5) == ([], 0)

    def test_sets_keep_their_weight_and_count(self, tmp_path: Path) -> None:
        write_rows(tmp_path / "a.jsonl", [{"problem": "p", "answer": "1"}, {"problem": "p" * 50, "answer": "1"}])
        write_rows(tmp_path / "b.jsonl", [{"problem": "p", "answer": "1"}])
        sources = (QuestionSource(path=str(tmp_path / "a.jsonl"), weight=3.0), QuestionSource(path=str(tmp_path / "b.jsonl")))
        sets = load_prompts(make_config(template="no", max_prompt_tokens=10), sources, ByteTokenizer())
        assert [(entry.name, len(entry.prompts), entry.weight, entry.num_dropped) for entry in sets] == [("a", 1, 3.0, 1), ("b", 1, 1.0, 0)]
        stream = PromptStream([(entry.prompts, entry.weight) for entry in sets], seed=0)
        assert {prompt.prompt_id for prompt in stream.draw(20)} == {"a/0", "b/0"}

    def test_questions_are_recognised_alike_before_ranks_start_and_by_them(self, tmp_path: Path) -> None:
        rows = [{"problem": "p", "answer": ["1", "2"]}, {"problem": "p" * 50, "answer": "1"}]
        sources = [write_rows(tmp_path / "a.jsonl", rows)]
        (mark,) = mark_questions(sources, load_question_sets(sources))
        (found,) = load_prompts(make_config(template="no", max_prompt_tokens=10), sources, ByteTokenizer())
        assert (mark.digest, mark.count) == (found.digest, len(found.prompts) + found.num_dropped)

    def test_a_set_of_long_prompts_only_is_refused(self, tmp_path: Path) -> None:
        source = write_rows(tmp_path / "a.jsonl", [{"problem": "p" * 50, "answer": "1"}] * 3)
        with pytest.raises(DataError, match=r"all 3 prompts are longer than data\.max_prompt_tokens 10 under template no"):
            load_prompts(make_config(template="no", max_prompt_tokens=10), (source,), ByteTokenizer())

    def test_files_of_the_same_name_get_different_names(self) -> None:
        paths = ["data/gsm/train.jsonl", "data/math/train.jsonl", "data/math/test.parquet", "data/math/train.jsonl"]
        assert name_sources([QuestionSource(path=path) for path in paths]) == ["gsm-train", "math-train", "test", "math-train"]

    def test_a_part_of_a_file_has_the_name_that_it_is_given(self) -> None:
        parts = [QuestionSource(path="data/math.jsonl", where={"level": (level,)}, name=f"level-{level}") for level in (1, 2)]
        assert name_sources([*parts, QuestionSource(path="data/math.jsonl")]) == ["level-1", "level-2", "math"]
        assert name_sources([QuestionSource(path="a.jsonl", name="math"), QuestionSource(path="b/math.jsonl")]) == ["math", "b-math"]

    @given(st.lists(st.tuples(PATHS, st.none() | st.sampled_from(["a", "b-a", "a.jsonl", "c"])), min_size=1, max_size=5))
    def test_sets_that_are_accepted_have_files_of_their_own(self, chosen: list[tuple[str, str | None]]) -> None:
        sources = tuple(QuestionSource(path=path, name=name) for path, name in chosen)
        called = [("name", name) if name is not None else ("path", os.path.normpath(path)) for path, name in chosen]
        if len(set(called)) < len(called):
            with pytest.raises(ConfigError, match="twice; its figures would collide"):
                EvaluationConfig(sets=sources)
            return
        EvaluationConfig(sets=sources)
        files = [os.path.normpath(f"run/{name}.jsonl") for name in name_sources(sources)]
        assert len(set(files)) == len(files)

    @pytest.mark.parametrize("name", ["", "a/b", "a b", "..", ".a", "é"])
    def test_a_name_that_names_no_file_is_refused(self, name: str) -> None:
        with pytest.raises(ConfigError, match=r"has the name '.*', after which files and figures are called"):
            QuestionSource(path="a.jsonl", name=name)

    def test_datasets_get_the_last_part_of_their_name_and_what_tells_them_apart(self) -> None:
        def name(*sources: dict[str, str]) -> list[str]:
            return name_sources([QuestionSource(**source) for source in sources])  # type: ignore[arg-type]

        gsm8k = {"dataset": "openai/gsm8k", "subset": "main"}
        assert name(gsm8k) == ["gsm8k"]
        assert name(gsm8k, {"path": "data/math.jsonl"}) == ["gsm8k", "math"]
        assert name(gsm8k, gsm8k | {"split": "test"}) == ["gsm8k-train", "gsm8k-test"]
        assert name(gsm8k, gsm8k | {"subset": "socratic"}) == ["gsm8k-main-train", "gsm8k-socratic-train"]
        assert name(gsm8k, {"dataset": "mine/gsm8k"}, {"path": "data/gsm8k.jsonl"}) == ["openai-gsm8k", "mine-gsm8k", "data-gsm8k"]
        assert name({"dataset": "sets/math-2.5/"}, {"dataset": "a/math"}) == ["math-2.5", "math"]


class TestTokenizer:
    def test_a_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="there is no model folder"):
            load_tokenizer(tmp_path / "none")

    @pytest.mark.parametrize("content", [None, "{", "{}"])
    def test_a_folder_without_a_usable_tokenizer(self, tmp_path: Path, content: str | None) -> None:
        pytest.importorskip("transformers")
        if content is not None:
            (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(DataError, match="no tokenizer can be read from") as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)


class TestAddedTokens:
    """Of real tokenizers, made on the spot: BOS once, EOS never."""

    BOS, EOS = ("<s>", 0), ("</s>", 1)

    def make(self, before: Sequence[tuple[str, int]], behind: Sequence[tuple[str, int]]) -> Any:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        names = ["<s>", "</s>", "<|im_end|>", *(chr(code) for code in range(33, 127)), "\u0120", "\u010a"]
        backend = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        pattern = " ".join([*(name for name, _ in before), "$A", *(name for name, _ in behind)])
        backend.post_processor = processors.TemplateProcessing(single=pattern, special_tokens=[*before, *behind])
        options = {"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": ["<|im_end|>"]}
        return PreTrainedTokenizerFast(tokenizer_object=backend, **options)

    @pytest.mark.parametrize("before", [[], [BOS]])
    @pytest.mark.parametrize("behind", [[], [EOS]])
    @pytest.mark.parametrize("text", ["1 + 1 = ", "<s>1 + 1 = ", "<s>"])
    def test_a_prompt_begins_once_and_does_not_end(self, before: Any, behind: Any, text: str) -> None:
        tokenizer = self.make(before, behind)
        assert added_tokens(tokenizer) == ([token for _, token in before], [token for _, token in behind])
        (found,) = tokenise([text], tokenizer, has_start=True)
        (plain,) = tokenise([text], tokenizer, has_start=False)
        has_bos = bool(before) or text.startswith("<s>")
        assert found.count(0) == has_bos
        assert (found[0] == 0) == has_bos
        assert 1 not in found
        assert plain == tokenizer(text, add_special_tokens=False).input_ids
        assert found in (plain, [0, *plain])

    def test_a_chat_template_that_writes_bos_gets_no_second_one(self) -> None:
        tokenizer = self.make([self.BOS], [self.EOS])
        tokenizer.chat_template = "<s>{% for turn in messages %}{{ turn['content'] }}<|im_end|>{% endfor %}>"
        template = make_template(make_config(template="chat"), tokenizer)
        ((prompt,), _) = make_prompts([Question("q/0", "1+1", ("2",), "q")], template, tokenizer, 100)
        assert (
            list(prompt.token_ids)
            == tokenizer.apply_chat_template([{"role": "user", "content": "1+1"}], add_generation_prompt=True).input_ids
        )
        assert prompt.token_ids.count(0) == 1
        assert prompt.token_ids[-2] == 2

    def test_stop_strings_that_are_special_tokens_go_by_their_id(self) -> None:
        tokenizer = self.make([], [])
        assert make_stops(("</answer>", "<|im_end|>", "</s>"), tokenizer) == ("</answer>", "<|im_end|>", "</s>", 2, 1)
        assert make_stops((), tokenizer) == ()
        assert "<|im_end|>" not in tokenizer.decode([34, 2], skip_special_tokens=True)
        with pytest.raises(
            ConfigError, match=r"rollout\.stop has 'a<\|im_end\|>', which can never be found: the special token '<\|im_end\|>'"
        ):
            make_stops(("a<|im_end|>",), tokenizer)
