"""`megatron-r1z train` from the command line to the files that it leaves: short runs of the whole loop, each shared by several tests."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zstandard
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.loop.conftest import BUDGET, HANGS_S, ITERATIONS, TP2, figures_of, has_iteration, iterations_of, rows_of

pytestmark = pytest.mark.slow

PP2 = ("parallel.tensor_parallel_size=1", "parallel.pipeline_parallel_size=2")
CP2 = ("parallel.tensor_parallel_size=1", "parallel.pipeline_parallel_size=1", "parallel.context_parallel_size=2")
DP2 = ("parallel.tensor_parallel_size=1", "parallel.pipeline_parallel_size=1")
TWO_ENGINES = ("rollout.tensor_parallel_size=1",)
TWO_STEPS = ("algorithm.train_batch_size=16", "optimizer.lr=1e-4", "algorithm.clip_low=0.02", "algorithm.clip_high=0.02")

LEFT_OVER = {
    **{"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"},
    **{"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "SLURM_JOB_ID": "1", "SLURM_PROCID": "1"},
}
"""What a torchrun in a Slurm job gave to a shell that has outlived it."""
GREEDY = """
import json, os, sys
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
from vllm import LLM, SamplingParams
folder, output, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
engine = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=80, kv_cache_memory_bytes=64 << 20, disable_log_stats=True)
outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], SamplingParams(temperature=0.0, max_tokens=48), use_tqdm=False)
with open(output, "w") as file:
    json.dump([list(item.outputs[0].token_ids) for item in outputs], file)
"""


@pytest.fixture(scope="session")
def resumed(training: list[str], cli: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, int, Any]:
    """The same run, stopped by SIGINT after iteration 2 and started again: folder, outcome, iteration it stopped at, second outcome."""
    folder = tmp_path_factory.mktemp("resumed")
    command = cli.start("train", *training, *TP2, f"logging.folder={folder}")
    command.wait_until(lambda: has_iteration(folder, 2))
    command.process.send_signal(signal.SIGINT)
    stopped = command.wait()
    iteration = json.loads((folder / "checkpoints" / newest_checkpoint(folder) / "state.json").read_text())["iteration"]
    return folder, stopped, iteration, cli.run("train", *training, *TP2, f"logging.folder={folder}", environment=LEFT_OVER)


@pytest.fixture(scope="session")
def two_steps(training: list[str], cli: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Two iterations of two optimizer steps with two engines, split by layers, by tokens and by data; the latter as ranks of torchrun."""
    runs = {}
    for name, layout, torchrun in (("pp2", PP2, 0), ("cp2", CP2, 0), ("dp2", DP2, 2)):
        folder = tmp_path_factory.mktemp(name)
        arguments = [*training, *layout, *TWO_ENGINES, *TWO_STEPS, "algorithm.iterations=2", f"logging.folder={folder}"]
        runs[name] = folder, cli.run("train", *arguments, torchrun=torchrun)
    return runs


def newest_checkpoint(folder: Path) -> str:
    return (folder / "checkpoints" / "latest").read_text().strip()


def versions_of(folder: Path) -> list[int]:
    """In `refits.jsonl`."""
    return [json.loads(row)["policy_version"] for row in (folder / "refits.jsonl").read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "hf" / "final" / "model.safetensors")


def rollouts_of(folder: Path, iteration: int) -> list[dict[str, Any]]:
    payload = (folder / "rollouts" / f"iter_{iteration:06d}.jsonl.zst").read_bytes()
    return [json.loads(line) for line in zstandard.decompress(payload).decode().splitlines()]


def are_close(row: dict[str, float], expected: dict[str, float]) -> bool:
    """The figures of an update, to float32's noise."""
    pairs = {name: (row[f"update/{name}"], expected[f"update/{name}"]) for name in ("loss", "grad_norm", "entropy_nats", "ratio_max")}
    print("differences", {name: abs(mine - other) for name, (mine, other) in pairs.items()})
    return all(mine == pytest.approx(other, rel=1e-5, abs=1e-7) for mine, other in pairs.values())


def left_nothing(outcome: Any) -> bool:
    print("left", outcome.processes, outcome.segments)
    return outcome.processes == outcome.segments == []


# ------------------------------------------------------------------------------------------------------------------- to the end


def test_run_succeeds_and_leaves_no_process(unbroken: tuple[Path, Any]) -> None:
    _, outcome = unbroken
    assert (outcome.status, outcome.stderr) == (0, "")
    assert left_nothing(outcome)


def test_engine_and_policy_agree_on_the_same_tokens(unbroken: tuple[Path, Any]) -> None:
    certificate = json.loads((unbroken[0] / "certificate.json").read_text())
    print("certificate", certificate)
    assert certificate["max_nats"] < 1e-4
    assert "log-probs at equal weights" in unbroken[1].stdout


def test_every_iteration_has_a_row_of_finite_figures(unbroken: tuple[Path, Any]) -> None:
    rows = iterations_of(unbroken[0])
    assert [row["iteration"] for row in rows] == list(range(1, ITERATIONS + 1))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    trained = [row for row in rows if row["update/trained_tokens"]]  # what is sampled, and so what is right, is the processor's rounding
    assert len(trained) >= ITERATIONS / 2, "the comparisons below are about something"
    assert all(0 < row["rollout/reward_mean"] < 1 and row["update/grad_norm"] > 0 for row in trained)
    assert all(row["update/mismatch_max_nats"] < 1e-4 for row in trained)  # after every refit, not only the first


def test_weights_are_handed_over_whole_after_every_iteration(unbroken: tuple[Path, Any]) -> None:
    folder, _ = unbroken
    nbytes = {row["refit/bytes"] for row in iterations_of(folder)}
    exported = sum(tensor.nbytes for tensor in weights_of(folder).values())
    assert len(nbytes) == 1
    assert exported <= nbytes.pop() < 1.1 * exported  # norms lie on both ranks


def test_evaluation_runs_before_between_and_after(unbroken: tuple[Path, Any]) -> None:
    rows = [row for row in rows_of(unbroken[0]) if any(name.endswith("_accuracy") for name in row)]
    assert [row["iteration"] for row in rows] == [0, 4, 8]
    assert all({"evaluation/easy_questions_accuracy", "evaluation/others_accuracy"} <= row.keys() for row in rows)  # two parts of a file


def test_tensorboard_shows_the_same_rewards(unbroken: tuple[Path, Any], resumed: tuple[Path, Any, int, Any]) -> None:
    for folder in (unbroken[0], resumed[0]):
        board = EventAccumulator(str(folder / "tensorboard"))
        board.Reload()
        shown = [(event.step, event.value) for event in board.Scalars("rollout/reward_mean")]
        assert shown == [(row["iteration"], pytest.approx(row["rollout/reward_mean"], rel=1e-6)) for row in iterations_of(folder)]


def test_rollouts_are_kept_whole(unbroken: tuple[Path, Any]) -> None:
    folder, _ = unbroken
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf" / "final")
    for row in iterations_of(folder):
        iteration = int(row["iteration"]) - 1
        samples = rollouts_of(folder, iteration)
        assert len(samples) == 32
        assert set(Counter(sample["sample_id"].split("/")[0] for sample in samples).values()) == {4}
        assert {sample["policy_version"] for sample in samples} == {iteration}
        assert sum(sample["reward"] for sample in samples) / 32 == pytest.approx(row["rollout/reward_mean"])
        for sample in samples:
            assert 0 < len(sample["engine_logprobs"]) == len(sample["response_token_ids"]) <= BUDGET
            assert max(sample["engine_logprobs"]) <= 0
            assert tokenizer.decode(sample["response_token_ids"], skip_special_tokens=True) == sample["response"]
            assert (sample["verdict"] == "correct") == (sample["reward"] == 1) == (sample["extracted"] in sample["answers"])


def test_exported_model_answers_alike_in_transformers_and_vllm(unbroken: tuple[Path, Any], tmp_path: Path) -> None:
    model_folder = unbroken[0] / "hf" / "final"
    prompts = [sample["prompt_token_ids"] for sample in rollouts_of(unbroken[0], 0)[::4]]
    script = [sys.executable, "-c", GREEDY, str(model_folder), str(tmp_path / "tokens.json"), json.dumps(prompts)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    engine = subprocess.Popen(script, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=BUDGET)
        expected.append(answer[0, len(prompt) :].tolist())
    _, errors = engine.communicate(timeout=HANGS_S)
    assert engine.returncode == 0, errors[-4000:]
    assert json.loads((tmp_path / "tokens.json").read_text()) == expected


# ----------------------------------------------------------------------------------------------------------------- stop and resume


def test_interrupt_ends_with_130_after_a_checkpoint(resumed: tuple[Path, Any, int, Any]) -> None:
    _, stopped, iteration, _ = resumed
    assert stopped.status == 130
    assert 2 <= iteration < ITERATIONS
    assert "Traceback" not in stopped.stderr
    assert left_nothing(stopped)


def test_stopped_before_its_first_step_a_run_starts_from_the_beginning(training: list[str], cli: Any, tmp_path: Path) -> None:
    """There is nothing to keep, and Megatron reads no checkpoint of an optimizer that never took a step.

    The rollout that is stopped would outlast the ranks' grace many times, under which they would be killed.
    """
    arguments = [*training, *TP2, "rollout.prompts_per_iteration=64", "algorithm.train_batch_size=256", "algorithm.iterations=1"]
    endless = ["rollout.prompts_per_iteration=20000", "algorithm.train_batch_size=80000", "parallel.grace_s=60"]
    command = cli.start("train", *arguments, *endless, f"logging.folder={tmp_path}")
    command.wait_until(lambda: rows_of(tmp_path) != [])  # of the evaluation before the first iteration
    command.process.send_signal(signal.SIGINT)
    stopped = command.wait()
    assert (stopped.status, iterations_of(tmp_path)) == (130, [])
    assert "stopped on request; nothing to keep yet, the same command starts from the beginning" in stopped.stdout
    assert not (tmp_path / "checkpoints" / "latest").exists()
    outcome = cli.run("train", *arguments, f"logging.folder={tmp_path}")
    assert (outcome.status, outcome.stderr, len(iterations_of(tmp_path))) == (0, "", 1)


def test_resumed_run_goes_on_from_the_checkpoint(resumed: tuple[Path, Any, int, Any]) -> None:
    folder, _, iteration, outcome = resumed
    assert (outcome.status, outcome.stderr) == (0, "")
    assert f"step_{iteration:06d}: {iteration} of {ITERATIONS} iterations done" in outcome.stdout
    assert "MASTER_PORT, TORCHELASTIC_RUN_ID, which is ignored" in outcome.stdout
    assert newest_checkpoint(folder) == f"step_{ITERATIONS:06d}"
    assert versions_of(folder) == list(range(ITERATIONS + 1))
    assert left_nothing(outcome)


def test_resumed_run_has_the_figures_of_an_unbroken_one(unbroken: tuple[Path, Any], resumed: tuple[Path, Any, int, Any]) -> None:
    assert figures_of(resumed[0]) == figures_of(unbroken[0])


def test_resumed_run_ends_in_the_same_weights(unbroken: tuple[Path, Any], resumed: tuple[Path, Any, int, Any], base: Path) -> None:
    expected, found, start = weights_of(unbroken[0]), weights_of(resumed[0]), load_file(base / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not any(torch.equal(start[name], tensor) for name, tensor in expected.items())


def test_checkpoint_goes_on_under_another_layout(unbroken: tuple[Path, Any], training: list[str], cli: Any, tmp_path: Path) -> None:
    original, folder = unbroken[0], tmp_path / "run"
    shutil.copytree(original, folder)
    (folder / "checkpoints" / "latest").write_text("step_000004")
    outcome = cli.run("train", *training, *PP2, "rollout.tensor_parallel_size=2", "algorithm.iterations=6", f"logging.folder={folder}")
    assert (outcome.status, outcome.stderr) == (0, "")
    assert "step_000004: 4 of 6 iterations done" in outcome.stdout
    assert versions_of(folder) == list(range(7))
    assert sorted(path.name for path in (folder / "rollouts").iterdir()) == [f"iter_{number:06d}.jsonl.zst" for number in range(6)]
    assert "goes on with other settings: algorithm.iterations 8 -> 6" in outcome.stdout
    assert "parallel.pipeline_parallel_size 1 -> 2" in outcome.stdout
    assert (folder / "config.1.yaml").read_text() == (original / "config.yaml").read_text() != (folder / "config.yaml").read_text()
    found, expected = iterations_of(folder), iterations_of(original)[:6]
    assert [row["iteration"] for row in found] == list(range(1, 7))
    for mine, row in zip(found[4:], expected[4:], strict=True):  # the second of them also by the optimizer's state
        assert mine["rollout/reward_mean"] == row["rollout/reward_mean"]
        assert are_close(mine, row)


def test_a_run_does_not_go_on_as_another(unbroken: tuple[Path, Any], training: list[str], task: Any, cli: Any, tmp_path: Path) -> None:
    folder, lines = unbroken[0], task.questions.read_text().splitlines(keepends=True)
    (tmp_path / "questions.jsonl").write_text("".join(lines[1:] + lines[:1]))
    arguments = [
        *training,
        *TP2,
        f"logging.folder={folder}",
        f"data.train=[{{path: {tmp_path / 'questions.jsonl'}}}]",
        "algorithm.clip_low=0.1",
    ]
    outcome = cli.run("train", *arguments)
    assert (outcome.status, outcome.stdout) == (2, "")
    assert "holds a run with algorithm.clip_low 0.2, which is now 0.1; with other rows of data.train.0 than are in" in outcome.stderr
    assert outcome.stderr.endswith("by checkpoint.accept_changes=[algorithm.clip_low, data.train].\n")


# ---------------------------------------------------------------------------------------------------------- several optimizer steps


@pytest.mark.parametrize("name", ["pp2", "cp2", "dp2"])
def test_iteration_takes_several_optimizer_steps(two_steps: dict[str, tuple[Path, Any]], name: str) -> None:
    folder, outcome = two_steps[name]
    assert outcome.status == 0, outcome.stderr
    assert left_nothing(outcome)
    steps = rows_of(folder, "step")
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert all(math.isfinite(value) for row in steps + iterations_of(folder) for value in row.values())
    firsts, seconds = ([row for row in steps[start::2] if row["update/trained_tokens"]] for start in (0, 1))
    assert firsts
    assert all(row["update/clip_fraction"] == 0 for row in firsts)  # no weight has moved since the rollout
    assert all(row["update/ratio_max"] == pytest.approx(1, abs=1e-4) for row in firsts)
    assert any(row["update/clip_fraction"] > 0 for row in seconds)
    for row, first, second in zip(iterations_of(folder), steps[::2], steps[1::2], strict=True):
        tokens = [step["update/trained_tokens"] for step in (first, second)]
        clipped = sum(step.get("update/clip_fraction", 0.0) * count for step, count in zip((first, second), tokens, strict=True))
        if sum(tokens):
            assert row["update/clip_fraction"] == pytest.approx(clipped / sum(tokens))
        else:  # every group alike
            assert "update/clip_fraction" not in row
        assert {sample["step"] for sample in rollouts_of(folder, int(row["iteration"]) - 1)} == {0, 1}


@pytest.mark.parametrize("name", ["pp2", "cp2"])
def test_layers_or_tokens_or_data_split_over_the_ranks_is_the_same_run(two_steps: dict[str, tuple[Path, Any]], name: str) -> None:
    mine, by_data = (iterations_of(two_steps[layout][0])[0] for layout in (name, "dp2"))
    assert mine["rollout/reward_mean"] == by_data["rollout/reward_mean"]
    assert are_close(mine, by_data)
    assert mine["update/trained_tokens"] == by_data["update/trained_tokens"]


def test_engine_and_policy_agree_on_as_many_tokens_however_they_are_split(two_steps: dict[str, tuple[Path, Any]]) -> None:
    certificates = [json.loads((folder / "certificate.json").read_text()) for folder, _ in two_steps.values()]
    assert len({certificate["num_tokens"] for certificate in certificates}) == 1
    assert all(certificate["max_nats"] < 1e-4 for certificate in certificates)


# -------------------------------------------------------------------------------------------------------- what is off by default


def test_all_switches_beside_the_objective_at_once(training: list[str], cli: Any, tmp_path: Path) -> None:
    """Two ranks with an engine each: both must see the same groups, or they would not sample as many rounds."""
    switches = ("dual_clip=1.01", "tis_cap=1.0", "mask_truncated=true", "filter_groups=true", "sampling_rounds=4")
    arguments = [
        *training,
        *DP2,
        *TWO_ENGINES,
        *TWO_STEPS,
        "evaluation.sets=[]",
        "rollout.max_response_tokens=17",
        "algorithm.iterations=3",
    ]
    outcome = cli.run("train", *arguments, *(f"algorithm.{switch}" for switch in switches), f"logging.folder={tmp_path}")
    assert outcome.status == 0, outcome.stderr
    assert left_nothing(outcome)
    rows = iterations_of(tmp_path)
    assert any(row["rollout/sampling_rounds"] > 1 for row in rows)
    for number, row in enumerate(rows):
        samples = rollouts_of(tmp_path, number)
        assert len(samples) == 32
        groups = [samples[start : start + 4] for start in range(0, 32, 4)]
        mixed = sum(len({sample["reward"] for sample in group}) > 1 for group in groups)
        drawn = 8 * row["rollout/sampling_rounds"]
        assert mixed == min(8, round(row["rollout/mixed_groups_share"] * drawn))
        assert mixed == 8 or row["rollout/sampling_rounds"] == 4
        assert all(sample["advantage"] == 0 for sample in samples if sample["finish_reason"] == "length")
        assert any(sample["advantage"] != 0 for sample in samples)
        assert 1 - 1e-4 < row["update/tis_weight_mean"] <= 1  # rounding decides on which side of 1 a factor is, and which are cut
    assert any(sample["finish_reason"] == "length" for number in range(3) for sample in rollouts_of(tmp_path, number))
    assert max(row["update/dual_clipped_share"] for row in rows) > 0


SWITCHED = {
    "regularised": (*TP2, "optimizer.lr=1e-4", "algorithm.kl_coef=0.5", "algorithm.entropy_coef=0.01", "algorithm.train_batch_size=16"),
    "ppo": (*PP2, *TWO_ENGINES, "optimizer.critic_lr=1e-3", "algorithm.name=ppo", "algorithm.train_batch_size=16"),
}


@pytest.fixture(scope="module", params=SWITCHED)
def gone_on(request: pytest.FixtureRequest, training: list[str], cli: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two steps an iteration: the name of a run, its folder, and that of one that went on from the first's second checkpoint."""
    name = request.param
    unbroken, resumed = (tmp_path_factory.mktemp(f"{name}-{part}") for part in ("unbroken", "resumed"))
    arguments = [*training, *SWITCHED[name], "algorithm.iterations=4", "evaluation.sets=[]", "checkpoint.every=2"]
    outcome = cli.run("train", *arguments, f"logging.folder={unbroken}")
    assert (outcome.status, outcome.stderr) == (0, "")
    shutil.copytree(unbroken, resumed, dirs_exist_ok=True)
    (resumed / "checkpoints" / "latest").write_text("step_000002")
    outcome = cli.run("train", *arguments, f"logging.folder={resumed}")
    assert (outcome.status, outcome.stderr) == (0, "")
    assert left_nothing(outcome)
    assert "step_000002: 2 of 4 iterations done" in outcome.stdout
    return name, unbroken, resumed


def test_every_sample_is_trained_on_under_kl_and_entropy_in_the_loss_and_under_ppo(gone_on: tuple[str, Path, Path]) -> None:
    name, folder, _ = gone_on
    for number, row in enumerate(iterations_of(folder)):
        samples = rollouts_of(folder, number)
        assert any(sample["reward"] == 0 for sample in samples)
        assert row["update/trained_tokens"] == sum(len(sample["response_token_ids"]) for sample in samples)
    if name == "ppo":
        check_critic(folder)
    else:
        check_divergences(folder)


def check_divergences(folder: Path) -> None:
    divergences = [row["update/reference_kl_nats"] for row in rows_of(folder, "step")]
    assert divergences[0] == 0  # the weights are the reference's
    assert all(0 < value < 1 for value in divergences[1:])
    assert any(sample["advantage"] == 0 for sample in rollouts_of(folder, 0))


def check_critic(folder: Path) -> None:
    """Its first values are 0, so an advantage is the reward; then it learns."""
    first = rollouts_of(folder, 0)
    assert all(sample["advantage"] == [sample["reward"]] * len(sample["response_token_ids"]) for sample in first)
    rows = rows_of(folder, "step")
    tokens = [sum(len(sample["response_token_ids"]) for sample in first if sample["step"] == step) for step in range(2)]
    rewarded = [
        sum(len(sample["response_token_ids"]) * sample["reward"] for sample in first if sample["step"] == step) for step in range(2)
    ]
    assert [row["critic/return_mean"] for row in rows[:2]] == pytest.approx(
        [part / all_ for part, all_ in zip(rewarded, tokens, strict=True)]
    )
    assert rows[0]["critic/value_mean"] == 0 < rows[-1]["critic/value_mean"]
    assert all(row["critic/grad_norm"] > 0 and row["critic/skipped_steps"] == 0 for row in rows)
    assert rows[-1]["critic/loss"] < rows[0]["critic/loss"]


def test_a_run_with_a_reference_or_a_critic_goes_on_to_the_bit(gone_on: tuple[str, Path, Path]) -> None:
    """The reference is not the checkpoint that it goes on from, and the critic is."""
    _, unbroken, resumed = gone_on
    assert figures_of(resumed) == figures_of(unbroken)
    assert all(torch.equal(weights_of(resumed)[name], tensor) for name, tensor in weights_of(unbroken).items())


def test_kl_in_the_reward_makes_advantages_differ(training: list[str], cli: Any, tmp_path: Path) -> None:
    """Tokens of a response on two ranks; and nobody reads what the run prints, which is no reason to end."""
    switches = ("kl_coef=0.1", "kl_in=reward", "kl_estimator=k1", "iterations=2")
    arguments = [*training, *CP2, *TWO_ENGINES, "optimizer.lr=1e-4", "evaluation.sets=[]"]
    overrides = [f"algorithm.{switch}" for switch in switches]
    outcome = cli.start("train", *arguments, *overrides, f"logging.folder={tmp_path}", unread=True).wait()
    assert (outcome.status, outcome.stderr) == (0, "")
    divergences = [row["rollout/reference_kl_nats"] for row in iterations_of(tmp_path)]
    assert divergences[0] == 0 != divergences[1]
    for number in range(2):
        samples = rollouts_of(tmp_path, number)
        groups = [samples[start : start + 4] for start in range(0, 32, 4)]
        for group in groups:
            mean = sum(sample["reward"] for sample in group) / 4
            shifts = [sample["advantage"] - (sample["reward"] - mean) for sample in group]  # by the divergence less the group's mean
            assert sum(shifts) == pytest.approx(0, abs=1e-9)
            assert (max(map(abs, shifts)) > 1e-6) == (number == 1)


# --------------------------------------------------------------------------------------------------------------------- a rank dies


def test_killed_rank_ends_the_run_with_its_name(training: list[str], cli: Any, tmp_path: Path) -> None:
    command = cli.start("train", *training, *TP2, "algorithm.iterations=100000", "evaluation.sets=[]", f"logging.folder={tmp_path}")
    command.wait_until(lambda: has_iteration(tmp_path, 2))
    command.rank(1).kill()
    outcome = command.wait()
    assert outcome.status == 1
    assert outcome.stderr.splitlines()[-1].startswith("rank 1 was ended by SIGKILL")
    assert left_nothing(outcome)
