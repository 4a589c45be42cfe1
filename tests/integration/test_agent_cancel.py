"""A device that reboots ends its session, even when the session cannot be left in good order."""

import asyncio
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
