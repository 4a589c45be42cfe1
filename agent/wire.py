"""A lean MQTT 3.1.1 session for the fleet simulator: just what thousands of devices in one process need.

CONNECT, SUBSCRIBE, PUBLISH at QoS 1 out and at QoS 0 in, PUBACK, PINGREQ; no task and no timer of its own. A general
client (aiomqtt, gmqtt) costs a simulated device more than all its cryptography; the real agent uses aiomqtt
(client.py). Packet formats: OASIS MQTT 3.1.1, sections 2 and 3.
"""

import asyncio
import struct
from collections.abc import Callable, Sequence
from typing import cast

_CONNACK, _PUBLISH, _SUBACK = 0x20, 0x30, 0x90
_PINGREQ = b"\xc0\x00"
_SUBACK_FAILURE = 0x80

Received = Callable[[str, memoryview], None]


def _length(size: int) -> bytes:
    if size < 128:
        return bytes((size,))
    encoded = bytearray()
    while True:
        size, low = divmod(size, 128)
        encoded.append(low | (0x80 if size else 0))
        if not size:
            return bytes(encoded)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">H", len(data)) + data


def _packet(kind: int, body: bytes) -> bytes:
    return bytes((kind,)) + _length(len(body)) + body


def connect_packet(client_id: str, keepalive_seconds: int) -> bytes:
    """CONNECT with a clean session."""
    return _packet(0x10, b"\x00\x04MQTT\x04\x02" + struct.pack(">H", keepalive_seconds) + _text(client_id))


def subscribe_packet(packet_id: int, filters: Sequence[str]) -> bytes:
    """SUBSCRIBE at QoS 0."""
    return _packet(0x82, struct.pack(">H", packet_id) + b"".join(_text(name) + b"\x00" for name in filters))


def publish_packet(packet_id: int, topic: str, payload: bytes) -> bytes:
    """PUBLISH at QoS 1."""
    return _packet(0x32, b"".join((_text(topic), struct.pack(">H", packet_id), payload)))


class WireSession(asyncio.Protocol):
    """One connection. `ready` is done once connected and every subscription granted, or failed."""

    def __init__(self, client_id: str, filters: Sequence[str], received: Received, lost: Callable[[], None]) -> None:
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._client_id = client_id
        self._filters = filters
        self._received = received
        self._lost = lost
        self._transport: asyncio.WriteTransport | None = None
        self._buffer = bytearray()
        self._packet_id = 0
        self._awaited = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is one without saying so
        self._transport.write(connect_packet(self._client_id, 0))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if not self.ready.done():
            self.ready.set_exception(ConnectionError(f"the broker closed the connection of {self._client_id}"))
        self._lost()

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        start, end = 0, len(buffer)
        with memoryview(buffer) as view:
            while end - start >= 2:
                size, at, shift = 0, start + 1, 0
                while at < end and buffer[at] & 0x80:
                    size |= (buffer[at] & 0x7F) << shift
                    at, shift = at + 1, shift + 7
                if at >= end:
                    break
                size |= buffer[at] << shift
                at += 1
                if at + size > end:
                    break
                with view[at : at + size] as body:
                    self._packet(buffer[start], body)
                start = at + size
        del buffer[:start]

    def publish(self, topic: str, payload: bytes) -> None:
        """Send a message; dropped while there is no connection."""
        if self._transport is not None:
            self._transport.write(publish_packet(self._next_id(), topic, payload))

    def ping(self) -> None:
        """Keep the connection from looking dead to what lies between."""
        if self._transport is not None:
            self._transport.write(_PINGREQ)

    def close(self) -> None:
        """Say DISCONNECT and close."""
        if self._transport is not None:
            self._transport.write(b"\xe0\x00")
            self._transport.close()

    def _packet(self, first: int, body: memoryview) -> None:
        kind = first & 0xF0
        if kind == _PUBLISH:
            size = body[0] << 8 | body[1]
            rest = 2 + size + (2 if first & 0x06 else 0)
            with body[rest:] as payload:
                self._received(str(body[2 : 2 + size], "utf-8"), payload)
        elif kind == _CONNACK:
            self._connected(body[1])
        elif kind == _SUBACK:
            self._granted(bytes(body[2:]))

    def _connected(self, code: int) -> None:
        if code or self._transport is None:
            self._fail(f"the broker refused {self._client_id}: code {code}")
            return
        for start in range(0, len(self._filters), 200):
            self._awaited += 1
            self._transport.write(subscribe_packet(self._next_id(), self._filters[start : start + 200]))

    def _granted(self, codes: bytes) -> None:
        if any(code >= _SUBACK_FAILURE for code in codes):
            self._fail(f"the broker refused a subscription of {self._client_id}")
        self._awaited -= 1
        if self._awaited == 0 and not self.ready.done():
            self.ready.set_result(None)

    def _fail(self, reason: str) -> None:
        if not self.ready.done():
            self.ready.set_exception(ConnectionError(reason))
        self.close()

    def _next_id(self) -> int:
        self._packet_id = self._packet_id % 65535 + 1
        return self._packet_id
