"""The course of `megatron-r1z analyse`: every template at every temperature is sampled like an evaluation, then judged and reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_r1z.analysis import judge
from megatron_r1z.analysis.examine import Inquiry, examine, make_inquiries, read_levels
from megatron_r1z.analysis.figures import CellFigures, make_figures
from megatron_r1z.analysis.plots import draw
from megatron_r1z.analysis.report import make_tree, render, summarise
from megatron_r1z.config import AnalyseConfig, Template
from megatron_r1z.data.naming import name_sources
from megatron_r1z.data.questions import Question, load_questions
from megatron_r1z.evaluation.evaluate import Evaluation, evaluate_set
from megatron_r1z.evaluation.scores import QuestionResult, powers_up_to
from megatron_r1z.host.rank import StopFlag
from megatron_r1z.protocols import Sampler, Sampling
from megatron_r1z.record.metrics import Console
from megatron_r1z.record.result_files import replace_text, to_json
from megatron_r1z.types import Group, Prompt


@dataclass(frozen=True, slots=True)
class Cell:
    """One template at one temperature.

    >>> Cell("qwen_math", 0.6).name
    'qwen_math_t0.6'
    """

    template: Template
    temperature: float

    @property
    def name(self) -> str:
        """Of its file of responses."""
        return f"{self.template}_t{self.temperature!r}"  # every digit: the file of one temperature is not another's


Records = Mapping[Cell, Sequence[QuestionResult]]


class OnDemand:
    """A sampler that is made when the first responses are asked for: an analysis whose responses are all on disk needs none."""

    def __init__(self, make: Callable[[], Sampler]) -> None:
        self._make = make
        self.made: Sampler | None = None

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, policy_version: int) -> list[Group]:
        """See `Sampler`; all ranks make theirs in the same call."""
        if self.made is None:
            self.made = self._make()
        return self.made.generate(prompts, sampling, policy_version)


@dataclass
class Analysis:
    """The collaborators of one `megatron-r1z analyse` on this rank."""

    config: AnalyseConfig
    cells: Mapping[Cell, Evaluation]
    """Each with the one set of questions under its template."""
    log: Console
    stop_flag: StopFlag


def cells_of(config: AnalyseConfig) -> list[Cell]:
    """The cells in the order in which they are sampled."""
    return [Cell(template, temperature) for template in config.analysis.templates for temperature in config.analysis.temperatures]


def records_path(config: AnalyseConfig, cell: Cell) -> Path:
    """Where the responses of a cell are."""
    return config.folder / "responses" / f"{cell.name}.jsonl"


def sample(analysis: Analysis) -> Records | None:
    """The responses of every cell, those on disk first; None where a stop was asked for."""
    records = {}
    for cell, evaluation in analysis.cells.items():
        (questions,) = evaluation.sets
        analysis.log.say(f"template {cell.template}, temperature {cell.temperature:g}")
        records[cell] = evaluate_set(evaluation, questions, records_path(analysis.config, cell))
        if len(records[cell]) < len(questions.prompts):
            return None
    return records


def finish(config: AnalyseConfig, records: Records, log: Console, stop_flag: StopFlag) -> bool:
    """Judge the responses where a judge is given and write the report; False where a stop was asked for. One rank does this.

    Raises:
        JudgeError: the judge cannot be reached.
    """
    (name,) = name_sources([config.analysis.questions])
    questions = {question.question_id: question for question in load_questions(config.analysis.questions, name)}
    verdicts = None
    if config.analysis.judge.url is not None:
        verdicts = _judge(config, records, questions, log, stop_flag)
        if verdicts is None:
            return False
    levels = read_levels(config.analysis.questions, config.analysis.level_column, questions)
    ks = config.analysis.k or powers_up_to(config.analysis.samples) or (1,)
    figures = [
        make_figures(cell.template, cell.temperature, examine(results, questions, levels, config.analysis.keywords, verdicts), ks)
        for cell, results in records.items()
    ]
    _write(config, figures, log)
    return True


def _judge(
    config: AnalyseConfig, records: Records, questions: Mapping[str, Question], log: Console, stop_flag: StopFlag
) -> dict[Inquiry, int | None] | None:
    settings = config.analysis.judge
    inquiries = list(dict.fromkeys(inquiry for results in records.values() for inquiry in make_inquiries(results, questions)))
    path = config.folder / "judge.jsonl"
    return judge.ask(inquiries, settings, path, judge.make_sender(settings), stop_flag, log)


def _write(config: AnalyseConfig, figures: Sequence[CellFigures], log: Console) -> None:
    """Report, figures and plots; the report comes last, so that what it shows is there."""
    pictures = draw(figures, config.folder)
    if not pictures:
        log.say("no plots, since matplotlib is not installed; run `pip install matplotlib` and the same command again")
    replace_text(config.folder / "analysis.json", to_json(make_tree(config, figures), indent=1) + "\n")
    replace_text(config.folder / "report.md", render(config, figures, pictures))
    log.say("\n" + summarise(figures) + "\n")
