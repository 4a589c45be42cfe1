"""`python -m bench.beats`: one side of the measured stream of heartbeats, in a process of its own; started by bench.heartbeats.

What it is to be comes as one line of JSON on standard input, and it says `ready` when it is connected.

- `publish`: devices that send heartbeats at QoS 1, as lean as they can be. Each line of standard input is how many they may
  have sent by now, altogether: whoever measures keeps them ahead of what has been committed, and not further.
- `discard`: one gmqtt client that takes every message and does nothing with it. It prints how many it has had.
- `one-by-one`: an aiomqtt client that writes each message with one statement and commits it. It prints how many it has.

All of them go on until standard input ends; publishers then report how many they sent and how many the broker acknowledged.
"""

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Literal, cast

import orjson
import uvloop
from pydantic import BaseModel

from agent.wire import connect_packet

TELL_SECONDS = 0.02
CHUNK = 200
"""Most messages in one write, and never two of one device: a device does not say two things in one millisecond."""
ACKNOWLEDGED_SECONDS = 20.0
_CONNACK_BYTES = 4
_PUBACK_BYTES = 4
_PAYLOAD = (
    b'{"deviceId":"%b","timestamp":%d,"uptime":%d,"freeMemory":%d,"cpuTemperature":48.5,"firmwareVersion":"1.4.2",'
    b'"networkSignalStrength":-61,"errorCount":0,"bootId":"boot-1"}'
)
INSERT = (
    "INSERT INTO heartbeats (device_id, at, device_time, uptime, free_memory, cpu_temperature, firmware_version, "
    "signal_strength, error_count, boot_id) VALUES (%s, clock_timestamp(), to_timestamp(%s), %s, %s, %s, %s, %s, %s, %s)"
)
"""What the requirements document's listener does with a heartbeat that it has read."""


class BeatsTask(BaseModel):
    """What one process is to be. `topic` has {} where the device's name goes, or + where a subscriber listens."""

    role: Literal["publish", "discard", "one-by-one"]
    host: str
    port: int
    topic: str
    devices: list[str] = []
    connections: int = 1
    database_url: str = ""


class Beats(asyncio.Protocol):
    """One connection of several devices, which beat one after the other."""

    def __init__(self, number: int, topic: str, devices: list[str]) -> None:
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.sent = 0
        self._number = number
        self._heads = [_head(topic.format(device)) for device in devices]
        self._names = [device.encode() for device in devices]
        self._bytes = 0
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)
        self._transport.write(connect_packet(f"bench-beats-{self._number}", 0))

    def data_received(self, data: bytes) -> None:
        if not self.ready.done():
            if data[0] != 0x20 or data[3]:
                self.ready.set_exception(ConnectionError(f"the broker refused the publishers: {data.hex()}"))
            else:
                self.ready.set_result(None)
        self._bytes += len(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ready.done():
            self.ready.set_exception(ConnectionError("the broker closed the connection of a publisher"))

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    @property
    def acknowledged(self) -> int:
        """PUBACKs so far: nothing else comes after the CONNACK."""
        return (self._bytes - _CONNACK_BYTES) // _PUBACK_BYTES

    async def send(self, count: int) -> None:
        """The next `count` heartbeats."""
        await self._writable.wait()
        now, devices = time.time_ns() // 1_000_000, len(self._names)
        packets: list[bytes] = []
        for number in range(self.sent, self.sent + count):
            turn, device = divmod(number, devices)
            payload = _PAYLOAD % (self._names[device], now, turn + 1, 120_000_000 + number % 4096)
            head = self._heads[device]
            size = len(head) + 2 + len(payload)
            packet_id = number % 65535 + 1
            packets += (
                bytes((0x32, size & 0x7F | 0x80, size >> 7)),
                head,
                packet_id.to_bytes(2, "big"),
                payload,
            )
        self.sent += count
        self._transport.write(b"".join(packets))

    def close(self) -> None:
        """Say DISCONNECT."""
        self._transport.write(b"\xe0\x00")
        self._transport.close()


def _head(topic: str) -> bytes:
    data = topic.encode()
    return len(data).to_bytes(2, "big") + data


async def publish(task: BeatsTask, lines: AsyncIterator[bytes]) -> None:
    """Send as many as each line allows, and say at the end how many that was."""
    loop = asyncio.get_running_loop()
    count = min(task.connections, len(task.devices))
    sessions = [Beats(number, task.topic, task.devices[number::count]) for number in range(count)]
    for session in sessions:
        await loop.create_connection(lambda session=session: session, task.host, task.port)  # type: ignore[misc]
        await session.ready
    _say("ready")
    sent, turn, chunk = 0, 0, min(CHUNK, len(task.devices) // count)
    async for line in lines:
        while (left := int(line) - sent) > 0:
            count = min(left, chunk)
            await sessions[turn % len(sessions)].send(count)
            sent, turn = sent + count, turn + 1
            await asyncio.sleep(0)
    async with asyncio.timeout(ACKNOWLEDGED_SECONDS):
        while sum(session.acknowledged for session in sessions) < sent:
            await asyncio.sleep(TELL_SECONDS)
    _say(orjson.dumps({"sent": sent, "acknowledged": sum(session.acknowledged for session in sessions)}).decode())
    for session in sessions:
        session.close()


async def discard(task: BeatsTask, lines: AsyncIterator[bytes]) -> None:
    """Take everything and do nothing with it."""
    import gmqtt
    from gmqtt.mqtt.constants import MQTTv311

    mute = logging.getLogger("bench.gmqtt")
    mute.setLevel(logging.ERROR)
    received, granted = 0, asyncio.Event()

    def on_message(*_: object) -> int:
        nonlocal received
        received += 1
        return 0

    client = gmqtt.Client("bench-discard", logger=mute)
    client.on_message = on_message
    client.on_subscribe = lambda *_: granted.set()
    await client.connect(task.host, task.port, version=MQTTv311)
    client.subscribe(task.topic.format("+"), qos=1)
    await granted.wait()
    _say("ready")
    telling = asyncio.create_task(_tell(lambda: received))
    async for _ in lines:
        continue
    telling.cancel()
    await client.disconnect()


async def one_by_one(task: BeatsTask, lines: AsyncIterator[bytes]) -> None:
    """Write each message when it comes: one statement, one commit."""
    import aiomqtt
    import psycopg

    written = 0

    async def write() -> None:
        nonlocal written
        async for message in client.messages:
            beat = orjson.loads(message.payload)
            await database.execute(
                INSERT,
                (
                    str(message.topic).split("/")[-2],
                    beat["timestamp"] / 1000,
                    beat["uptime"],
                    beat["freeMemory"],
                    beat["cpuTemperature"],
                    beat["firmwareVersion"],
                    beat["networkSignalStrength"],
                    beat["errorCount"],
                    beat["bootId"],
                ),
            )
            await database.commit()
            written += 1

    async with await psycopg.AsyncConnection.connect(task.database_url) as database:
        async with aiomqtt.Client(task.host, task.port, protocol=aiomqtt.ProtocolVersion.V311) as client:
            await client.subscribe(task.topic.format("+"), qos=1)
            _say("ready")
            working = [asyncio.create_task(write()), asyncio.create_task(_tell(lambda: written))]
            async for _ in lines:
                continue
            for job in working:
                job.cancel()


async def _tell(how_many: Callable[[], int]) -> None:
    while True:
        await asyncio.sleep(TELL_SECONDS)
        _say(str(how_many()))


def _say(line: str) -> None:
    print(line, flush=True)


async def _lines() -> AsyncIterator[bytes]:
    reader = asyncio.StreamReader(limit=2**22)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        yield line


async def main() -> None:
    """Be what the first line says."""
    lines = _lines()
    task = BeatsTask.model_validate_json(await anext(lines))
    roles = {"publish": publish, "discard": discard, "one-by-one": one_by_one}
    await roles[task.role](task, lines)


if __name__ == "__main__":
    uvloop.run(main())
