"""What is told of alerts that belong together: those of one rule that have come to the same state. Pure.

>>> in_words("overheating", AlertEvent.OPENED, [("motor-12", "berlin", datetime(2026, 11, 24, 14, 2, tzinfo=UTC))])
'motor-12: overheating at 14:02 UTC'
"""

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

from models.alerting import AlertEvent, NotedAlert, NotifyInput, Severity

MAX_NAMED = 20
"""Alerts that a notification names; of the others it gives the number."""
MAX_SITES = 10
MAX_TEXT_CHARS = 300

_VERBS = {AlertEvent.OPENED: "", AlertEvent.ACKNOWLEDGED: " acknowledged", AlertEvent.RESOLVED: " resolved"}


def compose(digest: str, rule: str, event: AlertEvent, alerts: Sequence[NotedAlert], at: datetime) -> NotifyInput:
    """One notification of these alerts, the earliest first.

    Args:
        alerts: at least one.
        at: when it is told.
    """
    ordered = sorted(alerts, key=lambda alert: (alert.at, alert.alert_no))
    sites = Counter(alert.site for alert in ordered if alert.site is not None)
    summary = in_words(rule, event, [(alert.subject, alert.site, alert.at) for alert in ordered])
    named = tuple(alert.model_copy(update={"text": _in_one_line(alert.text)}) for alert in ordered[:MAX_NAMED])
    return NotifyInput(
        digest=digest,
        rule=rule,
        event=event,
        severity=max((alert.severity for alert in ordered), key=lambda severity: severity.rank),
        summary=summary,
        count=len(ordered),
        sites=dict(sites.most_common(MAX_SITES)),
        alerts=named,
        at=at,
    )


def in_words(rule: str, event: AlertEvent, found: Sequence[tuple[str, str | None, datetime]]) -> str:
    """One sentence: `87 devices: overheating; sites berlin 80, hamburg 7; first motor-12 at 14:02 UTC`.

    Args:
        found: subject, site and time, the earliest first.
    """
    what = f"{rule}{_VERBS[event]}"
    subject, _, at = found[0]
    if len(found) == 1:
        return f"{subject}: {what} at {at.astimezone(UTC):%H:%M} UTC"
    sites = Counter(site for _, site, _ in found if site is not None)
    noun = "devices" if sites.total() == len(found) else "alerts"
    parts = [f"{len(found)} {noun}: {what}"]
    if sites:
        listed = ", ".join(f"{site} {number}" for site, number in sites.most_common(MAX_SITES))
        more = len(sites) - MAX_SITES
        parts.append(f"site{'s' if len(sites) > 1 else ''} {listed}{f' and {more} more' if more > 0 else ''}")
    return "; ".join([*parts, f"first {subject} at {at.astimezone(UTC):%H:%M} UTC"])


def _in_one_line(text: str) -> str:
    """What a device has said may be part of it, and must not look like another alert, nor like more than text."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:MAX_TEXT_CHARS])
    return shown[:MAX_TEXT_CHARS]


def trial_of(digest: str, channel: str, actor: str, at: datetime) -> NotifyInput:
    """What `alert channel test` sends."""
    return NotifyInput(
        digest=digest,
        rule="test",
        event=AlertEvent.OPENED,
        severity=Severity.INFO,
        summary=f"a test of the channel {channel}, asked for by {actor}; no alert stands behind it",
        count=0,
        at=at,
        channel=channel,
    )
