"""The documentation names what the code has: metrics, fields, files, tests and sentences."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from megatron_r1z.data import changes
from megatron_r1z.evaluation.evaluate import evaluation_metrics
from megatron_r1z.evaluation.scores import Attempt, QuestionResult, score
from megatron_r1z.record import metrics
from megatron_r1z.types import (
    FinishReason,
    GradedGroup,
    Group,
    Prompt,
    RefitReceipt,
    Response,
    UpdateStats,
    ValueStats,
    Verdict,
    VerdictKind,
)

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_r1z"
OURS = ("*.md", "docs/*.md", "megatron_r1z/**/*.md", "examples/**/*.md")
PAGES = sorted(path for pattern in OURS for path in ROOT.glob(pattern))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def first_cells(text: str) -> list[str]:
    """The first cell of every row of every table."""
    return [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]


# ------------------------------------------------------------------------------------------------------------------------- metrics


def produced_by_the_stages() -> set[str]:
    prompt = Prompt("set/0", "?", (1,), ("2",), "set")
    responses = tuple(Response("2", (2,), (-0.1,), FinishReason.STOP, 0) for _ in range(2))
    verdicts = (Verdict(VerdictKind.CORRECT, 1.0, "2", (("<name>", 0.5),)), Verdict(VerdictKind.WRONG, 0.0, "3"))
    stats = [UpdateStats(*[0.1] * 17, num_tokens=2, skipped=False)]
    return {
        *metrics.rollout_metrics([GradedGroup(Group(0, prompt, responses), verdicts)]),
        *metrics.penalty_metrics({"0/0": [0.1]}),
        *metrics.update_metrics(stats),
        *metrics.critic_metrics([ValueStats(*[0.1] * 8, num_tokens=2, skipped=False)]),
        *metrics.refit_metrics(RefitReceipt(1, 100, 0.1, (0.1,), ())),
    }


def timed() -> set[str]:
    """The phases that loop and pre-training time."""
    calls = re.findall(r'(?:\.phase\(|_unless_stopped\(run, )"(\w+)"', read("megatron_r1z/loop.py") + read("megatron_r1z/pretrain.py"))
    return {f"time/{name}_s" for name in calls}


def evaluated() -> set[str]:
    attempt = Attempt("7", 1, FinishReason.STOP, VerdictKind.CORRECT, "7")
    figures = evaluation_metrics(score("<set>", [QuestionResult("set/0", "?", ("7",), (attempt, attempt), 1.0)]))
    return {name.replace("pass_at_2", "pass_at_<k>") for name in figures}


def pretrained() -> set[str]:
    """The tuple `names` of `pretrain.py`, what is kept of a step's figures, and its evaluation; it cannot be imported without Megatron."""
    source = read("megatron_r1z/pretrain.py")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "names":
            found = {f"pretrain/{name}" for name in ast.literal_eval(node.value)}
            return found | {name.replace("{item.name}", "<source>") for name in re.findall(r'f"(evaluation/[^"]+)"', source)}
    return set()


@pytest.mark.parametrize("source", [produced_by_the_stages, timed, evaluated, pretrained])
def test_every_metric_is_explained(source: object) -> None:
    assert callable(source)
    names = source()
    assert names, "the figures are no longer written where this test looks for them"
    assert names - {cell.strip("`") for cell in first_cells(read("docs/metrics.md"))} == set()


def test_every_explained_metric_exists() -> None:
    explained = {cell.strip("`") for cell in first_cells(read("docs/metrics.md")) if "/" in cell}
    assert explained - produced_by_the_stages() - timed() - evaluated() - pretrained() == set()


# ------------------------------------------------------------------------------------------------------------------- configuration


def load_config_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("config_docs", ROOT / "tools" / "config_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_the_configuration_is_up_to_date() -> None:
    assert read("docs/configuration.md") == load_config_docs().page(), "run: python tools/config_docs.py > docs/configuration.md"


def test_the_page_of_the_configuration_has_every_field() -> None:
    page = read("docs/configuration.md")
    for name, record in load_config_docs().all_sections().items():
        section, *parts = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0].split("\n### ")
        records = [record, *load_config_docs().subsections(record).values()]
        for text, described in zip([section, *parts], records, strict=True):
            assert [cell.strip("`") for cell in first_cells(text)[2:]] == [item.name for item in dataclasses.fields(described)]


def test_the_page_of_checkpoints_says_what_may_change_in_a_run() -> None:
    rows = read("docs/checkpoints.md").partition("## What may change when a run goes on\n")[2].partition("\n\nA refused change")[0]
    fields = [tuple(re.findall(r"`([\w.]+)`", line.split("|")[2])) for line in rows.splitlines() if line.startswith("|")][2:]
    assert [set(named) for named in fields] == [set(changes.WITHOUT_EFFECT), set(changes.STEERED), set(changes.BY_CONTENTS), set()]
    assert set(changes.MAY_CHANGE_IN_RUNS) == {name for named in fields for name in named}


# --------------------------------------------------------------------------------------------------------------- files, links, tests


def links(path: Path) -> Iterator[str]:
    """Targets of the links of a page, without code."""
    text = re.sub(r"^( *)```.*?^\1```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"\]\(<?([^)>\s]+)>?\)", re.sub(r"`[^`\n]*`(?!\])", "", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    targets = [target.partition("#")[0] for target in links(page) if not re.match(r"[a-z]+:", target)]
    assert [target for target in targets if target and not (page.parent / target).exists()] == []


def test_the_table_of_files_in_the_readme_names_files_that_exist() -> None:
    cells = first_cells(read("README.md").partition("\n## Where to look\n")[2].partition("\n## ")[0])[2:]
    names = [name for cell in cells for name in re.findall(r"\]\((.*?)\)", cell)]
    assert 5 < len(cells) <= 15
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_index_names_every_page() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages - set(links(ROOT / "docs" / "README.md")) == set()


@pytest.mark.parametrize("folder", ["policy", "layout"])
def test_the_table_of_a_folder_names_each_of_its_files(folder: str) -> None:
    text = (PACKAGE / folder / "README.md").read_text(encoding="utf-8").partition("\n## ")[0]
    assert {cell.strip("`") for cell in first_cells(text)[2:]} == {path.name for path in (PACKAGE / folder).glob("[!_]*.py")}


def test_the_tests_that_hold_the_objectives_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", read("docs/algorithms.md")))
    files = ("test_objective", "test_objective_table", "test_loop", "test_samples")
    defined = {name for file in files for name in re.findall(r"^def (test_\w+)", read(f"tests/unit/{file}.py"), flags=re.MULTILINE)}
    assert named - defined == set()
