"""The pure rules of devices' lives: standing, which certificates a rotation replaces, reminders, changes by hand."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.lifecycle import changed_config
from domain.reminders import longer, next_pause
from domain.rotation import ENDING_PERCENT, HeldCertificate, ending_text, share_left, sort_certificates
from domain.standing import Standing, why_not_configure, why_not_decommission, why_not_rotate
from models.device import DeviceStatus
from models.errors import InvalidInputError

NOW = datetime(2026, 11, 24, tzinfo=UTC)
DAY = timedelta(days=1)


@given(st.lists(st.booleans(), min_size=1, max_size=5), st.booleans())
def test_a_rotation_never_counts_a_certificate_twice_and_never_loses_the_one_that_works(
    confirmed: list[bool], ask: bool
) -> None:
    held = [HeldCertificate(f"c{n}", n, each) for n, each in enumerate(confirmed)]
    seen = sort_certificates(held, ask=ask)
    named = [*seen.old, *seen.new, *([seen.settled] if seen.settled else [])]
    assert sorted(named) == sorted(each.certificate_id for each in held)
    newest_proved = max((n for n, each in enumerate(confirmed) if each), default=0)
    works = f"c{newest_proved}"
    assert works == seen.settled or works == seen.old[0]
    assert all(not confirmed[int(name[1:])] for name in seen.new)
    assert seen.settled is None or not ask


@pytest.mark.parametrize(
    ("age", "share"), [(0, 100), (45, 50), (54, 40), (55, 38), (72, 20), (73, 18), (90, 0), (99, 0)]
)
def test_the_share_of_life_that_is_left(age: int, share: int) -> None:
    issued = NOW - age * DAY
    assert share_left(issued, issued + 90 * DAY, NOW) == share
    text = ending_text("motor-7", share, issued + 90 * DAY, "it did not come")
    assert (text is None) is (share >= ENDING_PERCENT)


def test_a_certificate_without_a_life_is_over() -> None:
    assert share_left(NOW, NOW, NOW) == share_left(NOW, NOW - DAY, NOW) == 0


@pytest.mark.parametrize(
    ("device", "configure", "rotate", "decommission"),
    [
        (Standing("d", "s", DeviceStatus.ACTIVE, valid_certificates=1), True, True, True),
        (Standing("d", "s", DeviceStatus.ACTIVE), True, False, True),
        (Standing("d", "s", DeviceStatus.ERROR, NOW, "cloned", 1), False, False, True),
        (Standing("d", "s", DeviceStatus.RETIRED, NOW, "scrapped", 0, True), False, False, False),
        (Standing("d", "s", DeviceStatus.RETIRED), False, False, True),
        (Standing("d", "s", DeviceStatus.RETIRED, valid_certificates=1, buried=True), False, False, True),
    ],
)
def test_what_a_devices_standing_allows(device: Standing, configure: bool, rotate: bool, decommission: bool) -> None:
    assert (why_not_configure(device) is None) is configure
    assert (why_not_rotate(device) is None) is rotate
    assert (why_not_decommission(device) is None) is decommission


def test_reminders_come_ever_more_rarely_and_never_after_the_end() -> None:
    pause, rarest, waited, left = timedelta(seconds=30), timedelta(hours=6), [], timedelta(days=7)
    while left > timedelta(0):
        waited.append(next_pause(pause, left))
        left -= waited[-1]
        pause = longer(pause, rarest)
    assert sum(waited, timedelta(0)) == timedelta(days=7)
    assert max(waited) == rarest
    assert len(waited) < 45
    assert next_pause(pause, timedelta(seconds=-1)) == timedelta(0)


@pytest.mark.parametrize(
    ("changes", "after"),
    [
        (["interval=5"], {"led": {"on": True}, "interval": 5}),
        (["led.on=false"], {"led": {"on": False}}),
        (["led=null"], {}),
        (["led.colour.r=1"], {"led": {"on": True, "colour": {"r": 1}}}),
        (["name=pump a", 'quoted="5"'], {"led": {"on": True}, "name": "pump a", "quoted": "5"}),
        (["led=1", "led.on=2"], {"led": {"on": 2}}),
        (["nothing.there=null"], {"led": {"on": True}, "nothing": {}}),
    ],
)
def test_changes_by_hand(changes: list[str], after: dict[str, object]) -> None:
    before = {"led": {"on": True}}
    assert changed_config(before, changes) == after
    assert before == {"led": {"on": True}}


@pytest.mark.parametrize("wrong", ["interval", "=5", ".a=1", "a.=1", "a..b=1"])
def test_what_is_no_change_is_said_so(wrong: str) -> None:
    with pytest.raises(InvalidInputError, match="expected KEY=VALUE"):
        changed_config({}, [wrong])
