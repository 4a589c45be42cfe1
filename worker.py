"""`python worker.py`: runs workflows and activities until SIGTERM; add more of them to scale.

What runs where is in workers/queues.py. Beside it run the relays of the outbox, of notifications, and of the lookup cache.
It signs where it is given the keys of the certificate authorities (TIDEGATE_CA_DIR), and tells people of alerts where it
has the channels (TIDEGATE_NOTIFY_FILE). All that matters is in PostgreSQL and Temporal: a worker may be killed at any
moment, and another one goes on within the heartbeat timeout.

It waits for what is not there yet (Temporal, PostgreSQL, the broker), saying so, and registers the search attributes.
"""

import argparse
import asyncio
import os
import signal
import socket
import sys
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

import structlog
from temporalio.client import Client
from temporalio.runtime import LoggingConfig, PrometheusConfig, Runtime, TelemetryConfig, TelemetryFilter
from temporalio.service import RPCError

from activities.artifact_store import ArtifactStore
from activities.artifacts import ArtifactActivities
from activities.authorities import AuthorityActivities, AuthorityWatch
from activities.cache import CacheRelay
from activities.channels import load_channels
from activities.enrolment_hook import EnrolmentHook
from activities.fleet_jobs import FleetJobActivities
from activities.health import HealthActivities
from activities.notification_relay import NotificationRelay
from activities.notifying import NotifyingActivities
from activities.provisioning import IssuingActivities, ProvisioningActivities
from activities.relay import OutboxRelay
from activities.rollouts import RolloutActivities
from activities.signing import CertificateSigner
from models.alerting import NotifyInput
from models.errors import InvalidInputError, TidegateError, UnavailableError
from models.lifecycle import RotateFleetInput
from models.settings import Settings
from observe import logs, metrics
from observe.stopping import patiently
from pki.signer import FileKeyStore, key_store
from store.deltas import DeltaStore
from store.engine import Database
from store.fleetjobs import FleetJobStore
from store.notifications import NotificationStore
from store.provisioning import ProvisioningStore
from store.rollouts import RolloutStore
from transport.publisher import Publisher
from workers.lifecycle import Lifecycle
from workers.queues import workers
from workflows import options
from workflows.client import connect, ensure_schedules, register_search_attributes
from workflows.lifecycle_client import ROTATION_SCHEDULE, TemporalFlows, ensure_rotation_schedule
from workflows.notification_client import start_notification

log = structlog.get_logger("worker")

DATABASE_CONNECTIONS = 50


def _runtime(settings: Settings) -> tuple[Runtime, int]:
    """Temporal's runtime with a Prometheus endpoint of its own, and the port of that."""
    port = settings.worker_temporal_metrics_port or _free_port(settings.metrics_host)
    prometheus = PrometheusConfig(f"{settings.metrics_host}:{port}", durations_as_seconds=True)
    quiet = LoggingConfig(filter=TelemetryFilter(core_level="WARN", other_level="ERROR"))
    return Runtime(telemetry=TelemetryConfig(logging=quiet, metrics=prometheus)), port


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


async def _register(client: Client) -> None:
    """Search attributes, where the server lets us; where it does not, its operator adds them (docs/operations.md)."""
    try:
        added = await register_search_attributes(client)
    except RPCError as error:
        names = ", ".join(key.name for key in options.SEARCH_ATTRIBUTES)
        log.warning("cannot register search attributes; they must exist as keywords", names=names, reason=str(error))
    else:
        if added:
            log.info("registered search attributes", names=", ".join(added))


def _keys(settings: Settings) -> FileKeyStore | None:
    """The keys of the authorities, where this worker is given them. Raises where it is given half of what that takes."""
    return key_store(settings) if settings.ca_dir is not None else None


def _channels(settings: Settings) -> NotifyingActivities | None:
    """What tells people of alerts. Raises where there is a notify file and it cannot be used."""
    return NotifyingActivities(load_channels(settings.notify_file)) if settings.notify_file is not None else None


def notification_relay(db: Database, client: Client, notifying: NotifyingActivities | None) -> NotificationRelay:
    """Hands changes of alerts to workflows; where nobody is to be told, to nobody."""

    async def start(told: NotifyInput) -> None:
        await start_notification(client, told)

    return NotificationRelay(NotificationStore(db), start if notifying is not None else None)


async def _schedule(client: Client, settings: Settings, *, signs: bool) -> None:
    """Upkeep by the clock; of revocation lists where this worker signs, because without a CA there is nothing to keep."""
    sweep = RotateFleetInput(overlap=timedelta(hours=settings.rotation_overlap_hours))
    try:
        made = [ROTATION_SCHEDULE] if await ensure_rotation_schedule(client, sweep) else []
        made += await ensure_schedules(client, timedelta(hours=settings.crl_hours) if signs else None)
    except RPCError as error:
        log.warning(
            "cannot make schedules; lists are signed on revocations alone, no rotation starts, nobody is found offline, "
            "history is not kept by days",
            reason=str(error),
        )
    else:
        if made:
            log.info("made schedules", names=", ".join(made))


async def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT."""
    if not settings.database_url or not settings.temporal_address:
        raise InvalidInputError(
            "the worker needs TIDEGATE_DATABASE_URL, TIDEGATE_TEMPORAL_ADDRESS, TIDEGATE_MQTT_URL and "
            "TIDEGATE_ARTIFACT_STORE, or the state directory of a running 'starter.py up'"
        )
    keys, notifying = _keys(settings), _channels(settings)
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    port = metrics.serve(settings.metrics_host, settings.worker_metrics_port)
    address, namespace = settings.temporal_address, settings.temporal_namespace
    runtime, temporal_port = _runtime(settings)
    client = await patiently(
        log, "Temporal", lambda: connect(address, namespace, runtime=runtime), stop, UnavailableError
    )
    db = await patiently(log, "PostgreSQL", lambda: _open(settings), stop, UnavailableError)
    publisher = await patiently(log, "the MQTT broker", lambda: Publisher.connect(settings), stop, UnavailableError)
    if client and db and publisher:
        await _register(client)
        store, authorities, issuing = RolloutStore(db), None, None
        if keys is not None:
            authorities = AuthorityActivities(db, keys, timedelta(hours=settings.crl_hours))
            signer = CertificateSigner(db, keys, days=settings.certificate_days)
            issuing = IssuingActivities(ProvisioningStore(db), signer)
        running = workers(
            client,
            RolloutActivities(store, publisher, TemporalFlows(client)),
            ArtifactActivities(ArtifactStore.of(settings), DeltaStore(db), store),
            AuthorityWatch(db),
            ProvisioningActivities(ProvisioningStore(db), EnrolmentHook(settings.enrolment_hook_url)),
            Lifecycle.of(db, client, publisher, settings),
            HealthActivities.of(db, settings),
            FleetJobActivities(FleetJobStore(db)),
            authorities,
            issuing,
            notifying,
        )
        await _schedule(client, settings, signs=keys is not None)
        cache = CacheRelay(db.url, settings.redis_url) if settings.redis_url else None
        async with asyncio.TaskGroup() as group:
            for worker in running:
                group.create_task(worker.run())
            group.create_task(OutboxRelay(db, client, options.DEVICE_EVENT).run(stop))
            group.create_task(notification_relay(db, client, notifying).run(stop))
            if cache is not None:
                group.create_task(cache.run(stop))
            metrics.mark_ready("worker")
            log.info(
                "ready",
                metrics_port=port,
                temporal_metrics_port=temporal_port,
                temporal=address,
                queues=[worker.task_queue for worker in running],
            )
            await stop.wait()
            metrics.mark_ready("worker", False)
            for worker in running:
                group.create_task(worker.shutdown())
    if publisher:
        await publisher.close()
    if db:
        await db.close()
    log.info("stopped")


async def _open(settings: Settings) -> Database:
    db = Database(str(settings.database_url), max_size=DATABASE_CONNECTIONS)
    await db.open()
    return db


def main() -> NoReturn:
    """Entry point."""
    argparse.ArgumentParser(
        prog="python worker.py",
        description="Runs Tidegate's workflows and activities. Settings come from TIDEGATE_... variables and from the "
        "state directory of a running stack (docs/reference.md).",
    ).parse_args()
    settings = Settings().with_endpoints()
    logs.configure("worker", settings)
    status = 0
    try:
        asyncio.run(serve(settings))
    except TidegateError as error:
        log.error("worker stopped", error=str(error))
        status = 1
    except Exception:
        log.exception("worker stopped")
        status = 1
    # Not sys.exit: threads of Temporal's client can crash an interpreter that shuts down, and the exit status with it
    # (temporalio/sdk-python issue 300). Everything that has to be closed is closed.
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
