"""Silence that was listened to, and silence that was not."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.presence import MAX_GAP, Coverage, are_many, is_listening, is_offline, next_coverage
from gateway.pulse import Pulse, parse_pulse

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
LIMIT = timedelta(minutes=10)
SOON = timedelta(seconds=5)


def after(**passed: float) -> datetime:
    return NOON + timedelta(**passed)


def test_pulses_without_a_gap_carry_the_coverage_on() -> None:
    covered = Coverage(NOON, NOON)
    for second in range(5, 3600, 5):
        covered = next_coverage(covered, after(seconds=second), SOON)
    assert covered == Coverage(NOON, after(seconds=3595))


@pytest.mark.parametrize(
    ("before", "now", "under_way"),
    [
        (None, NOON, SOON),
        (Coverage(NOON, NOON), after(seconds=31), SOON),
        (Coverage(NOON, NOON), after(seconds=5), timedelta(seconds=31)),
        (Coverage(NOON, after(hours=1)), after(minutes=59), SOON),
    ],
    ids=["the first pulse", "a gap", "a pulse that had to wait", "a clock that was set back"],
)
def test_coverage_begins_anew_with(before: Coverage | None, now: datetime, under_way: timedelta) -> None:
    assert next_coverage(before, now, under_way) == Coverage(now, now)


def test_a_gap_of_thirty_seconds_is_still_none() -> None:
    assert next_coverage(Coverage(NOON, NOON), NOON + MAX_GAP, MAX_GAP).since == NOON


def test_a_device_is_offline_only_when_its_whole_limit_was_listened_to() -> None:
    always = Coverage(after(hours=-5), after(minutes=11))
    assert is_offline(NOON, LIMIT, always, after(minutes=11))
    assert not is_offline(after(minutes=2), LIMIT, always, after(minutes=11))
    assert not is_offline(NOON, LIMIT, Coverage(after(minutes=2), after(minutes=11)), after(minutes=11))
    assert not is_offline(NOON, LIMIT, Coverage(NOON, after(minutes=11)), after(minutes=12)), "nobody listens now"
    assert not is_offline(NOON, LIMIT, None, after(minutes=11))


@given(
    st.lists(st.tuples(st.integers(1, 200), st.integers(0, 60)), min_size=1, max_size=40),
    st.integers(0, 2000),
)
def test_no_device_is_ever_silent_within_its_limit_of_a_gap(steps: list[tuple[int, int]], last_heard: int) -> None:
    covered, second, last_gap = None, 0, 0
    for passed, under_way in steps:
        second += passed
        if passed > 30 or under_way > 30:
            last_gap = second
        covered = next_coverage(covered, after(seconds=second), timedelta(seconds=under_way))
    if is_offline(after(seconds=last_heard), LIMIT, covered, after(seconds=second)):
        assert second - last_gap > 600 and second - last_heard > 600
    assert is_listening(covered, after(seconds=second))


def test_many_are_more_than_twenty_and_more_than_a_fifth() -> None:
    assert [are_many(21, 100), are_many(20, 20), are_many(21, 105), are_many(2000, 9999)] == [True, False, False, True]


def test_a_pulse_names_its_gateway_and_its_time() -> None:
    assert parse_pulse({"gateway": "a1", "sent": 5}) == Pulse("a1", 5.0)
    for body in ({}, {"gateway": 1, "sent": 5}, {"gateway": "a", "sent": True}, {"gateway": "a", "sent": "5"}):
        with pytest.raises(ValueError, match="expected a pulse"):
            parse_pulse(body)


def test_a_pulse_from_the_future_says_nothing_of_now() -> None:
    """The clock was set back after it."""
    assert not is_listening(Coverage(NOON, after(minutes=60)), NOON)
    assert is_listening(Coverage(NOON, after(seconds=1)), NOON), (
        "two transactions may see their times the other way round"
    )
