"""A device that reboots ends its session, even when the session cannot be left in good order."""

import asyncio
import contextlib
from typing import Any

import aiomqtt
import pytest

from agent.client import Broker as BrokerAddress
from agent.client import JobsClient
from tests.conftest import Broker


async def test_a_cancelled_session_ends_even_if_disconnecting_fails(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = aiomqtt.Client.__aexit__

    async def failing(self: aiomqtt.Client, *details: Any) -> None:
        await original(self, *details)
        raise aiomqtt.MqttError("the disconnection was not answered")

    client = JobsClient("cancelled-1", BrokerAddress.at(f"mqtt://{broker.host}:{broker.port}"))
    session = asyncio.create_task(client.run())
    async with asyncio.timeout(10):
        await client.connected.wait()
    monkeypatch.setattr(aiomqtt.Client, "__aexit__", failing)
    session.cancel()
    done, _ = await asyncio.wait([session], timeout=5)
    assert done and session.cancelled()


async def test_a_cancelled_heartbeat_ends_even_if_publishing_hides_the_cancellation(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = JobsClient("cancelled-2", BrokerAddress.at(f"mqtt://{broker.host}:{broker.port}"))
    session = asyncio.create_task(client.run())
    async with asyncio.timeout(10):
        await client.connected.wait()

    async def publish(*_: Any, **__: Any) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise aiomqtt.MqttError("disconnected while publishing") from None

    monkeypatch.setattr(aiomqtt.Client, "publish", publish)
    for call in (client.heartbeat({}), client.request("start-next", body={})):
        task = asyncio.create_task(call)
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task], timeout=5)
        assert task.cancelled()
    session.cancel()
    await asyncio.wait([session], timeout=5)


@pytest.mark.parametrize("swallows", ["publish", "subscribe", "__aenter__"])
async def test_a_session_ends_even_if_a_call_forgets_its_cancellation(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, swallows: str
) -> None:
    """As `asyncio.wait_for` does in Python 3.11 when the result comes in the same moment."""
    original, reached = getattr(aiomqtt.Client, swallows), asyncio.Event()

    async def forgetful(self: aiomqtt.Client, *arguments: Any, **more: Any) -> Any:
        result = await original(self, *arguments, **more)
        reached.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return result

    monkeypatch.setattr(aiomqtt.Client, swallows, forgetful)
    client = JobsClient("cancelled-3", BrokerAddress.at(f"mqtt://{broker.host}:{broker.port}"))
    session = asyncio.create_task(client.run())
    task = asyncio.create_task(client.publish("devices/cancelled-3/commands/get", {}))
    async with asyncio.timeout(10):
        await reached.wait()
    for each in (task, session):
        each.cancel()
    done, _ = await asyncio.wait([task, session], timeout=5)
    assert done == {task, session} and task.cancelled() and session.cancelled()
