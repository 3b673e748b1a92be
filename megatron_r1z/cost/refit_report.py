"""`megatron-r1z plan`: what a refit between two layouts moves and about how long it takes, from `config.json` alone. Standard library only.

The estimate: local copies first, then round after round. A round is as slow as its slowest rank, and a rank is as slow as the busiest of
its four lanes: to and from ranks of its node, to and from ranks of other nodes. Start-up of transfers, packing and contention in the
network are not in it.
"""

from __future__ import annotations

import difflib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from megatron_r1z.errors import ConfigError
from megatron_r1z.layout.blocks import Layout, engine_layout, megatron_layout
from megatron_r1z.layout.families import ModelShape, load_shape
from megatron_r1z.layout.plan import DEFAULT_RANKS_PER_NODE, DEFAULT_ROUND_BYTES, LIVE_ROUNDS, Copy, Edge, Plan, make_plan
from megatron_r1z.layout.topology import Topology
from megatron_r1z.record.tables import align


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the ranks stand on; the speeds are assumptions, of the order of an H100 with NVLink and a 400 Gbit/s adapter of its own.

    Raises:
        ConfigError: a value that is not above 0.
    """

    ranks_per_node: int = DEFAULT_RANKS_PER_NODE
    round_bytes: int = DEFAULT_ROUND_BYTES
    local_gbs: float = 1500.0
    """GB/s at which a rank copies within its memory."""
    node_gbs: float = 400.0
    """GB/s between a rank and the others of its node, in each direction."""
    network_gbs: float = 50.0
    """GB/s between a rank and other nodes, in each direction."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ConfigError(f"{name} is {value}; it must be above 0.")

    def seconds(self, edge: Edge, nbytes: int) -> float:
        """How long one rank takes for so many bytes in one direction."""
        speed = {Edge.LOCAL: self.local_gbs, Edge.NODE: self.node_gbs, Edge.NETWORK: self.network_gbs}[edge]
        return nbytes / (speed * 1e9)


class Lane(NamedTuple):
    """One direction of one link of a rank."""

    rank: int
    edge: Edge
    receives: bool


@dataclass(frozen=True)
class EdgeBytes:
    """Bytes that cross one kind of edge."""

    total: int
    most_sent: int
    """By one rank."""
    most_received: int
    """By one rank."""


@dataclass(frozen=True)
class PlanReport:
    """What a plan moves, and how long that takes."""

    model: str
    source: str
    destination: str
    machine: Machine
    edges: Mapping[Edge, EdgeBytes]
    num_rounds: int
    buffer_bytes: int
    """Send and receive buffers of the rank that needs most."""
    estimated_s: float
    planning_s: float
    """Layouts included."""

    def to_tree(self) -> dict[str, Any]:
        """The report as JSON has it."""
        tree = {name: value for name, value in vars(self).items() if name not in ("edges", "machine")}
        edges = {edge.value: asdict(counts) for edge, counts in self.edges.items()}
        return tree | {"machine": asdict(self.machine), "edges": edges}


def make_plan_report(model: str, source: str, destination: str, itemsize: int, machine: Machine) -> PlanReport:
    """Plan a refit and add it up.

    Args:
        model: Hugging Face folder, or a `config.json`.
        source: the policy, such as `tp=8,pp=4,vpp=2`; see `read_policy`.
        destination: the engines, such as `tp=8` or `tp=16,engines=2`; see `engines_layout`.
        itemsize: bytes of one element in the engines.
        machine: nodes, rounds and speeds.

    Raises:
        UsageError: the model, a key or a degree that cannot be, in one sentence.
    """
    shape, topology = load_shape(model), read_policy(source)
    start = time.perf_counter()
    layouts = megatron_layout(shape, topology, spec="te"), engines_layout(shape, topology, destination)
    plan = make_plan(*layouts, itemsize, machine.round_bytes, machine.ranks_per_node)
    planning_s = time.perf_counter() - start
    return add_up(model, source, destination, plan, machine, planning_s)


def add_up(model: str, source: str, destination: str, plan: Plan, machine: Machine, planning_s: float) -> PlanReport:
    """The report of a plan that took `planning_s` to make."""
    local = _lanes(plan.local, machine.ranks_per_node)
    rounds = [_lanes(copies, machine.ranks_per_node) for copies in plan.rounds]
    totals: dict[Lane, int] = defaultdict(int)
    for lane, nbytes in (item for lanes in (local, *rounds) for item in lanes.items()):
        totals[lane] += nbytes
    return PlanReport(
        model=model,
        source=source,
        destination=destination,
        machine=machine,
        edges={edge: _edge_bytes(edge, totals) for edge in Edge},
        num_rounds=len(rounds),
        buffer_bytes=_largest_buffers(rounds),
        estimated_s=sum(_slowest(lanes, machine) for lanes in (local, *rounds)),
        planning_s=planning_s,
    )


def _lanes(copies: Iterable[Copy], ranks_per_node: int) -> Mapping[Lane, int]:
    """Bytes on every lane in one round."""
    lanes: dict[Lane, int] = defaultdict(int)
    for copy in copies:
        edge = copy.edge(ranks_per_node)
        lanes[Lane(copy.source_rank, edge, receives=False)] += copy.nbytes
        lanes[Lane(copy.destination_rank, edge, receives=True)] += copy.nbytes
    return lanes


def _slowest(lanes: Mapping[Lane, int], machine: Machine) -> float:
    return max((machine.seconds(lane.edge, nbytes) for lane, nbytes in lanes.items()), default=0.0)


def _edge_bytes(edge: Edge, totals: Mapping[Lane, int]) -> EdgeBytes:
    sent, received = (
        [nbytes for lane, nbytes in totals.items() if lane.edge is edge and lane.receives is direction] for direction in (False, True)
    )
    return EdgeBytes(sum(sent), max(sent, default=0), max(received, default=0))


def _largest_buffers(rounds: Sequence[Mapping[Lane, int]]) -> int:
    """The largest `RankPlan.buffer_bytes`."""
    most: dict[tuple[int, bool], int] = defaultdict(int)
    for lanes in rounds:
        used: dict[tuple[int, bool], int] = defaultdict(int)
        for lane, nbytes in lanes.items():
            used[lane.rank, lane.receives] += nbytes
        for key, nbytes in used.items():
            most[key] = max(most[key], nbytes)
    return LIVE_ROUNDS * max((most[rank, False] + most[rank, True] for rank, _ in list(most)), default=0)


# --- both sides, as they are typed ---


def read_policy(text: str) -> Topology:
    """The policy's topology from `tp=8,pp=4,vpp=2`.

    Keys are tp, pp, vpp, cp, ep, etp, dp and layers (of each model chunk, `7:8x14:7`). A degree that is not given is 1, except that etp is
    tp and dp the smallest that has room for the experts.

    Raises:
        ConfigError: an unknown key, a value that is no number, degrees that cannot be.
    """
    values = _read_keys("--from", text, POLICY_KEYS)
    tp, pp, cp, ep = (values.get(name, 1) for name in ("tp", "pp", "cp", "ep"))
    dp = values.get("dp", math.lcm(tp * cp, ep * values.get("etp", tp)) // (tp * cp))
    return Topology(tp * cp * pp * dp, tp, pp, values.get("vpp", 1), cp, ep, values.get("etp"), values.get("layers", ()))


def engines_layout(shape: ModelShape, topology: Topology, text: str) -> Layout:
    """The engines' layout from `tp=8`, on all of the policy's ranks, or `tp=16,engines=2`, on ranks of their own after those.

    Raises:
        ConfigError: an unknown key, a value that is no number, a model that cannot be split.
    """
    values = _read_keys("--to", text, ENGINE_KEYS)
    tp = values.get("tp", 1)
    if "engines" in values:
        return engine_layout(shape, tp * values["engines"], tp, first_rank=topology.num_ranks)
    return engine_layout(shape, topology.num_ranks, tp)


class _Key(NamedTuple):
    """How a value is read, and what to say of one that cannot be."""

    read: Callable[[str], Any]
    form: str


def _degree(text: str) -> int:
    degree = int(text)
    if degree < 1:
        raise ValueError
    return degree


def _layers(text: str) -> tuple[int, ...]:
    """`7:8x14:7` is one chunk of 7 layers, 14 of 8 and one of 7."""
    groups = [group.partition("x") for group in text.split(":")]
    return tuple(_degree(size) for size, times, count in groups for _ in range(_degree(count) if times else 1))


_DEGREE = _Key(_degree, "a whole number of at least 1")
POLICY_KEYS: Mapping[str, _Key] = {
    **dict.fromkeys(("tp", "pp", "vpp", "cp", "ep", "etp", "dp"), _DEGREE),
    "layers": _Key(_layers, "the layers of each model chunk, such as 7:8x14:7"),
}
ENGINE_KEYS: Mapping[str, _Key] = dict.fromkeys(("tp", "engines"), _DEGREE)


def _read_keys(option: str, text: str, keys: Mapping[str, _Key]) -> dict[str, Any]:
    values = {}
    for part in text.split(","):
        key, _, value = part.strip().partition("=")
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{option}: unknown key '{key}'; did you mean '{near}'? Known are {', '.join(keys)}.")
        try:
            values[key] = keys[key].read(value)
        except ValueError as error:
            raise ConfigError(f"{option}: {key} is '{value}'; it must be {keys[key].form}.") from error
    return values


# --- the terminal ---


def render_plan(report: PlanReport) -> str:
    """The report for a terminal."""
    machine = report.machine
    head = ["bytes moved", "total", "most sent by a rank", "most received by a rank"]
    rows = [[edge.value, *map(in_units, (item.total, item.most_sent, item.most_received))] for edge, item in report.edges.items()]
    figures = [
        ("rounds", f"{report.num_rounds}, in each at most {machine.round_bytes >> 20} MiB sent and as much received by a rank"),
        ("buffers", f"{in_units(report.buffer_bytes)} on the fullest rank: send and receive buffers of {LIVE_ROUNDS} rounds"),
        (
            "estimate",
            f"{report.estimated_s:.3g} s, assuming {machine.local_gbs:g} GB/s in a rank, {machine.node_gbs:g} in a node and "
            f"{machine.network_gbs:g} across nodes, for each rank and direction",
        ),
        ("planning", f"{report.planning_s:.2f} s"),
    ]
    title = f"{report.model}: policy {report.source} to engines {report.destination}, {machine.ranks_per_node} ranks per node"
    return "\n".join([title, "", *align([head, *rows]), "", *(f"{name:<10}{text}" for name, text in figures)])


def in_units(nbytes: int) -> str:
    """Bytes with three digits.

    >>> in_units(141_200_000_000)
    '141 GB'
    """
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
