"""`python worker.py`: runs workflows and activities until SIGTERM; add more of them to scale.

Three task queues: workflows with short activities, dispatch (drivers of waves), artifacts (CPU-bound). All that matters
is in PostgreSQL and Temporal: a worker may be killed at any moment.
"""

import argparse
import asyncio
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from datetime import timedelta
from os import getpid
from typing import TypeVar

import structlog
from temporalio.client import Client
from temporalio.worker import Worker

from activities.artifact_store import ArtifactStore
from activities.artifacts import ArtifactActivities
from activities.rollouts import RolloutActivities
from models.errors import InvalidInputError, TidegateError, UnavailableError
from models.settings import Settings
from observe import logs, metrics
from store.deltas import DeltaStore
from store.engine import Database
from store.rollouts import RolloutStore
from transport.publisher import Publisher
from workflows import options
from workflows.client import connect, register_search_attributes
from workflows.rollout import RolloutWorkflow
from workflows.sandbox import runner
from workflows.wave import WaveWorkflow

log = structlog.get_logger("worker")

GRACE = timedelta(seconds=10)
"""Time for activities to end after SIGTERM; drivers end within a beat."""
RETRY_SECONDS = 1.0
DRIVERS = 200
"""Waves driven at one time by one worker: each is one coroutine that mostly waits."""
SHORT_ACTIVITIES = 50
BUILDERS = 1
"""Rollouts whose deltas are built at one time: a build takes a core and 17 times the image in memory."""

T = TypeVar("T")


async def _patiently(what: str, attempt: Callable[[], Awaitable[T]], stop: asyncio.Event) -> T | None:
    """Try until it works; None when stopped before."""
    while not stop.is_set():
        try:
            return await attempt()
        except UnavailableError as error:
            log.warning(f"waiting for {what}", reason=str(error))
            try:
                await asyncio.wait_for(stop.wait(), RETRY_SECONDS)
            except TimeoutError:
                continue
    return None


def workers(client: Client, rollouts: RolloutActivities, artifacts: ArtifactActivities) -> list[Worker]:
    """One worker per task queue."""
    identity = f"{socket.gethostname()}/{getpid()}"
    light = Worker(
        client,
        task_queue=options.TASK_QUEUE,
        workflows=[RolloutWorkflow, WaveWorkflow],
        activities=[
            rollouts.plan_rollout,
            rollouts.write_plain_document,
            rollouts.close_wave,
            rollouts.check_promotable,
            rollouts.set_job_status,
            rollouts.adjust_pace,
        ],
        workflow_runner=runner(),
        max_concurrent_activities=SHORT_ACTIVITIES,
        graceful_shutdown_timeout=GRACE,
        identity=identity,
    )
    dispatch = Worker(
        client,
        task_queue=options.DISPATCH_QUEUE,
        activities=[rollouts.drive_wave, rollouts.finish_rollout],
        max_concurrent_activities=DRIVERS,
        graceful_shutdown_timeout=GRACE,
        identity=identity,
    )
    cpu = Worker(
        client,
        task_queue=options.ARTIFACTS_QUEUE,
        activities=[artifacts.build_delta, artifacts.prepare_artifacts],
        max_concurrent_activities=BUILDERS,
        graceful_shutdown_timeout=GRACE,
        identity=identity,
    )
    return [light, dispatch, cpu]


async def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT."""
    if not settings.database_url or not settings.temporal_address:
        raise InvalidInputError(
            "the worker needs TIDEGATE_DATABASE_URL, TIDEGATE_TEMPORAL_ADDRESS, TIDEGATE_MQTT_URL and "
            "TIDEGATE_ARTIFACT_STORE, or the state directory of a running 'starter.py up'"
        )
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    port = metrics.serve(settings.metrics_host, settings.worker_metrics_port)
    address, namespace = settings.temporal_address, settings.temporal_namespace
    client = await _patiently("Temporal", lambda: connect(address, namespace), stop)
    db = await _patiently("PostgreSQL", lambda: _open(settings), stop)
    publisher = await _patiently("the MQTT broker", lambda: Publisher.connect(settings), stop)
    if client and db and publisher:
        await register_search_attributes(client)
        store = RolloutStore(db)
        running = workers(
            client,
            RolloutActivities(store, publisher),
            ArtifactActivities(ArtifactStore.of(settings), DeltaStore(db), store),
        )
        async with asyncio.TaskGroup() as group:
            for worker in running:
                group.create_task(worker.run())
            metrics.mark_ready("worker")
            log.info("ready", metrics_port=port, temporal=address, queues=[worker.task_queue for worker in running])
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
    db = Database(str(settings.database_url), max_size=50)
    await db.open()
    return db


def main() -> None:
    """Entry point."""
    argparse.ArgumentParser(
        prog="python worker.py",
        description="Runs Tidegate's workflows and activities. Settings come from TIDEGATE_... variables and from the "
        "state directory of a running stack (docs/reference.md).",
    ).parse_args()
    settings = Settings().with_endpoints()
    logs.configure("worker", settings)
    try:
        asyncio.run(serve(settings))
    except TidegateError as error:
        log.error("worker stopped", error=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
