"""Wanting a state and waiting for it, whole: command line, Temporal, PostgreSQL, relay, broker, gateway, a device."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from temporalio.client import Client

import gateway.shadow
import store.shadow_syncing as syncing
import store.shadows as shadows
from activities.relay import OutboxRelay
from agent.client import Broker as Address
from agent.client import JobsClient, Patience
from agent.shadow import ShadowKeeper
from models.errors import ConflictError, InvalidInputError, NotFoundError, RefusedError
from models.identity import DeviceHappening
from models.settings import Settings
from models.shadow import CheckShadowInput, EndShadowInput, SyncOutcome, SyncShadowInput, WantShadowInput
from store.access import bar, change_access
from store.engine import Database
from store.lifecycle import standing
from store.retention import delete_old
from store.shadow_syncing import ShadowSyncStore
from store.shadows import clear_shadows, delete_shadow, get_shadow, save_shadows, set_desired
from store.waits import happened
from tests.agent_standin import serving_artifacts
from tests.cli_runner import Ran, run
from tests.conftest import Broker, free_port
from tests.integration.rollout_setup import add_devices
from tests.integration.shadow_setup import ask, desire, report, rows, shadow_door
from tests.integration.test_agent_process import THING, Rig
from tests.integration.test_gateway_jobs import Door
from tests.workflow.life_stage import life_workers
from transport.publisher import Publisher
from workers.lifecycle import Lifecycle
from workflows import options
from workflows.shadow_client import start_shadow_sync

ROOT = Path(__file__).parent.parent.parent
DEVICE = "motor-1"


@dataclass
class World:
    """A gateway, workers, and devices that come when they are told to."""

    db: Database
    broker: Broker
    client: Client
    door: Door
    settings: Settings
    publisher: Publisher
    state_dir: Path
    workers: AsyncExitStack = field(default_factory=AsyncExitStack)

    @property
    def environment(self) -> dict[str, str]:
        """For a command."""
        return {
            "TIDEGATE_DATABASE_URL": self.db.url,
            "TIDEGATE_TEMPORAL_ADDRESS": self.client.service_client.config.target_host,
            "TIDEGATE_MQTT_URL": str(self.settings.mqtt_url),
            "TIDEGATE_STATE_DIR": str(self.state_dir),
            "TIDEGATE_ACTOR": "alice",
        }

    async def run(self, *words: str) -> Ran:
        """Run a command to its end."""
        return await asyncio.to_thread(lambda: run("shadow", *words, **self.environment))

    async def start_workers(self) -> None:
        """Workers that remember nothing of what others did."""
        lifecycle = Lifecycle.of(self.db, self.client, self.publisher, self.settings)
        await self.workers.enter_async_context(life_workers(self.client, lifecycle.short))

    @asynccontextmanager
    async def device(self, thing: str = DEVICE) -> AsyncIterator[ShadowKeeper]:
        """A device that does as its shadow wants."""
        client = JobsClient(thing, Address(self.broker.host, self.broker.port), Patience(answer_seconds=5))
        keeper = ShadowKeeper(client, 30, 0.2)
        tasks = [asyncio.create_task(client.run()), asyncio.create_task(keeper.run())]
        try:
            yield keeper
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def waited_for(self) -> None:
        """Return once somebody waits for a report."""
        async with asyncio.timeout(30):
            while not await rows(self.db, "SELECT FROM device_waits"):
                await asyncio.sleep(0.05)


@pytest_asyncio.fixture
async def world(db: Database, broker: Broker, temporal: Client, tmp_path: Path) -> AsyncIterator[World]:
    settings = Settings(mqtt_url=f"mqtt://{broker.host}:{broker.port}")
    stop = asyncio.Event()
    publisher = await Publisher.connect(settings)
    async with shadow_door(db, broker) as door:
        world = World(db, broker, temporal, door, settings, publisher, tmp_path)
        relay = asyncio.create_task(OutboxRelay(db, temporal, options.DEVICE_EVENT).run(stop))
        await world.start_workers()
        yield world
        await world.workers.aclose()
        stop.set()
        await relay
    await publisher.close()


# --- the command line --------------------------------------------------------------------------------------------------


async def test_a_device_that_is_there_confirms_within_the_wait(world: World) -> None:
    async with world.device() as keeper:
        ran = await world.run("set", DEVICE, "power=on", "led.level=3", "--wait", "30s", "--json")
        assert ran.status == 0, ran.err
        assert (ran.json["outcome"], ran.json["differs"]) == ("confirmed", {})
        assert "should this end before it does, 'shadow wait motor-1 --token" in ran.err
        assert keeper.state == {"power": "on", "led": {"level": 3}}
        again = await world.run("set", DEVICE, "power=off", "--wait", "30s")
        assert again.status == 0 and "motor-1 reports what is wanted" in again.out and keeper.state["power"] == "off"
    got = await world.run("get", DEVICE, "--json")
    assert got.json["state"]["reported"] == {"power": "off", "led": {"level": 3}} and "delta" not in got.json["state"]
    assert await rows(world.db, "SELECT FROM device_waits") == []
    assert await rows(world.db, "SELECT actor, action FROM audit_events") == [("alice", "shadow.wanted")] * 2


async def test_a_device_that_is_away_is_named_as_such_and_given_it_when_it_comes(world: World) -> None:
    await report(world.door, DEVICE, {"power": "off"})
    await rows(
        world.db,
        "INSERT INTO presence (device_id, last_heartbeat, offline_since) VALUES "
        "('motor-1', now() - interval '1 hour', now() - interval '50 minutes') RETURNING 1",
    )
    ran = await world.run("set", DEVICE, "power=on", "--wait", "1s", "--json")
    assert ran.status == 5, ran.err
    assert (ran.json["outcome"], ran.json["differs"]) == ("timed-out", {"power": "on"})
    assert 'power is "off", wanted "on"' in ran.json["reason"] and "it is offline since" in ran.json["reason"]
    assert "it stays wanted" in ran.json["reason"]
    assert await rows(world.db, "SELECT FROM device_waits") == []
    async with world.device() as keeper:
        async with asyncio.timeout(30):
            while keeper.state != {"power": "on"}:
                await asyncio.sleep(0.05)


async def started(world: World, *words: str) -> tuple[asyncio.subprocess.Process, str]:
    """A command as a process of its own, and the first line of what it says: it has begun to wait by then."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "starter.py", "shadow", *words),
        cwd=ROOT,
        env=os.environ | world.environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    return process, (await asyncio.wait_for(process.stderr.readline(), 60)).decode()


async def test_the_waiting_command_is_killed_and_others_join(world: World) -> None:
    words = ("set", DEVICE, "power=on", "--wait", "5m")
    waiting, said = await started(world, *words)
    await world.waited_for()
    waiting.send_signal(signal.SIGKILL)
    await waiting.communicate()
    again, said_again = await started(world, *words)
    assert said == said_again
    token = said.split("--token ")[1].split("'")[0]
    joining = asyncio.create_task(world.run("wait", DEVICE, "--token", token, "--json"))
    async with world.device():
        joined = await joining
        out, err = await asyncio.wait_for(again.communicate(), 60)
    assert (joined.status, joined.json["outcome"]) == (0, "confirmed"), joined.err
    assert again.returncode == 0 and b"motor-1 reports what is wanted" in out, err
    assert await rows(world.db, "SELECT count(*) FROM shadow_history WHERE actor = 'alice'") == [(1,)]
    late = await world.run("wait", DEVICE, "--token", token, "--json")
    assert late.json["outcome"] == "confirmed", "what has ended says how"
    unknown = await world.run("wait", DEVICE, "--token", "nothing")
    assert unknown.status == 2 and "no wait shadow:motor-1//nothing" in unknown.err


async def test_a_worker_that_is_replaced_while_it_waits_changes_nothing(world: World) -> None:
    asked = SyncShadowInput(device_id=DEVICE, patch={"power": "on"}, actor="alice", limit=timedelta(minutes=2))
    handle = await start_shadow_sync(world.client, asked)
    await world.waited_for()
    await world.workers.aclose()
    await report(world.door, DEVICE, {"power": "on"})
    await world.start_workers()
    result = await asyncio.wait_for(handle.result(), 60)
    assert (result.outcome, result.version) == (SyncOutcome.CONFIRMED, 2)
    assert await rows(world.db, "SELECT count(*) FROM shadow_history WHERE actor = 'alice'") == [(1,)]


async def test_refusals_and_mistakes_say_what_to_do(world: World) -> None:
    async def refused(status: int, *words: str) -> str:
        ran = await world.run(*words)
        assert ran.status == status, (words, ran.out, ran.err)
        return ran.err

    assert "no device with the id 'nobody'" in await refused(2, "set", "nobody", "a=1")
    assert "no device with the id 'nobody'" in await refused(2, "set", "nobody", "a=1", "--wait", "5s")
    assert "expected either KEY=VALUE" in await refused(2, "set", DEVICE)
    assert "expected KEY=VALUE" in await refused(2, "set", DEVICE, "power")
    assert "given twice" in await refused(2, "set", DEVICE, "a=1", "a=2")
    assert "a value of its own" in await refused(2, "set", DEVICE, "a=1", "a.b=2")
    assert "use 'device configur" in await refused(2, "set", DEVICE, "a=1", "--name", "config")
    assert "not a shadow's name" in await refused(2, "get", DEVICE, "--name", "a/b")
    assert "there is no shadow of motor-1" in await refused(2, "get", DEVICE)
    assert "there is none" in await refused(2, "delete", DEVICE)
    assert "expected version 4, it is 0" in await refused(6, "set", DEVICE, "a=1", "--version", "4")
    assert "maximum is 8192" in await refused(2, "set", DEVICE, f"a={'x' * 9000}")
    assert "--wait" in await refused(2, "set", DEVICE, "a=1", "--wait", "soon")
    assert await rows(world.db, "SELECT FROM shadows") == []


async def test_changes_are_announced_listed_and_kept_in_the_history(world: World, tmp_path: Path) -> None:
    patch = tmp_path / "patch.json"
    patch.write_text('{"mode": "eco", "fan": {"speed": 2}}')
    for words in (["power=on", "n=3", "text=3 apples"], ["--file", str(patch)], ["power=", "--unset", "fan.speed"]):
        ran = await world.run("set", DEVICE, *words, "--name", "room")
        assert ran.status == 0, ran.err
    await world.door.wait_for(DEVICE, "room/update/delta")
    async with asyncio.timeout(20):
        while sum(topic.endswith("accepted") for topic, _ in world.door.answers[DEVICE]) < 3:
            await asyncio.sleep(0.02)
    kinds = [topic.rpartition("/")[2] for topic, _ in world.door.answers[DEVICE]]
    assert kinds == ["delta", "documents", "accepted"] * 3
    got = (await world.run("get", DEVICE, "--name", "room", "--json")).json
    assert got["state"]["desired"] == {"n": 3, "text": "3 apples", "mode": "eco", "fan": {}}
    shown = await world.run("get", DEVICE, "--name", "room")
    assert "differs" in shown.out and "version 3; 4 keys not as wanted" in shown.err
    listed = (await world.run("list", DEVICE, "--json")).json
    assert [(line["name"], line["version"], line["differs"]) for line in listed["shadows"]] == [("room", 3, 4)]
    deleted = await world.run("delete", DEVICE, "--name", "room", "--version", "3")
    assert deleted.status == 0 and "it was at version 3" in deleted.out
    assert (await world.door.wait_for(DEVICE, "room/delete/accepted"))["version"] == 3
    history = (await world.run("history", DEVICE, "--name", "room", "--json")).json["updates"]
    assert [(line["version"], line["actor"]) for line in history] == [
        (3, "alice"),
        (3, "alice"),
        (2, "alice"),
        (1, "alice"),
    ]
    assert history[0]["change"] is None and history[1]["change"] == {"desired": {"power": None, "fan": {"speed": None}}}


async def test_without_a_broker_it_is_written_and_the_device_gets_it_when_it_asks(world: World) -> None:
    world.settings = Settings(mqtt_url="mqtt://127.0.0.1:1")
    ran = await world.run("set", DEVICE, "power=on")
    assert ran.status == 0 and "motor-1 was not told, and is given it when it asks" in ran.err
    assert (await ask(world.door, DEVICE, "get"))["state"]["delta"] == {"power": "on"}


# --- the store ---------------------------------------------------------------------------------------------------------


WANT = WantShadowInput(
    device_id=DEVICE, patch={"power": "on"}, actor="alice", workflow_id="shadow:motor-1//t", mark="m1"
)
CHECK = CheckShadowInput(device_id=DEVICE, patch={"power": "on"}, workflow_id=WANT.workflow_id)


async def test_what_is_wanted_is_written_once_for_each_mark(db: Database) -> None:
    await add_devices(db, 1)
    store = ShadowSyncStore(db)
    first, messages = await store.want(WANT)
    again, reminder = await store.want(WANT)
    assert (first.version, again.version, len(messages), len(reminder)) == (1, 1, 3, 1)
    other, _ = await store.want(WANT.model_copy(update={"mark": "m2"}))
    assert other.version == 2
    assert await rows(db, "SELECT count(*) FROM shadow_history") == [(2,)]


async def test_a_report_is_seen_or_finds_the_wait_at_whichever_moment_it_comes(db: Database, broker: Broker) -> None:
    """Reports and looks at the same time, again and again: what a look has not seen is in the outbox."""
    async with shadow_door(db, broker, 1) as door:
        store = ShadowSyncStore(db)
        for number in range(25):
            await rows(db, "DELETE FROM workflow_outbox RETURNING 1")
            check = CHECK.model_copy(update={"patch": {"n": number}})
            (seen, _), _answer = await asyncio.gather(store.check(check), report(door, DEVICE, {"n": number}))
            told = await rows(db, "SELECT FROM workflow_outbox")
            assert seen.confirmed or told, number
            assert bool(await rows(db, "SELECT FROM device_waits")) is False


async def without_lock(connection: Any, device_id: str, **_: Any) -> Any:
    """`store.lifecycle.standing`, and nobody is kept from changing anything."""
    return await standing(connection, device_id)


@pytest.mark.parametrize("mutant", [False, True])
async def test_a_change_from_here_waits_for_a_batch_or_one_of_the_two_is_lost(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch, mutant: bool
) -> None:
    loaded, go_on, save = asyncio.Event(), asyncio.Event(), save_shadows

    async def slowly(*arguments: Any) -> None:
        loaded.set()
        await go_on.wait()
        await save(*arguments)

    monkeypatch.setattr(gateway.shadow, "save_shadows", slowly)
    if mutant:
        monkeypatch.setattr(shadows, "_LOCK", "SELECT %s::jsonb")
        monkeypatch.setattr(shadows, "standing", without_lock)
    async with shadow_door(db, broker, 1) as door:
        reporting = asyncio.create_task(report(door, DEVICE, {"power": "off"}))
        await asyncio.wait_for(loaded.wait(), 20)

        async def want() -> int:
            async with db.pool.connection() as connection:
                return (await set_desired(connection, DEVICE, "", {"power": "on"}, "alice")).after.version

        wanting = asyncio.create_task(want())
        await asyncio.wait([wanting], timeout=0.5)
        assert wanting.done() is mutant
        go_on.set()
        versions = sorted([(await reporting)["version"], await wanting])
    assert versions == ([1, 1] if mutant else [1, 2])
    found = await rows(db, "SELECT desired, reported FROM shadows")
    assert found == [(None if mutant else {"power": "on"}, {"power": "off"})]


@pytest.mark.parametrize("mutant", [False, True])
async def test_a_look_waits_for_a_report_that_is_being_taken_or_both_would_miss_each_other(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch, mutant: bool
) -> None:
    loaded, go_on, save = asyncio.Event(), asyncio.Event(), save_shadows

    async def slowly(*arguments: Any) -> None:
        loaded.set()
        await go_on.wait()
        await save(*arguments)

    monkeypatch.setattr(gateway.shadow, "save_shadows", slowly)
    if mutant:
        monkeypatch.setattr(syncing, "standing", without_lock)
    async with shadow_door(db, broker, 1) as door:
        reporting = asyncio.create_task(report(door, DEVICE, {"power": "on"}))
        await asyncio.wait_for(loaded.wait(), 20)
        looking = asyncio.create_task(ShadowSyncStore(db).check(CHECK))
        await asyncio.wait([looking], timeout=0.5)
        assert looking.done() is mutant
        go_on.set()
        await reporting
        seen, _ = await looking
    assert seen.confirmed is not mutant
    assert await rows(db, "SELECT FROM workflow_outbox") == []


async def test_a_device_that_is_barred_meanwhile_is_waited_for_no_longer(db: Database) -> None:
    await add_devices(db, 1)
    store = ShadowSyncStore(db)
    await store.want(WANT)
    async with db.pool.connection() as connection:
        await change_access(connection)
        await bar(connection, DEVICE, "alice", "cloned")
    with pytest.raises(RefusedError, match="nothing that it says is used"):
        await store.check(CHECK)
    assert await rows(db, "SELECT FROM device_waits") == []
    with pytest.raises(RefusedError, match="cannot change the shadow of motor-1"):
        await store.want(WANT.model_copy(update={"mark": "m2"}))


async def test_the_end_says_whether_the_device_is_there_and_whether_it_is_still_wanted(db: Database) -> None:
    await add_devices(db, 1)
    store, end = (
        ShadowSyncStore(db),
        EndShadowInput(**CHECK.model_dump(exclude={"remind"}), limit=timedelta(seconds=30)),
    )
    await store.want(WANT)
    seen = await store.end(end)
    assert 'within 30s: power is not reported, wanted "on"; no heartbeat of it has ever been heard' in seen.reason
    await rows(db, "INSERT INTO presence (device_id, last_heartbeat) VALUES ('motor-1', now()) RETURNING 1")
    async with db.pool.connection() as connection:
        await set_desired(connection, DEVICE, "", {"power": "off"}, "bob")
    seen = await store.end(end)
    assert "it is not offline" in seen.reason and "something else is wanted by now" in seen.reason


async def test_changes_from_here_keep_the_same_rules(db: Database) -> None:
    await add_devices(db, 2)
    async with db.pool.connection() as connection:
        for error, arguments in (
            (NotFoundError, ("nobody", "", {})),
            (InvalidInputError, (DEVICE, "config", {})),
            (InvalidInputError, (DEVICE, "", {"a": "x" * 9000})),
            (ConflictError, (DEVICE, "", {}, 3)),
        ):
            device, name, patch, *version = arguments
            with pytest.raises(error):
                await set_desired(connection, device, name, patch, "alice", *version)  # type: ignore[arg-type, misc]
        await set_desired(connection, DEVICE, "", {"a": 1}, "alice", 0)
        await set_desired(connection, DEVICE, "", None, "alice", 1)
        assert (await get_shadow(connection, DEVICE, "")).state() == {}
        with pytest.raises(ConflictError):
            await delete_shadow(connection, DEVICE, "", "alice", 7)
        await delete_shadow(connection, DEVICE, "", "alice", 2)
        await set_desired(connection, DEVICE, "x", {"a": 1}, "alice")
        assert (await clear_shadows(connection, DEVICE), await clear_shadows(connection, DEVICE)) == (1, 0)
        await happened(connection, [(DEVICE, DeviceHappening.SHADOW_REPORTED, {})])


# --- the reference agent -----------------------------------------------------------------------------------------------


async def test_the_agent_as_a_process_becomes_what_is_wanted_and_again_after_a_restart(
    db: Database, broker: Broker, tmp_path: Path
) -> None:
    async with serving_artifacts(free_port()) as publisher, shadow_door(db, broker, 7) as door:
        rig = Rig(tmp_path, broker, publisher)
        try:
            for wanted in ({"power": "on", "led": {"level": 3}}, {"led": {"level": 4, "rgb": [1, 2]}}):
                await desire(door, THING, wanted)
                await rig.start()
                async with asyncio.timeout(60):
                    while "delta" in (got := await ask(door, THING, "get"))["state"]:
                        await asyncio.sleep(0.1)
                assert await rig.end() == 0
            assert got["state"]["reported"] == {"power": "on", "led": {"level": 4, "rgb": [1, 2]}}
        finally:
            if rig.process is not None and rig.process.returncode is None:
                await rig.end(signal.SIGKILL)


async def test_the_version_of_a_shadow_that_was_deleted_is_forgotten_after_two_days(db: Database) -> None:
    await add_devices(db, 2)
    async with db.pool.connection() as connection:
        for device in (DEVICE, "motor-2"):
            await set_desired(connection, device, "", {"a": 1}, "alice")
        await delete_shadow(connection, DEVICE, "", "alice")
    assert await delete_old(db, timedelta(days=30)) == {}
    await rows(db, "UPDATE shadows SET deleted_at = deleted_at - interval '49 hours' RETURNING 1")
    assert await delete_old(db, timedelta(days=30)) == {"shadows": 1}
    assert await rows(db, "SELECT device_id FROM shadows") == [("motor-2",)]
