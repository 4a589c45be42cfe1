"""How many devices are told at once, and when they are told again."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.hints import MAX_HINTS_PER_TICK, MAX_REPEAT, HintNeeds, hints_to_send, next_repeat


def needs(**changes: int | None) -> HintNeeds:
    """Nothing under way: cap 500, nobody in flight, many queued."""
    base: dict[str, int | None] = {"cap": 500, "in_flight": 0, "hinted": 0, "admitted": 0, "queued": 10_000}
    return HintNeeds(**{**base, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "hints"),
    [
        ({}, 500),
        ({"in_flight": 420}, 80),
        ({"in_flight": 500}, 0),
        ({"in_flight": 600}, 0),  # the cap was lowered
        ({"hinted": 100}, 400),  # on their way
        ({"hinted": 100, "admitted": 70, "in_flight": 70}, 400),
        ({"hinted": 10, "admitted": 90, "in_flight": 90}, 410),  # devices that asked by themselves
        ({"queued": 3}, 3),
        ({"queued": 3, "hinted": 3}, 0),
        ({"per_minute": 60, "admitted_in_window": 0}, 60),
        ({"per_minute": 60, "admitted_in_window": 45}, 15),
        ({"per_minute": 60, "admitted_in_window": 61}, 0),
        ({"per_minute": 60, "admitted_in_window": 45, "hinted": 10}, 5),
        ({"cap": 5000}, MAX_HINTS_PER_TICK),
        ({"in_flight": 490, "soon_free": 25}, 35),
    ],
)
def test_hints_fill_the_slots_that_will_be_free(changes: dict[str, int], hints: int) -> None:
    assert hints_to_send(needs(**changes)) == hints


SMALL = st.integers(0, 2000)


@given(SMALL, SMALL, SMALL, SMALL, SMALL)
def test_hints_on_their_way_never_exceed_the_free_slots(
    cap: int, in_flight: int, hinted: int, admitted: int, queued: int
) -> None:
    more = hints_to_send(HintNeeds(cap + 1, in_flight, hinted, admitted, queued))
    on_their_way = max(0, hinted - admitted)
    assert more >= 0
    assert not more or on_their_way + more <= min(max(0, cap + 1 - in_flight), queued)


def test_a_round_is_repeated_soon_while_it_brings_devices_and_ever_more_rarely_while_it_does_not() -> None:
    waits, wait = [], timedelta(0)
    for _ in range(12):
        wait = next_repeat(wait, admitted_since=0)
        waits.append(wait.total_seconds())
    assert waits[:5] == [1, 2, 4, 8, 16]
    assert waits[-1] == MAX_REPEAT.total_seconds()
    assert next_repeat(MAX_REPEAT, admitted_since=1) == timedelta(seconds=1)
