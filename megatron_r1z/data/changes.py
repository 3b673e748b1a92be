"""What may change when a run, an evaluation, an analysis or a sweep goes on, and the refusal of everything else.

A folder holds one piece of work. `config.yaml` and `inputs.json` say what it was made of (settings, and files by their contents); the same
command with other settings or files would mix two pieces of work or pass one off as the other. The tables below are the one place that
says which fields may change; docs/checkpoints.md has them in words.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from megatron_r1z.config import AnalyseConfig, AnyConfig, EvaluateConfig, PretrainConfig, TrainConfig, dump_config, leaves, load_config
from megatron_r1z.data.fingerprint import Marks, RowsMark, differing
from megatron_r1z.data.inputs import INPUTS_FILE, Inputs, load_inputs, read_inputs, save_inputs
from megatron_r1z.data.order import Cursor, SeededStream
from megatron_r1z.errors import ConfigError
from megatron_r1z.record.result_files import keep_earlier, replace_text
from megatron_r1z.weights.resume_point import holds_checkpoints

WITHOUT_EFFECT = (
    *("parallel", "logging", "checkpoint", "grading.workers"),
    *("rollout.tensor_parallel_size", "rollout.kv_cache_bytes", "rollout.max_concurrent_sequences", "rollout.refit"),
    *("rollout.max_num_batched_tokens", "rollout.enforce_eager", "rollout.enable_prefix_caching"),
)
"""What decides where and how fast a number is computed, and no number beyond rounding. A section stands for all of its fields."""
BY_CONTENTS = ("model.path", "model.checkpoint", "data.train", "data.shots_path", "corpus.sources")
"""Names of files; what they hold is compared, not what they are called."""
SOURCES = ("data.train", "evaluation.sets", "corpus.sources", "corpus.evaluation")
"""Lists of sources, whose values are too long for a line."""
STEERED = (
    *("algorithm.iterations", "corpus.steps", "corpus.evaluation", "corpus.evaluation_every", "evaluation", "grading.timeout_s"),
    *("optimizer.lr", "optimizer.critic_lr", "optimizer.min_lr", "optimizer.schedule", "optimizer.warmup_steps", "optimizer.decay_steps"),
    *("optimizer.betas", "optimizer.eps", "optimizer.weight_decay", "optimizer.clip_grad", "optimizer.max_skipped_steps"),
)
"""What a user steers a training run by while it goes on."""
OF_TRAINING = (
    *("data.train", "data.seed", "rollout.prompts_per_iteration", "rollout.samples_per_prompt"),
    *("rollout.temperature", "rollout.top_p", "rollout.top_k"),
)
"""What a training run's file says of training, which an evaluation does not read."""
OF_REPORTS = (
    *("analysis.questions", "analysis.level_column", "analysis.templates", "analysis.temperatures", "analysis.k", "analysis.keywords"),
    *("analysis.judge", "analysis.shots_path", "analysis.system_prompt"),
)
"""What an analysis may have otherwise: each template at each temperature has a file, prompts are compared one by one, and a judge's replies
are kept by what they depend on."""

Work = TypeVar("Work", bound=AnyConfig)
MAY_CHANGE_IN_RUNS = (*WITHOUT_EFFECT, *BY_CONTENTS, *STEERED)
MAY_CHANGE_IN_EVALUATIONS = (*WITHOUT_EFFECT, *BY_CONTENTS, *OF_TRAINING, "evaluation.sets", "evaluation.every")
MAY_CHANGE_IN_ANALYSES = (*WITHOUT_EFFECT, *BY_CONTENTS, *OF_TRAINING, *OF_REPORTS)
MAY_CHANGE_IN_SWEEPS = (*WITHOUT_EFFECT, *BY_CONTENTS, "algorithm.iterations", "evaluation.every", "grading.timeout_s")


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as it was.

    >>> str(Difference("rollout.temperature", "rollout.temperature 1.0, which is now 0.6"))
    'rollout.temperature 1.0, which is now 0.6'
    """

    field: str
    """By which the change can be asked for."""
    text: str
    """What follows "holds a run with"."""

    def __str__(self) -> str:
        return self.text


def is_among(name: str, entries: Collection[str]) -> bool:
    """Whether a field, or a section that it is in, is one of `entries`.

    >>> is_among("precision.fp8.recipe", ("precision",)), is_among("precision.fp8.recipe", ("precision.fp8.param",))
    (True, False)
    """
    return any(name == entry or name.startswith(f"{entry}.") for entry in entries)


def changed_fields(was: AnyConfig, now: AnyConfig) -> dict[str, tuple[object, object]]:
    """Both values of every field that differs, by dotted name."""
    before, after = leaves(was), leaves(now)
    return {name: (before.get(name), value) for name, value in after.items() if before.get(name) != value}


def changed_settings(was: AnyConfig, now: AnyConfig, may_change: Collection[str]) -> list[Difference]:
    """The fields that differ and must not."""
    return [
        Difference(name, f"{name} {before!r}, which is now {after!r}")
        for name, (before, after) in changed_fields(was, now).items()
        if not is_among(name, may_change)
    ]


def changed_inputs(was: tuple[AnyConfig, Inputs], now: tuple[AnyConfig, Inputs]) -> list[Difference]:
    """The files that differ, each as the field that names it."""
    (config, before), (other, after) = was, now
    found = [
        *_changed_files("model.path", other.model.path, before.settings, after.settings),
        *_changed_weights((config, before.weights), (other, after.weights)),
        *_changed_files("data.shots_path", str(leaves(other).get("data.shots_path")), before.shots, after.shots),
    ]
    functions = leaves(other)
    field = "grading.function" if functions.get("grading.function") is not None else "grading.extra"
    found += _changed_files(field, "the reward function", before.rewards, after.rewards)
    return found + changed_rows("corpus.sources" if isinstance(other, PretrainConfig) else "data.train", before.rows, after.rows)


def _changed_files(field: str, place: str, was: Marks, now: Marks) -> list[Difference]:
    names = differing(was, now)
    if not names:
        return []
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return [Difference(field, f"other contents than {place} has now ({field}: {shown})")]


def _changed_weights(was: tuple[AnyConfig, Marks], now: tuple[AnyConfig, Marks]) -> list[Difference]:
    (config, before), (other, after) = was, now
    if not differing(before, after):
        return []
    checkpoints = config.model.checkpoint, other.model.checkpoint
    field = "model.path" if checkpoints == (None, None) else "model.checkpoint"
    if None in checkpoints and checkpoints != (None, None):
        return [Difference(field, f"the weights of {field} {checkpoints[0]!r}, which is now {checkpoints[1]!r}")]
    return [
        Difference(field, difference.text.replace("other contents", "other weights"))
        for difference in _changed_files(field, other.model.checkpoint or other.model.path, before, after)
    ]


def changed_rows(field: str, was: Sequence[RowsMark], now: Sequence[RowsMark]) -> list[Difference]:
    """Sources of training that differ in number, order, weight or rows; a file that has another name only is the same."""
    if len(was) != len(now):
        return [Difference(field, f"{field} of {len(was)} sources, which are now {len(now)}")]
    found = []
    for index, (before, after) in enumerate(zip(was, now, strict=True)):
        if before.weight != after.weight:
            found.append(Difference(field, f"{field}.{index}.weight {before.weight:g}, which is now {after.weight:g}"))
        if before.digest != after.digest:
            text = f"other rows of {field}.{index} than are in {after.label} now ({before.count} of {before.label} then, {after.count} now)"
            found.append(Difference(field, text))
    return found


# --- runs that go on ---


def check_goes_on(config: TrainConfig | PretrainConfig, rows: Sequence[RowsMark]) -> None:
    """Refuse a training run that would go on as another one: it goes on from a checkpoint, and what decides which run it is has changed.

    Args:
        config: of the run now.
        rows: what it would be trained on.

    Raises:
        ConfigError: names every such field with both values, and how to ask for the change.
    """
    folder = Path(config.logging.folder)
    earlier = earlier_config(type(config), folder) if holds_checkpoints(folder / "checkpoints") else None
    if earlier is None:
        return
    found = [item for item in run_differences(earlier, config, rows) if item.field not in config.checkpoint.accept_changes]
    if found:
        names = ", ".join(dict.fromkeys(item.field for item in found))
        raise ConfigError(
            f"{folder} holds a run with {'; with '.join(map(str, found))}; give what it had, choose another logging.folder, or go on with "
            f"the change by checkpoint.accept_changes=[{names}]."
        )


def run_differences(was: TrainConfig | PretrainConfig, now: TrainConfig | PretrainConfig, rows: Sequence[RowsMark]) -> list[Difference]:
    """What must not change in a run that goes on and has; of the weights that it began from, only where they are still looked at."""
    found = changed_settings(was, now, MAY_CHANGE_IN_RUNS)
    known = load_inputs(Path(now.logging.folder))
    if known is None:
        return found
    return found + changed_inputs((was, known), (now, read_inputs(now, rows, known, weights=has_reference(now))))


def has_reference(config: TrainConfig | PretrainConfig) -> bool:
    """Whether the weights that `model` names are those of a reference model, which a run that goes on reads again."""
    return isinstance(config, TrainConfig) and config.algorithm.kl_coef > 0


def is_asked_for(config: TrainConfig | PretrainConfig) -> bool:
    """Whether a run that goes on may draw other rows, or in another order, than it did."""
    return any(is_among(name, ("data", "corpus", "model.path")) for name in config.checkpoint.accept_changes)


def accepts_weights(config: TrainConfig | PretrainConfig) -> bool:
    """Whether a run that goes on may have begun from other weights than those that `model` names now."""
    return not {"model.path", "model.checkpoint"}.isdisjoint(config.checkpoint.accept_changes)


def earlier_config(kind: type[Work], folder: Path) -> Work | None:
    """The configuration that a folder's work had; None where there is none.

    Raises:
        ConfigError: it is that of another kind of work or of a version with other fields, or cannot be read.
    """
    path = folder / "config.yaml"
    if not path.exists():
        return None
    try:
        return cast(Work, load_config(cast(Any, kind), path, is_record=True))
    except ConfigError as error:
        reason = str(error).removesuffix(".")
        raise ConfigError(
            f"what {folder} holds is no work of this command in this version ({reason}); choose another logging.folder, or go on with the "
            "version that is in its versions.json."
        ) from error


def describe_changes(was: AnyConfig, now: AnyConfig) -> str | None:
    """One line on the settings that a run goes on with and did not have; None where there are none."""
    changed = changed_fields(was, now)
    shown = [
        name if name in SOURCES else f"{name} {before!r} -> {after!r}"
        for name, (before, after) in changed.items()
        if name != "checkpoint.accept_changes"
    ]
    return f"goes on with other settings: {', '.join(shown)}" if shown else None


def go_on(stream: SeededStream[Any], state: Mapping[str, Any], config: TrainConfig | PretrainConfig) -> str | None:
    """Put a stream where the checkpoint was, or at its beginning where other rows were asked for; what is worth saying about it.

    Raises:
        DataError: the checkpoint was drawing from other rows, and nobody asked for them.
    """
    cursor = Cursor.from_state(state)
    reason = cursor.misfit(stream.cursor)
    if reason is not None and is_asked_for(config):
        return f"{reason}, as checkpoint.accept_changes allows; the order begins anew"
    stream.restore(state)
    if cursor.seed is None:
        return "the checkpoint, by an earlier version, does not say by which seed, weights and contents it drew: they are taken as they are"
    return None


# --- every kind of work ---


def record_work(folder: Path, config: AnyConfig, rows: Sequence[RowsMark] = (), *, goes_on: bool = True) -> list[str]:
    """Write what the work in a folder is made of: `inputs.json` and `config.yaml`, an earlier one that differs kept as `config.<n>.yaml`.

    A training run that goes on keeps the record of the weights that it began from, also where they are not looked at any more.

    Args:
        folder: is made if need be.
        config: as it is now.
        rows: what is trained on.
        goes_on: whether what is in the folder is gone on with, not begun anew.

    Returns:
        Lines that the user should see.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = load_inputs(folder)
    earlier = earlier_config(type(config), folder) if goes_on else None
    keeps = goes_on and known is not None and isinstance(config, TrainConfig | PretrainConfig) and not accepts_weights(config)
    save_inputs(folder, read_inputs(config, rows, known, weights=not keeps))
    text = dump_config(config)
    keep_earlier(folder / "config.yaml", text)
    replace_text(folder / "config.yaml", text)
    if earlier is None:
        return []
    unknown = f"{folder} has no {INPUTS_FILE}, by an earlier version: its files are taken to hold what they did, and compared from now on"
    return [line for line in (unknown if known is None else None, describe_changes(earlier, config)) if line is not None]


# --- evaluations and analyses ---


def check_same(config: EvaluateConfig | AnalyseConfig) -> None:
    """Refuse to add to a folder responses of another model, under other settings or by another reward.

    Raises:
        ConfigError: names what has changed.
    """
    earlier = earlier_config(type(config), config.folder)
    if earlier is None:
        return
    known = load_inputs(config.folder)
    may_change: tuple[str, ...] = MAY_CHANGE_IN_EVALUATIONS if isinstance(config, EvaluateConfig) else MAY_CHANGE_IN_ANALYSES
    if known is None:
        may_change = tuple(name for name in may_change if name not in ("model.path", "model.checkpoint"))
    found = changed_settings(earlier, config, may_change)
    if known is not None and not found:
        now = read_inputs(config, (), known)
        found = [
            item for item in changed_inputs((earlier, known), (config, now)) if item.field != "data.shots_path"
        ]  # prompts are compared
    if found:
        raise ConfigError(
            f"{config.folder} holds responses with {'; with '.join(map(str, found))}; choose another logging.folder, or delete that folder "
            "to start again."
        )


def on_first_rank(check: Callable[[], None]) -> None:
    """Make a check that reads whole files once: under torchrun on rank 0, whose folder it is about."""
    if os.environ.get("RANK", "0") == "0":
        check()
