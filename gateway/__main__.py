"""`python -m gateway`: the devices' door. Exactly one is active; others stand by and take over when it is gone.

The active one holds an advisory lock of PostgreSQL in a session of its own. When that session ends, for whatever reason,
it stops serving at once and exits; a standby that gets the lock connects to the broker under the same client id, which
also ends what may be left of the former session.
"""

import argparse
import asyncio
import gc
import signal
import sys

import psycopg
import structlog
import uvloop

from firmware.keys import load_private_key
from gateway.diagnostics import RebootSigner, order_reboots
from gateway.documents import Documents
from gateway.pulse import send_pulses
from gateway.service import Gateway
from models.errors import InvalidInputError, TidegateError, UnavailableError
from models.protocol import REQUEST_FILTERS
from models.settings import Settings
from observe import logs, metrics
from observe.stopping import pause
from store.engine import Database
from transport.connection import Connection

log = structlog.get_logger("gateway")

ACTIVE_LOCK = 7311461
CLIENT_ID = "engine@gateway"
"""The @ keeps it apart from every device: a device's client id is its thing name, and none has one. (nats-server refuses
a dot in a client id.)"""
STANDBY_POLL_SECONDS = 0.5
LOCK_CHECK_SECONDS = 2.0


async def hold_lock(settings: Settings, stop: asyncio.Event) -> psycopg.AsyncConnection | None:
    """Wait until this process is the active gateway; None when it was stopped before."""
    assert settings.database_url
    connection = await psycopg.AsyncConnection.connect(settings.database_url, autocommit=True)
    told = False
    while not stop.is_set():
        row = await (await connection.execute("SELECT pg_try_advisory_lock(%s)", (ACTIVE_LOCK,))).fetchone()
        if row and row[0]:
            return connection
        if not told:
            log.info("standing by: another gateway is active")
            told = True
        await pause(stop, STANDBY_POLL_SECONDS)
    await connection.close()
    return None


async def watch_lock(connection: psycopg.AsyncConnection, stop: asyncio.Event) -> None:
    """Raise UnavailableError as soon as the session that holds the lock is gone."""
    while not stop.is_set():
        try:
            await connection.execute("SELECT 1")
        except psycopg.OperationalError as error:
            raise UnavailableError("lost the session that makes this gateway the active one; exiting") from error
        await pause(stop, LOCK_CHECK_SECONDS)


async def open_patiently(connection: Connection, settings: Settings, gateway: Gateway, stop: asyncio.Event) -> None:
    """Connect to the broker, however long it stays away."""
    while not stop.is_set():
        try:
            await connection.open(settings, REQUEST_FILTERS, gateway.receive)
            return
        except UnavailableError as error:
            log.warning("waiting for the MQTT broker", reason=str(error))
            await pause(stop, STANDBY_POLL_SECONDS)


def collect_rarely() -> None:
    """Look for cycles seldom: messages make thousands of objects that wait for their batch and are in none.

    Python looks after every 700 new objects, which is every 140 messages, and took a quarter of the time of receiving.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


async def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT."""
    if not settings.database_url or not settings.artifact_url or not settings.order_key:
        raise InvalidInputError(
            "the gateway needs TIDEGATE_DATABASE_URL, TIDEGATE_ARTIFACT_URL and TIDEGATE_ORDER_KEY, or the state "
            "directory of a running 'starter.py up'"
        )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    port = metrics.serve(settings.metrics_host, settings.gateway_metrics_port)
    db = Database(settings.database_url, max_size=4)
    await db.open(timeout=30)
    lock = await hold_lock(settings, stop)
    if lock is not None:
        order_key = load_private_key(settings.order_key)
        documents = Documents(settings.artifact_url, order_key, settings.order_lifetime_seconds)
        connection = Connection(CLIENT_ID, keep_session=True)
        gateway = Gateway(db, connection, documents, settings)
        await open_patiently(connection, settings, gateway, stop)
        collect_rarely()
        metrics.mark_ready("gateway")
        log.info("ready", metrics_port=port, broker=settings.mqtt_url)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(gateway.run(stop))
                group.create_task(watch_lock(lock, stop))
                group.create_task(send_pulses(connection, gateway.name, stop))
                signer = RebootSigner(order_key)
                group.create_task(order_reboots(settings.database_url, signer, connection.publish, stop))
        finally:
            await connection.close()
            await lock.close()
    await db.close()
    log.info("stopped")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m gateway",
        description="The devices' door: MQTT to PostgreSQL in batches. Settings come from TIDEGATE_... variables and "
        "from the state directory of a running stack (docs/reference.md).",
    )
    parser.parse_args()
    settings = Settings().with_endpoints()
    logs.configure("gateway", settings)
    try:
        uvloop.run(serve(settings))
    except* TidegateError as errors:
        for error in errors.exceptions:
            log.error("gateway stopped", error=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
