"""Clearing retained messages, on real brokers: judged by whoever subscribes next."""

import asyncio
from contextlib import suppress

import aiomqtt
import pytest

from models.errors import UnavailableError
from models.settings import Settings
from tests.conftest import Broker, free_port
from transport.connection import Connection
from transport.retained import PASSES, RetainedMessages

FILTERS = ("$aws/things/motor-1/#", "devices/motor-1/#")
OF_THE_DEVICE = (
    "devices/motor-1/heartbeat",
    "$aws/things/motor-1/jobs/notify",
    "$aws/things/motor-1/shadow/name/config/get",
)
OF_ANOTHER = "devices/motor-10/heartbeat"


@pytest.fixture
def settings(broker: Broker) -> Settings:
    return Settings(mqtt_url=f"mqtt://{broker.host}:{broker.port}")


async def retain(broker: Broker, *topics: str) -> None:
    async with aiomqtt.Client(broker.host, broker.port) as client:
        for topic in topics:
            await client.publish(topic, b"{}", qos=1, retain=True)


async def kept(broker: Broker) -> set[str]:
    found: set[str] = set()
    async with aiomqtt.Client(broker.host, broker.port) as client:
        await client.subscribe([("devices/#", 1), ("$aws/things/#", 1)])
        with suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                async for message in client.messages:
                    if message.retain:
                        found.add(str(message.topic))
    return found


async def test_what_is_kept_of_a_device_is_cleared_and_of_no_other(broker: Broker, settings: Settings) -> None:
    await retain(broker, *OF_THE_DEVICE, OF_ANOTHER)
    cleaner = RetainedMessages(settings, quiet_seconds=0.3)
    assert await cleaner.clear(FILTERS) == sorted(OF_THE_DEVICE)
    assert await kept(broker) == {OF_ANOTHER}
    assert await cleaner.clear(FILTERS) == []
    await cleaner.clear(["devices/#"])


async def test_messages_that_are_not_kept_are_left_alone(broker: Broker, settings: Settings) -> None:
    async with aiomqtt.Client(broker.host, broker.port) as client:
        over = asyncio.Event()

        async def chatter() -> None:
            while not over.is_set():
                await client.publish("devices/motor-1/heartbeat", b"{}")
                await asyncio.sleep(0.01)

        talking = asyncio.create_task(chatter())
        assert await RetainedMessages(settings, quiet_seconds=0.3).clear(FILTERS) == []
        over.set()
        await talking


async def test_somebody_who_keeps_writing_them_is_said_to(
    broker: Broker, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the mutant of looking again: a cleaner that does not clear is noticed."""
    await retain(broker, *OF_THE_DEVICE)
    with monkeypatch.context() as patched:
        patched.setattr(Connection, "publish_retained", lambda *_: None)
        with pytest.raises(UnavailableError, match="come back as often as they are cleared"):
            await RetainedMessages(settings, quiet_seconds=0.1).clear(FILTERS)
    assert PASSES > 1
    assert len(await RetainedMessages(settings, quiet_seconds=0.3).clear(FILTERS)) == 3


async def test_a_broker_that_does_not_answer_is_said_to() -> None:
    settings = Settings(mqtt_url=f"mqtt://127.0.0.1:{free_port()}")
    with pytest.raises(UnavailableError, match="cannot connect to the MQTT broker"):
        await RetainedMessages(settings).clear(FILTERS)
