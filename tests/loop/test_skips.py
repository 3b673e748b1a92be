"""A step whose loss or gradient is not finite leaves no trace, on every rank; and a run of such steps ends with the samples' names."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zstandard
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {  # of two ranks: parallel, optimizer, precision
    "dp2": ({}, {}, "fp32"),
    "dp2-bf16": ({}, {}, "bf16"),
    "dp2-distributed-optimizer": ({}, {"distributed": True}, "fp32"),
    "tp2": ({"tensor_parallel_size": 2}, {}, "fp32"),
    "pp2": ({"pipeline_parallel_size": 2}, {}, "fp32"),
    "cp2": ({"context_parallel_size": 2}, {}, "fp32"),
}
Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def results(torchrun: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each of two ranks found, by layout."""
    folder = tmp_path_factory.mktemp("skips")
    transformers.Qwen2Config(
        vocab_size=67, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    ).save_pretrained(folder)
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"architectures": ["Qwen2ForCausalLM"]})
    )
    (folder / "layouts.json").write_text(json.dumps(LAYOUTS))
    torchrun(2, Path(__file__).with_name("skips_worker.py"), folder)
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loss_or_gradient_that_is_not_finite_skips_the_step_on_every_rank(results: Results, layout: str) -> None:
    for rank in results:
        steps = rank[layout]["broken"]
        assert [step["skipped"] for step in steps] == [False, True, True, False]
        assert [math.isfinite(step["loss"]) for step in steps] == [True, False, True, True]
        assert [math.isfinite(step["grad_norm"]) for step in steps] == [True, False, False, True]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_samples_whose_loss_was_not_finite_are_known_on_every_rank(results: Results, layout: str) -> None:
    for rank in results:
        assert [step["non_finite"] for step in rank[layout]["broken"]] == [(), (rank[layout]["culprit"],), (), ()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_skipped_steps_leave_weights_moments_and_schedule_as_they_were(results: Results, layout: str) -> None:
    for rank in results:
        broken, unbroken = rank[layout]["broken"], rank[layout]["unbroken"]
        assert [broken[0], broken[3]] == unbroken
        assert broken[0]["learning_rate"] < broken[1]["learning_rate"] == broken[2]["learning_rate"] == broken[3]["learning_rate"]
        assert rank[layout]["same_weights"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_with_an_infinite_element_or_norm_leaves_no_trace(results: Results, layout: str) -> None:
    """Although the loss is finite, and in the second case every element of the gradient."""
    for rank in results:
        steps, unbroken = rank[layout]["spoiled"], rank[layout]["unbroken"]
        assert [step["skipped"] for step in steps] == [False, True, True, False]
        assert [step["grad_norm"] for step in steps[1:3]] == [math.inf] * 2
        assert [steps[0], steps[3]] == unbroken
        assert rank[layout]["spoiled_weights"]


@pytest.mark.parametrize("layout", ["dp2", "dp2-distributed-optimizer", "tp2", "pp2", "cp2"])
def test_biases_and_norms_are_not_decayed(results: Results, layout: str) -> None:
    """A step whose gradient is 0 does nothing but decay."""
    for rank in results:
        (step,) = rank[layout]["decay"]
        assert (step["grad_norm"], step["skipped"]) == (0.0, False)
        for name, (after, before) in rank[layout]["weights"].items():
            is_vector = name.endswith("bias") or "norm" in name
            assert before.dim() == (1 if is_vector else 2)
            factor = 1.0 if is_vector else 1 - 0.25 * 0.5
            torch.testing.assert_close(after, before * factor, rtol=1e-6 * (not is_vector), atol=0.0, msg=name)


# -------------------------------------------------------------------------------------------------------------------- a whole run

REWARD = """
from pathlib import Path

LATEST = Path(__file__).parent / "run" / "checkpoints" / "latest"

def reward(response, answers, finish_reason):
    right = float(any(answer in response for answer in answers))
    return right * (1e300 if LATEST.exists() and int(answers[0]) % 2 else 1.0)  # finite, and too large for float32
"""


@pytest.fixture(scope="module")
def stopped(base: Path, task: Any, cli: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run that, once it has a checkpoint, has samples of odd answers whose advantages float32 does not hold: folder and outcome."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "reward.py").write_text(REWARD)
    arguments = [
        "configs/quickstart.yaml",
        f"model.path={base}",
        f"data.train=[{{path: {task.questions}}}]",
        "evaluation.sets=[]",
        f"grading.function={folder / 'reward.py'}:reward",
        *(
            "parallel.num_ranks=2",
            "parallel.pipeline_parallel_size=2",
            "parallel.tensor_parallel_size=1",
            "parallel.pipeline_layers=[1, 3]",
        ),
        *("rollout.tensor_parallel_size=1", "rollout.prompts_per_iteration=8", "rollout.samples_per_prompt=4"),
        *("rollout.max_response_tokens=48", "algorithm.train_batch_size=32", "algorithm.iterations=9", "optimizer.max_skipped_steps=2"),
        *("checkpoint.every=1", "checkpoint.keep=1", f"logging.folder={folder / 'run'}"),
    ]
    return folder / "run", cli.run("train", *arguments)


def test_a_run_ends_with_the_names_of_the_samples(stopped: tuple[Path, Any]) -> None:
    folder, outcome = stopped
    assert outcome.status == 3
    assert outcome.processes == outcome.segments == []
    (sentence,) = outcome.stderr.splitlines()
    last = len(skipped_steps(folder))
    payload = zstandard.decompress((folder / "rollouts" / f"iter_{last - 1:06d}.jsonl.zst").read_bytes()).decode()
    trained = [sample for sample in map(json.loads, payload.splitlines()) if sample["advantage"]]
    names = [sample["sample_id"] for sample in trained if abs(sample["advantage"]) > 1e38]
    assert 0 < len(names) <= len(trained)
    assert f"2 optimizer steps in a row were skipped, the last of them optimizer step {last}: the loss was not finite for" in sentence
    assert f"for {len(names)} of {len(trained)} samples ({', '.join(names[:8])}" in sentence
    newest = (folder / "checkpoints" / "latest").read_text()
    assert f"no checkpoint was written, the newest is {folder / 'checkpoints' / newest}: look at these samples" in sentence


def test_what_the_run_had_done_is_kept(stopped: tuple[Path, Any], cli: Any, tmp_path: Path) -> None:
    folder, outcome = stopped
    skipped = skipped_steps(folder)
    assert "".join(map(str, skipped)).index("11") == len(skipped) - 2
    assert sum(line.startswith("warning: skipped optimizer step") for line in outcome.stdout.splitlines()) == sum(skipped)
    checkpoint = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
    assert [path.name for path in checkpoint.parent.glob("step_*")] == [checkpoint.name]
    assert checkpoint.name == f"step_{len(skipped) - 1:06d}"  # a checkpoint was due after every step, and the last one wrote none
    outcome = cli.run("convert", str(checkpoint), str(tmp_path / "hf"))
    assert outcome.status == 0, outcome.stderr
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "hf" / "model.safetensors").values())


def skipped_steps(folder: Path) -> list[int]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [int(row["update/skipped_steps"]) for row in rows if "update/skipped_steps" in row]
