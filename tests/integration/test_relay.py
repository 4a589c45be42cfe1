"""The outbox on a real PostgreSQL and a real Temporal: signals are delivered at least once, and never lost."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio
from temporalio import workflow
from temporalio.client import WorkflowHandle
from temporalio.service import RPCError, RPCStatusCode
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from activities.relay import BATCH, OutboxRelay
from models.identity import DeviceEvent, DeviceHappening
from models.protocol import heartbeat_topic
from store.engine import Database
from store.waits import expect, happened
from tests.conftest import Broker
from tests.integration.rollout_setup import prepare
from tests.integration.test_gateway_jobs import open_door
from tests.temporal_server import development_server
from workflows.options import DEVICE_EVENT

QUEUE = "relay-test"


@workflow.defn
class Listener:
    """Keeps what it is told, until it is told enough."""

    def __init__(self) -> None:
        self.events: list[DeviceEvent] = []

    @workflow.run
    async def run(self, number: int) -> list[DeviceEvent]:
        await workflow.wait_condition(lambda: len(self.events) >= number)
        return self.events

    @workflow.signal(name=DEVICE_EVENT)
    def told(self, event: DeviceEvent) -> None:
        self.events.append(event)

    @workflow.query
    def heard(self) -> list[DeviceEvent]:
        return self.events


@pytest_asyncio.fixture(scope="module")
async def server() -> AsyncIterator[WorkflowEnvironment]:
    """A development server with a worker."""
    async with development_server() as environment:
        runner = UnsandboxedWorkflowRunner()
        async with Worker(environment.client, task_queue=QUEUE, workflows=[Listener], workflow_runner=runner):
            yield environment


async def listener(server: WorkflowEnvironment, number: int) -> WorkflowHandle[Any, Any]:
    """A workflow that ends when it was told `number` times."""
    return await server.client.start_workflow(
        Listener.run, number, id=f"provision:{uuid4().hex[:12]}", task_queue=QUEUE
    )


async def tell(db: Database, workflow_id: str, *things: str) -> None:
    """These devices connect, and the workflow waits for each."""
    async with db.pool.connection() as connection:
        for thing in things:
            await expect(connection, thing, workflow_id, {DeviceHappening.CONNECTED: None})
        await happened(connection, [(thing, DeviceHappening.CONNECTED, {}) for thing in things])


async def waiting(db: Database) -> int:
    async with db.pool.connection() as connection:
        row = await (await connection.execute("SELECT count(*) FROM workflow_outbox")).fetchone()
    assert row is not None
    return int(row[0])


async def test_what_a_device_does_reaches_the_workflow_that_waits_for_it(
    db: Database, broker: Broker, server: WorkflowEnvironment
) -> None:
    fleet, stop = await prepare(db, 2), asyncio.Event()
    relaying = asyncio.create_task(OutboxRelay(db, server.client, DEVICE_EVENT).run(stop))
    handle = await listener(server, 2)
    async with open_door(db, broker, fleet) as door:
        async with db.pool.connection() as connection:
            both = {DeviceHappening.CONNECTED: None, DeviceHappening.HEARTBEAT: None}
            await expect(connection, "motor-1", handle.id, both)
        await door.client.publish(heartbeat_topic("motor-1"), b"{}", qos=1)
        events = await asyncio.wait_for(handle.result(), 15)
    assert {event.happening for event in events} == {DeviceHappening.CONNECTED, DeviceHappening.HEARTBEAT}
    assert {event.device_id for event in events} == {"motor-1"} and all(event.at.tzinfo for event in events)
    stop.set()
    await asyncio.wait_for(relaying, 10)
    assert await waiting(db) == 0


class Halting(OutboxRelay):
    """Stands still between the signals and the deletion of their rows, as one that is about to be killed."""

    async def _forget(self, connection: Any, taken: Any) -> None:
        self.halted.set()
        await asyncio.Event().wait()


class Careless(OutboxRelay):
    """Deletes first, signals then."""

    async def deliver(self) -> int:
        async with self.db.pool.connection() as connection:
            cursor = await connection.execute("DELETE FROM workflow_outbox RETURNING workflow_id, event")
            rows = await cursor.fetchall()
        self.halted.set()
        await asyncio.Event().wait()
        return len(rows)


async def killed_half_way(db: Database, server: WorkflowEnvironment, kind: Any, workflow_id: str) -> None:
    """One relay is killed in the middle; another one delivers what is left."""
    await tell(db, workflow_id, "motor-1", "motor-2")
    first = kind(db, server.client, DEVICE_EVENT)
    first.halted = asyncio.Event()
    task = asyncio.create_task(first.deliver())
    await asyncio.wait_for(first.halted.wait(), 10)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    second = OutboxRelay(db, server.client, DEVICE_EVENT)
    while await waiting(db):
        await second.deliver()


async def test_a_relay_killed_between_signal_and_deletion_delivers_again(
    db: Database, server: WorkflowEnvironment
) -> None:
    handle = await listener(server, 4)
    await killed_half_way(db, server, Halting, handle.id)
    events = await asyncio.wait_for(handle.result(), 10)
    assert sorted(event.device_id for event in events) == ["motor-1", "motor-1", "motor-2", "motor-2"]


async def test_a_relay_that_deletes_first_loses_what_it_held(db: Database, server: WorkflowEnvironment) -> None:
    handle = await listener(server, 2)
    await killed_half_way(db, server, Careless, handle.id)
    assert await handle.query(Listener.heard) == []
    await handle.terminate("the test is over")


async def test_signals_for_workflows_that_do_not_run_are_dropped_and_hold_nobody_up(
    db: Database, server: WorkflowEnvironment
) -> None:
    over = await listener(server, 0)
    await over.result()
    handle = await listener(server, 1)
    await tell(db, over.id, "motor-1")
    await tell(db, "provision:never-was", "motor-2")
    async with db.pool.connection() as connection:
        await connection.execute("INSERT INTO workflow_outbox (workflow_id, event) VALUES ('x', '{\"no\": 1}')")
    await tell(db, handle.id, "motor-3")
    assert await OutboxRelay(db, server.client, DEVICE_EVENT).deliver() == 4
    assert [event.device_id for event in await asyncio.wait_for(handle.result(), 10)] == ["motor-3"]
    assert await waiting(db) == 0


async def test_two_relays_share_the_outbox_and_what_temporal_refuses_stays(
    db: Database, server: WorkflowEnvironment, monkeypatch: Any
) -> None:
    handle = await listener(server, 120)
    await tell(db, handle.id, *(f"motor-{i}" for i in range(120)))
    stop, relays = asyncio.Event(), [OutboxRelay(db, server.client, DEVICE_EVENT) for _ in range(2)]
    original, refused = relays[0]._send, 0

    async def refusing(workflow_id: str, event: Any) -> None:
        nonlocal refused
        if refused < 5:
            refused += 1
            raise RPCError("away", RPCStatusCode.UNAVAILABLE, b"")
        await original(workflow_id, event)

    monkeypatch.setattr(relays[0], "_send", refusing)
    running = [asyncio.create_task(relay.run(stop)) for relay in relays]
    events = await asyncio.wait_for(handle.result(), 30)
    assert {event.device_id for event in events} == {f"motor-{i}" for i in range(120)} and refused
    stop.set()
    await asyncio.gather(*running)
    assert await waiting(db) == 0


async def test_signals_that_nobody_can_deliver_hold_up_no_other(
    db: Database, server: WorkflowEnvironment, monkeypatch: Any
) -> None:
    stuck, handle = await listener(server, 1), await listener(server, 1)
    await tell(db, stuck.id, *(f"motor-{i}" for i in range(BATCH)))
    await tell(db, handle.id, "motor-x")
    relay = OutboxRelay(db, server.client, DEVICE_EVENT)
    original = relay._send

    async def refusing(workflow_id: str, event: Any) -> None:
        if workflow_id == stuck.id:
            raise RPCError("away", RPCStatusCode.UNAVAILABLE, b"")
        await original(workflow_id, event)

    monkeypatch.setattr(relay, "_send", refusing)
    for _ in range(2):
        with pytest.raises(RPCError):
            await relay.deliver()
    assert [event.device_id for event in await asyncio.wait_for(handle.result(), 10)] == ["motor-x"]
    assert await waiting(db) == BATCH
    await stuck.terminate("the test is over")
