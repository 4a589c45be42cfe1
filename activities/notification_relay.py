"""The relay of notifications: from changes of alerts in PostgreSQL to workflows that tell people (store/notifications.py).

Where the worker has no notify file it tells nobody: what has waited for minutes, so that any worker which has one had
its chance, is marked as told to nobody.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta

import psycopg
import structlog
from prometheus_client import Counter
from psycopg_pool import PoolTimeout
from temporalio.service import RPCError

from models.alerting import NotifyInput
from observe.stopping import pause
from store.notifications import NotificationStore

HANDED_OVER = Counter("tidegate_alert_changes_handed_over_total", "Changes of alerts given to notifications.")
DIGESTS = Counter("tidegate_notifications_started_total", "Notifications started.")
LEFT = Counter("tidegate_alert_changes_told_to_nobody_total", "Changes of alerts that no worker has a channel for.")

GATHER = timedelta(seconds=5)
"""How long the first change waits for others of its kind."""
QUIET = timedelta(minutes=1)
"""How long later ones of the same rule and event wait: a fleet that fails, fails one heartbeat after the other."""
LEAVE = timedelta(minutes=5)
"""Longer than QUIET by far: what waits to be told together is still told, by a worker that has a file."""
POLL_SECONDS = 1.0

log = structlog.get_logger("relay")


@dataclass
class NotificationRelay:
    """See the module. `start` starts the workflow of a notification, and does nothing where it was started before."""

    store: NotificationStore
    start: Callable[[NotifyInput], Awaitable[None]] | None
    gather: timedelta = GATHER
    quiet: timedelta = QUIET

    async def run(self, stop: asyncio.Event) -> None:
        """Hand over until `stop` is set, whatever is away for a while."""
        said = ""
        while not stop.is_set():
            try:
                await self.hand_over()
                said = ""
            except (psycopg.Error, PoolTimeout, RPCError) as error:
                if str(error) != said:
                    log.warning("cannot hand notifications over, trying again", reason=str(error).strip()[:200])
                said = str(error)
            await pause(stop, POLL_SECONDS)

    async def hand_over(self) -> int:
        """Start what is due; how many notifications that were. Raises RPCError where Temporal did not take one."""
        if self.start is None:
            LEFT.inc(await self.store.leave(LEAVE))
            return 0
        due = await self.store.digests(self.gather, self.quiet)
        for told in due:
            await self.start(told)
            HANDED_OVER.inc(await self.store.handed_over(told.digest))
            DIGESTS.inc()
        return len(due)
