"""A real agent in a real stack, from its enrolment to its end: the whole of identity as a device lives through it.

Everything is real: CAs, broker with TLS and ACL, enrolment server, gateway, worker, workflows, and the agent's process.
"""

import asyncio
import json
import signal
import stat
import sys
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
import pytest_asyncio

from agent.credentials import Credentials
from agent.image import declared_image
from agent.storage import PosixStorage
from cli.claim import make_claim
from devstack.postgres import make_passable
from devstack.stack import EmbeddedStack
from firmware.keys import generate_private_key, save_public_key
from models.identity import ClaimBatchSpec
from models.settings import Settings
from store.engine import Database
from tests.cli_runner import Ran, run
from tests.conftest import mosquitto_binary

SERIAL, DEVICE = "SN-000001", "motor-SN-000001"


class Life:
    """A stack, a batch, and one agent process."""

    def __init__(self, folder: Path, stack: EmbeddedStack) -> None:
        self.folder, self.stack = folder, stack
        self.process: asyncio.subprocess.Process | None = None
        (folder / "base.bin").write_bytes(declared_image("1.2.0", body=b"\x5a" * 4000))
        save_public_key(folder / "release.pem", generate_private_key().public_key())

    async def make_batch(self) -> None:
        endpoints = self.stack.endpoints
        settings = Settings().model_copy(
            update={
                "ca_dir": Path(str(endpoints.ca_dir)),
                "ca_passphrase_file": Path(str(endpoints.ca_passphrase_file)),
            }
        )
        spec = ClaimBatchSpec(
            name="batch-1",
            device_type="motor",
            site_id="berlin",
            config={"heartbeatSeconds": 1},
            id_prefix="motor-",
            max_devices=10,
            expires_at=datetime.now(UTC) + timedelta(hours=1),
        )
        db = Database(str(endpoints.database_url), max_size=2)
        await db.open()
        try:
            await make_claim(db, settings, spec, [], "test", self.folder / "claim")
        finally:
            await db.close()

    async def start(self, *more: str) -> None:
        endpoints = self.stack.endpoints
        arguments = {
            "--serial": SERIAL,
            "--type": "motor",
            "--state": self.folder / "device",
            "--base": self.folder / "base.bin",
            "--base-version": "1.2.0",
            "--release-key": self.folder / "release.pem",
            "--order-key": Path(str(endpoints.order_key)).with_suffix(".pub"),
            "--mqtt": f"mqtts://{endpoints.mqtt_host}:{endpoints.mqtt_port}",
            "--ca": endpoints.ca,
            "--enrolment-url": endpoints.enrolment_url,
            "--claim-cert": self.folder / "claim" / "claim.pem",
            "--claim-key": self.folder / "claim" / "claim.key",
            "--retry": "0.3",
            "--refused": "0.5",
            "--heartbeat": "1",
        }
        flat = [str(part) for pair in arguments.items() for part in pair]
        with (self.folder / "agent.log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(sys.executable, "-m", "agent", *flat, *more, stderr=log)

    async def command(self, *arguments: object) -> Ran:
        """A command of `starter.py`."""
        return await asyncio.to_thread(
            run, *arguments, TIDEGATE_STATE_DIR=str(self.stack.settings.state_dir), TERM="dumb"
        )

    async def value(self, statement: str) -> Any:
        connection = await psycopg.AsyncConnection.connect(str(self.stack.endpoints.database_url), autocommit=True)
        async with connection:
            row = await (await connection.execute(statement.encode())).fetchone()
        return row[0] if row else None

    async def until(self, statement: str, wanted: Any, seconds: float = 60) -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        while (found := await self.value(statement)) != wanted:
            assert asyncio.get_running_loop().time() < deadline, f"{statement}: {found!r}, expected {wanted!r}"
            await asyncio.sleep(0.1)

    def log(self) -> str:
        return (self.folder / "agent.log").read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A state directory that a server's own account can reach."""
    opened = make_passable(tmp_path / "state")
    yield tmp_path
    for parent in opened:
        parent.chmod(parent.stat().st_mode & ~stat.S_IXOTH)


@pytest_asyncio.fixture(params=["mosquitto", "nats"])
async def life(folder: Path, request: pytest.FixtureRequest) -> AsyncIterator[Life]:
    if request.param == "mosquitto" and mosquitto_binary() is None:
        pytest.skip("Mosquitto is not installed")
    async with EmbeddedStack(folder / "state", settings=Settings(), broker=request.param) as stack:
        life = Life(folder, stack)
        await life.make_batch()
        yield life
        if life.process is not None and life.process.returncode is None:
            life.process.send_signal(signal.SIGKILL)
            await life.process.wait()


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_a_device_from_its_enrolment_to_its_end(life: Life) -> None:
    await life.start()
    await life.until("SELECT status FROM devices", "active")
    assert await life.value("SELECT device_id FROM devices") == DEVICE
    await life.until("SELECT state FROM enrolments", "active")
    assert await life.value("SELECT config FROM devices") == {"heartbeatSeconds": 1}
    await life.until("SELECT count(*) FROM certificates WHERE confirmed_at IS NOT NULL", 1)

    ran = await life.command("device", "configure", DEVICE, "--set", "mode=eco", "--wait", "60s", "--json")
    assert ran.status == 0, ran.err
    assert json.loads(ran.out)["outcome"] == "applied"
    assert await life.value("SELECT config FROM devices") == {"heartbeatSeconds": 1, "mode": "eco"}

    ran = await life.command("device", "rotate", DEVICE, "--wait", "60s", "--json")
    assert ran.status == 0, ran.err
    assert json.loads(ran.out)["outcome"] == "rotated"
    assert await life.value("SELECT count(*) FROM certificates WHERE state = 'valid'") == 1
    assert await life.value("SELECT count(*) FROM certificates WHERE state = 'revoked'") == 1
    seen = await life.value("SELECT last_heartbeat FROM presence")
    await life.until(f"SELECT last_heartbeat > '{seen}'::timestamptz + interval '2 s' FROM presence", True)

    ran = await life.command("diagnose", DEVICE, "config-dump", "--json")
    assert ran.status == 0 and json.loads(ran.out)["answer"]["config"] == {"heartbeatSeconds": 1, "mode": "eco"}
    ran = await life.command("diagnose", DEVICE, "reboot", "--delay", "0s", "--wait", "--json")
    assert ran.status == 0 and json.loads(ran.out)["outcome"] == "rebooted", ran
    assert life.process is not None and life.process.returncode is None, "the same process, booted again"
    ran = await life.command("diagnose", DEVICE, "system-info")
    assert ran.status == 0 and "of memory" not in ran.err and "uptime" in ran.out

    ran = await life.command("device", "decommission", DEVICE, "--wait", "--json")
    assert ran.status == 0, ran.err
    assert json.loads(ran.out)["wiped"] is True
    assert life.process is not None
    async with asyncio.timeout(20):
        assert await life.process.wait() == 4, life.log()
    assert await life.value("SELECT status FROM devices") == "retired"
    assert not Credentials(PosixStorage(life.folder / "device")).candidates()

    await life.start()
    async with asyncio.timeout(20):
        assert await life.process.wait() == 4, "started again it stays wiped"
    await life.start("--enrol-again")
    await asyncio.sleep(3)
    assert life.process.returncode is None and "was refused" in life.log(), "its serial number is buried"
    assert await life.value("SELECT count(*) FROM certificates WHERE state = 'valid'") == 0
    ran = await life.command("device", "release", SERIAL, "--reason", "refurbished")
    assert ran.status == 0, ran.err
    await life.until("SELECT status FROM devices", "active")
