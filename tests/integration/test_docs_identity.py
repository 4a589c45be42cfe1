"""The commands of docs/identity.md, run as they stand there: a device enrols with curl and openssl alone, connects with
Mosquitto's clients, is configured, becomes active, and renews its certificate."""

import asyncio
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from devstack.stack import EmbeddedStack
from models.device import DeviceStatus
from models.settings import Settings
from store.engine import Database
from store.lookup import DeviceLookup, Source
from store.registry import Registry
from tests.conftest import RedisServer, mosquitto_binary

ROOT = Path(__file__).parent.parent.parent
NEEDED = ("curl", "openssl", "mosquitto_rr", "mosquitto_pub")
MISSING = [name for name in NEEDED if shutil.which(name) is None] + ([] if mosquitto_binary() else ["mosquitto"])
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.timeout(180),
]


def blocks(heading: str) -> list[str]:
    """The shell blocks under a heading of the page, in their order."""
    page = (ROOT / "docs" / "identity.md").read_text()
    section = page.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"```sh\n(.*?)```", section, re.DOTALL)


@pytest_asyncio.fixture
async def stack(tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer) -> AsyncIterator[EmbeddedStack]:
    state = tmp_path_factory.mktemp("identity")
    settings = Settings(state_dir=state, redis_url=redis_server.url)
    async with EmbeddedStack(state, settings=settings, broker="mosquitto") as running:
        yield running


async def shell(script: str, folder: Path, environment: dict[str, str] | None = None) -> str:
    """Run a script as a person would type it, stopping at the first command that fails."""
    done = await asyncio.to_thread(
        subprocess.run,
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=90,
        env=environment,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


async def until(what: str, look: Any, seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not await look():
            await asyncio.sleep(0.1)


async def looked_up_in_redis(db: Database, redis_url: str, thing: str) -> None:
    """Redis has the device as it is now, by id and by serial number, because the stack's worker vouches for it."""
    lookup = DeviceLookup(db, redis_url)
    try:

        async def kept() -> bool:
            return (await lookup.get(thing)).source is Source.REDIS

        await until("the device to be answered for by Redis", kept)
        found = await lookup.get_by_serial("SN-000042")
        assert (found.device.device_id, found.device.status) == (thing, DeviceStatus.ACTIVE)
    finally:
        await lookup.close()


async def test_a_device_enrols_with_curl_and_openssl_alone_as_the_page_says(
    stack: EmbeddedStack, tmp_path: Path
) -> None:
    starter = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'starter.py'))}"
    create = blocks("A batch of devices")[0].replace("python starter.py", starter)
    await shell(create, tmp_path, stack.env())
    assert {path.name for path in (tmp_path / "claim").iterdir()} >= {"claim.pem", "claim.key", "ca.pem"}

    where, enrol, connect, renew = blocks("With curl and openssl alone")
    assert set(re.findall(r"\b([A-Z]+)=", where)) == {"EST", "HOST", "PORT"}
    endpoints = json.loads(stack.state.endpoints_path.read_text())
    here = f"EST={endpoints['enrolment_url']}\nHOST={endpoints['mqtt_host']} PORT={endpoints['mqtt_port']}\n"
    done = await shell(here + enrol + connect + 'echo "thing=$THING"', tmp_path)
    found = re.search(r"thing=(\S+)", done)
    assert found is not None
    thing = found[1]

    db = Database(str(stack.endpoints.database_url))
    await db.open()
    try:
        registry = Registry(db)

        async def active() -> bool:
            return (await registry.get(thing)).status is DeviceStatus.ACTIVE

        await until("the device to become active", active)
        device = await registry.get(thing)
        assert (device.serial_number, device.site_id, device.device_type) == ("SN-000042", "factory-berlin", "motor")
        assert device.config_version == device.desired_config_version == 1
        await looked_up_in_redis(db, str(stack.settings.redis_url), thing)

        await shell(f"{here}THING={thing}\n{renew}", tmp_path)

        async def one_certificate_left() -> bool:
            async with db.pool.connection() as connection:
                rows = await (
                    await connection.execute(
                        "SELECT generation, state FROM certificates WHERE device_id = %s ORDER BY generation", (thing,)
                    )
                ).fetchall()
            return rows == [(1, "revoked"), (2, "valid")]

        await until("the old certificate to be revoked", one_certificate_left)
    finally:
        await db.close()


def test_the_page_names_the_programs_that_this_test_needs() -> None:
    text = "".join(blocks("With curl and openssl alone"))
    assert {name for name in NEEDED if name in text} == set(NEEDED)
