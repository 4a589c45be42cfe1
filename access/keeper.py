"""The access keeper: brings one Mosquitto to what PostgreSQL says of who may speak, and says when it is there.

Level-triggered: each pass reads the whole of what is wanted and compares it with what is in force. A notification only
makes the next pass come sooner, and one that was lost costs POLL_SECONDS. Whether files are in force is asked of the
broker itself: the engine's ACL gives us one topic, named after the files' content, and what we say there comes back to us
only once that ACL has been read. So a signal that was lost, a broker that was restarted, or a keeper that was killed
half-way are all the same case: not there yet, so do it again.

Order: note who has to be thrown out, write the files, signal, hear the canary, throw out, record the revision.
"""

import asyncio
import contextlib
import signal
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psycopg
import structlog
from prometheus_client import Counter, Gauge, Histogram
from psycopg_pool import PoolTimeout

from access.folder import BrokerFolder, broker_process
from access.mosquitto import ACCESS
from access.plan import HALF_LIFE, UNUSABLE, AccessPlan, plan_access
from models.errors import TidegateError, UnavailableError
from models.settings import Settings
from store.access import CHANNEL
from store.alerts import settle_alerts
from store.brokers import AccessSnapshot, BrokerStore
from transport.session import echoes, take_over

POLL_SECONDS = 15.0
"""How late a change is noticed whose notification was lost; also how often a broker is asked whether it is in step."""
RETRY_SECONDS = 1.0
SIGNAL_SECONDS = 30.0
"""How long a broker may take to read its files: 20,000 denied devices take about two seconds."""
STEADY_SECONDS = 2.0
"""How long a canary may take when nothing was changed."""
LEAST_PAUSE_SECONDS = 1.0
"""Between two signals. Reading its files stops the broker for a moment, so many changes share one."""
PAUSE_FACTOR = 10.0
"""A signal that stopped the broker for a second is followed by ten seconds of peace."""
BEHIND_SECONDS = 30.0
"""How long a broker may be out of step before a person is told."""
KICKS_AT_ONCE = 8
BEHIND = "broker-behind"

REVISION = Gauge("tidegate_access_revision", "Revision of who may speak.", ["what"])
RELOADS = Counter("tidegate_access_reloads", "Times that the broker was told to read its files again.")
RELOAD_SECONDS = Histogram(
    "tidegate_access_reload_seconds", "Time from the signal until the broker had read its files."
)
KICKS = Counter("tidegate_access_kicks", "Sessions that were ended because their device is denied.")
DENIED = Gauge("tidegate_access_denied_devices", "Devices that the broker's ACL denies.")
UNLISTED = Gauge("tidegate_access_unlisted_certificates", "Revoked certificates that no revocation list has yet.")
CRL_SECONDS = Gauge("tidegate_access_crl_seconds", "Time left of a CA's revocation list in force.", ["authority"])
FAILURES = Counter("tidegate_access_failures", "Passes that did not bring the broker up to date.")

log = structlog.get_logger("access")


@dataclass
class AccessKeeper:
    """Keeps one broker. `settings` say where PostgreSQL and the broker's engine listener are."""

    store: BrokerStore
    settings: Settings
    folder: BrokerFolder
    pid_file: Path
    broker_id: str
    reloads: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _next_signal: float = 0.0
    _in_step_at: float = field(default_factory=time.monotonic)

    async def keep(self, stop: asyncio.Event) -> None:
        """Until `stop`."""
        async with asyncio.TaskGroup() as group:
            listening = group.create_task(self._listen())
            while not stop.is_set():
                in_step = await self._pass()
                await self._wait(stop, POLL_SECONDS if in_step else RETRY_SECONDS)
            listening.cancel()

    async def bring_up_to_date(self) -> AccessPlan:
        """Read what is wanted, put it in force, throw out, record. What is in force already costs no signal.

        Raises:
            RefusedError: there is no usable revocation list at all; nothing was changed.
            UnavailableError: the broker does not run, or does not come to what was written.
        """
        if (pause := self._next_signal - time.monotonic()) > 0:
            await asyncio.sleep(pause)  # before reading: what changes meanwhile comes with it
        snapshot = await self.store.snapshot()
        REVISION.labels("wanted").set(snapshot.revision)
        plan, changed = await asyncio.to_thread(self._write, snapshot)
        await self._tell(plan)
        if changed or not await echoes(self.settings, self._client_id, plan.canary, STEADY_SECONDS):
            await self._signal(plan)
        await self._throw_out(plan)
        await self._record(plan)
        return plan

    async def _pass(self) -> bool:
        """One pass; whether the broker is in step after it. What goes wrong is logged, recorded and tried again."""
        self._changed.clear()
        try:
            await self.bring_up_to_date()
        except (TidegateError, OSError, psycopg.Error, PoolTimeout) as error:
            FAILURES.inc()
            log.warning("the broker is not up to date", reason=str(error))
            await self._record_failure(str(error))
            return False
        self._in_step_at = time.monotonic()
        return True

    def _write(self, snapshot: AccessSnapshot) -> tuple[AccessPlan, bool]:
        """The plan, and whether files had to be changed for it."""
        installed = self.folder.read()
        plan = plan_access(snapshot, installed, self.broker_id, datetime.now(UTC))
        changed = plan.files != installed
        if changed:
            self.folder.add_pending(plan.kicks)
            self.folder.write(plan.files)
        return plan, changed

    async def _signal(self, plan: AccessPlan) -> None:
        """Have the broker read its files; returns when it has."""
        process = broker_process(self.pid_file)
        began = time.monotonic()
        process.send_signal(signal.SIGHUP)
        self.reloads += 1
        RELOADS.inc()
        heard = await echoes(self.settings, self._client_id, plan.canary, SIGNAL_SECONDS)
        seconds = time.monotonic() - began
        self._next_signal = time.monotonic() + max(LEAST_PAUSE_SECONDS, PAUSE_FACTOR * seconds)
        if not heard:
            raise UnavailableError(
                f"Mosquitto (process {process.pid}) has not read {self.folder.path} within {SIGNAL_SECONDS:.0f} s after "
                "SIGHUP; does its configuration name the files there, and may its account read them?"
            )
        RELOAD_SECONDS.observe(seconds)
        log.info("the broker has read its files", seconds=round(seconds, 3), denied=len(plan.denied))

    async def _throw_out(self, plan: AccessPlan) -> None:
        """End the sessions that have to end. Who is not denied (its certificate was replaced) may come back at once."""
        devices = sorted(self.folder.pending())
        for start in range(0, len(devices), KICKS_AT_ONCE):
            some = devices[start : start + KICKS_AT_ONCE]
            await asyncio.gather(*(take_over(self.settings, device, forget=device in plan.denied) for device in some))
            KICKS.inc(len(some))
        if devices:
            self.folder.remove_pending(devices)
            log.info("ended sessions", devices=len(devices), first=devices[0])

    @property
    def _client_id(self) -> str:
        return f"engine@access-{self.broker_id}"

    # --- what PostgreSQL is told -------------------------------------------------------------------------------------

    async def _tell(self, plan: AccessPlan) -> None:
        """Alerts and gauges."""
        DENIED.set(len(plan.denied))
        UNLISTED.set(plan.unlisted)
        CRL_SECONDS.clear()
        for name, seconds in plan.crl_seconds_left.items():
            CRL_SECONDS.labels(name).set(seconds)
        found = {(problem.rule, f"{self.broker_id}/{problem.authority}"): problem.text for problem in plan.problems}
        async with self.store.db.pool.connection() as connection:
            await settle_alerts(connection, (HALF_LIFE, UNUSABLE), f"{self.broker_id}/", found, actor=ACCESS)

    async def _record(self, plan: AccessPlan) -> None:
        """What is in force now. A revision counts as applied only when no list lacks one of its revocations."""
        revision = None if plan.unlisted else plan.revision
        error = f"{plan.unlisted} revoked certificates are on no revocation list yet" if plan.unlisted else None
        async with self.store.db.pool.connection() as connection:
            await self.store.record(
                connection, self.broker_id, revision=revision, crl_next_update=plan.crl_next_update, error=error
            )
            await settle_alerts(connection, (BEHIND,), f"{self.broker_id}/", {}, actor=ACCESS)
        if revision is not None:
            REVISION.labels("applied").set(revision)

    async def _record_failure(self, reason: str) -> None:
        seconds = time.monotonic() - self._in_step_at
        with contextlib.suppress(psycopg.Error, PoolTimeout):
            async with self.store.db.pool.connection(timeout=2) as connection:
                await self.store.record(connection, self.broker_id, revision=None, crl_next_update=None, error=reason)
                if seconds > BEHIND_SECONDS:
                    text = f"broker {self.broker_id} has been out of step for {seconds:.0f} s: {reason}"
                    found = {(BEHIND, f"{self.broker_id}/access"): text}
                    await settle_alerts(connection, (BEHIND,), f"{self.broker_id}/", found, actor=ACCESS)

    # --- when to look ------------------------------------------------------------------------------------------------

    async def _wait(self, stop: asyncio.Event, seconds: float) -> None:
        """Until something has changed, it is time to look again, or it is over."""
        waits = [asyncio.create_task(event.wait()) for event in (stop, self._changed)]
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def _listen(self) -> None:
        """Turn notifications into `_changed`; after a lost session too, for what was notified meanwhile is unknown."""
        while True:
            with contextlib.suppress(psycopg.Error):
                connection = await psycopg.AsyncConnection.connect(self.store.db.url, autocommit=True)
                async with connection:
                    await connection.execute(f"LISTEN {CHANNEL}".encode())
                    self._changed.set()
                    async for _ in connection.notifies():
                        self._changed.set()
            await asyncio.sleep(RETRY_SECONDS)
