"""The figures as Markdown, as JSON and as a table for a terminal. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_r1z.analysis.examine import ANSWER_MARKS, Outcome, Task
from megatron_r1z.analysis.figures import CellFigures, ReflectionEffect, Share, best_cell
from megatron_r1z.config import AnalyseConfig
from megatron_r1z.record.tables import align, markdown

NONE = "-"
Column = tuple[str, Callable[[CellFigures], str]]


def make_tree(config: AnalyseConfig, figures: Sequence[CellFigures]) -> dict[str, Any]:
    """Everything that the report shows, and more, as a plain JSON-able mapping."""
    settings = config.analysis
    return {
        "model": config.model.checkpoint or config.model.path,
        "questions": settings.questions.label,
        "grading": config.grading.function or config.grading.mode,
        "max_response_tokens": config.rollout.max_response_tokens,
        "keywords": list(settings.keywords),
        "judge": settings.judge.model if settings.judge.url is not None else None,
        "cells": [cell.to_tree() for cell in figures],
    }


def summarise(figures: Sequence[CellFigures]) -> str:
    """One row for each cell."""
    most = max(figures[0].pass_at)
    rows = [["template", "temperature", "answers", "accuracy", f"pass@{most}", "mixed", "cut", "reflecting questions"]]
    rows += [
        [
            cell.template,
            f"{cell.temperature:g}",
            _percent(cell.answering.value),
            _percent(cell.accuracy.value),
            _percent(cell.best_pass.value),
            _percent(cell.mixed.value),
            _percent(cell.outcomes[Outcome.CUT.value].share),
            str(cell.reflection[cell.detector].questions),
        ]
        for cell in figures
    ]
    return "\n".join(align(rows))


def render(config: AnalyseConfig, figures: Sequence[CellFigures], pictures: Sequence[str]) -> str:
    """The report in Markdown; `pictures` are files beside it."""
    sections = [
        _introduction(config, figures),
        "\n\n".join(f"![{name.removesuffix('.png')}]({name})" for name in pictures),
        _answering(figures),
        _exploration(figures),
        _reflection(config, figures),
        _by_level(figures),
        _endings(figures),
        _effect(figures),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _introduction(config: AnalyseConfig, figures: Sequence[CellFigures]) -> str:
    settings, cell = config.analysis, figures[0]
    asked = settings.judge.model if settings.judge.url is not None else None
    counts = sorted({item.questions for item in figures})
    questions = " or ".join(map(str, counts))
    judge = (
        f"Judge: {asked}. Of {len(Task) * sum(item.questions * item.samples for item in figures)} replies, {len(Task)} on each response, "
        f"{sum(item.without_verdict for item in figures)} have no verdict in them or were refused; they count as no."
        if asked is not None
        else "No judge was asked: whether a response answers is told from its form, and self-reflection from keywords alone."
    )
    return (
        f"# Analysis of {config.model.checkpoint or config.model.path}\n\n"
        f"{questions} questions of {settings.questions.label}{' (by template, as longer prompts are dropped)' if len(counts) > 1 else ''}, "
        f"{cell.samples} responses to each under each template at each temperature, top-p {settings.top_p:g}, at most "
        f"{config.rollout.max_response_tokens} tokens; grading: {config.grading.function or config.grading.mode}. {judge}\n\n"
        "In brackets: 95 % interval over the draw of questions."
    )


def _answering(figures: Sequence[CellFigures]) -> str:
    marks = ", ".join(f"`{mark}`" for mark in ANSWER_MARKS)
    best = max(figures, key=lambda cell: cell.answering.value)
    columns: list[Column] = [("by form", lambda cell: _share(cell.answering_by_form)), ("accuracy", lambda cell: _share(cell.accuracy))]
    if figures[0].answering_by_judge is not None:
        columns.insert(0, ("by the judge", lambda cell: _share(cell.answering_by_judge)))
    source = "the judge" if figures[0].answering_by_judge is not None else "form"
    return (
        "## Does it answer?\n\n"
        "Responses that try to answer the question, right or not. "
        f"By form: the response ended by itself and has one of {marks} in it.\n\n"
        f"{_table(figures, columns)}\n\n"
        f"Most by {source}: template {best.template} at temperature {best.temperature:g}, {_percent(best.answering.value)}."
    )


def _exploration(figures: Sequence[CellFigures]) -> str:
    columns: list[Column] = [(f"pass@{k}", lambda cell, k=k: _share(cell.pass_at[k])) for k in figures[0].pass_at]  # type: ignore[misc]
    columns.append(("mixed", lambda cell: _share(cell.mixed)))
    best = best_cell(figures)
    return (
        "## Does it explore?\n\n"
        "pass@k: probability that one of k responses is right. Mixed: questions with right and wrong responses, the only ones "
        "from which Dr. GRPO learns.\n\n"
        f"{_table(figures, columns)}\n\n"
        f"Highest pass@{max(best.pass_at)}: template {best.template} at temperature {best.temperature:g}, {_percent(best.best_pass.value)}."
    )


def _reflection(config: AnalyseConfig, figures: Sequence[CellFigures]) -> str:
    columns: list[Column] = []
    for name in figures[0].reflection:
        columns.append((f"responses, {name}", lambda cell, name=name: _share(cell.reflection[name].responses)))  # type: ignore[misc]
        columns.append((f"questions, {name}", lambda cell, name=name: str(cell.reflection[name].questions)))  # type: ignore[misc]
    templates = list(dict.fromkeys(cell.template for cell in figures))
    counts = {
        keyword: [sum(cell.keyword_counts.get(keyword, 0) for cell in figures if cell.template == template) for template in templates]
        for keyword in config.analysis.keywords
    }
    used = sorted((keyword for keyword in counts if any(counts[keyword])), key=lambda keyword: -sum(counts[keyword]))
    rows = [["keyword", *templates], *([keyword, *map(str, counts[keyword])] for keyword in used)]
    table = (
        f"Responses that contain each keyword, over all temperatures:\n\n{markdown(rows)}" if used else "No response has a keyword in it."
    )
    both = " Both: keywords and judge agree, which is what the paper counts." if "both" in figures[0].reflection else ""
    return (
        "## Does it reflect on itself?\n\n"
        f"Responses with self-reflection, and questions with at least one of them.{both}\n\n{_table(figures, columns)}\n\n{table}"
    )


def _by_level(figures: Sequence[CellFigures]) -> str:
    levels = list(figures[0].levels)
    if not levels:
        return ""
    columns: list[Column] = [
        (f"level {level}", lambda cell, level=level: _share(cell.levels[level].accuracy) if level in cell.levels else NONE)  # type: ignore[misc]
        for level in levels
    ]
    return f"## Accuracy by level\n\n{_table(figures, columns)}"


def _endings(figures: Sequence[CellFigures]) -> str:
    columns: list[Column] = [
        (outcome.value, lambda cell, outcome=outcome: _ending(cell, outcome))  # type: ignore[misc]
        for outcome in Outcome
    ]
    return f"## How responses end\n\nShare, mean length in tokens / in characters. By level in analysis.json.\n\n{_table(figures, columns)}"


def _ending(cell: CellFigures, outcome: Outcome) -> str:
    found = cell.outcomes[outcome.value]
    if found.mean_tokens is None or found.mean_characters is None:
        return _percent(found.share)
    return f"{_percent(found.share)}, {found.mean_tokens:.0f} / {found.mean_characters:.0f}"


def _effect(figures: Sequence[CellFigures]) -> str:
    columns: list[Column] = [
        ("with", lambda cell: _accuracy(cell.effect.accuracy_with, cell.effect.num_with)),
        ("without", lambda cell: _accuracy(cell.effect.accuracy_without, cell.effect.num_without)),
        ("questions with both", lambda cell: str(len(cell.effect.differences))),
        ("mean difference", lambda cell: _difference(cell.effect)),
        ("quartiles", lambda cell: _quartiles(cell.effect)),
        ("no gain", lambda cell: NONE if cell.effect.difference is None else _percent(cell.effect.difference.no_gain_share)),
    ]
    detector = {"both": "keywords and judge together", "keywords": "keywords"}[figures[0].detector]
    return (
        "## Are responses with self-reflection more often right?\n\n"
        f"Self-reflection by {detector}. Accuracy of responses with and without it; then, over questions that have both kinds, "
        "accuracy with minus without.\n\n"
        f"{_table(figures, columns)}"
    )


def _accuracy(share: Share | None, count: int) -> str:
    return NONE if share is None else f"{_share(share)} of {count}"


def _difference(effect: ReflectionEffect) -> str:
    spread = effect.difference
    if spread is None:
        return NONE
    bounds = "" if spread.low is None or spread.high is None else f" ({spread.low:+.2f} to {spread.high:+.2f})"
    return f"{spread.mean:+.2f}{bounds}"


def _quartiles(effect: ReflectionEffect) -> str:
    spread = effect.difference
    return NONE if spread is None else f"{spread.lower_quartile:+.2f}, {spread.median:+.2f}, {spread.upper_quartile:+.2f}"


def _table(figures: Sequence[CellFigures], columns: Sequence[Column]) -> str:
    header = ["template, temperature", *(name for name, _ in columns)]
    return markdown([header, *([f"{cell.template}, {cell.temperature:g}", *(show(cell) for _, show in columns)] for cell in figures)])


def _share(share: Share | None) -> str:
    return NONE if share is None else f"{share.value:.1%} ({share.low:.1%} - {share.high:.1%})"


def _percent(value: float) -> str:
    return f"{value:.1%}"
