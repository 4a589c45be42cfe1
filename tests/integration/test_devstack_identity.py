"""The whole stack with identity: a device enrols, speaks, is revoked, is thrown out; and a second start renews the rest."""

import asyncio
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiomqtt
import orjson
import psycopg
import pytest

from devstack import identity
from devstack.broker import mosquitto_binary
from devstack.postgres import make_passable
from devstack.stack import EmbeddedStack
from models.identity import AuthorityKind, RevocationReason
from models.settings import Settings
from pki.authority import read_certificate
from store.access import revoke
from store.engine import Database
from tests.integration.access_setup import Credentials

pytestmark = [
    pytest.mark.skipif(mosquitto_binary() is None, reason="Mosquitto is not installed"),
    pytest.mark.timeout(180),
]
ROOT = Path(__file__).parent.parent.parent


async def starter(stack: EmbeddedStack, *words: str) -> Any:
    """A command, as an operator gives it."""
    command = [sys.executable, "starter.py", "--json", "--state", str(stack.settings.state_dir), *words]
    done = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    return orjson.loads(done.stdout)


def connect(stack: EmbeddedStack, who: Credentials) -> aiomqtt.Client:
    assert stack.endpoints.mqtt_host and stack.endpoints.mqtt_port
    return aiomqtt.Client(
        stack.endpoints.mqtt_host, stack.endpoints.mqtt_port, identifier=who.name, tls_context=who.context(), timeout=5
    )


def value(stack: EmbeddedStack, statement: str) -> Any:
    with psycopg.connect(str(stack.endpoints.database_url), autocommit=True) as connection:
        row = connection.execute(statement.encode()).fetchone()
    return row[0] if row else None


async def until(check: Any, seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not check():
            await asyncio.sleep(0.1)


async def test_a_device_enrols_speaks_is_revoked_and_is_thrown_out(tmp_path: Path) -> None:
    await asyncio.to_thread(make_passable, tmp_path / "state")
    async with EmbeddedStack(tmp_path / "state", settings=Settings()) as stack:
        await starter(
            stack, "claim", "create", "batch", "--type", "motor", "--site", "berlin", "--max-devices", "5", "--out", str(tmp_path / "claim")
        )  # fmt: skip
        made = await starter(
            stack, "device", "enroll", "SN-1", "--claim", str(tmp_path / "claim"), "--out", str(tmp_path / "device")
        )
        name, own = made["device_id"], tmp_path / "device"
        device = Credentials(name, own / "cert.pem", own / "key.pem", own / "ca.pem")
        async with connect(stack, device) as client:
            beat = {"deviceId": name, "timestamp": int(time.time() * 1000), "firmwareVersion": "1.2.0"}
            await client.publish(f"devices/{name}/heartbeat", orjson.dumps(beat), qos=1)
            await until(lambda: value(stack, f"SELECT firmware_version FROM presence WHERE device_id = '{name}'"))
            began = time.monotonic()
            db = Database(str(stack.endpoints.database_url))
            await db.open()
            async with db.pool.connection() as connection:
                await revoke(connection, name, RevocationReason.KEY_COMPROMISE, "test", "by a test")
            await db.close()
            with pytest.raises(aiomqtt.MqttError):
                async with asyncio.timeout(30):
                    async for _ in client.messages:
                        pass
            print(f"\nthrown out {time.monotonic() - began:.2f} s after the revocation")
        claim = Credentials("claim", *(tmp_path / "claim" / f for f in ("claim.pem", "claim.key", "ca.pem")))
        with pytest.raises(aiomqtt.MqttError):
            async with connect(stack, claim):
                pass


async def test_a_second_start_keeps_what_is_good_and_renews_what_is_near_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asyncio.to_thread(make_passable, tmp_path / "state")
    options: dict[str, Any] = {"settings": Settings(), "worker": False, "gateway": False, "enrolment": False}
    tls = tmp_path / "state" / "tls"

    def certificates() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tls.glob("*.pem")}

    async with EmbeddedStack(tmp_path / "state", **options):
        first = certificates()
        assert set(first) == {
            "ca.pem", "broker.pem", "enrolment.pem", "engine.gateway.pem", "engine.worker.pem", "engine.access.pem"
        }  # fmt: skip
    async with EmbeddedStack(tmp_path / "state", **options) as stack:
        assert certificates() == first
        assert value(stack, "SELECT count(*) FROM authorities") == len(AuthorityKind)
        crl = value(stack, "SELECT max(number) FROM crls")
        with psycopg.connect(str(stack.endpoints.database_url), autocommit=True) as connection:
            connection.execute("UPDATE crls SET pem = 'over', next_update = now() - interval '1 day'")
    (tmp_path / "state/broker/mosquitto/access/devices.crl").unlink()
    monkeypatch.setattr(identity, "RENEW_BEFORE", timedelta(days=400))
    (tls / "engine.worker.key").unlink()
    async with EmbeddedStack(tmp_path / "state", **options) as stack:
        assert value(stack, "SELECT max(number) FROM crls") == crl + 1, "a list that is over is signed anew"
        renewed = certificates()
        assert renewed["ca.pem"] == first["ca.pem"]
        assert all(renewed[name] != first[name] for name in first if name != "ca.pem")
        ends = read_certificate(renewed["broker.pem"]).not_valid_after_utc
        assert ends > datetime.now(UTC) + timedelta(days=390)
