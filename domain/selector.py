"""Which devices a filter selects: the meaning of a `DeviceFilter`, stated once.

`parse_condition` reads a tag's condition; `matches` decides for one device. store/filters.py says the same in SQL for
the whole registry, and a differential test holds the two together: for any text, the same devices.

Rules: every key that is given must match. A device without a tag matches no condition on it, `!=` included, so that
an untagged device is never updated by accident. Values are compared as text, code point by code point.

>>> parse_condition("production"), parse_condition("<= 2026-03-12")
(Condition(operator='=', value='production'), Condition(operator='<=', value='2026-03-12'))
"""

import operator as comparisons
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from models.device import DeviceFilter, DeviceRecord, DeviceStatus
from models.errors import InvalidInputError

Operator = Literal["=", "<", "<=", ">", ">=", "!="]

_WRITTEN: tuple[Operator, ...] = ("<=", ">=", "!=", "<", ">")  # the longer ones first: `<=` is not `<` and `=`
MAX_INACTIVE_MINUTES = 100 * 365 * 24 * 60
_HOLDS: dict[Operator, Callable[[str, str], bool]] = {
    "=": comparisons.eq,
    "<": comparisons.lt,
    "<=": comparisons.le,
    ">": comparisons.gt,
    ">=": comparisons.ge,
    "!=": comparisons.ne,
}


@dataclass(frozen=True, slots=True)
class Condition:
    """One comparison with a tag's value."""

    operator: Operator
    value: str

    def holds(self, found: str | None) -> bool:
        """Whether a device's value satisfies it; None (no such tag) never does."""
        return found is not None and _HOLDS[self.operator](found, self.value)


def parse_condition(text: str) -> Condition:
    """Read `production` (exactly this) or `<2026-03-12` (one of `< <= > >= !=`, then blanks if any, then a value)."""
    for written in _WRITTEN:
        if text.startswith(written):
            return Condition(written, text[len(written) :].lstrip(" "))
    return Condition("=", text)


def tag_conditions(devices: DeviceFilter) -> dict[str, Condition]:
    """Every tag condition of a filter, by tag."""
    return {key: parse_condition(value) for key, value in devices.tags.items()}


def check_askable(devices: DeviceFilter) -> None:
    """Refuse a filter that PostgreSQL cannot be asked: its text holds no U+0000, its times end 4713 BC.

    Raises:
        InvalidInputError: naming the key at fault.
    """
    if (devices.inactive_minutes or 0) > MAX_INACTIVE_MINUTES:
        raise InvalidInputError(
            f"cannot select devices: inactive_minutes is {devices.inactive_minutes}, "
            f"expected at most {MAX_INACTIVE_MINUTES} (a hundred years)"
        )
    texts = [("type", devices.type or "")]
    texts += [("sites", site) for site in devices.sites] + [("versions", version) for version in devices.versions]
    texts += [(f"tags.{key!r}", key + value) for key, value in devices.tags.items()]
    for where, text in texts:
        if "\0" in text:
            raise InvalidInputError(f"cannot select devices: {where} contains the character U+0000; take it out")


def matches(devices: DeviceFilter, device: DeviceRecord, now: datetime) -> bool:
    """Whether a filter selects a device.

    A filter without `statuses` takes every device that is not retired. A device that never sent a heartbeat counts as
    inactive for any length of time.
    """
    statuses = devices.statuses or tuple(status for status in DeviceStatus if status is not DeviceStatus.RETIRED)
    return (
        device.status in statuses
        and (devices.type is None or device.device_type == devices.type)
        and (not devices.sites or device.site_id in devices.sites)
        and (not devices.versions or device.firmware_version in devices.versions)
        and (not devices.ids or device.device_id in devices.ids)
        and (
            devices.inactive_minutes is None or _silent_for(device, now) >= timedelta(minutes=devices.inactive_minutes)
        )
        and all(condition.holds(device.tags.get(key)) for key, condition in tag_conditions(devices).items())
    )


def _silent_for(device: DeviceRecord, now: datetime) -> timedelta:
    return timedelta.max if device.last_heartbeat is None else max(now - device.last_heartbeat, timedelta(0))
