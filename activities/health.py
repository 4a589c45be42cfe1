"""Looking after what heartbeats say: who is offline, and how long the history is kept."""

from dataclasses import dataclass
from datetime import timedelta

import structlog
from prometheus_client import Counter, Gauge
from temporalio import activity

from models.health import KeepHistoryInput, KeepHistoryResult, SweepOfflineInput, SweepOfflineResult
from models.settings import Settings
from store.engine import Database
from store.offline import sweep_offline
from store.partitions import Kept, turn_partitions
from store.retention import delete_old

log = structlog.get_logger("health")

OFFLINE = Counter("tidegate_devices_offline_total", "Devices found to be silent beyond their limit.")
BACK = Counter("tidegate_devices_back_total", "Devices that were offline and are no more.")
LISTENING = Gauge("tidegate_listening", "1 while the gateway's pulse comes through the broker, 0 while it does not.")


@dataclass
class HealthActivities:
    """PostgreSQL, and what the settings say."""

    db: Database
    offline_after: timedelta = timedelta(minutes=10)
    heartbeat_days: int = 30
    shadow_history_days: int = 30
    quarantine_days: int = 30

    @classmethod
    def of(cls, db: Database, settings: Settings) -> "HealthActivities":
        """With the settings' numbers."""
        return cls(
            db,
            timedelta(minutes=settings.offline_minutes),
            settings.heartbeat_days,
            settings.shadow_history_days,
            settings.quarantine_days,
        )

    @activity.defn
    async def sweep_offline(self, asked: SweepOfflineInput) -> SweepOfflineResult:
        """Mark who has fallen silent and take back who is heard, in one transaction.

        Idempotent: who is marked is not marked again, and one alert for each rule and subject stands.
        """
        async with self.db.pool.connection() as connection:
            sweep = await sweep_offline(connection, self.offline_after)
        OFFLINE.inc(sweep.offline)
        BACK.inc(sweep.back)
        LISTENING.set(sweep.listening)
        for text in sweep.alerts:
            log.warning("alert", text=text)
        said = f"{sweep.offline} fell silent, {sweep.back} back"
        return SweepOfflineResult(
            listening=sweep.listening,
            offline=sweep.offline,
            back=sweep.back,
            alerts=sweep.alerts,
            reason=said if sweep.listening else f"{said}; {sweep.deaf}",
        )

    @activity.defn
    async def keep_history(self, asked: KeepHistoryInput) -> KeepHistoryResult:
        """Make the partitions of the next days, drop those that are old, and delete what else is.

        Idempotent: what was made and dropped in an attempt that died stays so, and the next finds it.
        """
        kept = (Kept("heartbeats", self.heartbeat_days), Kept("shadow_history", self.shadow_history_days))
        turned = await turn_partitions(self.db, kept)
        deleted = await delete_old(self.db, timedelta(days=self.quarantine_days))
        if turned.deleted:
            deleted["strays"] = turned.deleted
        said = [
            f"made {len(turned.made)} partitions, dropped {len(turned.dropped)}",
            *([f"moved {turned.moved} rows into the partition of their day"] if turned.moved else []),
            *(f"deleted {count} of {table}" for table, count in deleted.items()),
        ]
        if turned.made or turned.dropped or deleted:
            log.info("history kept", made=turned.made, dropped=turned.dropped, deleted=deleted)
        return KeepHistoryResult(
            made=turned.made, dropped=turned.dropped, moved=turned.moved, deleted=deleted, reason="; ".join(said)
        )
