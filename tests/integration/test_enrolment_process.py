"""`python -m enrolment` as a process: waits for its servers, says that it is ready, keeps counts, ends in good order."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from temporalio.client import Client

from store.engine import Database
from tests.conftest import free_port
from tests.integration.enrolment_setup import CACERTS, ENROLL, PKCS10, REENROLL, Door, Pki, body_for, new_key, working

ROOT = Path(__file__).parent.parent.parent
Start = Callable[..., "Process"]


class Process:
    """The server, and what it logs."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.log = folder / f"enrolment-{time.monotonic_ns()}.log"
        environment = {f"TIDEGATE_{name.upper()}": str(value) for name, value in settings.items()}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "enrolment"],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={
                    **os.environ,
                    "TIDEGATE_STATE_DIR": str(folder / "no-state"),
                    "TIDEGATE_LOG_FORMAT": "json",
                    **environment,
                },
            )

    async def until(self, pattern: str) -> re.Match[str]:
        """Wait until the log has it."""
        for _ in range(1500):
            if found := re.search(pattern, self.log.read_text()):
                return found
            assert self.process.poll() is None, self.log.read_text()
            await asyncio.sleep(0.02)
        pytest.fail(f"{pattern!r} was not logged: {self.log.read_text()}")

    async def ended(self) -> int:
        """Its exit status."""
        return await asyncio.to_thread(self.process.wait, 20)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Process] = []

    def make(**settings: Any) -> Process:
        started.append(Process(tmp_path, **settings))
        return started[-1]

    yield make
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait(10)


def settings_of(db: Database, temporal: Client, pki: Pki) -> dict[str, Any]:
    certificate, key = pki.server()
    return {
        "database_url": db.url,
        "temporal_address": temporal.service_client.config.target_host,
        "enrolment_certificate": certificate,
        "enrolment_private_key": key,
    }


async def test_it_waits_for_temporal_serves_counts_and_ends_in_good_order(
    db: Database, temporal: Client, pki: Pki, start: Start
) -> None:
    process = start(**settings_of(db, temporal, pki))
    ready = await process.until(r'"metrics_port": (\d+), "address": "(https://[^"]+)"')
    door = Door(ready[2], pki.ca_file(), pki)
    claim = door.client(await pki.batch(db))
    assert (await door.client().get(CACERTS)).status_code == 200
    async with working(db, temporal, pki):
        key = new_key()
        answer = await claim.post(ENROLL, content=body_for("SN-1", key), headers=PKCS10)
        device = door.client(door.own("device", answer, key))
        assert (await device.post(REENROLL, content=body_for("SN-1", new_key()), headers=PKCS10)).status_code == 200
        rotation = await temporal.get_workflow_handle("rotate:SN-1").describe()
        assert rotation.workflow_type == "CertificateRotationWorkflow", (
            "a device that came by itself is seen to its end"
        )
    async with httpx.AsyncClient(trust_env=False) as http:
        text = (await http.get(f"http://127.0.0.1:{ready[1]}/metrics")).text
    assert 'tidegate_ready{process="enrolment"} 1.0' in text
    assert 'tidegate_enrolment_requests_total{request="simpleenroll",status="200"} 1.0' in text
    for each in door.clients:
        await each.aclose()
    process.process.send_signal(signal.SIGTERM)
    assert await process.ended() == 0
    assert '"event": "stopped"' in process.log.read_text()


async def test_it_says_what_it_waits_for(db: Database, temporal: Client, pki: Pki, start: Start) -> None:
    settings = settings_of(db, temporal, pki) | {"temporal_address": f"127.0.0.1:{free_port()}"}
    process = start(**settings)
    await process.until("waiting for Temporal")
    process.process.send_signal(signal.SIGTERM)
    assert await process.ended() == 0


async def test_settings_that_cannot_work_end_it_with_a_sentence(
    db: Database, temporal: Client, pki: Pki, start: Start
) -> None:
    settings = settings_of(db, temporal, pki)
    process = start(**settings | {"enrolment_private_key": pki.ca_file()})
    assert await process.ended() == 1
    assert "check TIDEGATE_ENROLMENT_CERTIFICATE" in process.log.read_text()
    process = start(database_url=db.url)
    assert await process.ended() == 1
    assert "the enrolment server needs" in process.log.read_text()
