"""The worker as a process: waits for its servers, says that it is ready, ends in good order, and is replaced."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.testing import WorkflowEnvironment

from activities.authorities import ensure_authorities
from firmware.keys import generate_private_key
from models.rollout import StartRolloutInput
from pki.signer import FileKeyStore, make_passphrase, read_passphrase
from store.authorities import AuthorityStore
from store.engine import Database
from store.rollouts import RolloutStore
from tests.conftest import Broker, free_port
from tests.integration.notification_setup import Receiver, channels, hot, taken
from tests.integration.rollout_setup import add_devices, add_release, specification
from tests.integration.test_gateway_identity import rows, until
from tests.pki_setup import now
from tests.temporal_server import BINARIES
from workflows.client import connect, start_rollout

ROOT = Path(__file__).parent.parent.parent
READY_SECONDS = 60.0


class WorkerProcess:
    """`python worker.py`, and what it logs."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.log = folder / f"worker-{time.monotonic_ns()}.log"
        environment = {f"TIDEGATE_{name.upper()}": str(value) for name, value in settings.items()}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "worker.py")],
                stdout=log,
                stderr=log,
                cwd=folder,
                env={**os.environ, "TIDEGATE_STATE_DIR": str(folder), "TIDEGATE_LOG_FORMAT": "json", **environment},
            )

    async def until(self, pattern: str) -> re.Match[str]:
        """Wait until the log has a line."""
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if found := re.search(pattern, self.log.read_text()):
                return found
            assert self.process.poll() is None, f"the worker ended: {self.log.read_text()}"
            await asyncio.sleep(0.05)
        pytest.fail(f"{pattern!r} was not logged: {self.log.read_text()}")

    async def stop(self, number: int = signal.SIGTERM) -> int:
        """End it, and return its exit status."""
        self.process.send_signal(number)
        return await asyncio.to_thread(self.process.wait, 20)


@pytest.fixture
def started() -> Iterator[list[WorkerProcess]]:
    """Workers that are ended with the test, however it ends."""
    processes: list[WorkerProcess] = []
    yield processes
    for worker in processes:
        if worker.process.poll() is None:
            worker.process.kill()
            worker.process.wait(10)


async def test_a_worker_waits_for_its_servers_drives_a_wave_ends_in_good_order_and_is_replaced(
    db: Database, database_url: str, broker: Broker, tmp_path: Path, started: list[WorkerProcess]
) -> None:
    port = free_port()
    settings = {
        "temporal_address": f"127.0.0.1:{port}",
        "database_url": database_url,
        "mqtt_url": f"mqtt://{broker.host}:{broker.port}",
        "artifact_store": tmp_path.as_uri(),
        "redis_url": f"redis://127.0.0.1:{free_port()}/0",  # nobody is there, which keeps a worker from nothing
    }
    started.append(WorkerProcess(tmp_path, **settings))
    await started[0].until(rf"cannot connect to Temporal at 127\.0\.0\.1:{port}")

    async with await WorkflowEnvironment.start_local(
        port=port,
        data_converter=pydantic_data_converter,
        dev_server_existing_path=str(BINARIES / "temporal"),
        dev_server_log_level="error",
    ):
        ready = await started[0].until(r'"metrics_port": (\d+), "temporal_metrics_port": (\d+).*"event": "ready"')
        await check_metrics(int(ready[1]), int(ready[2]))
        await started[0].until("the lookup cache is not invalidated|Redis does not answer")

        client = await connect(settings["temporal_address"])
        await add_devices(db, 5)
        await add_release(db, generate_private_key())
        await start_rollout(client, StartRolloutInput(spec=specification()))
        store = RolloutStore(db)
        await opened(store)

        began = time.monotonic()
        assert await started[0].stop() == 0
        assert time.monotonic() - began < 5, "a driver kept the worker from ending"
        assert '"event": "stopped"' in started[0].log.read_text()

        started.append(WorkerProcess(tmp_path, **settings))
        await started[1].until('"event": "ready"')
        pending = await driver_on(client, started[1].process.pid)
        assert pending, "the second worker did not take the wave up"
        assert await started[1].stop(signal.SIGINT) == 0


@pytest.mark.timeout(240)
async def test_a_worker_with_a_notify_file_tells_and_after_its_death_the_next_one_does(
    db: Database, database_url: str, broker: Broker, receiver: Receiver, tmp_path: Path, started: list[WorkerProcess]
) -> None:
    async with await WorkflowEnvironment.start_local(
        data_converter=pydantic_data_converter,
        dev_server_existing_path=str(BINARIES / "temporal"),
        dev_server_log_level="error",
    ) as environment:
        settings = {
            "temporal_address": environment.client.service_client.config.target_host,
            "database_url": database_url,
            "mqtt_url": f"mqtt://{broker.host}:{broker.port}",
            "artifact_store": tmp_path.as_uri(),
            "notify_file": channels(tmp_path, receiver),
        }
        started.append(WorkerProcess(tmp_path, **settings))
        await started[0].until('tidegate-notify".*"event": "ready"')
        await hot(db, 3)
        await until(lambda: rows(db, "SELECT FROM alert_notifications WHERE digest <> ''"), 60)
        await started[0].stop(signal.SIGKILL)
        started.append(WorkerProcess(tmp_path, **settings))
        told = await taken(receiver, 1, 120)
        assert told[0]["data"]["count"] == 3 and told[0]["type"] == "alert.opened"
        assert await started[1].stop() == 0


async def test_a_worker_with_the_keys_of_the_authorities_signs_and_makes_the_schedules(
    db: Database, database_url: str, broker: Broker, tmp_path: Path, started: list[WorkerProcess]
) -> None:
    passphrase = tmp_path / "passphrase"
    make_passphrase(passphrase)
    keys = FileKeyStore(tmp_path / "ca", read_passphrase(passphrase))
    await ensure_authorities(db, keys, now() - timedelta(days=30), "alice")
    async with await WorkflowEnvironment.start_local(
        data_converter=pydantic_data_converter,
        dev_server_existing_path=str(BINARIES / "temporal"),
        dev_server_log_level="error",
    ) as environment:
        settings = {
            "temporal_address": environment.client.service_client.config.target_host,
            "database_url": database_url,
            "mqtt_url": f"mqtt://{broker.host}:{broker.port}",
            "artifact_store": tmp_path.as_uri(),
            "ca_dir": tmp_path / "ca",
            "ca_passphrase_file": passphrase,
        }
        started.append(WorkerProcess(tmp_path, **settings))
        await started[0].until(
            r'"names": "tidegate-rotation, tidegate-offline, tidegate-retention, tidegate-crl".*"event": "made schedules"'
        )
        await started[0].until(r'tidegate-ca.*"event": "ready"')
        await started[0].until(r'"number": 2.*"event": "revocation list signed"')
        assert await started[0].stop() == 0
    assert [crl.number for crl in await AuthorityStore(db).newest_crls()] == [2]


async def test_a_worker_whose_passphrase_is_missing_says_so_and_ends(
    database_url: str, broker: Broker, tmp_path: Path, started: list[WorkerProcess]
) -> None:
    settings = {"temporal_address": "127.0.0.1:1", "database_url": database_url, "ca_dir": tmp_path}
    started.append(WorkerProcess(tmp_path, **settings))
    assert await asyncio.to_thread(started[0].process.wait, READY_SECONDS) == 1
    assert "TIDEGATE_CA_PASSPHRASE_FILE" in started[0].log.read_text()


async def check_metrics(ours: int, temporals: int) -> None:
    async with httpx.AsyncClient(trust_env=False) as http:
        text = (await http.get(f"http://127.0.0.1:{ours}/metrics")).text
        assert 'tidegate_ready{process="worker"} 1.0' in text
        text = (await http.get(f"http://127.0.0.1:{temporals}/metrics")).text
        assert "temporal_worker_task_slots_available" in text


async def opened(store: RolloutStore) -> None:
    async with asyncio.timeout(READY_SECONDS):
        while not any(view.waves[0].opened_at for view in await store.list_rollouts()):
            await asyncio.sleep(0.05)


async def driver_on(client: Any, pid: int) -> bool:
    """Whether the wave's driver runs in this process, once Temporal knows."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        described = await client.get_workflow_handle("rollout:motor-1.3.0/wave:1").describe()
        for activity in described.raw_description.pending_activities:
            if activity.last_worker_identity.endswith(f"/{pid}"):
                return True
        await asyncio.sleep(0.1)
    return False


async def test_a_worker_without_addresses_says_what_it_needs(tmp_path: Path, started: list[WorkerProcess]) -> None:
    started.append(WorkerProcess(tmp_path))
    assert await asyncio.to_thread(started[0].process.wait, 20) == 1
    assert "the worker needs TIDEGATE_DATABASE_URL" in started[0].log.read_text()


async def test_a_worker_that_waits_can_be_stopped(tmp_path: Path, started: list[WorkerProcess]) -> None:
    started.append(WorkerProcess(tmp_path, temporal_address=f"127.0.0.1:{free_port()}", database_url="postgresql://x"))
    await started[0].until("waiting for Temporal")
    assert await started[0].stop() == 0
