"""Whether a heartbeat's value opens an alert, or is the end of one. Pure.

A rule opens after so many values beyond its threshold in a row, and for so long; it is over after so many in a row that
are back within `clear`. Between the two lies a band in which nothing changes, so that a value which wavers around the
threshold gives one alert and not many. A value that is missing is no evidence: it changes nothing.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from models.alerting import AlertRuleSpec, Comparison

COMPARE: dict[Comparison, Callable[[float, float], bool]] = {
    Comparison.ABOVE: operator.gt,
    Comparison.AT_LEAST: operator.ge,
    Comparison.BELOW: operator.lt,
    Comparison.AT_MOST: operator.le,
    Comparison.EQUAL: operator.eq,
    Comparison.UNEQUAL: operator.ne,
}


class Change(StrEnum):
    """What has become of an alert."""

    OPENED = "opened"
    CLEARED = "cleared"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a device is on the way into an alert, or, while `firing`, out of it.

    `in_a_row`: values beyond the threshold; while firing, values back within `clear`. `since`: when the
    first of those beyond came, in epoch seconds of the server's clock.
    """

    firing: bool = False
    in_a_row: int = 0
    since: float | None = None


WELL = Progress()
"""Where all is well; nobody keeps a record of it."""


def is_beyond(rule: AlertRuleSpec, value: float) -> bool:
    """Whether a value is beyond the threshold."""
    return COMPARE[rule.comparison](value, rule.threshold)


def is_back(rule: AlertRuleSpec, value: float) -> bool:
    """Whether a value is back within the limit."""
    if rule.clear is None or rule.comparison.back is None:
        return not is_beyond(rule, value)
    return COMPARE[rule.comparison.back](value, rule.clear)


def judge(progress: Progress, value: float | None, at: float, rule: AlertRuleSpec) -> tuple[Progress, Change | None]:
    """The progress after a value, and what it has brought about.

    Args:
        value: None where the heartbeat says nothing of it.
        at: when it came, in epoch seconds of the server's clock.
    """
    if value is None:
        return progress, None
    if progress.firing:
        if not is_back(rule, value):
            return Progress(firing=True), None
        if progress.in_a_row + 1 >= rule.clear_heartbeats:
            return WELL, Change.CLEARED
        return Progress(firing=True, in_a_row=progress.in_a_row + 1), None
    if not is_beyond(rule, value):
        return WELL, None
    since = at if progress.since is None else min(progress.since, at)  # the clock may have been set back
    if progress.in_a_row + 1 >= rule.heartbeats and at - since >= rule.lasting.total_seconds():
        return Progress(firing=True), Change.OPENED
    return Progress(in_a_row=min(progress.in_a_row + 1, rule.heartbeats), since=since), None
