"""`megatron-r1z plan`: what is typed, the numbers against an element-by-element count, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from megatron_r1z.cli import main
from megatron_r1z.cost.refit_report import Machine, add_up, engines_layout, in_units, make_plan_report, read_policy, render_plan
from megatron_r1z.errors import ConfigError
from megatron_r1z.layout.blocks import Layout, engine_layout, megatron_layout
from megatron_r1z.layout.families import load_shape
from megatron_r1z.layout.plan import Edge, make_plan
from megatron_r1z.layout.topology import Topology

DENSE = {
    **{"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": 12, "vocab_size": 70, "max_position_embeddings": 64},
}
MIXTURE = DENSE | {"model_type": "mixtral", "num_local_experts": 4}
MACHINE = Machine(ranks_per_node=2, round_bytes=500, local_gbs=100.0, node_gbs=10.0, network_gbs=2.0)


def write(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("text", "topology"),
    [
        ("tp=8,pp=4,vpp=2", Topology(32, tp=8, pp=4, vpp=2)),
        ("dp=3, tp=2", Topology(6, tp=2)),
        ("tp=8,pp=16,layers=7:8x14:7", Topology(128, tp=8, pp=16, chunk_layers=(7, *[8] * 14, 7))),
        ("tp=2,ep=4", Topology(8, tp=2, ep=4)),
        ("tp=2,cp=4,dp=3", Topology(24, tp=2, cp=4)),
        ("tp=2,cp=2,ep=8", Topology(16, tp=2, cp=2, ep=8)),
        ("tp=2,pp=2,ep=4,etp=1", Topology(8, tp=2, pp=2, ep=4, etp=1)),
    ],
)
def test_degrees_of_the_policy(text: str, topology: Topology) -> None:
    assert read_policy(text) == topology


def test_engines_share_the_policy_s_ranks_or_follow_them(tmp_path: Path) -> None:
    shape, topology = load_shape(write(tmp_path, DENSE)), Topology(4, tp=2)
    assert engines_layout(shape, topology, "tp=2") == engine_layout(shape, 4, 2)
    assert engines_layout(shape, topology, "tp=4,engines=2") == engine_layout(shape, 8, 4, first_rank=4)


def elements(layout: Layout) -> dict[tuple[str, tuple[int, ...]], Counter[int]]:
    """How often each rank holds each element of each tensor."""
    found: dict[tuple[str, tuple[int, ...]], Counter[int]] = defaultdict(Counter)
    for block in layout.blocks:
        for index in product(*(range(first, first + count) for first, count in zip(block.start, block.size, strict=True))):
            found[block.tensor, index][block.rank] += 1
    return found


def counted(source: Layout, destination: Layout, itemsize: int, ranks_per_node: int) -> dict[Edge, int]:
    """Bytes by the nearest holder of each element that a destination rank needs."""
    holders, totals = elements(source), dict.fromkeys(Edge, 0)
    for element, ranks in elements(destination).items():
        nodes = {holder // ranks_per_node for holder in holders[element]}
        for rank, times in ranks.items():
            near = Edge.NODE if rank // ranks_per_node in nodes else Edge.NETWORK
            totals[Edge.LOCAL if rank in holders[element] else near] += times * itemsize
    return totals


@pytest.mark.parametrize(
    ("config", "source", "destination"),
    [
        (DENSE, "tp=2,pp=3", "tp=2"),
        (DENSE, "tp=2,pp=2,layers=2:1,dp=2", "tp=4,engines=1"),
        (MIXTURE, "tp=2,dp=2,ep=2,etp=1", "tp=2"),
    ],
)
def test_the_bytes_are_those_of_a_count_by_element(tmp_path: Path, config: dict[str, Any], source: str, destination: str) -> None:
    path = write(tmp_path, config)
    report = make_plan_report(str(path), source, destination, 4, MACHINE)
    topology = read_policy(source)
    policy = megatron_layout(load_shape(path), topology)
    engines = engines_layout(load_shape(path), topology, destination)
    assert {edge: item.total for edge, item in report.edges.items()} == counted(policy, engines, 4, MACHINE.ranks_per_node)


def test_rounds_buffers_and_seconds(tmp_path: Path) -> None:
    path = write(tmp_path, DENSE)
    report = make_plan_report(str(path), "tp=2,pp=3", "tp=2", 4, MACHINE)
    shape = load_shape(path)
    plan = make_plan(megatron_layout(shape, Topology(6, tp=2, pp=3)), engine_layout(shape, 6, 2), 4, MACHINE.round_bytes, 2)
    assert report.num_rounds == len(plan.rounds) > 2
    assert report.buffer_bytes == max(plan.of_rank(rank).buffer_bytes for rank in range(6)) <= 4 * MACHINE.round_bytes
    seconds = max(sum(copy.nbytes for copy in plan.local if copy.source_rank == rank) for rank in range(6)) / 100e9
    sent: Counter[int] = Counter()
    for copies in plan.rounds:
        lanes: Counter[tuple[Any, ...]] = Counter()
        for copy in copies:
            speed = 10e9 if copy.source_rank // 2 == copy.destination_rank // 2 else 2e9
            lanes["from", copy.source_rank, speed] += copy.nbytes
            lanes["to", copy.destination_rank, speed] += copy.nbytes
            sent[copy.source_rank] += copy.nbytes if speed == 2e9 else 0
        seconds += max(nbytes / lane[2] for lane, nbytes in lanes.items())
    assert report.estimated_s == pytest.approx(seconds, rel=1e-12)
    assert report.edges[Edge.NETWORK].most_sent == max(sent.values())


def test_nothing_to_send(tmp_path: Path) -> None:
    layout = engine_layout(load_shape(write(tmp_path, DENSE)), 2, 2)
    report = add_up("m", "a", "b", make_plan(layout, layout, 2), MACHINE, 0.0)
    assert (report.num_rounds, report.buffer_bytes, report.edges[Edge.NODE].total) == (0, 0, 0)
    assert report.estimated_s > 0


def test_the_table(tmp_path: Path) -> None:
    report = make_plan_report(str(write(tmp_path, DENSE)), "tp=2", "tp=1", 2, Machine())
    lines = render_plan(report).splitlines()
    assert lines[2].split() == "bytes moved total most sent by a rank most received by a rank".split()
    assert [line.split("  ")[0] for line in lines[3:6]] == ["local", "in a node", "across nodes"]
    assert [line.split()[0] for line in lines[7:]] == ["rounds", "buffers", "estimate", "planning"]


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_999, "1 MB"), (268435456, "268 MB"), (2 * 10**12, "2 TB")]
)
def test_units(nbytes: int, text: str) -> None:
    assert in_units(nbytes) == text


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, MIXTURE)
    status = main(["plan", "--model", str(tmp_path), "--from", "tp=2,ep=2", "--to", "tp=2", "--dtype", "fp32", "--json", f"{path}.plan"])
    assert status == 0
    written = json.loads(Path(f"{path}.plan").read_text())
    report = make_plan_report(str(tmp_path), "tp=2,ep=2", "tp=2", 4, Machine())
    assert written | {"planning_s": 0} == report.to_tree() | {"planning_s": 0}
    assert "policy tp=2,ep=2 to engines tp=2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "tq=2", "--to", "tp=2"], "--from: unknown key 'tq'; did you mean 'tp'?"),
        (["--from", "tp=2", "--to", "engine=2"], "--to: unknown key 'engine'; did you mean 'engines'?"),
        (["--from", "", "--to", "tp=2"], "--from: unknown key ''"),
        (["--from", "tp=two", "--to", "tp=2"], "--from: tp is 'two'; it must be a whole number of at least 1."),
        (["--from", "tp=0", "--to", "tp=2"], "--from: tp is '0'"),
        (
            ["--from", "pp=2,layers=2x", "--to", "tp=2"],
            "--from: layers is '2x'; it must be the layers of each model chunk, such as 7:8x14:7.",
        ),
        (["--from", "pp=2", "--to", "tp=2"], "3 layers cannot be split evenly over pp 2 x vpp 1 = 2 model chunks"),
        (["--from", "tp=3", "--to", "tp=1"], "policy: num_heads is 4, which tp 3 does not divide"),
        (["--from", "ep=2", "--to", "tp=1"], "policy: ep is 2, but the model has no experts"),
        (["--from", "tp=2", "--to", "tp=4"], "engine: num_ranks is 2, which tp 4 does not divide; tp 2 does."),
        (["--from", "tp=2", "--to", "tp=2", "--network-gbs", "0"], "network_gbs is 0.0; it must be above 0."),
        (["--from", "tp=2", "--to", "tp=2", "--ranks-per-node", "-1"], "ranks_per_node is -1; it must be above 0."),
    ],
)
def test_mistakes_end_with_status_2_and_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write(tmp_path, DENSE)
    assert main(["plan", "--model", str(tmp_path), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)


def test_a_speed_must_be_a_number() -> None:
    with pytest.raises(ConfigError, match=r"node_gbs is nan; it must be above 0"):
        Machine(node_gbs=float("nan"))


def test_the_command_loads_nothing_heavy(tmp_path: Path) -> None:
    arguments = ["plan", "--model", str(write(tmp_path, DENSE)), "--from", "tp=2", "--to", "tp=1"]
    program = f"import sys; from megatron_r1z.cli import main; status = main({arguments}); print(status, *sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    status, *modules = result.stdout.splitlines()[-1].split()
    assert status == "0"
    assert set(modules) & {"torch", "vllm", "megatron", "transformers", "numpy", "sympy", "safetensors"} == set()
