"""The order of draws is a function of seed, sizes and weights: not of chunking, not of interruptions."""

import json
from collections import Counter
from itertools import pairwise
from random import Random

import pytest

from megatron_r1z.data.order import Cursor, SeededOrder, SeededStream
from megatron_r1z.errors import DataError

SIZES = [(1,), (7,), (3, 5), (1, 10, 4)]


def make_stream(sizes: tuple[int, ...], seed: int = 0) -> SeededStream[str]:
    return SeededStream([([f"{source}/{item}" for item in range(size)], source + 1.0) for source, size in enumerate(sizes)], seed)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("seed", [0, 1])
def test_any_chunking_draws_the_same_sequence(sizes: tuple[int, ...], seed: int) -> None:
    whole = make_stream(sizes, seed).draw(60)
    cuts = sorted({0, 60, *Random(seed).sample(range(60), 6)})
    stream = make_stream(sizes, seed)
    assert [item for low, high in pairwise(cuts) for item in stream.draw(high - low)] == whole


@pytest.mark.parametrize("sizes", SIZES)
def test_a_restored_stream_goes_on_where_the_state_was_taken(sizes: tuple[int, ...]) -> None:
    whole = make_stream(sizes).draw(60)
    for cut in range(0, 60, 7):
        first, second = make_stream(sizes), make_stream(sizes)
        first.draw(cut)
        second.restore(json.loads(json.dumps(first.to_state())))
        assert second.draw(60 - cut) == whole[cut:]


def test_every_pass_is_a_fresh_permutation() -> None:
    drawn = make_stream((20,)).draw(100)
    passes = [drawn[start : start + 20] for start in range(0, 100, 20)]
    assert all(len(set(part)) == 20 for part in passes)
    assert len({tuple(part) for part in passes}) == 5


def test_no_item_of_a_source_is_repeated_before_its_pass_is_over() -> None:
    drawn = make_stream((6, 9)).draw(200)
    for source, size in ((0, 6), (1, 9)):
        own = [item for item in drawn if item.startswith(f"{source}/")]
        for start in range(0, len(own) - size, size):
            assert len(set(own[start : start + size])) == size


def test_sources_are_mixed_by_weight() -> None:
    counts = Counter(item[0] for item in make_stream((10, 10)).draw(6000))
    assert counts["0"] / 6000 == pytest.approx(1 / 3, abs=0.02)


def test_the_source_of_a_draw_does_not_depend_on_what_was_drawn_before() -> None:
    choices = [item[0] for item in make_stream((3, 5)).draw(50)]
    assert [item[0] for item in make_stream((30, 2)).draw(50)] == choices


def test_the_seed_changes_the_order() -> None:
    assert make_stream((50,), 0).draw(50) != make_stream((50,), 1).draw(50)


def test_the_order_stays_what_it_was() -> None:
    """Runs resume across versions of this package: these numbers must not move."""
    order = SeededOrder(8, "order/0/0")
    assert [order.index(position) for position in range(16)] == [4, 0, 3, 7, 2, 1, 6, 5, 1, 3, 6, 7, 4, 5, 2, 0]
    assert make_stream((3, 5)).draw(8) == ["0/0", "1/3", "1/4", "1/1", "1/0", "1/2", "1/3", "0/2"]


def test_a_position_can_be_asked_for_in_any_order() -> None:
    order, again = SeededOrder(5, "seed"), SeededOrder(5, "seed")
    forward = [order.index(position) for position in range(20)]
    assert [again.index(position) for position in reversed(range(20))] == forward[::-1]


def test_the_cursor_survives_json() -> None:
    cursor = Cursor(drawn=3, taken=(2, 1), sizes=(10, 5))
    assert Cursor.from_state(json.loads(json.dumps(cursor.to_state()))) == cursor


def test_a_state_of_other_files_is_refused() -> None:
    state = make_stream((3, 5)).to_state()
    with pytest.raises(DataError, match=r"\[3, 5\] items and now they hold \[3, 6\]"):
        make_stream((3, 6)).restore(state)


@pytest.mark.parametrize("sources", [[], [([], 1.0)], [(["a"], 1.0), ([], 1.0)]])
def test_there_must_be_something_to_draw(sources: list[tuple[list[str], float]]) -> None:
    with pytest.raises(DataError, match="at least one"):
        SeededStream(sources, 0)
