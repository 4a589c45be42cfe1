"""The meaning of a device filter, as a pure function."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domain.selector import MAX_INACTIVE_MINUTES, Condition, check_askable, matches, parse_condition
from models.device import DeviceFilter, DeviceRecord, DeviceStatus
from models.errors import InvalidInputError

NOW = datetime(2026, 3, 12, tzinfo=UTC)


def device(**changes: object) -> DeviceRecord:
    """A motor in Berlin, with changes."""
    values = {"device_id": "m1", "device_type": "motor", "serial_number": "S1", "site_id": "berlin", **changes}
    return DeviceRecord.model_validate(values)


@pytest.mark.parametrize(
    ("text", "operator", "value"),
    [
        ("production", "=", "production"),
        ("<2026-03-12", "<", "2026-03-12"),
        ("< 2026-03-12", "<", "2026-03-12"),
        ("<=b", "<=", "b"),
        (">=b", ">=", "b"),
        (">b", ">", "b"),
        ("!= b", "!=", "b"),
        ("=b", "=", "=b"),
        (" <b", "=", " <b"),
        ("", "=", ""),
        ("<", "<", ""),
        ("!", "=", "!"),
    ],
)
def test_a_condition_is_an_operator_in_front_of_a_value(text: str, operator: str, value: str) -> None:
    assert parse_condition(text) == Condition(operator, value)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["production", "!=production", "<z", ">=", "!="])
def test_a_device_without_the_tag_matches_no_condition_on_it(text: str) -> None:
    assert not matches(DeviceFilter(tags={"environment": text}), device(), NOW)


@pytest.mark.parametrize(
    ("selected", "changes", "expected"),
    [
        ({}, {}, True),
        ({}, {"status": "retired"}, False),
        ({"statuses": ["retired"]}, {"status": "retired"}, True),
        ({"statuses": ["retired"]}, {}, False),
        ({"type": "motor", "sites": ["paris", "berlin"]}, {}, True),
        ({"type": "motor", "sites": ["paris"]}, {}, False),
        ({"type": "Motor"}, {}, False),
        ({"versions": ["1.2.3"]}, {}, False),
        ({"versions": ["1.2.3"]}, {"firmware_version": "1.2.3"}, True),
        ({"ids": ["m1"]}, {}, True),
        ({"ids": ["m2"]}, {}, False),
        ({"inactive_minutes": 10}, {}, True),
        ({"inactive_minutes": 10}, {"last_heartbeat": NOW - timedelta(minutes=10)}, True),
        ({"inactive_minutes": 10}, {"last_heartbeat": NOW - timedelta(minutes=10) + timedelta(microseconds=1)}, False),
        ({"inactive_minutes": 10}, {"last_heartbeat": NOW + timedelta(days=1)}, False),
        ({}, {"last_heartbeat": NOW + timedelta(days=1)}, True),
        ({"tags": {"due": "<2026-03-12"}}, {"tags": {"due": "2026-03-11"}}, True),
        ({"tags": {"due": "<2026-03-12"}}, {"tags": {"due": "2026-03-12"}}, False),
        ({"tags": {"due": "<2026-03-12", "line": "3"}}, {"tags": {"due": "2026-03-11"}}, False),
    ],
)
def test_every_key_that_is_given_must_match(
    selected: dict[str, object], changes: dict[str, object], expected: bool
) -> None:
    assert matches(DeviceFilter.model_validate(selected), device(**changes), NOW) is expected


@settings(deadline=None)
@given(st.text(), st.text())
def test_exactly_one_of_less_equal_and_greater_holds(found: str, wanted: str) -> None:
    wanted = wanted.lstrip(" =")
    written = [parse_condition(f"{operator}{wanted}") for operator in ("<", ">")]
    assert [c.holds(found) for c in written].count(True) == (found != wanted)
    assert parse_condition(f"!={wanted}").holds(found) == (found != wanted)
    assert parse_condition(f"<={wanted}").holds(found) != parse_condition(f">{wanted}").holds(found)


@pytest.mark.parametrize(
    "selected",
    [
        DeviceFilter(tags={"a\0": "b"}),
        DeviceFilter(tags={"a": "<\0"}),
        DeviceFilter(type="\0"),
        DeviceFilter(sites=("a", "\0")),
        DeviceFilter(versions=("\0",)),
        DeviceFilter(inactive_minutes=MAX_INACTIVE_MINUTES + 1),
    ],
)
def test_a_filter_that_postgresql_cannot_be_asked_is_refused_with_its_key(selected: DeviceFilter) -> None:
    with pytest.raises(InvalidInputError, match=r"cannot select devices: (tags|type|sites|versions|inactive_minutes)"):
        check_askable(selected)


def test_the_longest_inactivity_can_be_asked() -> None:
    check_askable(DeviceFilter(inactive_minutes=MAX_INACTIVE_MINUTES, statuses=(DeviceStatus.ACTIVE,)))
