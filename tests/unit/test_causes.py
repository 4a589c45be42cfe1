"""Failures are grouped by what devices have in common; whatever text a device sends, counting stays exact and bounded."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.causes import MAX_REASON_CHARS, NO_REASON, FailureGroup, causes_of, normalise
from domain.diagnosis import number, percent, span, summary

AT = datetime(2026, 11, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("cannot write slot a: errno 28", "cannot write slot a: errno 5"),
        ("sha256 is 0123456789abcdef0123, expected ffff", "sha256 is fedcba98765432100123, expected ffff"),
        ("/dev/mtd3 is gone", "/dev/mmcblk0p2 is gone"),
        ("http://10.0.0.1:80/x?y=1 answered 404", "https://cdn.example/z answered 503"),
        ("no route to 10.1.2.3", "no route to 192.168.1.1"),
        ("fell  back\n after 3 tries", "fell back after 12 tries"),
        ("at 0xDEADBEEF", "at 0x0"),
    ],
)
def test_texts_of_one_cause_become_equal(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(
    ("one", "other"), [("no space left", "no power left"), ("slot a is bad", "slot b is bad"), ("decade", "facade")]
)
def test_texts_of_different_causes_stay_different(one: str, other: str) -> None:
    assert normalise(one) != normalise(other)


@pytest.mark.parametrize("reason", [None, "", "  \n\t"])
def test_no_reason_is_a_cause_as_well(reason: str | None) -> None:
    assert normalise(reason) == NO_REASON


@given(st.text(max_size=5000))
def test_any_text_is_bounded_and_collapsing_twice_changes_nothing(text: str) -> None:
    found = normalise(text)
    assert 0 < len(found) <= MAX_REASON_CHARS
    assert not any(char.isdigit() and char.isascii() for char in found)
    if len(found) < MAX_REASON_CHARS:
        assert normalise(found) == found


def test_a_text_that_is_made_to_be_slow_is_not() -> None:
    for hostile in (
        "/a" * 1000,
        "1." * 1000,
        "a" * 2000,
        "0x" * 1000,
        "://" * 700,
        "ab://" + "x" * 1990,
        "f" * 1999 + "g",
    ):
        started = datetime.now(UTC)
        normalise(hostile)
        assert datetime.now(UTC) - started < timedelta(seconds=2)


@given(
    st.lists(
        st.tuples(st.sampled_from(["flash", "power"]), st.sampled_from(["a 1", "a 2", "b", None]), st.integers(1, 50)),
        max_size=20,
    )
)
def test_counts_and_shares_add_up(made: list[tuple[str, str | None, int]]) -> None:
    groups = [FailureGroup(*each, example=f"motor-{place}") for place, each in enumerate(made)]
    found = causes_of(groups)
    total = sum(group.count for group in groups)
    assert sum(cause.count for cause in found) == total
    assert not found or abs(sum(cause.share for cause in found) - 1) < 1e-9
    assert [cause.count for cause in found] == sorted((cause.count for cause in found), reverse=True)
    assert len({(cause.failure_class, cause.reason) for cause in found}) == len(found)


def test_the_example_is_a_device_that_was_asked_where_there_is_one_and_times_span_all() -> None:
    [cause] = causes_of(
        [
            FailureGroup("flash", "sector 1", 9, "motor-1", AT, AT + timedelta(seconds=9)),
            FailureGroup("flash", "sector 2", 1, "motor-9", AT - timedelta(seconds=1), AT, diagnosed=1),
        ],
        total=20,
    )
    assert (cause.example, cause.example_reason, cause.diagnosed) == ("motor-9", "sector 2", 1)
    assert (cause.count, cause.share) == (10, 0.5)
    assert (cause.first_at, cause.last_at) == (AT - timedelta(seconds=1), AT + timedelta(seconds=9))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
FIELDS = [
    "uptime",
    "freeMemory",
    "totalMemory",
    "cpuTemperature",
    "diskUsage",
    "networkStatus",
    "logs",
    "used",
    "total",
]


@given(st.sampled_from(["system-info", "log-tail", "ping", "?"]), st.dictionaries(st.sampled_from(FIELDS), ANYTHING))
def test_a_summary_survives_any_answer(what: str, answer: dict[str, object]) -> None:
    assert isinstance(summary(what, answer), str)
    for value in answer.values():
        number(value), percent(value, value), span(value)
