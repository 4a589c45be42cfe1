"""What a device with a good certificate can do to others, on a real Mosquitto with the ACL we write: nothing.

Judged at the victim. Each attack also runs against a broker whose defence is off, where it has to succeed.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiomqtt
import pytest
from aiomqtt import ProtocolVersion

from access.mosquitto import GATEWAY
from gateway.__main__ import CLIENT_ID
from gateway.documents import Documents
from gateway.service import Gateway
from models.protocol import REQUEST_FILTERS, jobs_topic
from store.engine import Database
from tests.conftest import mosquitto_binary
from tests.integration.access_setup import VERSIONS, Stage, ear, stage, without, without_acl, without_start
from tests.integration.rollout_setup import Fleet, prepare
from transport.connection import Connection

pytestmark = pytest.mark.skipif(mosquitto_binary() is None, reason="Mosquitto is not installed")
QUIET_SECONDS = 5.0


async def say(stage: Stage, who: object, version: ProtocolVersion, *messages: tuple[str, str]) -> None:
    """Publish as this device; an MQTT 5 client is told that it may not, an older one gets a plain acknowledgement."""
    async with stage.client(who, version) as client:  # type: ignore[arg-type]
        for topic, text in messages:
            try:
                await client.publish(topic, text, qos=1)
            except aiomqtt.MqttError:
                assert version is ProtocolVersion.V5


SPOOFED = [
    "$aws/things/victim/jobs/start-next",
    "$aws/things/victim/jobs/get",
    "$aws/things/victim/jobs/job-1/update",
    "$aws/things/victim/shadow/name/config/update",
    "devices/victim/heartbeat",
    "devices/victim/commands/response",
    "$aws/things/attacker/jobs/../../victim/jobs/get",
    "devices/attacker/../victim/heartbeat",
]
FORGED = [
    "$aws/things/victim/jobs/start-next/accepted",
    "$aws/things/victim/jobs/notify-next",
    "$aws/things/victim/shadow/name/config/update/delta",
    "devices/victim/commands/request",
    "devices/victim/diagnostics/request",
]
FORGED_OWN = ["$aws/things/attacker/jobs/start-next/accepted", "devices/attacker/commands/request"]
VICTIM_FILTERS = ["$aws/things/victim/#", "devices/victim/#"]


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_device_cannot_speak_for_another_nor_forge_answers(db: Database, version: ProtocolVersion) -> None:
    async with stage(db) as ground:
        victim, attacker = await ground.device("victim"), await ground.device("attacker")
        async with ground.gateway_ear() as engine, ear(ground.client(victim), VICTIM_FILTERS) as reached:
            forbidden = [(topic, "spoofed") for topic in SPOOFED + FORGED + FORGED_OWN]
            await say(ground, attacker, version, *forbidden, ("devices/attacker/heartbeat", "last"))
            assert await engine.hears("last")
            await victim_is_reached(ground, reached)
            assert "spoofed" not in engine.texts and "spoofed" not in reached.texts


@pytest.mark.parametrize("version", VERSIONS)
async def test_without_the_acl_a_device_speaks_for_another_and_forges_answers(
    db: Database, version: ProtocolVersion
) -> None:
    async with stage(db, without_acl) as ground:
        victim, attacker = await ground.device("victim"), await ground.device("attacker")
        async with ground.gateway_ear() as engine, ear(ground.client(victim), VICTIM_FILTERS) as reached:
            await say(ground, attacker, version, (SPOOFED[0], "spoofed"), (FORGED[0], "forged"))
            assert await engine.hears("spoofed") and await reached.hears("forged")


async def victim_is_reached(ground: Stage, reached: object) -> None:
    """The line to the victim is open, so that hearing nothing else means something."""
    service = ground.credentials(GATEWAY)
    async with ground.client(service, engine=True, client_id="engine@test") as client:
        await client.publish(jobs_topic("victim", "notify-next"), "real", qos=1)
    assert await reached.hears("real")  # type: ignore[attr-defined]


BEAT = '{"deviceId":"%s","timestamp":1767225600000,"firmwareVersion":"9.9.9"}'


@asynccontextmanager
async def serving(ground: Stage, fleet: Fleet) -> AsyncIterator[None]:
    """A gateway on the engine's listener."""
    settings, stop = ground.settings(GATEWAY), asyncio.Event()
    connection = Connection(CLIENT_ID, keep_session=True)
    gateway = Gateway(ground.db, connection, Documents("http://127.0.0.1:1/", fleet.order_key, 3600), settings)
    await connection.open(settings, REQUEST_FILTERS, gateway.receive)
    running = asyncio.create_task(gateway.run(stop))
    try:
        yield
    finally:
        stop.set()
        await running
        await connection.close()


async def present(db: Database, last: str) -> set[str]:
    """The devices whose heartbeat the registry has, once that of `last` is there."""
    seen: set[str] = set()
    async with asyncio.timeout(10):
        while last not in seen:
            async with db.pool.connection() as connection:
                found = await connection.execute("SELECT device_id FROM presence WHERE firmware_version = '9.9.9'")
                seen = {row[0] for row in await found.fetchall()}
            await asyncio.sleep(0.05)
    return seen


@pytest.mark.parametrize(("mutate", "reached"), [(None, {"motor-2"}), (without_acl, {"motor-1", "motor-2"})])
async def test_a_spoofed_heartbeat_does_not_reach_the_registry_and_does_without_the_acl(
    db: Database, mutate: Callable[[str], str] | None, reached: set[str]
) -> None:
    fleet = await prepare(db, 2)
    async with stage(db, mutate or str) as ground, serving(ground, fleet):
        attacker = await ground.device("motor-2")
        beats = [(f"devices/{name}/heartbeat", BEAT % name) for name in ("motor-1", "motor-2")]
        await say(ground, attacker, ProtocolVersion.V311, *beats)
        assert await present(db, "motor-2") == reached


def defenceless(text: str) -> str:
    """The mutant of a broker that neither denies nor refuses anybody."""
    return without_start("crlfile")(without_acl(text))


@pytest.mark.parametrize("registry_decides", [True, False])
async def test_what_a_revoked_device_says_changes_nothing_even_if_the_broker_lets_it_in(
    db: Database, registry_decides: bool
) -> None:
    fleet = await prepare(db, 2)
    async with stage(db, defenceless) as ground, serving(ground, fleet):
        revoked, other = await ground.device("motor-1"), await ground.device("motor-2")
        await ground.revoke("motor-1")
        if not registry_decides:  # the mutant of a registry that forgets
            async with db.pool.connection() as connection:
                await connection.execute("UPDATE devices SET barred_at = NULL")
        start = jobs_topic("motor-1", "start-next")
        await say(ground, revoked, ProtocolVersion.V311, (start, "{}"), ("devices/motor-1/heartbeat", BEAT % "motor-1"))
        await say(ground, other, ProtocolVersion.V311, ("devices/motor-2/heartbeat", BEAT % "motor-2"))
        assert ("motor-1" in await present(db, "motor-2")) != registry_decides
        async with db.pool.connection() as connection:
            row = await (
                await connection.execute("SELECT state FROM executions WHERE device_id = 'motor-1'")
            ).fetchone()
        assert row is not None and (row[0] == "IN_PROGRESS") != registry_decides


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_device_cannot_take_over_anothers_session(db: Database, version: ProtocolVersion) -> None:
    async with stage(db) as ground:
        victim, attacker = await ground.device("victim"), await ground.device("attacker")
        async with ground.gateway_ear() as engine, ear(ground.client(victim, version), VICTIM_FILTERS) as session:
            for stolen in ("victim", "engine@ear", CLIENT_ID):
                async with ground.client(attacker, version, client_id=stolen) as client:
                    await client.publish("devices/attacker/heartbeat", stolen, qos=1)
                assert await engine.hears(stolen, 2), "the attacker itself is served, under its own id"
            began = asyncio.get_running_loop().time()
            await session.client.publish("devices/victim/heartbeat", "still here", qos=1)
            assert await engine.hears("still here", 1)
            assert asyncio.get_running_loop().time() - began < 1
            assert not session.gone.is_set() and not engine.gone.is_set()


async def test_where_the_client_id_is_free_a_device_takes_over_anothers_session(db: Database) -> None:
    async with stage(db, without("use_username_as_clientid true")) as ground:
        victim, attacker = await ground.device("victim"), await ground.device("attacker")
        async with ear(ground.client(victim), VICTIM_FILTERS) as session:
            async with ground.client(attacker, client_id="victim"):
                await asyncio.wait_for(session.gone.wait(), 5)


WIDE = [
    "#",
    "+/#",
    "+/+/+/+/+",
    "$aws/#",
    "$aws/things/#",
    "$aws/things/+/jobs/#",
    "$aws/things/+/jobs/notify-next",
    "$aws/things/victim/jobs/notify-next",
    "devices/#",
    "devices/victim/commands/request",
    "$share/group/#",
    "$share/group/$aws/#",
    "$share/group/devices/#",
    "$SYS/#",
    "tidegate/#",
]


async def flow(ground: Stage, seconds: float) -> None:
    """Orders to the victim, and requests of it, all the time."""
    async with ground.client(ground.credentials(GATEWAY), engine=True, client_id="engine@test") as client:
        for _ in range(int(seconds / 0.1)):
            await client.publish(jobs_topic("victim", "notify-next"), "order", qos=1)
            await client.publish("devices/victim/commands/request", "order", qos=1)
            await client.publish("tidegate/something", "order", qos=1)
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_device_hears_nothing_that_is_for_others(db: Database, version: ProtocolVersion) -> None:
    async with stage(db) as ground:
        victim, attacker = await ground.device("victim"), await ground.device("attacker")
        async with ear(ground.client(victim), VICTIM_FILTERS) as reached:
            async with ear(ground.client(attacker, version), WIDE) as overheard:
                await flow(ground, QUIET_SECONDS)
                assert len(reached.heard) >= 90
                assert overheard.heard == []
                assert not overheard.gone.is_set()


@pytest.mark.parametrize("version", VERSIONS)
async def test_without_the_acl_a_device_hears_what_is_for_others(db: Database, version: ProtocolVersion) -> None:
    async with stage(db, without_acl) as ground:
        await ground.device("victim")
        attacker = await ground.device("attacker")
        async with ear(ground.client(attacker, version), WIDE) as overheard:
            await flow(ground, 0.5)
            assert {jobs_topic("victim", "notify-next"), "devices/victim/commands/request"} <= set(overheard.topics)


async def test_a_device_does_not_hear_its_own_requests_and_hears_every_kind_of_answer(db: Database) -> None:
    async with stage(db) as ground:
        device = await ground.device("device")
        answers = [
            "jobs/notify",
            "jobs/notify-next",
            "jobs/get/accepted",
            "jobs/start-next/rejected",
            "jobs/$next/get/accepted",
            "jobs/job-1/update/rejected",
            "shadow/get/accepted",
            "shadow/update/delta",
            "shadow/name/config/get/accepted",
            "shadow/name/config/update/documents",
            "shadow/name/config/delete/rejected",
        ]
        async with ear(ground.client(device), ["$aws/things/device/#", "devices/device/#"]) as reached:
            for request in ("jobs/get", "jobs/$next/get", "jobs/job-1/update", "shadow/name/config/update"):
                await reached.client.publish(f"$aws/things/device/{request}", "mine", qos=1)
            await reached.client.publish("devices/device/heartbeat", "mine", qos=1)
            async with ground.client(ground.credentials(GATEWAY), engine=True, client_id="engine@test") as engine:
                for answer in answers:
                    await engine.publish(f"$aws/things/device/{answer}", "answer", qos=1)
                for order in ("commands/notify", "commands/request", "diagnostics/request"):
                    await engine.publish(f"devices/device/{order}", "answer", qos=1)
                await engine.publish("$aws/things/device/jobs/notify", "last", qos=1)
            assert await reached.hears("last")
            assert "mine" not in reached.texts
            assert reached.texts.count("answer") == len(answers) + 3


async def test_no_certificate_of_the_wrong_kind_and_no_stranger_gets_in(db: Database) -> None:
    async with stage(db) as ground:
        device, claim = await ground.device("device"), ground.claim()
        service = ground.credentials(GATEWAY)
        assert not await ground.refused(device)
        assert not await ground.refused(service, engine=True)
        assert await ground.refused(claim), "a claim certificate at the devices' listener"
        assert await ground.refused(claim, engine=True), "a claim certificate at the engine's listener"
        assert await ground.refused(service), "a service at the devices' listener"
        assert await ground.refused(device, engine=True), "a device at the engine's listener"
        assert await ground.refused(ground.credentials("broker"), engine=True), "a server certificate as a client"
        stranger = await ground.authority_of_a_stranger()
        assert await ground.refused(stranger) and await ground.refused(stranger, engine=True)
        for port in (ground.listeners.devices, ground.listeners.engine):
            with pytest.raises(aiomqtt.MqttError):
                async with aiomqtt.Client("127.0.0.1", port, timeout=3, tls_context=anonymous(ground)):
                    pass
            with pytest.raises(aiomqtt.MqttError):
                async with aiomqtt.Client("127.0.0.1", port, timeout=3):
                    pass


def anonymous(ground: Stage) -> object:
    import ssl

    return ssl.create_default_context(cafile=str(ground.folder / "ca.pem"))


async def test_the_access_keeper_can_neither_hear_nor_say_anything_but_its_canary(db: Database) -> None:
    async with stage(db) as ground:
        keeper = ground.credentials("engine.access")
        async with ground.gateway_ear() as engine, ear(ground.client(keeper, engine=True), WIDE) as overheard:
            await overheard.client.publish(jobs_topic("victim", "notify-next"), "forged", qos=1)
            await flow(ground, 0.3)
            assert await engine.hears("order")
            assert overheard.heard == [] and "forged" not in engine.texts
