"""One short MQTT 3.1.1 session in raw bytes, for two questions that need no client: does a broker let these bytes pass
to and from this topic, and may this client id's session end. Not for messages that matter.

```python
await take_over(settings, "motor-7")        # whoever is connected under that id is thrown out
await echoes(settings, "engine@access", "tidegate/access/mosquitto/0f3a", seconds=1)
```
"""

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator

from models.errors import UnavailableError
from models.settings import Settings
from transport.connection import broker_address

CONNECT_SECONDS = 10.0
_CONNECT, _CONNACK, _PUBLISH, _SUBSCRIBE, _SUBACK, _DISCONNECT = 0x10, 0x20, 0x30, 0x82, 0x90, 0xE0
_REPEAT_SECONDS = 0.05
_LARGEST_PACKET = 64 * 1024


async def take_over(settings: Settings, client_id: str, *, forget: bool) -> None:
    """End the session of this client id, wherever it is connected. Raises UnavailableError.

    `forget`: what the broker keeps for it (subscriptions, queued messages) goes too.
    """
    async with _session(settings, client_id, clean=forget):
        pass


async def echoes(settings: Settings, client_id: str, topic: str, seconds: float) -> bool:
    """Whether a message that we publish to `topic` comes back to us within this time. Raises UnavailableError."""
    async with _session(settings, client_id, clean=True) as (reader, writer):
        writer.write(_packet(_SUBSCRIBE, b"\0\1" + _text(topic) + b"\0"))
        publishing = asyncio.create_task(_publish_again(writer, topic))
        try:
            async with asyncio.timeout(seconds):
                while (await _read(reader))[0] & 0xF0 != _PUBLISH:
                    continue
        except TimeoutError:
            return False
        except (OSError, EOFError) as error:
            raise UnavailableError(f"the MQTT broker closed the connection: {error or 'no reason given'}") from error
        finally:
            publishing.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await publishing
        return True


async def _publish_again(writer: asyncio.StreamWriter, topic: str) -> None:
    while True:
        writer.write(_packet(_PUBLISH, _text(topic) + b"?"))
        await writer.drain()
        await asyncio.sleep(_REPEAT_SECONDS)


@contextlib.asynccontextmanager
async def _session(
    settings: Settings, client_id: str, *, clean: bool
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, port, context = broker_address(settings)
    writer: asyncio.StreamWriter | None = None
    try:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                reader, writer = await asyncio.open_connection(host, port, ssl=context)
                body = _text("MQTT") + bytes([4, 2 if clean else 0]) + struct.pack("!H", 60) + _text(client_id)
                writer.write(_packet(_CONNECT, body))
                kind, answer = await _read(reader)
        except (OSError, EOFError, TimeoutError) as error:
            raise UnavailableError(
                f"cannot connect to the MQTT broker at {host}:{port}: {str(error) or type(error).__name__}"
            ) from error
        if kind != _CONNACK or answer[1:2] != b"\0":
            raise UnavailableError(f"the MQTT broker at {host}:{port} refused {client_id!r}: {answer.hex()}")
        yield reader, writer
        writer.write(_packet(_DISCONNECT, b""))
        with contextlib.suppress(OSError):
            await writer.drain()
    finally:
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(writer.wait_closed(), 2)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("!H", len(data)) + data


def _packet(kind: int, body: bytes) -> bytes:
    length, rest = b"", len(body)
    while True:
        rest, digit = rest >> 7, rest & 0x7F
        length += bytes([digit | (0x80 if rest else 0)])
        if not rest:
            return bytes([kind]) + length + body


async def _read(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """First byte and body of the next packet. Raises EOFError, OSError."""
    kind = (await reader.readexactly(1))[0]
    length = shift = 0
    while True:
        digit = (await reader.readexactly(1))[0]
        length |= (digit & 0x7F) << shift
        shift += 7
        if not digit & 0x80:
            break
    if length > _LARGEST_PACKET:
        raise OSError(f"a packet of {length} bytes where a short one was expected")
    return kind, await reader.readexactly(length)
