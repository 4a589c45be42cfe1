"""The server's MQTT connection on a real broker: what is acknowledged, when, and on which link."""

import asyncio
import uuid
from dataclasses import dataclass, field
from typing import Any

import aiomqtt
import pytest

from models.settings import Settings
from tests.conftest import Broker
from transport.connection import Connection, Receipt

TOPIC = "devices/motor-1/heartbeat"
SECONDS = 20


@dataclass
class Heard:
    """What a connection was given."""

    messages: list[tuple[bytes, bool, Receipt]] = field(default_factory=list)
    news: asyncio.Condition = field(default_factory=asyncio.Condition)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def receive(self, topic: str, payload: bytes, retained: bool, duplicate: bool, receipt: Receipt) -> None:
        assert topic == TOPIC and not retained
        self.messages.append((payload, duplicate, receipt))
        task = asyncio.get_running_loop().create_task(self._tell())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self) -> None:
        async with self.news:
            self.news.notify_all()

    async def wait_for(self, count: int) -> None:
        async with asyncio.timeout(SECONDS):
            async with self.news:
                await self.news.wait_for(lambda: len(self.messages) >= count)


async def publish(broker: Broker, *payloads: bytes) -> None:
    async with aiomqtt.Client(broker.host, broker.port) as client:
        for payload in payloads:
            await client.publish(TOPIC, payload, qos=1)


async def opened(broker: Broker, client_id: str) -> tuple[Connection, Heard]:
    heard, connection = Heard(), Connection(client_id, keep_session=True)
    await connection.open(Settings(mqtt_url=f"mqtt://{broker.host}:{broker.port}"), [TOPIC], heard.receive)
    return connection, heard


async def break_link(connection: Connection, heard: Heard, again: int) -> None:
    """The link breaks; the connection comes back by itself, and so do so many messages."""
    before = len(heard.messages)
    connection._client._connection._transport.abort()
    await heard.wait_for(before + again)


async def test_what_is_not_acknowledged_comes_again_and_says_so(broker: Broker) -> None:
    connection, heard = await opened(broker, f"c-{uuid.uuid4().hex}")
    try:
        await publish(broker, b"1", b"2", b"3")
        await heard.wait_for(3)
        connection.acknowledge([heard.messages[1][2]])
        await break_link(connection, heard, 2)
        assert [(payload, again) for payload, again, _ in heard.messages[3:]] == [(b"1", True), (b"3", True)]
        connection.acknowledge(receipt for _, _, receipt in heard.messages[3:])
        await break_link(connection, heard, 0)
        await publish_until_heard(broker, heard)
        assert [payload for payload, _, _ in heard.messages[5:]] == [b"last"], "what was acknowledged is over"
    finally:
        await forget(connection, broker)


async def publish_until_heard(broker: Broker, heard: Heard) -> None:
    before = len(heard.messages)
    await publish(broker, b"last")
    await heard.wait_for(before + 1)


async def forget(connection: Connection, broker: Broker) -> None:
    """The broker's session goes too."""
    await connection.close()
    identifier = connection._client._client_id
    async with aiomqtt.Client(broker.host, broker.port, identifier=identifier, clean_session=True):
        pass


async def acknowledged_too_late(broker: Broker, old: Any) -> list[bytes]:
    """A batch commits after its link broke, and the process dies before the second delivery was used. What comes then?

    `old`: what the receipts of the first delivery are by then.
    """
    name = f"c-{uuid.uuid4().hex}"
    connection, heard = await opened(broker, name)
    await publish(broker, b"1")
    await heard.wait_for(1)
    await break_link(connection, heard, 1)
    connection.acknowledge(old(connection, heard.messages[0][2]))
    await asyncio.sleep(0.2)  # for an acknowledgement that must not be sent
    connection._client.stop_reconnect()
    connection._client._connection._transport.abort()
    successor, then = await opened(broker, name)
    await publish_until_heard(broker, then)
    if then.messages[-1][0] != b"last":
        await then.wait_for(2)
    await forget(successor, broker)
    return sorted(payload for payload, _, _ in then.messages)


async def test_a_receipt_of_a_link_that_is_gone_acknowledges_nothing(broker: Broker) -> None:
    assert await acknowledged_too_late(broker, lambda _, receipt: [receipt]) == [b"1", b"last"]


async def test_if_it_did_a_message_would_be_over_that_nobody_has_used(broker: Broker) -> None:
    def taken_over(connection: Connection, receipt: Receipt) -> list[Receipt]:
        return [(connection._client._package_handler.current_connection, receipt[1])]

    assert await acknowledged_too_late(broker, taken_over) == [b"last"]


def test_the_part_of_gmqtt_that_is_replaced_is_still_there() -> None:
    packages = Connection("x")._client._package_handler
    assert isinstance(packages._handler_cache, dict)
    assert packages.__get_handler__(0x32) == packages._handle_publish_packet


@pytest.mark.parametrize("topic", [b"devices/\xff/heartbeat", b"x"])
async def test_a_topic_that_is_no_text_is_handed_on_as_what_it_can_be(topic: bytes) -> None:
    taken: list[Any] = []
    connection = Connection("x")
    connection._receive_with(lambda *message: taken.append(message))
    packages = connection._client._package_handler
    packages._handler_cache[0x30](0x3B, len(topic).to_bytes(2, "big") + topic + b"\x01\x02payload")
    ((text, payload, retained, duplicate, receipt),) = taken
    assert text == topic.decode("utf-8", "replace")
    assert (payload, retained, duplicate, receipt) == (b"payload", True, True, (None, b"\x40\x02\x01\x02"))
