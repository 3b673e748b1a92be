"""`megatron-r1z plan CONFIG`: one screen, what is refused and with which words, and nothing heavy imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_r1z.cli import main
from megatron_r1z.cost.plan_run import plan_run

CLUSTER = str(Path(__file__).parents[3] / "configs" / "clusters" / "h100-8.yaml")
RUN: dict[str, Any] = {
    "model": {"path": "models/Qwen2.5-7B"},
    "data": {"train": [{"path": "questions.jsonl"}]},
    "algorithm": {"iterations": 100},
    "parallel": {"num_ranks": 8, "tensor_parallel_size": 2, "sequence_parallel": True, "recompute": "selective"},
    "rollout": {"tensor_parallel_size": 2, "kv_cache_bytes": 20 << 30},
    "optimizer": {"distributed": True},
    "logging": {"folder": "runs/x"},
}


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "seven.yaml"
    file.write_text(yaml.safe_dump(RUN))
    return str(file)


def test_one_screen(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", path, "--cluster", CLUSTER]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "seven: Qwen/Qwen2.5-7B, 7.62 billion parameters, 8 ranks, H100 SXM 80 GB, 1 x 8 (h100-8)"
    assert len(lines) <= 36
    assert max(map(len, lines)) <= 170
    for word in ("gradients", "KV cache", "refit", "rollout", "update", "throughput", "GPU-hours", "limits"):
        assert any(word in line for line in lines), word


def test_without_a_cluster_there_are_bytes_but_no_seconds(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", path]) == 0
    out = capsys.readouterr().out
    assert "engine weights" in out
    assert "an iteration" not in out
    assert "GPU-hours" not in out


def test_a_run_that_does_not_fit_ends_with_status_2_and_the_nearest_that_does(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", path, "parallel.recompute=none", "parallel.micro_batch_tokens=16384", "--cluster", CLUSTER]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "GiB in the update phase, the largest part" in captured.err
    near = captured.err.rpartition(" GiB) is ")[2].strip().removesuffix(".").split()
    again = main(["plan", path, "parallel.recompute=none", "parallel.micro_batch_tokens=16384", *near, "--cluster", CLUSTER])
    assert again == 0


def test_a_run_that_fits_nowhere_says_how_many_ranks_it_takes(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["model.path=models/Llama-3.1-70B", "parallel.tensor_parallel_size=8", "rollout.tensor_parallel_size=8"]
    assert main(["plan", path, *model, "optimizer.distributed=true", "--cluster", CLUSTER]) == 2
    assert "the nearest layout that fits" in capsys.readouterr().err  # with the optimizer in the host's memory
    assert main(["plan", path, *model, "parallel.num_ranks=16", "--cluster", CLUSTER]) == 2
    assert "parallel.num_ranks is 16, but the cluster has 1 x 8 GPUs" in capsys.readouterr().err


def test_the_report_as_json(path: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert main(["plan", path, "--cluster", CLUSTER, "--json", str(file), "--response-tokens", "500", "--prompt-tokens", "200"]) == 0
    tree = json.loads(file.read_text())
    report = plan_run(path, cluster_path=CLUSTER, prompt_tokens=200, response_tokens=500)
    assert tree["time"]["iteration_s"] == report.cost.time.total
    assert sum(tree["time"]["seconds"].values()) == pytest.approx(tree["time"]["iteration_s"])
    assert tree["memory"][0]["totals"]["update"] == report.cost.ranks[0].peak
    assert tree["shortfall"] is None
    assert tree["time"]["gpu_hours"] == pytest.approx(100 * tree["time"]["iteration_s"] * 8 / 3600)


def test_the_search_lists_layouts_and_how_to_get_the_first(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", path, "--cluster", CLUSTER, "--search"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "policy"
    first = lines[-1].removeprefix("the first is ").split()
    assert main(["plan", path, *first, "--cluster", CLUSTER]) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "plan needs the YAML file of a run, or --model, --from and --to for a refit alone"),
        (["{path}", "--search"], "a search needs a cluster; name one by --cluster."),
        (["{path}", "parallel.num_rank=4"], "unknown key 'parallel.num_rank'; did you mean 'parallel.num_ranks'?"),
        (["{path}", "model.path=models/Unknown-7B"], "there is no model folder models/Unknown-7B, and its name is not one"),
        (["{path}", "parallel.tensor_parallel_size=8"], "policy: num_heads is 28, which tp 8 does not divide"),
        (["{path}", "rollout.tensor_parallel_size=8"], "engine: num_heads is 28, which tp 8 does not divide"),
        (["{path}", "parallel.pipeline_parallel_size=4", "parallel.pipeline_layers=[7, 7, 7, 6]"], "adds up to 27, but the model has 28"),
        (["{path}", "data.max_prompt_tokens=200000"], "but the model has 131072 positions"),
        (["{path}", "rollout.kv_cache_bytes=1000"], "rollout.kv_cache_bytes is 1000, but one sequence of 4024 tokens needs"),
        (["{path}", "--response-tokens", "5000"], "a response 1 to rollout.max_response_tokens 3000"),
        (["{path}", "--cluster", "nowhere.yaml"], "cannot read the configuration nowhere.yaml"),
    ],
)
def test_mistakes_end_with_status_2_and_one_sentence(
    arguments: list[str], sentence: str, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *(argument.format(path=path) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.count("\n") == 1


def test_the_command_loads_nothing_heavy(path: str) -> None:
    arguments = ["plan", path, "--cluster", CLUSTER]
    program = f"import sys; from megatron_r1z.cli import main; status = main({arguments}); print(status, *sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    status, *modules = result.stdout.splitlines()[-1].split()
    assert status == "0"
    heavy = {"torch", "vllm", "megatron", "transformers", "numpy", "sympy", "safetensors", "psutil", "zstandard", "datasets"}
    assert set(modules) & heavy == set()
