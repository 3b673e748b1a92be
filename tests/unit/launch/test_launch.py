"""`launch` before anything is submitted: what goes where, what is refused, and what nemo-run makes of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_r1z.cli import commands, main
from megatron_r1z.config import (
    AnalyseConfig,
    EvaluateConfig,
    Executor,
    LaunchConfig,
    PretrainConfig,
    TrainConfig,
    load_config,
    load_launch,
)
from megatron_r1z.cost.cluster import load_cluster
from megatron_r1z.errors import ConfigError
from megatron_r1z.launch.job import CODE, RUN_FILE, Job, Work, make_job, place, stage

ROOT = Path(__file__).parents[3]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
H100 = str(ROOT / "configs" / "clusters" / "h100-8.yaml")
PYTHON = ROOT / ".venv-launch" / "bin" / "python"
needs_nemo_run = pytest.mark.skipif(not PYTHON.exists(), reason="there is no .venv-launch; run `make launch-env`")


def job_of(ranks: int, cluster: str | None = None, **launch: Any) -> Job:
    config = load_config(TrainConfig, QUICKSTART, [f"parallel.num_ranks={ranks}"])
    return place("a run", "train", config, LaunchConfig(**launch), None if cluster is None else load_cluster(cluster))


@pytest.mark.parametrize(
    ("ranks", "cluster", "per_node", "expected"),
    [
        (2, None, None, (1, 2, None)),
        (8, None, 4, (2, 4, None)),
        (4, H100, None, (1, 4, 4)),
        (8, H100, None, (1, 8, 8)),
        (64, H100.replace("-8", "-64"), None, (8, 8, 8)),
        (8, H100.replace("-8", "-64"), 2, (4, 2, 2)),
    ],
)
def test_ranks_fill_nodes(ranks: int, cluster: str | None, per_node: int | None, expected: tuple[int, int, int | None]) -> None:
    job = job_of(ranks, cluster, executor="slurm", ranks_per_node=per_node)
    assert (job.nodes, job.ranks_per_node, job.gpus_per_node) == expected
    assert job.nodes * job.ranks_per_node == ranks
    assert job.name == "a-run"


@pytest.mark.parametrize(
    ("ranks", "cluster", "launch", "sentence"),
    [
        (6, None, {"executor": "slurm", "ranks_per_node": 4}, "6 ranks do not fill nodes of 4"),
        (16, H100, {"executor": "slurm"}, "16 ranks, 8 on a node, need 2 nodes; the cluster has 1."),
        (16, H100, {"executor": "slurm", "ranks_per_node": 16}, "launch.ranks_per_node is 16, but a node of the cluster has 8 devices."),
        (4, None, {"executor": "local", "ranks_per_node": 2}, "executor local has one node"),
    ],
)
def test_what_does_not_fit_is_refused(ranks: int, cluster: str | None, launch: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        job_of(ranks, cluster, **launch)


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"hours": 0}, "launch.hours is 0.0; it must be above 0"),
        ({"lead_s": 7200, "hours": 2}, "launch.lead_s is 7200; it must be above 0 and below the 7200 s of launch.hours"),
        ({"restarts": -1}, "launch.restarts is -1; it must be at least 0"),
        ({"container": "image"}, "launch.container is set, but a local run"),
        ({"executor": "slurm", "mounts": ["/a:/a"]}, "launch.mounts is set, but there is no container"),
        ({"executor": "slurm", "container": "image", "environment": ".venv"}, "two places for the libraries"),
        ({"executor": "docker", "ssh": {"host": "h", "user": "u", "folder": "f"}}, "launch.ssh is set, but executor docker"),
        ({"executor": "slurn"}, "must be one of local, slurm"),
        ({"hour": 3}, "unknown key 'launch.hour'; did you mean 'launch.hours'"),
        ({"options": [1]}, "launch.options must be a mapping from names to values"),
    ],
)
def test_a_wrong_section_is_refused_by_every_command_that_reads_the_file(
    section: dict[str, Any], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(Path(QUICKSTART).read_text()) | {"launch": section}))
    with pytest.raises(ConfigError, match=sentence):
        load_config(TrainConfig, path)
    with pytest.raises(ConfigError, match=sentence):
        load_launch(path)


def test_the_run_goes_before_the_cluster_and_the_command_line_before_both(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"base: {QUICKSTART}\nlaunch: {{executor: slurm, hours: 2, options: {{qos: high}}}}\n")
    text = f"base: {H100}\nlaunch: {{hours: 1, restarts: 2, variables: {{NCCL_DEBUG: INFO, N: 1}}, options: {{account: me, qos: low}}}}\n"
    (tmp_path / "cluster.yaml").write_text(text)
    job = make_job(str(tmp_path / "run.yaml"), ["launch.restarts=3"], cluster_path=str(tmp_path / "cluster.yaml"))
    assert (job.launch.hours, job.launch.restarts) == (2.0, 3)
    assert job.launch.options == {"account": "me", "qos": "high"}
    assert job.launch.variables == {"NCCL_DEBUG": "INFO", "N": 1}
    assert make_job(str(tmp_path / "run.yaml")).launch.restarts == 0


@pytest.mark.parametrize(
    ("work", "kind", "config"),
    [
        ("pretrain", PretrainConfig, "configs/quickstart-pretrain.yaml"),
        ("evaluate", EvaluateConfig, "configs/quickstart.yaml"),
        ("analyse", AnalyseConfig, "configs/analyse-smollm2.yaml"),
    ],
)
def test_every_command_that_has_ranks_can_be_a_job(work: Work, kind: type[Any], config: str, tmp_path: Path) -> None:
    job = make_job(str(ROOT / config), [f"logging.folder={tmp_path}"], work=work)
    stage(job, tmp_path)
    assert load_config(kind, tmp_path / RUN_FILE) == job.config
    assert job.arguments(CODE)[2] == work


def test_a_job_takes_code_and_configuration_as_they_are_now(tmp_path: Path) -> None:
    job = make_job(QUICKSTART, ["optimizer.lr=5e-4", "launch.executor=slurm", "launch.folder=/data"])
    stage(job, tmp_path)
    assert load_config(TrainConfig, tmp_path / RUN_FILE) == job.config
    assert job.config.optimizer.lr == 5e-4
    assert (tmp_path / "megatron_r1z" / "loop.py").read_bytes() == (ROOT / "megatron_r1z" / "loop.py").read_bytes()
    assert (tmp_path / "megatron_r1z" / "layout" / "known_models.json").exists()
    assert not list(tmp_path.rglob("__pycache__"))
    assert job.arguments(CODE) == ["-C", "/data", "train", "/nemo_run/code/run.yaml"]


def test_the_staged_code_runs_by_itself(tmp_path: Path) -> None:
    stage(make_job(QUICKSTART, ["launch.executor=slurm"]), tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    program = "import megatron_r1z.cli as cli; print(cli.__file__)"
    found = subprocess.run([sys.executable, "-c", program], cwd="/", env=environment, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()) == tmp_path / "megatron_r1z" / "cli" / "__init__.py"


def test_work_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "run.yaml").write_text(f"base: {ROOT / 'configs' / 'qwen2.5-7b-h100.yaml'}\n")
    assert main(["-C", "inner", "plan", "run.yaml"]) == 0
    assert "Qwen2.5" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["-C", "nowhere", "plan", "run.yaml"])


def test_a_folder_may_have_the_name_of_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(commands, "train", lambda _options, arguments: seen.append(arguments) or 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train").mkdir()
    assert main(["-C", "train", "train", "run.yaml"]) == 0
    assert seen == [["train", "run.yaml"]]


def test_overrides_may_follow_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", QUICKSTART, "--cluster", H100, "parallel.num_ranks=3"]) == 2
    assert "3 ranks" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", QUICKSTART, "--clutser", H100])
    with pytest.raises(SystemExit):
        main(["doctor", "a=b"])


def test_without_nemo_run_the_environment_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", QUICKSTART]) == 2
    assert "make launch-env" in capsys.readouterr().err


def in_launch_environment(program: str, *arguments: str, cwd: Path = ROOT) -> str:
    """Output of a program that may import nemo-run."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [str(PYTHON), "-c", program, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


FIELDS = """
import dataclasses, json
import nemo_run as run
from megatron_r1z.launch.executors import TARGETS
found = {}
for name, target in TARGETS.items():
    fields = {item.name for item in dataclasses.fields(getattr(run, target.kind)) if item.init}
    ours = [getattr(target, item.name) for item in dataclasses.fields(target) if item.name not in ("kind", "extra")]
    found[name] = sorted({*filter(None, ours), "env_vars", "retries", "launcher", "packager"} - fields)
print(json.dumps(found))
"""


@needs_nemo_run
def test_every_executor_has_the_fields_that_we_give_it() -> None:
    found = json.loads(in_launch_environment(FIELDS).splitlines()[-1])
    assert found == {name: [] for name in Executor.__args__}  # type: ignore[attr-defined]


@needs_nemo_run
def test_a_slurm_script_without_and_with_a_container(tmp_path: Path) -> None:
    command = "import sys; from megatron_r1z.cli import main; sys.exit(main(sys.argv[1:]))"
    common = ["launch", QUICKSTART, "--executor", "slurm", "--dry-run", "launch.hours=1.5", "launch.restarts=2", "parallel.num_ranks=8"]
    options = [
        "launch.ranks_per_node=4",
        "launch.options.partition=gpu",
        "launch.variables.lower_case='a b'",
        "launch.setup=[module load x]",
    ]
    script = in_launch_environment(command, *common, *options)
    for line in (
        "#SBATCH --partition=gpu",
        "#SBATCH --time=01:30:00",
        "#SBATCH --nodes=2",
        "#SBATCH --signal=TERM@300",
        "export TORCHX_MAX_RETRIES=2",
        "export lower_case='a b'",
        "module load x",
        "export R1Z_RENDEZVOUS_PORT=$((20000 + SLURM_JOB_ID % 12768))",
        "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300",
        f"export PATH={ROOT / '.venv' / 'bin'}:$PATH",
    ):
        assert f"\n{line}\n" in script, line
    assert "--account" not in script
    assert "--rdzv-endpoint $head_node_ip:$R1Z_RENDEZVOUS_PORT" in script
    assert "--nnodes 2 --nproc-per-node 4 --node-rank $SLURM_NODEID" in script
    assert "/nemo_run" not in script
    assert script.startswith("#!/bin/bash")
    boxed = in_launch_environment(command, *common, *options, "launch.container=image.sqsh", "launch.mounts=[/data:/data]")
    assert "--container-image image.sqsh --container-mounts /data:/data," in boxed
    assert "--container-workdir /nemo_run/code" in boxed
    assert "export PYTHONPATH=/nemo_run/code" in boxed
    assert "train /nemo_run/code/run.yaml" in boxed
    assert "export PATH=" not in boxed


@needs_nemo_run
def test_grace_and_lead_are_settings() -> None:
    command = "import sys; from megatron_r1z.cli import main; sys.exit(main(sys.argv[1:]))"
    common = ["launch", QUICKSTART, "--executor", "slurm", "--dry-run"]
    for options, lead, grace in (
        (["launch.hours=1", "parallel.grace_s=600"], 600, 600),
        (["launch.hours=0.1", "parallel.grace_s=600"], 90, 600),
        (["launch.hours=0.1", "parallel.grace_s=99.5", "launch.lead_s=200"], 200, 100),
    ):
        script = in_launch_environment(command, *common, *options)
        assert f"#SBATCH --signal=TERM@{lead}\n" in script
        assert f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={grace}\n" in script


FAKES = {
    "scontrol": """case "$1 $2" in
      "show hostnames") echo node ;;
      "show job") printf 'JobId=7 JobName=x\\n   StdOut=%s/sbatch_x_7.out\\n   Power=\\n' "$JOB" ;;
      requeue*) echo "$2" >> "$JOB/requeued" ;;
    esac""",
    "srun": """case "$*" in *hostname*) echo 127.0.0.1; exit ;; esac
    if [ -e "$JOB/is_final" ]; then echo "the reason." > "$R1Z_FINAL_FILE"; fi
    exit 1""",
}


@needs_nemo_run
@pytest.mark.parametrize("is_final", [True, False])
@pytest.mark.parametrize("container", [(), ("launch.container=image.sqsh",)])
def test_a_slurm_job_is_queued_again_unless_its_run_has_ended_for_good(is_final: bool, container: tuple[str, ...], tmp_path: Path) -> None:
    """The batch script as nemo-run writes it, with tools of Slurm that note what they are asked for."""
    command = "import sys; from megatron_r1z.cli import main; sys.exit(main(sys.argv[1:]))"
    script = in_launch_environment(command, "launch", QUICKSTART, "--executor", "slurm", "--dry-run", "launch.restarts=1", *container)
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    if is_final:
        (tmp_path / "is_final").touch()
    lines = re.sub(r"(R1Z_FINAL_FILE=).*/", rf"\g<1>{tmp_path}/", script)  # the job's folder, as a rank sees it
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "JOB": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node"}
    done = subprocess.run(["bash", "-c", lines], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert (tmp_path / "requeued").exists() != is_final
    assert ("the reason." in done.stdout) == is_final


@needs_nemo_run
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["launch.options.partitoin=x"],
            "unknown key 'launch.options.partitoin' for executor slurm; did you mean 'launch.options.partition'?",
        ),
        (["launch.options.time=1"], "launch.options.time follows from launch.hours"),
        (["launch.environment=no/such"], "has no bin/torchrun"),
    ],
)
def test_what_nemo_run_cannot_take_is_refused_in_one_sentence(arguments: list[str], sentence: str) -> None:
    command = "import sys; from megatron_r1z.cli import main; sys.stderr = sys.stdout; print(main(sys.argv[1:]))"
    output = in_launch_environment(command, "launch", QUICKSTART, "--executor", "slurm", "--dry-run", *arguments)
    assert sentence in output
    assert output.rstrip().endswith("2")


RECIPE = """
import fiddle, sys
from megatron_r1z.config import load_config, TrainConfig
from megatron_r1z.launch.recipes import recipe, start
task = recipe(sys.argv[1], "optimizer.lr=1e-4", cluster=sys.argv[2])
built = fiddle.build(task)
assert built.func is start
assert built.keywords["config"] == load_config(TrainConfig, sys.argv[1], ["optimizer.lr=1e-4"])
task.config.algorithm.name = "grpo"
task.launch.executor = "slurm"
assert fiddle.build(task).keywords["config"].algorithm.name == "grpo"
task.config.parallel.tensor_parallel_size = 3
try:
    fiddle.build(task)
except Exception as error:
    print(type(error).__name__)
"""


@needs_nemo_run
def test_a_recipe_is_the_same_run_and_is_checked_when_it_is_built() -> None:
    assert in_launch_environment(RECIPE, QUICKSTART, H100).strip().endswith("ConfigError")


@needs_nemo_run
def test_every_run_of_configs_is_a_recipe() -> None:
    names = in_launch_environment("import sys; sys.path.insert(0, 'examples'); import recipes; print(*recipes.FILES)").split()
    assert {"qwen2_5_7b_h100", "quickstart", "oat_zero_7b"} <= set(names)
    assert "quickstart_pretrain" not in names
