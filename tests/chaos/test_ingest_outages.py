"""Broker, PostgreSQL and gateway fail under load: nothing acknowledged is lost, nothing counts twice, no false alarm.

What "acknowledged" means:

- A request about shadows or jobs is acknowledged by its `accepted`, which is published after the commit.
- A heartbeat has no answer. What a device gets for it is the broker's PUBACK: the broker has it. The gateway sends the
  broker its own PUBACK only after the transaction that wrote the heartbeat down has committed, and the broker keeps the
  message for the gateway's session until then. So a heartbeat that the broker has acknowledged ends up in the history,
  whoever dies, as long as the broker keeps what it has.
- Mosquitto writes its sessions down when it ends in good order and every now and then; killed by SIGKILL it forgets
  what came since. That loss is the broker's and no server behind it can undo it, so the broker is ended by SIGTERM here.

Three grounds of their own fail side by side, since each spends most of its time waiting.
"""

import asyncio
import collections
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiomqtt
import pytest

from tests.chaos.outage_setup import LIMIT, Device, Ground, ground
from tests.conftest import mosquitto_binary

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(mosquitto_binary() is None, reason="Mosquitto is not installed"),
    pytest.mark.timeout(400),
]
DEVICES = 15
SILENT = f"motor-{DEVICES + 1}"
"""Says one thing and no more: the sweep has to find it, and it alone."""


async def without_broker(ground: Ground) -> None:
    """The broker is gone for a minute."""
    await ground.end("broker", signal.SIGTERM)
    await asyncio.sleep(60)
    ground.start_broker()
    await asyncio.sleep(10)


async def without_postgres(ground: Ground) -> None:
    """PostgreSQL is gone for half a minute, as in a crash: it ends without a checkpoint and has to recover."""
    await ground.end("postgres", signal.SIGQUIT)
    await asyncio.sleep(30)
    await ground.start_postgres()
    await asyncio.sleep(10)


async def gateway_killed(ground: Ground) -> None:
    """The gateway is killed eight times, at whatever it is; meanwhile one device really is silent for too long."""
    assert ground.gateway is not None
    for number in range(8):
        await ground.gateway.ready()
        await asyncio.sleep(1 + number * 0.13)
        ground.gateway.kill()
        await asyncio.sleep(0.4)
    async with asyncio.timeout(LIMIT.total_seconds() + 60):
        while SILENT not in ground.offline:
            await asyncio.sleep(0.5)


async def under_load(folder: Path, outage: Callable[[Ground], Awaitable[None]]) -> str:
    """Let devices work, let it fail, let them finish; then compare what they remember with what was written down."""
    async with ground(folder, DEVICES + 1) as made:
        stop = asyncio.Event()
        devices = [Device(f"motor-{i}", made.broker_port, stop) for i in range(1, DEVICES + 1)]
        silent = Device(SILENT, made.broker_port, stop)
        assert made.gateway is not None
        async with asyncio.timeout(60):
            while made.starts == 0:
                await asyncio.sleep(0.1)
        await made.gateway.ready()
        working = [asyncio.create_task(device.live()) for device in devices]
        async with aiomqtt.Client("127.0.0.1", made.broker_port) as client:
            await silent.beat(client)
        await asyncio.sleep(5)
        await outage(made)
        stop.set()
        async with asyncio.timeout(120):
            await asyncio.gather(*working)
            await until_drained(made, devices)
        expected = {SILENT} if outage is gateway_killed else set()
        assert made.offline == expected and made.sweeps > 10, "nobody else was silent"
        return await compare(made, devices)


async def until_drained(made: Ground, devices: list[Device]) -> None:
    """Until the last heartbeat of each device is written down: what came before it is, too, for the order holds."""
    last = {device.thing: device.beats[-1] for device in devices}
    query = "SELECT device_id, max((extract(epoch FROM device_time) * 1000)::bigint) FROM heartbeats GROUP BY 1"
    while True:
        written = dict(await made.rows(query))
        if all(written.get(thing, 0) >= time for thing, time in last.items()):
            return
        await asyncio.sleep(0.2)


async def compare(made: Ground, devices: list[Device]) -> str:
    """Nothing is missing and nothing is there twice."""
    beats = collections.Counter(
        await made.rows("SELECT device_id, (extract(epoch FROM device_time) * 1000)::bigint FROM heartbeats")
    )
    history: dict[str, list[tuple[int, int]]] = {}
    for thing, version, number in await made.rows(
        "SELECT device_id, version, (change->'reported'->>'n')::bigint FROM shadow_history ORDER BY device_id, version"
    ):
        history.setdefault(thing, []).append((version, number))
    executions = {
        thing: (state, version)
        for thing, state, version in await made.rows("SELECT device_id, state, version_number FROM executions")
    }
    for device in devices:
        lost = [time for time in device.beats if (device.thing, time) not in beats]
        assert lost == [], f"{device.thing}: {len(lost)} of {len(device.beats)} acknowledged heartbeats are lost"
        versions = [version for version, _ in history[device.thing]]
        numbers = [number for _, number in history[device.thing]]
        assert versions == list(range(1, len(versions) + 1)), f"{device.thing}: versions {versions}"
        assert len(set(numbers)) == len(numbers), f"{device.thing}: a change was applied twice"
        assert device.changes.items() <= {number: version for version, number in history[device.thing]}.items()
        assert executions[device.thing] == ("SUCCEEDED", device.execution_version), device.thing
        assert device.reports <= device.execution_version - 1, f"{device.thing}: an accepted report was not counted"
    twice = [key for key, times in beats.items() if times > 1]
    assert twice == [], f"{len(twice)} heartbeats are written down twice"
    assert await made.rows("SELECT code, topic FROM quarantine") == []
    return (
        f"{len(beats)} heartbeats, {sum(len(d.changes) for d in devices)} changes and {sum(d.reports for d in devices)} "
        f"reports acknowledged; {sum(map(len, history.values()))} changes applied; {made.starts} gateways, "
        f"{sum(d.reconnects for d in devices)} connections of {len(devices)} devices, {made.sweeps} sweeps"
    )


async def test_nothing_acknowledged_is_lost_or_counts_twice_and_no_device_is_called_offline(tmp_path: Path) -> None:
    outages: dict[str, Callable[[Ground], Awaitable[None]]]
    outages = {"broker": without_broker, "postgres": without_postgres, "gateway": gateway_killed}
    for name in outages:
        (tmp_path / name).mkdir()
    async with asyncio.TaskGroup() as group:
        found = {
            name: group.create_task(under_load(tmp_path / name, outage), name=name) for name, outage in outages.items()
        }
    for name, task in found.items():
        print(f"{name}: {task.result()}")
