"""Telling people of alerts: which channels want a notification, and one delivery to one of them.

Webhooks are signed as Standard Webhooks has it (https://www.standardwebhooks.com): `webhook-id` is the notification's
digest, the same in every attempt, so that a receiver can drop what it has already. Other channels are apprise's, which
has no such id: there a notification may come twice.

No error of these activities carries an address, an answer or a library's message: errors end up in Temporal.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx
import orjson
import structlog
from prometheus_client import Counter, Histogram
from standardwebhooks.webhooks import Webhook
from temporalio import activity

from activities.channels import Channel
from models.alerting import ChosenChannels, DeliverInput, Delivery, NotifyInput, Severity
from models.errors import NotFoundError, RefusedError, UnavailableError

DELIVERED = Counter("tidegate_notifications_delivered_total", "Notifications that a channel has taken.", ["channel"])
FAILED = Counter("tidegate_notification_failures_total", "Attempts that a channel did not take.", ["channel"])
SECONDS = Histogram(
    "tidegate_notification_seconds", "How long an attempt took.", ["channel"], buckets=(0.1, 0.5, 2, 10, 30)
)

CONNECT_SECONDS, ATTEMPT_SECONDS = 5.0, 20.0
"""A receiver that takes longer is tried again; it may well have taken it."""

log = structlog.get_logger("notify")
for _name in ("apprise", "httpx", "httpcore"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)  # they name addresses, and with them secrets


@dataclass(frozen=True)
class NotifyingActivities:
    """Runs on workers that have a notify file, from a queue of their own."""

    channels: Mapping[str, Channel]

    @activity.defn
    async def choose_channels(self, told: NotifyInput) -> ChosenChannels:
        """Which channels want it. Idempotent: only reads."""
        if told.channel is not None:
            self._channel(told.channel)
            return ChosenChannels(names=(told.channel,))
        return ChosenChannels(names=tuple(name for name, channel in self.channels.items() if channel.wants(told)))

    @activity.defn
    async def deliver_notification(self, asked: DeliverInput) -> Delivery:
        """Give it to a channel. At least once: an attempt whose answer is lost is repeated, under the same id.

        Raises:
            UnavailableError: it was not taken, and may be the next time.
            RefusedError: the receiver is gone for good. NotFoundError: this worker has no such channel.
        """
        channel = self._channel(asked.channel)
        with SECONDS.labels(channel.name).time():
            trouble, is_gone = await _attempt(channel, asked.notification)
        if trouble:
            FAILED.labels(channel.name).inc()
            log.warning(
                "notification not taken", channel=channel.name, digest=asked.notification.digest, reason=trouble
            )
            raise (RefusedError if is_gone else UnavailableError)(f"channel {channel.name}: {trouble}")
        DELIVERED.labels(channel.name).inc()
        log.info("told", channel=channel.name, digest=asked.notification.digest, summary=asked.notification.summary)
        return Delivery(channel=channel.name, delivered=True)

    def _channel(self, name: str) -> Channel:
        if (channel := self.channels.get(name)) is None:
            raise NotFoundError(f"no channel {name} in this worker's notify file; 'alert channel list' shows a file's")
        return channel


async def _attempt(channel: Channel, told: NotifyInput) -> tuple[str, bool]:
    """Why it was not taken (empty: it was), and whether that is for good."""
    try:
        async with asyncio.timeout(ATTEMPT_SECONDS):
            return await (_post(channel, told) if channel.kind == "webhook" else _notify(channel, told))
    except TimeoutError:
        return f"no answer within {ATTEMPT_SECONDS:g} s", False


async def _post(channel: Channel, told: NotifyInput) -> tuple[str, bool]:
    assert channel.secret is not None
    body, now = body_of(told), datetime.now(UTC)
    signature = Webhook(channel.secret.get_secret_value()).sign(told.digest, now, body.decode())
    headers = {
        "content-type": "application/json",
        "user-agent": "tidegate",
        "webhook-id": told.digest,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": signature,
    }
    limits = httpx.Timeout(ATTEMPT_SECONDS, connect=CONNECT_SECONDS)
    try:
        async with httpx.AsyncClient(timeout=limits, follow_redirects=False, trust_env=False) as http:
            async with http.stream("POST", channel.url.get_secret_value(), content=body, headers=headers) as answer:
                status = answer.status_code
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        return f"cannot be reached ({type(error).__name__})", False
    return ("", False) if 200 <= status < 300 else (f"answered with status {status}, expected 2xx", status == 410)


def body_of(told: NotifyInput) -> bytes:
    """What a webhook carries: `{"type": "alert.opened", "timestamp": ..., "data": {...}}` (docs/alerts.md)."""
    data: dict[str, Any] = told.model_dump(mode="json", exclude={"at", "channel"})
    more = told.count - len(told.alerts)
    return orjson.dumps({"type": f"alert.{told.event}", "timestamp": told.at, "data": data | {"more": max(more, 0)}})


async def _notify(channel: Channel, told: NotifyInput) -> tuple[str, bool]:
    taken = await asyncio.to_thread(_through_apprise, channel.url.get_secret_value(), told)
    return ("" if taken else "apprise could not deliver it", False)


def _through_apprise(url: str, told: NotifyInput) -> bool:
    import apprise  # takes half a second, and only workers with such a channel need it

    kinds = {
        Severity.INFO: apprise.NotifyType.INFO,
        Severity.WARNING: apprise.NotifyType.WARNING,
        Severity.CRITICAL: apprise.NotifyType.FAILURE,
    }
    sender = apprise.Apprise()
    if not sender.add(url):
        return False
    lines = [f"{alert.severity} {alert.text} ({alert.at:%Y-%m-%d %H:%M:%S} UTC)" for alert in told.alerts]
    if (more := told.count - len(told.alerts)) > 0:
        lines.append(f"and {more} more: starter.py alert list --rule {told.rule}")
    title = f"[{told.severity}] {told.summary}"
    try:
        return bool(
            sender.notify(
                body="\n".join(lines) or told.summary,
                title=title,
                notify_type=kinds[told.severity],
                body_format=apprise.NotifyFormat.TEXT,  # where a channel takes HTML, what devices have said is escaped
            )
        )
    except Exception:
        return False
