"""The scripts of a first hour on a GPU: no check stops the ones after it, figures outlive a kill, wheels travel in pieces."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


gpu_check, gpu_report = load("gpu_check"), load("gpu_report")
FIGURES = """
import json, os
def record(**figures):
    with open(os.environ["R1Z_FIGURES"], "a") as file:
        file.write(json.dumps({"check": os.environ["R1Z_CHECK"], "figures": figures}) + "\\n")
"""
CODES = {
    "good": "record(model='llama', precision='bf16', error=1.25e-7, states=3)",
    "crash": "record(found=1); os.abort()",
    "wrong": "print('error 3 (limit 1)'); raise SystemExit(1)",
    "absent": "print('no FP8 here'); raise SystemExit(77)",
    "hang": "import subprocess, time; record(before=1); print('waiting'); "
    "child = subprocess.Popen(['sleep', '1000']); record(child=child.pid); time.sleep(1000)",
    "after": "print('all is well')",
}
LONG_S = 60.0


def check(name: str, **options: object) -> object:
    return gpu_check.Check(
        name, (sys.executable, "-c", FIGURES + CODES[name]), 3.0 if name == "hang" else LONG_S, **{"needs": "json", **options}
    )


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, object], Path]:
    runner = gpu_check.Runner(tmp_path_factory.mktemp("out"), minutes=10)
    runner.write(run="2026-12-01", commit="abc1234", is_quick=True)
    for name in CODES:
        runner.run(check(name))
    runner.run(check("absent", needs="a_module_that_is_not_there"))
    return {item.check: item for item in runner.ended[: len(CODES)]} | {"other": runner.ended[-1]}, runner.results


def test_neither_a_crash_nor_a_hang_stops_the_checks_after_it(ended: tuple[dict[str, object], Path]) -> None:
    found, _ = ended
    statuses = {name: item.status for name, item in found.items()}
    assert statuses == {
        "good": "passed",
        "crash": "failed",
        "wrong": "failed",
        "absent": "skipped",
        "hang": "failed",
        "after": "passed",
        "other": "skipped",
    }
    assert found["crash"].reason.startswith("status -6")
    assert found["wrong"].reason == "status 1: error 3 (limit 1)"
    assert found["absent"].reason == "no FP8 here"
    assert found["hang"].reason == "not ended after 3 s"
    assert found["hang"].log == ("waiting",)
    assert found["other"].reason == "no a_module_that_is_not_there here"


def test_what_a_check_has_started_ends_with_it(ended: tuple[dict[str, object], Path]) -> None:
    lines = [json.loads(line) for line in ended[1].read_text().splitlines()]
    child = next(line["figures"]["child"] for line in lines if "child" in line.get("figures", {}))
    for _ in range(100):
        status = Path(f"/proc/{child}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError(f"process {child} is still there")


def test_figures_are_in_the_file_before_the_check_has_ended(ended: tuple[dict[str, object], Path]) -> None:
    lines = [json.loads(line) for line in ended[1].read_text().splitlines()]
    for name, figures in (("crash", {"found": 1}), ("hang", {"before": 1})):
        assert {"check": name, "figures": figures} in lines


def test_without_time_checks_are_skipped_by_name(tmp_path: Path) -> None:
    runner = gpu_check.Runner(tmp_path, minutes=0.1)
    runner.run(check("after"))
    assert (runner.ended[0].status, runner.ended[0].reason) == ("skipped", "no time left")


def test_the_report_has_a_line_for_each_check_with_figures_or_a_failure(ended: tuple[dict[str, object], Path]) -> None:
    _, results = ended
    whole = [*results.read_text().splitlines(), '{"check": "good", "figu']
    rows = {row[5]: row for row in gpu_report.rows(whole)}
    assert rows["good"] == ("2026-12-01", "abc1234", "none (CPU)", "llama", "bf16", "good", "error 1.25e-07; states 3")
    assert rows["crash"][6].startswith("**failed** status -6")
    assert rows["crash"][6].endswith("found 1")
    assert set(rows) == {"good", "crash", "wrong", "hang"}


def test_the_report_names_the_gpu_and_keeps_runs_apart() -> None:
    def run(date: str, gpu: str) -> list[str]:
        figures = ({"check": "machine", "figures": {"gpu": gpu, "num_gpus": 1}}, {"check": "refit", "figures": {"seconds": 0.5}})
        return [json.dumps(line) for line in ({"run": date, "commit": "c"}, *figures, {"check": "refit", "status": "passed", "reason": ""})]

    table = gpu_report.render(gpu_report.rows([*run("1", "NVIDIA H200"), *run("2", "NVIDIA B200")]))
    assert table.splitlines()[0] == "| Date | Commit | GPUs | Model | Layout, precision | Check | Figure |"
    assert "| 1 | c | 1 x NVIDIA H200 |  |  | refit | seconds 0.5 |" in table
    assert "| 2 | c | 1 x NVIDIA B200 |  |  | refit | seconds 0.5 |" in table
    assert "| machine | **not ended**" in table


def test_the_table_of_the_page_has_the_columns_of_the_report() -> None:
    assert f"| {' | '.join(gpu_report.COLUMNS)} |" in (ROOT / "docs" / "gpu.md").read_text()


def test_every_check_of_the_quick_mode_fits_in_its_time_alone(tmp_path: Path) -> None:
    quick = [item for item in gpu_check.all_checks(tmp_path) if item.is_quick]
    assert all(item.limit_s < 60 * gpu_check.QUICK_MINUTES / 3 for item in quick)
    assert len({item.name for item in gpu_check.all_checks(tmp_path)}) == len(gpu_check.all_checks(tmp_path))


def test_pieces_of_a_wheel_are_joined_and_a_missing_one_is_told(tmp_path: Path) -> None:
    import zipfile

    wheel = tmp_path / "thing-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("thing.py", os.urandom(5000).hex())
    content = wheel.read_bytes()
    for number, first in enumerate(range(0, len(content), 3000)):
        Path(f"{wheel}.part-{number:02d}").write_bytes(content[first : first + 3000])
    wheel.unlink()
    middle = Path(f"{wheel}.part-01")
    saved = middle.read_bytes()
    middle.unlink()
    join = ["bash", "tools/gpu_wheels.sh", "join", tmp_path]
    done = subprocess.run(join, cwd=ROOT, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is not whole: are all pieces there?" in done.stderr
    middle.write_bytes(saved)
    subprocess.run(join, cwd=ROOT, env=os.environ | {"PYTHON": sys.executable}, check=True)
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]
    assert wheel.read_bytes() == content
