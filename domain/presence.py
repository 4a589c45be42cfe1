"""Who counts as offline, and since when the engine could have heard. Pure: every clock is an argument.

The gateway says something to itself through the broker every few seconds: its pulse. While pulses come, all that devices
say would have come too. After a gap nobody can tell who was silent and who was not heard, so everybody's limit begins anew.

>>> from datetime import UTC, datetime, timedelta
>>> noon = datetime(2026, 3, 1, 12, tzinfo=UTC)
>>> covered = next_coverage(Coverage(noon, noon), noon + timedelta(seconds=5), timedelta(seconds=0.1))
>>> covered.since == noon
True
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

MAX_GAP = timedelta(seconds=30)
"""Between two pulses, and from sending to handling one: six pulses. A gateway that is started anew takes a few seconds."""

MANY_DEVICES = 20
MANY_SHARE = 0.2
"""More than so many devices, and more than this share of a site or of the fleet, are a matter of the site."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """The engine has heard without a gap from `since` to `pulsed_at`."""

    since: datetime
    pulsed_at: datetime


def next_coverage(before: Coverage | None, now: datetime, under_way: timedelta) -> Coverage:
    """What a pulse says that is handled now and was under way for so long.

    It begins anew where the last one is too long ago, where this one had to wait (what devices said had to wait with it),
    and where the clock has been set back.
    """
    if before is None or not timedelta(0) <= now - before.pulsed_at <= MAX_GAP or under_way > MAX_GAP:
        return Coverage(now, now)
    return Coverage(before.since, now)


def is_listening(coverage: Coverage | None, now: datetime) -> bool:
    """Whether what devices say now would be heard."""
    return coverage is not None and abs(now - coverage.pulsed_at) < MAX_GAP  # ahead: the clock was set back


def is_offline(last_heard: datetime, limit: timedelta, coverage: Coverage | None, now: datetime) -> bool:
    """Whether a device counts as offline: silent beyond its limit, all of which somebody listened."""
    if coverage is None or not is_listening(coverage, now):
        return False
    return max(last_heard, coverage.since) < now - limit


def are_many(offline: int, devices: int) -> bool:
    """Whether so many devices of these are offline that it is not the devices."""
    return offline > MANY_DEVICES and offline > devices * MANY_SHARE
