"""Files that build on each other: what is merged, what messages name, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1z.config import TrainConfig, dump_config, load_config
from megatron_r1z.config.yaml_tree import _merge, read_tree
from megatron_r1z.errors import ConfigError

BASE: dict[str, Any] = {
    "model": {"path": "base-model"},
    "data": {"train": [{"path": "a.jsonl"}, {"path": "b.jsonl"}]},
    "algorithm": {"iterations": 3},
    "optimizer": {"lr": 1e-5, "betas": [0.8, 0.9]},
    "logging": {"folder": "runs/base"},
}


def write(folder: Path, **files: Any) -> Path:
    """Write `name.yaml` for every argument; the last one is returned."""
    path = folder
    for name, tree in files.items():
        path = folder / f"{name}.yaml"
        path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree), encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, path, overrides)
    return str(caught.value)


def test_a_file_changes_values_of_its_base_and_keeps_the_others(tmp_path: Path) -> None:
    path = write(
        tmp_path, base=BASE, run={"base": "base.yaml", "model": {"path": "mine"}, "optimizer": {"lr": 2e-5}, "rollout": {"seed": 4}}
    )
    config = load_config(TrainConfig, path)
    assert (config.model.path, config.rollout.seed, config.algorithm.iterations) == ("mine", 4, 3)
    assert (config.optimizer.lr, config.optimizer.betas) == (2e-5, (0.8, 0.9))


def test_lists_are_replaced_not_merged(tmp_path: Path) -> None:
    path = write(tmp_path, base=BASE, run={"base": "base.yaml", "data": {"train": [{"path": "c.jsonl"}]}})
    assert [source.path for source in load_config(TrainConfig, path).data.train] == ["c.jsonl"]


def test_bases_of_bases_are_found_relative_to_the_file_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    write(tmp_path, root=BASE)
    write(tmp_path / "inner", middle={"base": "../root.yaml", "optimizer": {"lr": 2e-5, "eps": 1e-7}})
    path = write(tmp_path, run={"base": "inner/middle.yaml", "optimizer": {"eps": 1e-6}})
    config = load_config(TrainConfig, path)
    assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.betas) == (2e-5, 1e-6, (0.8, 0.9))


def test_the_command_line_has_the_last_word_and_the_merged_run_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path, base=BASE, run={"base": "base.yaml", "optimizer": {"lr": 2e-5}})
    config = load_config(TrainConfig, path, ["optimizer.lr=3e-5", "data.train.1.weight=2"])
    assert (config.optimizer.lr, config.data.train[1].weight) == (3e-5, 2.0)
    kept = write(tmp_path, kept=dump_config(config))
    assert load_config(TrainConfig, kept) == config
    assert "base:" not in kept.read_text()


TREES = st.recursive(
    st.integers() | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from("abc"), TREES, max_size=3), st.dictionaries(st.sampled_from("abc"), TREES, max_size=3))
def test_what_a_file_says_holds_and_the_rest_is_the_base_s(base: dict[str, Any], over: dict[str, Any]) -> None:
    def leaves(tree: dict[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
        found: dict[tuple[str, ...], Any] = {}
        for key, value in tree.items():
            found |= leaves(value, (*prefix, key)) if isinstance(value, dict) and value else {(*prefix, key): value}
        return found

    before, mine = leaves(base), leaves(over)
    _merge(base, over)
    merged = leaves(base)
    for place, value in mine.items():
        assert value == {} or merged[place] == value
    for place, value in merged.items():
        assert place in mine or before[place] == value


# ------------------------------------------------------------------------------------------------------------------------ messages


def test_a_message_names_the_file_that_the_key_stands_in(tmp_path: Path) -> None:
    run = {"base": "base.yaml", "optimizer": {"lrr": 2e-5}}
    path = write(tmp_path, base=BASE, run=run)
    assert refusal(path) == f"{path}: unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"
    path = write(tmp_path, base=BASE | {"rollout": {"seed": "x"}}, run={"base": "base.yaml"})
    assert refusal(path) == f"{tmp_path / 'base.yaml'}: rollout.seed must be of type int, not 'x'."


def test_a_message_about_an_entry_of_a_list_names_its_file(tmp_path: Path) -> None:
    path = write(tmp_path, base=BASE | {"data": {"train": [{"pth": "a"}]}}, run={"base": "base.yaml", "data": {"template": "r1"}})
    assert refusal(path).startswith(f"{tmp_path / 'base.yaml'}: unknown key 'data.train.0.pth'")


def test_a_message_about_a_section_names_every_file_that_has_a_part_in_it(tmp_path: Path) -> None:
    path = write(tmp_path, base=BASE, run={"base": "base.yaml", "optimizer": {"min_lr": 1.0}})
    assert refusal(path) == f"{path} with {tmp_path / 'base.yaml'}: optimizer.min_lr 1.0 is above optimizer.lr 1e-05."


def test_a_message_about_the_command_line_names_no_file(tmp_path: Path) -> None:
    path = write(tmp_path, base=BASE, run={"base": "base.yaml"})
    assert refusal(path, "optimizer.lrr=1") == "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"
    assert refusal(path, "optimizer.min_lr=1.0") == "optimizer.min_lr 1.0 is above optimizer.lr 1e-05."


def test_what_no_file_has_is_asked_of_the_file_that_was_named(tmp_path: Path) -> None:
    path = write(tmp_path, base={key: value for key, value in BASE.items() if key != "logging"}, run={"base": "base.yaml"})
    assert refusal(path) == f"{path}: 'logging' is missing; it has no default."


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (
            {"run": {"base": "gone.yaml"}},
            "cannot read the configuration {0}/gone.yaml, the base of {0}/run.yaml: No such file or directory.",
        ),
        ({"run": {"base": ["a.yaml"]}}, "{0}/run.yaml: base is ['a.yaml']; it must be the name of another YAML file."),
        ({"base": "- 1", "run": {"base": "base.yaml"}}, "{0}/base.yaml must hold sections such as 'model:' and 'data:'."),
        (
            {"base": {"base": "run.yaml"}, "run": {"base": "base.yaml"}},
            "{0}/base.yaml: base leads back to {0}/run.yaml, which builds on it; remove one of the two.",
        ),
        ({"run": {"base": "run.yaml"}}, "{0}/run.yaml: base leads back to {0}/run.yaml, which builds on it; remove one of the two."),
    ],
)
def test_a_base_that_cannot_be(files: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    assert refusal(write(tmp_path, **files)) == sentence.format(tmp_path)


def test_a_base_that_is_not_yaml_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, base="a: [1", run={"base": "base.yaml"})
    assert refusal(path).startswith(f"{tmp_path / 'base.yaml'} is not valid YAML: ")


def test_a_section_that_a_file_replaces_is_its_own(tmp_path: Path) -> None:
    tree = read_tree(write(tmp_path, base={"a": {"b": 1, "c": 2}}, run={"base": "base.yaml", "a": 3}))
    assert (tree.values, tree.files("a"), tree.files("a.b")) == ({"a": 3}, (tree.path,), (tree.path,))
