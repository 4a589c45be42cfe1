"""Alert rules: how they are written, and what values make of them."""

import re
import time
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import models.alerting
from cli.spec import parse_model
from domain.alerting import WELL, Change, Progress, is_back, is_beyond, judge
from models.alerting import BUILT_IN, AlertRuleSpec, Comparison, parse_condition
from models.errors import SpecError


def rule(when: str, **more: Any) -> AlertRuleSpec:
    return AlertRuleSpec.model_validate({"name": "r", "when": when, **more})


def changes(of: AlertRuleSpec, values: list[float | None], every: float = 1.0) -> list[Change | None]:
    progress, found = WELL, []
    for number, value in enumerate(values):
        progress, change = judge(progress, value, number * every, of)
        found.append(change)
    return found


# --- how they are written --------------------------------------------------------------------------------------------

WRITTEN = [
    ("cpuTemperature > 80", ("cpuTemperature", ">", 80, 1, "0s", None, 1)),
    ("cpuTemperature>80", ("cpuTemperature", ">", 80, 1, "0s", None, 1)),
    (
        "cpuTemperature > 80 for 2 heartbeats, clear < 75 for 3 heartbeats",
        ("cpuTemperature", ">", 80, 2, "0s", 75, 3),
    ),
    ("freeMemory <= 1.5e6 for 10m, clear > 2000000", ("freeMemory", "<=", 1.5e6, 1, "10m", 2e6, 1)),
    ("errorCount >= 1 for 3 heartbeats and 1h30m", ("errorCount", ">=", 1, 3, "1h30m", None, 1)),
    ("networkSignalStrength < -90.5, clear for 2 heartbeats", ("networkSignalStrength", "<", -90.5, 1, "0s", None, 2)),
    ("door.open == 1 for 1 heartbeat", ("door.open", "==", 1, 1, "0s", None, 1)),
    ("  mode  !=  .5  ", ("mode", "!=", 0.5, 1, "0s", None, 1)),
]


@pytest.mark.parametrize(("text", "expected"), WRITTEN, ids=[text for text, _ in WRITTEN])
def test_a_condition_says_what_it_is_read_as(text: str, expected: tuple[Any, ...]) -> None:
    metric, comparison, threshold, heartbeats, lasting, clear, clear_heartbeats = expected
    read = rule(text)
    assert (read.metric, read.comparison.value, read.threshold) == (metric, comparison, threshold)
    assert (read.heartbeats, read.model_dump(mode="json")["lasting"]) == (heartbeats, lasting)
    assert (read.clear, read.clear_heartbeats) == (clear, clear_heartbeats)
    assert rule(read.condition) == read


REFUSED = [
    ("", "expected a heartbeat's key, as cpuTemperature, got 'nothing'"),
    ("80 > cpuTemperature", "expected a heartbeat's key"),
    ("cpuTemperature", "expected one of > >= < <= == !=, got 'nothing'"),
    ("cpuTemperature is 80", "expected one of > >= < <= == !=, got 'is 80'"),
    ("cpuTemperature >> 80", "expected one of > >= < <= == !=, got '>> 80'"),
    ("cpuTemperature > ", "expected a number, got 'nothing'"),
    ("cpuTemperature > 80%", "expected a number, got '80%'"),
    ("cpuTemperature > 80 twice", "expected 'for N heartbeats', 'for 10m' or ', clear ...', got 'twice'"),
    ("cpuTemperature > 80 for two heartbeats", "expected 'for N heartbeats'"),
    ("cpuTemperature > 80 for 10 parsecs", "expected 'for N heartbeats'"),
    ("cpuTemperature > 80 for 10q", "expected a duration as in 30m"),
    ("cpuTemperature > 80 for 0 heartbeats", "greater than or equal to 1"),
    ("cpuTemperature > 80, clear > 75", "expected 'clear <' after '>', got 'clear >'"),
    ("cpuTemperature > 80, clear < 85", "expected at most the threshold 80, got 85"),
    ("freeMemory < 10, clear > 5", "expected at least the threshold 10, got 5"),
    ("mode == 1, clear < 0", "expected 'clear without a threshold' after '=='"),
    ("cpuTemperature > 80, then what", "expected 'clear < 75 for 3 heartbeats', got 'then what'"),
    ("bootId > 1", "expected a heartbeat's key that is a number"),
    ("cpuTemperature > 1e999", "expected a finite number"),
    (7, "expected text as in"),
]


@pytest.mark.parametrize(("text", "expected"), REFUSED, ids=[str(text) for text, _ in REFUSED])
def test_what_is_no_condition_is_told_what_was_expected(text: Any, expected: str) -> None:
    with pytest.raises(ValidationError) as refused:
        rule(text)
    assert expected in str(refused.value)


@given(st.text(alphabet="cpu > 80for,learhtbs<=!1.\n", max_size=60))
def test_no_text_breaks_the_reader(text: str) -> None:
    try:
        read = parse_condition(text)
    except ValueError:
        return
    assert read["metric"] and isinstance(read["threshold"], float)


def test_a_rule_s_file_is_read_strictly_and_every_mistake_has_its_line() -> None:
    good = b"name: hot\nwhen: cpuTemperature > 80\nseverity: critical\ntarget: {type: motor, sites: [berlin]}\n"
    read = parse_model(good, "hot.yaml", AlertRuleSpec)
    assert (read.threshold, read.target.type, read.target.sites) == (80, "motor", ("berlin",))
    spelled = b"name: hot\nmetric: x\ncomparison: '>'\nthreshold: 1\nfor: 10m\nclear: 0.5\nclear_heartbeats: 2\n"
    assert parse_model(spelled, "hot.yaml", AlertRuleSpec).lasting == timedelta(minutes=10)
    with pytest.raises(SpecError) as refused:
        parse_model(b"name: Hot\nmetric: x\ncomparison: '>'\nthreshold: 1\nseverty: info\n", "hot.yaml", AlertRuleSpec)
    assert "line 1: name: expected small letters" in str(refused.value)
    assert "line 5: severty: unknown key; did you mean 'severity'?" in str(refused.value)
    with pytest.raises(SpecError, match="expected either when or metric, got both"):
        parse_model(b"name: hot\nwhen: x > 1\nmetric: x\n", "hot.yaml", AlertRuleSpec)
    with pytest.raises(SpecError, match="inactive_minutes"):
        parse_model(b"name: hot\nwhen: x > 1\ntarget: {inactive_minutes: 5}\n", "hot.yaml", AlertRuleSpec)


def test_no_rule_bears_the_name_of_an_alert_of_tidegate_s_own() -> None:
    with pytest.raises(ValidationError, match="own alerts do not bear"):
        AlertRuleSpec.model_validate({"name": "cloned-device", "when": "x > 1"})


def test_the_rules_to_begin_with_are_those_of_the_requirements() -> None:
    assert {rule.name: rule.condition for rule in BUILT_IN} == {
        "overheating": "cpuTemperature > 80 for 2 heartbeats, clear < 75 for 3 heartbeats",
        "high-error-rate": "errorCount > 100",
    }


# --- what values make of them ----------------------------------------------------------------------------------------

HOT = rule("cpuTemperature > 80 for 2 heartbeats, clear < 75 for 3 heartbeats")


def test_two_in_a_row_open_and_three_in_a_row_clear() -> None:
    assert changes(HOT, [81, 79, 81, 82, 90]) == [None, None, None, Change.OPENED, None]
    assert changes(HOT, [81, 81, 70, 70, 78, 70, 70, 70]) == [None, Change.OPENED, *[None] * 5, Change.CLEARED]
    assert changes(HOT, [80, 80, 80]) == [None] * 3, "80 is not above 80"


def test_a_value_that_is_missing_is_no_evidence() -> None:
    assert changes(HOT, [81, None, 81]) == [None, None, Change.OPENED]
    assert changes(HOT, [81, 81, 70, None, 70, None, 70]) == [None, Change.OPENED, *[None] * 4, Change.CLEARED]
    assert judge(Progress(in_a_row=1, since=0.0), None, 5, HOT) == (Progress(in_a_row=1, since=0.0), None)


def test_a_duration_is_the_server_s_and_begins_with_the_first_beyond() -> None:
    lasting = rule("cpuTemperature > 80 for 10m")
    assert changes(lasting, [81] * 12, every=60) == [*[None] * 10, Change.OPENED, None]
    assert changes(lasting, [81] * 9 + [79] + [81] * 10, every=60) == [None] * 20
    both = rule("cpuTemperature > 80 for 3 heartbeats and 10m")
    assert changes(both, [81, 81, 81], every=600) == [None, None, Change.OPENED]
    assert changes(both, [81] * 4, every=60) == [None] * 4


@pytest.mark.parametrize("comparison", Comparison)
def test_beyond_and_back_never_hold_together(comparison: Comparison) -> None:
    clear = {"clear": 5.0} if comparison.back else {}
    of = AlertRuleSpec(name="r", metric="x", comparison=comparison, threshold=5, **clear)
    assert not any(is_beyond(of, value) and is_back(of, value) for value in (4, 5, 6))


VALUES = st.lists(st.none() | st.integers(60, 100).map(float), max_size=80)
RULES = st.builds(
    lambda n, m, gap: AlertRuleSpec(
        name="r",
        metric="x",
        comparison=Comparison.ABOVE,
        threshold=80,
        heartbeats=n,
        clear=80 - gap,
        clear_heartbeats=m,
    ),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 15),
)


@given(RULES, VALUES)
def test_an_alert_opens_again_only_after_it_was_cleared(of: AlertRuleSpec, values: list[float | None]) -> None:
    happened = [change for change in changes(of, values) if change is not None]
    assert not happened or happened[0] is Change.OPENED
    assert all(before is not after for before, after in pairwise(happened))


@given(RULES, VALUES)
def test_it_opens_after_exactly_so_many_in_a_row(of: AlertRuleSpec, values: list[float | None]) -> None:
    said = [value for value in values if value is not None]
    found, in_a_row = changes(of, list(said)), 0
    for value, change in zip(said, found, strict=True):
        in_a_row = in_a_row + 1 if value > 80 else 0
        if change is Change.OPENED:
            assert in_a_row >= of.heartbeats
            break
        assert in_a_row < of.heartbeats


@given(RULES, st.lists(st.booleans(), max_size=80))
def test_a_value_that_wavers_within_the_band_gives_one_alert_at_most(of: AlertRuleSpec, ups: list[bool]) -> None:
    assert of.clear is not None
    values: list[float | None] = [81.0 if up else of.clear for up in ups]  # `clear` itself is not below it
    assert changes(of, values).count(Change.OPENED) <= 1
    assert Change.CLEARED not in changes(of, values)


def test_without_a_band_the_same_value_gives_many() -> None:
    bare = rule("cpuTemperature > 80")
    assert changes(bare, [81, 79] * 10).count(Change.OPENED) == 10


@given(RULES, VALUES, st.integers(0, 80))
def test_what_is_missing_might_as_well_not_have_come(of: AlertRuleSpec, values: list[float | None], at: int) -> None:
    place = min(at, len(values))
    with_gap = changes(of, [*values[:place], None, *values[place:]])
    assert with_gap[:place] + with_gap[place + 1 :] == changes(of, values)


def test_a_clock_that_was_set_back_does_not_put_an_alert_off() -> None:
    lasting = rule("cpuTemperature > 80 for 10m")
    progress, change = judge(Progress(in_a_row=1, since=100_000.0), 81, 1000.0, lasting)
    assert (progress.since, change) == (1000.0, None)
    assert judge(progress, 81, 1600.0, lasting)[1] is Change.OPENED


@pytest.mark.parametrize("written", ["a > " + "1" * 20_000 + "e", "a > 1" + " " * 20_000 + "x", "a" * 20_000])
def test_a_condition_that_is_no_end_of_text_is_refused_unread(written: str) -> None:
    with pytest.raises(ValueError, match="at most 500 characters"):
        parse_condition(written)


def test_a_number_is_read_in_one_way() -> None:
    """Digits that could be split between two parts of the pattern took a minute to refuse."""
    started = time.process_time()
    assert re.compile(models.alerting._NUMBER + r"(?![\w.%])").match("1" * 20_000 + "e") is None
    assert time.process_time() - started < 2
