"""`python worker.py`: runs workflows and activities until SIGTERM; add more of them to scale.

Three task queues: workflows with short activities; dispatch, for activities that last as long as a wave; artifacts, whose
CPU-bound work runs in processes of its own (activities.delta_builder). A fourth where it is given the keys of the
certificate authorities (TIDEGATE_CA_DIR): signing. A fifth where it has the channels that alerts are told to
(TIDEGATE_NOTIFY_FILE). All that matters is in PostgreSQL and Temporal: a
worker may be killed at any moment, and another one goes on within the heartbeat timeout.

It waits for what is not there yet (Temporal, PostgreSQL, the broker), saying so, and registers the search attributes.
"""

import argparse
import asyncio
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import structlog
from temporalio.client import Client
from temporalio.runtime import LoggingConfig, PrometheusConfig, Runtime, TelemetryConfig, TelemetryFilter
from temporalio.service import RPCError
from temporalio.worker import Worker

from activities.artifact_store import ArtifactStore
from activities.artifacts import ArtifactActivities
from activities.authorities import AuthorityActivities, AuthorityWatch
from activities.cache import CacheRelay
from activities.channels import load_channels
from activities.configuration import ConfigurationActivities
from activities.decommission import DecommissionActivities
from activities.diagnostics import DiagnosticActivities
from activities.enrolment_hook import EnrolmentHook
from activities.fleet_jobs import FleetJobActivities
from activities.fleet_rotation import FleetRotationActivities
from activities.health import HealthActivities
from activities.notification_relay import NotificationRelay
from activities.notifying import NotifyingActivities
from activities.provisioning import IssuingActivities, ProvisioningActivities
from activities.relay import OutboxRelay
from activities.rollouts import RolloutActivities
from activities.rotation import RotationActivities
from activities.shadow import ShadowActivities
from activities.signing import CertificateSigner
from models.alerting import NotifyInput
from models.errors import InvalidInputError, TidegateError, UnavailableError
from models.lifecycle import RotateFleetInput
from models.settings import Settings
from observe import logs, metrics
from pki.signer import FileKeyStore, key_store
from store.configuring import ConfiguringStore
from store.decommission import DecommissionStore
from store.deltas import DeltaStore
from store.diagnostics import DiagnosticStore
from store.engine import Database
from store.fleetjobs import FleetJobStore
from store.notifications import NotificationStore
from store.provisioning import ProvisioningStore
from store.rollouts import RolloutStore
from store.rotation import RotationStore
from store.shadow_syncing import ShadowSyncStore
from transport.publisher import Publisher
from transport.retained import RetainedMessages
from workflows import options
from workflows.client import connect, ensure_schedules, register_search_attributes
from workflows.configuration import ConfigurationWorkflow
from workflows.decommission import DecommissionWorkflow
from workflows.diagnostic import DiagnosticWorkflow
from workflows.fleet_job import FleetJobWorkflow
from workflows.fleet_rotation import FleetRotationWorkflow
from workflows.lifecycle_client import ROTATION_SCHEDULE, TemporalFlows, ensure_rotation_schedule
from workflows.notification import NotificationWorkflow
from workflows.notification_client import start_notification
from workflows.offline import OfflineSweepWorkflow
from workflows.provisioning import ProvisioningWorkflow
from workflows.reissue import ReissueCertificateWorkflow
from workflows.retention import RetentionWorkflow
from workflows.rollout import RolloutWorkflow
from workflows.rotation import CertificateRotationWorkflow
from workflows.sandbox import runner
from workflows.shadow_sync import ShadowSyncWorkflow
from workflows.upkeep import CrlUpkeepWorkflow
from workflows.wave import WaveWorkflow

log = structlog.get_logger("worker")

GRACE = timedelta(seconds=10)
"""Time for activities to end after SIGTERM; drivers end within a beat."""

STICKY = timedelta(seconds=2)
"""How long a workflow's next task waits for the worker that has it in memory before any may take it: after a kill -9
this is the delay. A replay of a few hundred events is cheap."""

BEAT_THROTTLE = timedelta(seconds=2)
"""Heartbeats reach the server at most this often, and with them a driver learns that it was cancelled."""

RETRY_SECONDS = 1.0
DRIVERS = 200
"""Waves driven at one time by one worker: each is one coroutine that mostly waits."""

SHORT_ACTIVITIES = 50
BUILDERS = 1
"""Rollouts whose deltas are built at one time: a build takes a core and 17 times the image in memory."""

TELLERS = 20
"""Attempts to tell somebody at one time: each waits for a receiver, and nobody else."""

SIGNERS = 20
"""Activities that sign at one time: each has a transaction open while the signer answers."""

DATABASE_CONNECTIONS = 50

T = TypeVar("T")


async def _patiently(what: str, attempt: Callable[[], Awaitable[T]], stop: asyncio.Event) -> T | None:
    """Try until it works; None when stopped before. Says what it waits for once, and again when the reason changes."""
    said = ""
    while not stop.is_set():
        try:
            return await attempt()
        except UnavailableError as error:
            if str(error) != said:
                log.warning(f"waiting for {what}", reason=str(error))
            said = str(error)
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), RETRY_SECONDS)
    return None


@dataclass(frozen=True)
class Lifecycle:
    """The activities of devices' lives."""

    configuration: ConfigurationActivities
    rotation: RotationActivities
    decommission: DecommissionActivities
    fleet: FleetRotationActivities
    shadow: ShadowActivities
    diagnostics: DiagnosticActivities

    @classmethod
    def of(cls, db: Database, client: Client, publisher: Publisher, settings: Settings) -> "Lifecycle":
        """With their collaborators."""
        certificates, flows = RotationStore(db), TemporalFlows(client)
        return cls(
            ConfigurationActivities(ConfiguringStore(db), publisher),
            RotationActivities(certificates, publisher),
            DecommissionActivities(DecommissionStore(db), flows, publisher, RetainedMessages(settings)),
            FleetRotationActivities(certificates, flows),
            ShadowActivities(ShadowSyncStore(db), publisher),
            DiagnosticActivities(DiagnosticStore(db), publisher),
        )

    @property
    def short(self) -> list[Callable[..., Any]]:
        """Of one transaction, or a few seconds at most."""
        configuration, rotation, decommission = self.configuration, self.rotation, self.decommission
        diagnostics = self.diagnostics
        return [
            configuration.want_configuration,
            configuration.hint_configuration,
            configuration.end_configuration,
            rotation.look_at_certificates,
            rotation.ask_for_rotation,
            rotation.settle_rotation,
            rotation.give_up_rotation,
            rotation.revert_rotation,
            self.shadow.want_shadow,
            self.shadow.check_shadow,
            self.shadow.end_shadow,
            decommission.begin_decommission,
            decommission.stop_flows,
            decommission.ask_to_wipe,
            decommission.retire_device,
            decommission.clear_retained,
            decommission.alert_retained_left,
            decommission.end_decommission,
            diagnostics.open_question,
            diagnostics.publish_question,
            diagnostics.end_question,
            diagnostics.look_at_boot,
        ]

    @property
    def lasting(self) -> list[Callable[..., Any]]:
        """Those that wait or pace, and beat."""
        return [self.decommission.await_brokers, self.fleet.rotate_fleet]


LIFECYCLE_WORKFLOWS: list[type] = [
    ConfigurationWorkflow,
    CertificateRotationWorkflow,
    DecommissionWorkflow,
    FleetRotationWorkflow,
    ShadowSyncWorkflow,
    DiagnosticWorkflow,
]
HEALTH_WORKFLOWS: list[type] = [OfflineSweepWorkflow, RetentionWorkflow]


def workers(
    client: Client,
    rollouts: RolloutActivities,
    artifacts: ArtifactActivities,
    watch: AuthorityWatch,
    provisioning: ProvisioningActivities,
    lifecycle: Lifecycle,
    health: HealthActivities,
    jobs: FleetJobActivities,
    authorities: AuthorityActivities | None = None,
    issuing: IssuingActivities | None = None,
    notifying: NotifyingActivities | None = None,
) -> list[Worker]:
    """One worker per task queue; that of the CA only where there are keys, that of notifications where channels are."""
    common: dict[str, Any] = {
        "identity": f"{socket.gethostname()}/{os.getpid()}",
        "graceful_shutdown_timeout": GRACE,
    }
    light = Worker(
        client,
        task_queue=options.TASK_QUEUE,
        workflows=[
            RolloutWorkflow,
            WaveWorkflow,
            FleetJobWorkflow,
            ProvisioningWorkflow,
            ReissueCertificateWorkflow,
            CrlUpkeepWorkflow,
            NotificationWorkflow,
            *LIFECYCLE_WORKFLOWS,
            *HEALTH_WORKFLOWS,
        ],
        activities=[
            rollouts.plan_rollout,
            jobs.plan_fleet_job,
            rollouts.write_plain_document,
            rollouts.close_wave,
            rollouts.check_promotable,
            rollouts.set_job_status,
            rollouts.adjust_pace,
            watch.check_authorities,
            provisioning.check_enrolment,
            provisioning.refuse_enrolment,
            provisioning.mark_configured,
            provisioning.activate_device,
            provisioning.undo_provisioning,
            health.sweep_offline,
            health.keep_history,
            *lifecycle.short,
        ],
        workflow_runner=runner(),
        max_concurrent_activities=SHORT_ACTIVITIES,
        sticky_queue_schedule_to_start_timeout=STICKY,
        **common,
    )
    dispatch = Worker(
        client,
        task_queue=options.DISPATCH_QUEUE,
        activities=[rollouts.drive_wave, rollouts.finish_rollout, rollouts.cancel_running, *lifecycle.lasting],
        max_concurrent_activities=DRIVERS,
        max_heartbeat_throttle_interval=BEAT_THROTTLE,
        **common,
    )
    cpu = Worker(
        client,
        task_queue=options.ARTIFACTS_QUEUE,
        activities=[artifacts.build_delta, artifacts.prepare_artifacts],
        max_concurrent_activities=BUILDERS,
        **common,
    )
    found = [light, dispatch, cpu]
    if authorities is not None and issuing is not None:
        signing = Worker(
            client,
            task_queue=options.CA_QUEUE,
            activities=[authorities.publish_crls, issuing.issue_certificate, issuing.reissue_certificate],
            max_concurrent_activities=SIGNERS,
            **common,
        )
        found.append(signing)
    return found if notifying is None else [*found, notify_worker(client, notifying, **common)]


def notify_worker(client: Client, notifying: NotifyingActivities, **common: Any) -> Worker:
    """Tells people of alerts."""
    return Worker(
        client,
        task_queue=options.NOTIFY_QUEUE,
        activities=[notifying.choose_channels, notifying.deliver_notification],
        max_concurrent_activities=TELLERS,
        **common,
    )


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
    client = await _patiently("Temporal", lambda: connect(address, namespace, runtime=runtime), stop)
    db = await _patiently("PostgreSQL", lambda: _open(settings), stop)
    publisher = await _patiently("the MQTT broker", lambda: Publisher.connect(settings), stop)
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
