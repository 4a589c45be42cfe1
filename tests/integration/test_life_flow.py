"""The lifecycle workflows whole: the real Temporal, PostgreSQL, relay, broker and activities; a device that is played.

The device's part is what the gateway and the enrolment server write (tests/integration/life_setup.py). Row 37 of the
threats: a device is decommissioned at a random moment of a rollout that is running.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiomqtt
import pytest
import pytest_asyncio
from temporalio import activity
from temporalio.client import WorkflowExecutionStatus, WorkflowHandle
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.service import RPCError
from temporalio.testing import WorkflowEnvironment

from activities.artifact_store import ArtifactStore
from activities.artifacts import ArtifactActivities
from activities.configuration import ConfigurationActivities
from activities.relay import OutboxRelay
from activities.rollouts import RolloutActivities
from domain.gate import judge_answered
from firmware.keys import generate_private_key
from models.errors import RefusedError
from models.identity import (
    ConfigureDeviceInput,
    ConfigureOutcome,
    DecommissionDeviceInput,
    PublishCrlsInput,
    PublishCrlsResult,
    RotateCertificateInput,
    RotateOutcome,
)
from models.ids import configure_workflow_id, rotate_workflow_id
from models.lifecycle import HintConfigurationInput, RotateFleetInput
from models.protocol import command_topic, config_topic, heartbeat_topic, jobs_topic
from models.rollout import Outcome, StartRolloutInput, Verdict, WaveCounts
from models.settings import Settings
from models.spec import GateSpec
from store.configuring import ConfiguringStore
from store.deltas import DeltaStore
from store.devicetraffic import bar_clone
from store.engine import Database
from store.executions import ExecutionStore
from store.rollouts import RolloutStore
from tests.conftest import Broker
from tests.integration.hinted_devices import HintedDevices
from tests.integration.life_setup import (
    add_authority,
    add_certificate,
    alerts,
    answer,
    audit_of,
    confirm,
    one,
    report_configuration,
    rows,
    waits,
)
from tests.integration.rollout_setup import add_devices, add_release, recount, specification
from tests.integration.test_cli_registry import Desk
from tests.temporal_server import BINARIES
from tests.workflow.life_stage import life_workers
from transport.publisher import Publisher
from transport.retained import RetainedMessages
from workers.lifecycle import Lifecycle
from workflows import options
from workflows.client import register_search_attributes, start_rollout
from workflows.lifecycle_client import (
    TemporalFlows,
    ensure_rotation_schedule,
    start_configuration,
    start_decommission,
    start_fleet_rotation,
    start_rotation,
)
from workflows.rollout import RolloutWorkflow
from workflows.wave import WaveWorkflow

PATIENCE_SECONDS = 30.0
DEVICE = "motor-1"


@pytest_asyncio.fixture(scope="module")
async def temporal(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[WorkflowEnvironment]:
    """The development server on a database file, as in the embedded stack."""
    file = tmp_path_factory.mktemp("temporal") / "temporal.db"
    async with await WorkflowEnvironment.start_local(
        data_converter=pydantic_data_converter,
        dev_server_existing_path=str(BINARIES / "temporal"),
        dev_server_database_filename=str(file),
        dev_server_extra_args=["--sqlite-pragma", "journal_mode=wal", "--sqlite-pragma", "synchronous=normal"],
        dev_server_log_level="error",
    ) as environment:
        await register_search_attributes(environment.client)
        yield environment


@dataclass
class World:
    """Devices, and all that sees to their lives."""

    temporal: WorkflowEnvironment
    db: Database
    broker: Broker
    settings: Settings
    devices: HintedDevices
    """The fleet in a rollout."""
    heard: list[tuple[str, bytes]] = field(default_factory=list)
    """What has been published since a test began to listen."""
    lists_signed: int = 0
    handles: list[WorkflowHandle[Any, Any]] = field(default_factory=list)

    async def configure(self, config: dict[str, Any], **given: Any) -> WorkflowHandle[Any, Any]:
        """Want a configuration of the device."""
        asked = ConfigureDeviceInput(device_id=DEVICE, config=config, actor="alice", **given)
        return self._kept(await start_configuration(self.temporal.client, asked))

    async def rotate(self, **given: Any) -> WorkflowHandle[Any, Any]:
        """Rotate its certificate."""
        asked = RotateCertificateInput(device_id=DEVICE, actor="alice", **given)
        return self._kept(await start_rotation(self.temporal.client, asked))

    async def decommission(self, device_id: str = DEVICE, **given: Any) -> WorkflowHandle[Any, Any]:
        """End it."""
        asked = DecommissionDeviceInput(device_id=device_id, actor="alice", reason="scrapped", **given)
        return self._kept(await start_decommission(self.temporal.client, asked))

    def _kept(self, handle: WorkflowHandle[Any, Any]) -> WorkflowHandle[Any, Any]:
        self.handles.append(handle)
        return handle

    async def result(self, handle: WorkflowHandle[Any, Any]) -> Any:
        """Its result."""
        return await asyncio.wait_for(handle.result(), PATIENCE_SECONDS)

    async def until(self, what: Callable[[], Any]) -> Any:
        """Wait until something is true of the database."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            if found := await what():
                return found
            await asyncio.sleep(0.02)
        pytest.fail("it did not come to be")

    async def runs(self, workflow_id: str) -> bool:
        """Whether a workflow of this id is running."""
        described = await self.temporal.client.get_workflow_handle(workflow_id).describe()
        return described.status is WorkflowExecutionStatus.RUNNING

    async def listen(self, topic: str) -> None:
        """Hear what is published to the device from now on."""
        ready = asyncio.Event()

        async def hear() -> None:
            async with aiomqtt.Client(self.broker.host, self.broker.port) as client:
                await client.subscribe(topic)
                ready.set()
                async for message in client.messages:
                    self.heard.append((str(message.topic), bytes(message.payload)))  # type: ignore[arg-type]

        self._listener = asyncio.create_task(hear())
        await asyncio.wait_for(ready.wait(), PATIENCE_SECONDS)

    async def stop_listening(self) -> None:
        """End it."""
        listener: asyncio.Task[None] | None = getattr(self, "_listener", None)
        if listener is not None:
            listener.cancel()
            with suppress(asyncio.CancelledError):
                await listener

    @activity.defn(name=options.PUBLISH_CRLS)
    async def publish_crls(self, _asked: PublishCrlsInput) -> PublishCrlsResult:
        """What a worker with the CA's key would do."""
        self.lists_signed += 1
        return PublishCrlsResult()


@pytest_asyncio.fixture
async def world(temporal: WorkflowEnvironment, db: Database, broker: Broker, tmp_path: Path) -> AsyncIterator[World]:
    """An empty database with one device that has a certificate, workers and the relay."""
    settings = Settings(mqtt_url=f"mqtt://{broker.host}:{broker.port}")
    publisher = await Publisher.connect(settings)
    world = World(temporal, db, broker, settings, HintedDevices(ExecutionStore(db), seconds=0.15))
    lifecycle = Lifecycle.of(db, temporal.client, publisher, settings)
    stop = asyncio.Event()
    await add_authority(db)
    activities = [*lifecycle.short, *lifecycle.lasting, world.publish_crls, *_of_rollouts(world, tmp_path)]
    async with life_workers(temporal.client, activities, [RolloutWorkflow, WaveWorkflow]):
        relay = asyncio.create_task(OutboxRelay(db, temporal.client, options.DEVICE_EVENT).run(stop))
        yield world
        for handle in world.handles:
            with suppress(RPCError):  # it has ended, or does so just now
                await handle.terminate("the test is over")
        stop.set()
        await relay
    await world.stop_listening()
    await publisher.close()


@pytest.fixture
async def device(world: World) -> str:
    await add_devices(world.db, 1)
    return await add_certificate(world.db, DEVICE)


# --- configuration -----------------------------------------------------------------------------------------------------


async def test_a_device_is_told_what_differs_and_its_report_ends_the_wait(world: World, device: str) -> None:
    await world.listen(config_topic(DEVICE, "#"))
    handle = await world.configure({"interval": 5})
    await world.until(lambda: _true(world.heard))
    topic, payload = world.heard[0]
    assert topic == config_topic(DEVICE, "update", "delta")
    assert json.loads(payload)["state"] == {"version": 1, "config": {"interval": 5}}
    await report_configuration(world.db, DEVICE, 1, {"interval": 5})
    result = await world.result(handle)
    assert (result.outcome, result.version) == (ConfigureOutcome.APPLIED, 1)
    assert await waits(world.db) == []


async def test_of_two_configurations_the_newer_is_waited_for_and_both_are_in_the_history(
    world: World, device: str
) -> None:
    await world.configure({"interval": 5})
    await world.until(lambda: waits(world.db))
    handle = await world.configure({"interval": 7})
    await world.until(lambda: rows(world.db, "SELECT FROM device_waits WHERE at_least = 2"))
    await report_configuration(world.db, DEVICE, 1)
    await report_configuration(world.db, DEVICE, 2)
    assert (await world.result(handle)).version == 2
    kept = await rows(world.db, "SELECT version, config FROM device_configurations ORDER BY version")
    assert [row["config"] for row in kept] == [{"interval": 5}, {"interval": 7}]


async def test_what_a_device_runs_already_needs_no_report(world: World, device: str) -> None:
    handle = await world.configure({"interval": 5})
    await world.until(lambda: waits(world.db))
    await report_configuration(world.db, DEVICE, 1)
    await world.result(handle)
    assert (await world.result(await world.configure({"interval": 5}))).version == 1


async def test_a_configuration_that_no_device_can_take_is_refused_with_the_reason(world: World, device: str) -> None:
    result = await world.result(await world.configure({"text": "x" * 9000}))
    assert (result.outcome, result.version) == (ConfigureOutcome.REFUSED, 0)
    assert "bytes as JSON, at most 8192" in result.reason


async def test_a_device_that_is_barred_meanwhile_is_waited_for_no_longer(world: World, device: str) -> None:
    activities = ConfigurationActivities(ConfiguringStore(world.db), world.devices)
    await world.configure({"interval": 5})
    await world.until(lambda: waits(world.db))
    async with world.db.pool.connection() as connection:
        await connection.execute("UPDATE devices SET barred_at = now(), barred_reason = 'cloned'")
    with pytest.raises(RefusedError, match="nothing that it says is used"):
        await activities.hint_configuration(HintConfigurationInput(device_id=DEVICE, version=1))
    assert await waits(world.db) == []


async def test_a_limit_that_passes_leaves_it_wanted_and_nothing_waiting(world: World, device: str) -> None:
    result = await world.result(await world.configure({"interval": 5}, limit=timedelta(seconds=1)))
    assert result.outcome is ConfigureOutcome.TIMED_OUT
    assert await waits(world.db) == []
    assert (await one(world.db, "SELECT desired_config_version AS v FROM devices"))["v"] == 1
    assert (await audit_of(world.db, DEVICE))[-2:] == ["configuration.wanted", "configuration.unanswered"]


# --- rotation ----------------------------------------------------------------------------------------------------------


async def test_a_device_that_is_asked_comes_and_connects(world: World, device: str) -> None:
    await world.listen(command_topic(DEVICE, "notify"))
    handle = await world.rotate(reason="a drill")
    await world.until(lambda: _true(world.heard))
    new = await add_certificate(world.db, DEVICE, 2, confirmed=False, tell=True)
    await confirm(world.db, DEVICE, new)
    result = await world.result(handle)
    assert (result.outcome, result.certificate_id, result.revoked) == (RotateOutcome.ROTATED, new, (device,))
    assert world.lists_signed == 1
    assert await answer(world.db, DEVICE) is None, "a command that is done is handed out no more"
    assert await waits(world.db) == []


async def test_a_device_that_fetches_and_does_not_connect_is_left_with_its_old_certificate(
    world: World, device: str
) -> None:
    handle = await world.rotate(overlap=timedelta(seconds=1))
    await world.until(lambda: waits(world.db))
    new = await add_certificate(world.db, DEVICE, 2, confirmed=False, tell=True)
    result = await world.result(handle)
    assert (result.outcome, result.certificate_id, result.revoked) == (RotateOutcome.REVERTED, device, (new,))
    assert await alerts(world.db) == {"rotation-reverted": DEVICE}
    assert world.lists_signed == 1


async def test_a_device_that_does_not_come_keeps_its_certificate(world: World, device: str) -> None:
    result = await world.result(await world.rotate(renew_within=timedelta(seconds=1)))
    assert (result.outcome, result.certificate_id) == (RotateOutcome.UNANSWERED, device)
    assert (await one(world.db, "SELECT state FROM certificates"))["state"] == "valid"


# --- the fleet ---------------------------------------------------------------------------------------------------------


async def test_a_sweep_asks_all_that_are_due_at_its_pace_and_leaves_the_others_alone(world: World) -> None:
    await add_devices(world.db, 8)
    for n in range(1, 9):
        await add_certificate(world.db, f"motor-{n}", age=timedelta(days=80 if n <= 6 else 10))
    begun = time.monotonic()
    handle = await start_fleet_rotation(world.temporal.client, RotateFleetInput(actor="alice", per_minute=300))
    result = await world.result(handle)
    assert (result.due, result.started, result.running) == (6, 6, 0)
    assert time.monotonic() - begun >= 5 * 0.2
    asked = await world.until(lambda: _enough(world, 6))
    assert {row["device_id"] for row in asked} == {f"motor-{n}" for n in range(1, 7)}
    again = await start_fleet_rotation(world.temporal.client, RotateFleetInput(actor="alice", per_minute=60_000))
    assert (await world.result(again)).due == 0
    await _end_rotations(world, 8)


async def test_a_sweep_that_is_interrupted_goes_on_and_asks_nobody_twice(world: World) -> None:
    await add_devices(world.db, 12)
    for n in range(1, 13):
        await add_certificate(world.db, f"motor-{n}", age=timedelta(days=80))
    handle = await start_fleet_rotation(world.temporal.client, RotateFleetInput(actor="alice", per_minute=600))
    await world.until(lambda: _enough(world, 4))
    await handle.terminate("the history is lost")
    again = await start_fleet_rotation(world.temporal.client, RotateFleetInput(actor="alice", per_minute=6000))
    assert (await world.result(again)).due <= 8
    asked = await world.until(lambda: _enough(world, 12))
    assert len(asked) == len({row["device_id"] for row in asked}) == 12
    await _end_rotations(world, 12)


async def test_the_schedule_is_made_once_and_skips_what_overlaps(world: World) -> None:
    client = world.temporal.client
    assert [await ensure_rotation_schedule(client, RotateFleetInput()) for _ in range(2)] == [True, False]
    schedule = client.get_schedule_handle("tidegate-rotation")
    described = await schedule.describe()
    policy = described.schedule.policy
    assert (policy.overlap.name, policy.catchup_window) == ("SKIP", options.CATCH_UP)
    await schedule.trigger()
    await world.until(lambda: _swept(world))
    await schedule.delete()


# --- the end -----------------------------------------------------------------------------------------------------------


async def test_a_device_that_answers_is_wiped_retired_and_nothing_of_it_is_left(world: World, device: str) -> None:
    await world.configure({"interval": 5})
    await world.rotate()
    await world.until(lambda: _waiting(world, 2))
    await _retain(world, DEVICE)
    await world.listen(command_topic(DEVICE, "notify"))
    handle = await world.decommission()
    await world.until(lambda: rows(world.db, "SELECT FROM device_commands WHERE operation = 'wipe-credentials'"))
    assert not await world.runs(configure_workflow_id(DEVICE))
    assert not await world.runs(rotate_workflow_id(DEVICE))
    while (done := await answer(world.db, DEVICE)) != "wipe-credentials":
        assert done == "rotate-certificate"
    result = await world.result(handle)
    assert (result.wiped, result.certificates_revoked, result.retained_cleared) == (True, 1, 4)
    assert result.serial_number == "motor/1"
    assert await _retained(world, DEVICE) == []
    assert await waits(world.db) == []
    assert world.lists_signed == 1
    assert world.heard
    assert (await audit_of(world.db, DEVICE))[-1] == "device.decommissioned"


async def test_without_ending_its_workflows_and_clearing_its_topics_a_decommissioned_device_leaves_both_behind(
    world: World, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(*_: object) -> bool:
        return False

    async def no_topics(*_: object) -> tuple[str, ...]:
        return ()

    monkeypatch.setattr(TemporalFlows, "end", nothing)
    monkeypatch.setattr(RetainedMessages, "clear", no_topics)
    await world.rotate()
    await world.until(lambda: _waiting(world, 1))
    await _retain(world, DEVICE)
    await world.result(await world.decommission(wipe_within=timedelta(0)))
    assert await world.runs(rotate_workflow_id(DEVICE))
    assert len(await _retained(world, DEVICE)) == 4


async def test_a_device_that_never_answers_is_retired_all_the_same(world: World, device: str) -> None:
    result = await world.result(await world.decommission(wipe_within=timedelta(seconds=1)))
    assert not result.wiped
    assert (await one(world.db, "SELECT status FROM devices"))["status"] == "retired"


async def test_a_broker_that_does_not_follow_is_alerted_of_and_one_that_does_is_waited_for(
    world: World, device: str
) -> None:
    async with world.db.pool.connection() as connection:
        await connection.execute("INSERT INTO brokers (broker_id) VALUES ('quick'), ('stuck')")
    handle = await world.decommission(wipe_within=timedelta(0), broker_within=timedelta(seconds=1))
    await world.until(lambda: rows(world.db, "SELECT FROM devices WHERE status = 'retired'"))
    async with world.db.pool.connection() as connection:
        await connection.execute("UPDATE brokers SET applied_revision = 1000 WHERE broker_id = 'quick'")
    result = await world.result(handle)
    assert "broker stuck does not shut it out yet" in result.reason
    assert await alerts(world.db) == {"broker-behind": "stuck"}


async def test_a_workflow_that_is_started_as_the_device_is_retired_refuses_by_itself(world: World, device: str) -> None:
    await world.result(await world.decommission(wipe_within=timedelta(0)))
    assert (await world.result(await world.configure({"a": 1}))).outcome is ConfigureOutcome.REFUSED
    assert (await world.result(await world.rotate())).outcome is RotateOutcome.REFUSED
    assert await waits(world.db) == []


@pytest.mark.parametrize("seed", range(4))
async def test_row_37_a_device_decommissioned_in_the_middle_of_its_update_leaves_nothing_behind(
    world: World, seed: int
) -> None:
    rng = random.Random(seed)
    store = RolloutStore(world.db)
    await add_devices(world.db, 40)
    await add_release(world.db, generate_private_key())
    victims = [f"motor-{n}" for n in rng.sample(range(1, 41), 4)]
    for victim in victims:
        await add_certificate(world.db, victim)
        await _retain(world, victim)
    name = f"motor-{seed}"
    spec = specification(
        name=name,
        waves=[{"name": "canary", "size": "25%"}, {"name": "fleet", "size": "100%"}],
        pace={"in_flight": 6, "per_minute": None},
    )
    rollout = await start_rollout(world.temporal.client, StartRolloutInput(spec=spec, requested_by="alice"))
    await world.until(lambda: rows(world.db, "SELECT FROM jobs WHERE exposed > 0"))
    await asyncio.sleep(rng.random())
    ends = [await world.decommission(victim, wipe_within=timedelta(0)) for victim in victims]
    results = [await world.result(end) for end in ends]
    result = await asyncio.wait_for(rollout.result(), PATIENCE_SECONDS)
    await world.devices.settle()
    view = await store.show(name)
    assert result.outcome is Outcome.SUCCEEDED
    assert await recount(world.db, view.job_no) == []
    assert view.in_flight == 0
    states = await rows(world.db, "SELECT device_id, state FROM executions WHERE device_id = ANY(%s)", victims)
    assert {row["state"] for row in states} <= {"REMOVED", "SUCCEEDED"}
    removed = sum(row["state"] == "REMOVED" for row in states)
    assert view.counts.removed == removed == sum(end.executions_removed for end in results)
    assert result.succeeded == 40 - removed
    for victim in victims:
        assert await _retained(world, victim) == []
        orphans = world.temporal.client.list_workflows(f'TidegateDevice = "{victim}" AND ExecutionStatus = "Running"')
        assert [each.id async for each in orphans] == []
    assert await rows(world.db, "SELECT FROM device_waits") == []


async def test_a_gate_that_waited_for_removed_devices_would_hold_the_rollout(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = WaveCounts(succeeded=8, removed=2, gate_succeeded=8)
    completion = specification().completion
    assert judge_answered(counts, GateSpec(), completion).verdict is Verdict.PROMOTE
    monkeypatch.setattr(WaveCounts, "awaited", WaveCounts.total)
    assert judge_answered(counts, GateSpec(), completion).verdict is Verdict.HOLD


# --- as a person types it ------------------------------------------------------------------------------------------------


@pytest.fixture
def desk(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    desk = Desk(tmp_path, world.db.url)
    address = world.temporal.client.service_client.config.target_host
    desk.environment |= {"TIDEGATE_TEMPORAL_ADDRESS": address}
    return desk


async def test_a_configuration_is_wanted_shown_and_waited_for(world: World, device: str, desk: Desk) -> None:
    async def take() -> None:
        await world.until(lambda: waits(world.db))
        await report_configuration(world.db, DEVICE, 1)

    taking = asyncio.create_task(take())
    ran = await _run(
        desk, "device", "configure", DEVICE, "--set", "interval=5", "--set", "led.on=true", "--wait", "20s", "--json"
    )
    await taking
    assert (ran.status, ran.json["outcome"], ran.json["version"]) == (0, "applied", 1)
    shown = await _run(desk, "device", "configuration", DEVICE, "--json")
    assert (shown.json["state"], shown.json["reported"]) == ("in-sync", {"interval": 5, "led": {"on": True}})
    changed = await _run(desk, "device", "configure", DEVICE, "--set", "interval=7", "--wait", "1s", "--json")
    assert (changed.status, changed.json["config"]) == (5, {"interval": 7, "led": {"on": True}})
    assert "pending" in (await _run(desk, "device", "configuration", DEVICE)).out
    whole = desk.file("config.json", '{"interval": 9}')
    assert (await _run(desk, "device", "configure", DEVICE, "--file", whole)).status == 0
    for wrong in (["--set", "interval"], ["--file", desk.file("bad.json", "[1]")], ["--file", "nothing.json"], []):
        assert (await _run(desk, "device", "configure", DEVICE, *wrong)).status == 2
    world.handles.append(world.temporal.client.get_workflow_handle(configure_workflow_id(DEVICE)))


async def test_certificates_are_shown_rotated_and_revoked(world: World, device: str, desk: Desk) -> None:
    async def come() -> None:
        await world.until(lambda: waits(world.db))
        await confirm(world.db, DEVICE, await add_certificate(world.db, DEVICE, 2, confirmed=False, tell=True))

    coming = asyncio.create_task(come())
    ran = await _run(desk, "device", "rotate", DEVICE, "--reason", "a drill", "--wait", "20s", "--json")
    await coming
    assert (ran.status, ran.json["outcome"], ran.json["revoked"]) == (0, "rotated", [device])
    listed = (await _run(desk, "device", "certificates", DEVICE, "--json")).json["certificates"]
    assert [(c["generation"], c["state"]) for c in listed] == [(2, "valid"), (1, "revoked")]
    revoked = await _run(desk, "device", "revoke", DEVICE, "--reason", "stolen", "--code", "keyCompromise", "--json")
    assert (revoked.status, revoked.json["revoked"]) == (0, [f"{DEVICE}/2"])
    assert (
        (await _run(desk, "device", "revoke", DEVICE, "--reason", "stolen"))
        .out.strip()
        .endswith("had no valid certificate")
    )
    refused = await _run(desk, "device", "rotate", DEVICE)
    assert refused.status == 6
    assert "nothing that it says is used since" in refused.err
    assert (await _run(desk, "device", "rotate", "nobody")).status == 2
    assert "revoked" in (await _run(desk, "device", "certificates", DEVICE)).out


async def test_a_barred_device_is_heard_again_only_with_a_valid_certificate(
    world: World, device: str, desk: Desk
) -> None:
    early = await _run(desk, "device", "unbar", DEVICE, "--reason", "why not")
    assert (early.status, "it is not barred" in early.err) == (6, True)
    async with world.db.pool.connection() as connection:
        await connection.execute("INSERT INTO presence (device_id, last_heartbeat) VALUES (%s, now())", (DEVICE,))
        assert await bar_clone(connection, DEVICE) is not None
    assert (await _run(desk, "alert", "list", "--json")).json["alerts"][0]["rule"] == "cloned-device"
    heard = await _run(desk, "device", "unbar", DEVICE, "--reason", "the test bench", "--json")
    assert (heard.status, heard.json["barred"]) == (0, False)
    shown = (await _run(desk, "device", "show", DEVICE, "--json")).json
    assert (shown["status"], shown["barred_at"]) == ("active", None)
    assert (await _run(desk, "alert", "list", "--json")).json["alerts"] == []
    await _run(desk, "device", "revoke", DEVICE, "--reason", "stolen")
    late = await _run(desk, "device", "unbar", DEVICE, "--reason", "found again")
    assert (late.status, "no valid certificate; it has to enrol again" in late.err) == (6, True)


async def test_a_device_is_decommissioned_and_its_serial_number_released(world: World, device: str, desk: Desk) -> None:
    ran = await _run(desk, "device", "decommission", DEVICE, "--wipe-within", "0", "--wait", "--json")
    assert (ran.status, ran.json["certificates_revoked"]) == (0, 1)
    again = await _run(desk, "device", "decommission", DEVICE)
    assert again.status == 6
    assert "it is retired already" in again.err
    for command in (["configure", DEVICE, "--set", "a=1"], ["rotate", DEVICE]):
        refused = await _run(desk, "device", *command)
        assert refused.status == 6
        assert "it is retired; its serial number can enrol again after 'device release motor/1'" in refused.err
    released = await _run(desk, "device", "release", "motor/1", "--reason", "repaired", "--json")
    assert released.json == {"serial_number": "motor/1", "device_id": DEVICE}
    assert (await _run(desk, "device", "release", "motor/1")).status == 2


async def test_what_is_under_way_is_not_started_twice(world: World, device: str, desk: Desk) -> None:
    await world.rotate()
    assert "a rotation of it runs already" in (await _run(desk, "device", "rotate", DEVICE)).err
    await world.decommission()
    twice = await _run(desk, "device", "decommission", DEVICE)
    assert (twice.status, "that is under way already" in twice.err) == (6, True)


async def test_the_rotation_of_the_fleet_is_started_and_shown(world: World, desk: Desk) -> None:
    await add_devices(world.db, 3)
    for n in (1, 2, 3):
        await add_certificate(world.db, f"motor-{n}", age=timedelta(days=80 if n < 3 else 10))
    before = (await _run(desk, "rotation", "status", "--json")).json
    assert (before["valid"], before["due"]) == (3, 2)
    ran = await _run(
        desk, "rotation", "start", "--per-minute", 6000, "--site", "berlin", "--reason", "a drill", "--json"
    )
    assert (ran.status, ran.json["due"]) == (0, 2)
    await world.until(lambda: _enough(world, 2))
    after = await _run(desk, "rotation", "status")
    assert "asked in 24 h" in after.out
    await _end_rotations(world, 3)


# --- inside --------------------------------------------------------------------------------------------------------------


def _of_rollouts(world: World, folder: Path) -> list[Any]:
    store = RolloutStore(world.db)
    rollouts = RolloutActivities(store, world.devices)
    artifacts = ArtifactActivities(ArtifactStore.open(folder.as_uri()), DeltaStore(world.db), store)
    return [
        rollouts.plan_rollout, rollouts.write_plain_document, rollouts.drive_wave, rollouts.close_wave,
        rollouts.check_promotable, rollouts.set_job_status, rollouts.adjust_pace, rollouts.finish_rollout,
        artifacts.prepare_artifacts,
    ]  # fmt: skip


async def _run(desk: Desk, *words: object) -> Any:
    return await asyncio.to_thread(desk.run, *words)


async def _true(value: Any) -> bool:
    return bool(value)


async def _enough(world: World, count: int) -> list[dict[str, Any]]:
    asked = await rows(world.db, "SELECT device_id FROM device_commands WHERE operation = 'rotate-certificate'")
    return asked if len(asked) >= count else []


async def _waiting(world: World, workflows: int) -> bool:
    return len({workflow for workflow, _ in await waits(world.db)}) == workflows


async def _swept(world: World) -> bool:
    found = world.temporal.client.list_workflows('WorkflowType = "FleetRotationWorkflow" AND TidegateKind = "upkeep"')
    return any([each.id.startswith("tidegate-rotation") and each.close_time is not None async for each in found])


async def _end_rotations(world: World, devices: int) -> None:
    flows = TemporalFlows(world.temporal.client)
    for n in range(1, devices + 1):
        await flows.end(rotate_workflow_id(f"motor-{n}"), "the test is over")


async def _retain(world: World, device_id: str) -> None:
    """What devices and old versions of the engine may have left with the broker."""
    async with aiomqtt.Client(world.broker.host, world.broker.port) as client:
        for topic in (
            heartbeat_topic(device_id),
            command_topic(device_id, "notify"),
            config_topic(device_id, "update", "delta"),
            jobs_topic(device_id, "notify-next"),
        ):
            await client.publish(topic, b"{}", qos=1, retain=True)


async def _retained(world: World, device_id: str) -> list[str]:
    """What whoever takes its name would be given."""
    found: list[str] = []
    async with aiomqtt.Client(world.broker.host, world.broker.port) as client:
        await client.subscribe([(f"devices/{device_id}/#", 1), (f"$aws/things/{device_id}/#", 1)])
        with suppress(TimeoutError):
            async with asyncio.timeout(0.4):
                async for message in client.messages:
                    if message.retain:
                        found.append(str(message.topic))
    return found
