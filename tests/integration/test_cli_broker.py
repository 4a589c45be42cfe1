"""`broker setup` and `broker list`: what they write is what a real Mosquitto runs on."""

import asyncio
import os
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from access.folder import BrokerFolder
from access.keeper import AccessKeeper
from access.mosquitto import ACCESS, GATEWAY, MosquittoListeners
from activities.authorities import ensure_authorities
from models.identity import AuthorityKind
from models.settings import Settings
from pki.authority import Authority, read_certificate
from pki.signer import key_store
from store.brokers import BrokerStore
from store.engine import Database
from tests.cli_runner import Ran, run
from tests.conftest import free_port, mosquitto_binary, wait_for_port
from tests.integration.access_setup import Credentials, Stage, open_folder


@pytest.fixture
def folder() -> Path:
    return open_folder()


async def stage_of(db: Database, folder: Path) -> tuple[Stage, dict[str, str]]:
    settings = Settings(ca_dir=folder / "ca", ca_passphrase_file=folder / "ca.passphrase")
    keys = key_store(settings, make=True)
    found = await ensure_authorities(db, keys, datetime.now(UTC), "test")
    ground = Stage(db, folder, MosquittoListeners(free_port(), free_port()), lambda text: text)
    for kind in AuthorityKind:
        key = keys.open(found[kind].key_reference)
        ground.authorities[kind.value] = Authority(read_certificate(found[kind].certificate), key)
    environment = {
        "TIDEGATE_DATABASE_URL": db.url,
        "TIDEGATE_CA_DIR": str(folder / "ca"),
        "TIDEGATE_CA_PASSPHRASE_FILE": str(folder / "ca.passphrase"),
        "TIDEGATE_STATE_DIR": str(folder / "state"),
    }
    return ground, environment


async def starter(environment: dict[str, str], *words: object) -> Ran:
    return await asyncio.to_thread(lambda: run(*words, **environment))


@pytest.mark.skipif(mosquitto_binary() is None, reason="Mosquitto is not installed")
async def test_a_mosquitto_runs_on_what_setup_writes_and_list_says_that_it_is_in_step(
    db: Database, folder: Path
) -> None:
    ground, environment = await stage_of(db, folder)
    out, listeners = folder / "mosquitto", ground.listeners
    words = ("broker", "setup", "--host", "localhost", "--host", "127.0.0.1", "--out", out, "--folder", out)
    ports = ("--devices-port", listeners.devices, "--engine-port", listeners.engine, "--listen", "127.0.0.1")
    places = ("--persistence", out / "kept", "--pid-file", folder / "mosquitto.pid")
    ran = await starter(environment, *words, *ports, *places)
    assert ran.status == 0, ran.err
    again = await starter(environment, *words)
    assert again.status != 0 and "is not empty" in again.err
    await asyncio.to_thread(_give_away, out)
    broker = _start(out / "mosquitto.conf")
    try:
        wait_for_port(listeners.engine, broker)
        ground.process = broker
        shutil.copyfile(out / "ca.pem", folder / "ca.pem")
        motor = await ground.device("motor-1")
        assert not await ground.refused(motor)
        files = Credentials(GATEWAY, out / f"{GATEWAY}.pem", out / f"{GATEWAY}.key", out / "ca.pem")
        assert not await ground.refused(files, engine=True)
        settings = Settings(
            mqtt_url=f"mqtts://localhost:{listeners.engine}",
            mqtt_ca=out / "ca.pem",
            mqtt_certificate=out / f"{ACCESS}.pem",
            mqtt_private_key=out / f"{ACCESS}.key",
        )
        keeper = AccessKeeper(BrokerStore(db), settings, BrokerFolder(out / "access"), ground.pid_file, "mosquitto")
        await ground.revoke("motor-1")
        await keeper.bring_up_to_date()
        listed = (await starter(environment, "--json", "broker", "list")).json
        assert listed["brokers"][0]["error"] == "1 revoked certificates are on no revocation list yet"
        ground.numbers[ground.authorities["device"].authority_id] = 1
        await ground.publish_crl(ground.authorities["device"])
        await keeper.bring_up_to_date()
        assert await ground.refused(motor)
        listed = (await starter(environment, "--json", "broker", "list")).json
        assert listed["brokers"][0]["applied_revision"] == listed["revision"] and not listed["brokers"][0]["error"]
        shown = await starter(environment, "broker", "list")
        assert "in step" in shown.out and "left" in shown.out
    finally:
        broker.kill()
        broker.wait()


def _start(config: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [str(mosquitto_binary()), "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def _give_away(out: Path) -> None:
    (out / "kept").mkdir()
    if os.geteuid() == 0:
        for path in (out, out / "kept", out / "broker.key"):
            shutil.chown(path, "mosquitto")


async def test_list_says_nothing_where_no_broker_was_heard_of_and_setup_needs_cas(db: Database, folder: Path) -> None:
    environment = {"TIDEGATE_DATABASE_URL": db.url, "TIDEGATE_STATE_DIR": str(folder / "state")}
    listed = await starter(environment, "--json", "broker", "list")
    assert listed.json == {"revision": 0, "brokers": []}
    refused = await starter(environment, "broker", "setup", "--host", "localhost", "--out", folder / "new")
    assert refused.status != 0 and "no key store" in refused.err
    assert not (folder / "new").exists()
