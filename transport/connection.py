"""MQTT for the server's side over gmqtt: one client that reconnects by itself, and bulk publishing.

Receiving: a handler is called with each message and a receipt, and hands the receipt back (`acknowledge`) when the message
has been used; the gateway does so only after its transaction has committed. There is no task and no future for a message,
and the acknowledgements of a batch are one write: over TLS a write is a record, which costs both sides more than all the
rest of a PUBACK. A receipt holds for the connection on which its message came. On a later one the broker delivers the
message again, and the same packet id may mean another message.

Publishing is at QoS 0: every message to a device is a hint or an answer that the device asks for again when it is lost.
"""

import asyncio
import logging
import ssl
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

import gmqtt
import structlog
from gmqtt.mqtt.constants import MQTTCommands, MQTTv311

from models.errors import InvalidInputError, UnavailableError
from models.settings import Settings

Receipt = tuple[object, bytes]
"""The link on which a message came, and the PUBACK that is due for it; no bytes for a message at QoS 0."""

Handler = Callable[[str, bytes, bool, bool, Receipt], None]
"""Topic, payload, whether the broker had kept the message (retained) from before the subscription, whether it may be
one that it has delivered before (duplicate), and the receipt to hand back once it has been used."""

_RETAIN, _DUPLICATE, _QOS = 0x01, 0x08, 0x06

CONNECT_SECONDS = 10.0
RETRY_SECONDS = 1.0
log = structlog.get_logger("mqtt")
_MUTE = logging.getLogger("tidegate.gmqtt")
_MUTE.setLevel(logging.ERROR)


def broker_address(settings: Settings) -> tuple[str, int, ssl.SSLContext | None]:
    """Host, port and TLS context of `settings.mqtt_url`. Raises InvalidInputError naming what is wrong."""
    if not settings.mqtt_url:
        raise InvalidInputError(
            "no MQTT broker is known: set TIDEGATE_MQTT_URL, or start the embedded stack with 'starter.py up'"
        )
    url = urlsplit(settings.mqtt_url)
    if url.scheme not in ("mqtt", "mqtts") or not url.hostname:
        raise InvalidInputError(f"TIDEGATE_MQTT_URL is {settings.mqtt_url!r}, expected mqtt://host:port or mqtts://...")
    if url.scheme == "mqtt":
        return url.hostname, url.port or 1883, None
    context = ssl.create_default_context(cafile=str(settings.mqtt_ca) if settings.mqtt_ca else None)
    if settings.mqtt_certificate:
        context.load_cert_chain(settings.mqtt_certificate, settings.mqtt_private_key)
    return url.hostname, url.port or 8883, context


class Connection:
    """One MQTT 3.1.1 session."""

    def __init__(self, client_id: str, *, keep_session: bool = False) -> None:
        self._client = gmqtt.Client(
            client_id, clean_session=not keep_session, optimistic_acknowledgement=False, logger=_MUTE
        )
        self._client.set_config({"reconnect_retries": -1, "reconnect_delay": 1})
        self._filters: list[str] = []
        self._granted: dict[int, asyncio.Future[tuple[int, ...]]] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._client.on_subscribe = self._on_subscribe
        self._client.on_connect = self._on_connect
        self.reconnects = 0
        self._was_connected = False

    async def open(self, settings: Settings, filters: Sequence[str] = (), handler: Handler | None = None) -> None:
        """Connect, subscribe, and read every SUBACK. Raises UnavailableError or InvalidInputError."""
        host, port, context = broker_address(settings)
        self._filters = list(filters)
        if handler is not None:
            self._receive_with(handler)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._client.connect(host, port, ssl=context or False, keepalive=30, version=MQTTv311)
        except (OSError, TimeoutError, gmqtt.mqtt.handler.MQTTConnectError) as error:
            raise UnavailableError(
                f"cannot connect to the MQTT broker at {host}:{port}: {error or 'no answer'}; "
                "start the stack with 'starter.py up', or check TIDEGATE_MQTT_URL"
            ) from error
        await self._subscribe()
        self._was_connected = True

    def _receive_with(self, handler: Handler) -> None:
        """Take PUBLISH packets apart here: gmqtt's own way makes a task for each message and a write for each PUBACK."""
        packages = self._client._package_handler

        def on_publish(first: int, packet: bytes) -> None:
            end = 2 + (packet[0] << 8 | packet[1])
            topic, puback = packet[2:end].decode("utf-8", "replace"), b""
            if first & _QOS:
                puback = b"\x40\x02" + packet[end : end + 2]
                end += 2
            receipt = (packages.current_connection, puback)
            handler(topic, packet[end:], bool(first & _RETAIN), bool(first & _DUPLICATE), receipt)

        packages._handler_cache[MQTTCommands.PUBLISH] = on_publish

    def acknowledge(self, receipts: Iterable[Receipt]) -> None:
        """These messages have been used. Receipts of a link that is gone are void: the broker delivers again."""
        link = self._client._package_handler.current_connection
        due = b"".join(puback for origin, puback in receipts if origin is link)
        if due and not link.is_closing():
            link.send_package(due)

    def collect_retained(self, take: Callable[[str, bytes], None]) -> None:
        """Before `open`: give what the broker had kept, and nothing else, to `take`."""

        def on_message(_client: Any, topic: Any, payload: bytes, _qos: int, properties: Any) -> int:
            if properties.get("retain") and isinstance(topic, str):
                take(topic, payload)
            return 0

        self._client.on_message = on_message

    async def _subscribe(self) -> None:
        """Subscribe one by one and wait for each SUBACK: what asks for an answer may be published only after it."""
        for topic_filter in self._filters:
            mid = self._client.subscribe(topic_filter, qos=1)
            answer = self._granted.setdefault(mid, asyncio.get_running_loop().create_future())
            async with asyncio.timeout(CONNECT_SECONDS):
                granted = await answer
            del self._granted[mid]
            if any(code >= 0x80 for code in granted):
                raise UnavailableError(
                    f"the broker refused the subscription {topic_filter!r}; on nats-server check max_ack_pending"
                )

    async def _subscribe_again(self) -> None:
        """After a reconnection: until it has worked, for a client that is connected and deaf would look alive."""
        while True:
            try:
                await self._subscribe()
                return
            except (UnavailableError, TimeoutError) as error:
                log.warning("cannot subscribe after a reconnection, trying again", reason=str(error))
                await asyncio.sleep(RETRY_SECONDS)

    def _on_subscribe(self, _client: Any, mid: int, granted: Sequence[int], _properties: Any) -> None:
        answer = self._granted.setdefault(mid, asyncio.get_running_loop().create_future())
        if not answer.done():
            answer.set_result(tuple(granted))

    def _on_connect(self, _client: Any, _flags: Any, _code: Any, _properties: Any) -> None:
        if self._was_connected:
            self.reconnects += 1
            task = asyncio.get_running_loop().create_task(self._subscribe_again())
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    @property
    def is_connected(self) -> bool:
        """Whether the broker has accepted and the link is up."""
        return bool(self._client.is_connected)

    def publish(self, topic: str, payload: bytes) -> None:
        """Send at QoS 0. While the link is down the message is dropped: devices ask again."""
        if self._client.is_connected:
            self._client.publish(topic, payload, qos=0)

    def publish_durably(self, topic: str, payload: bytes) -> None:
        """Send at QoS 1: the broker owes an acknowledgement, and its subscribers get it at least once. Dropped while the
        link is down."""
        if self._client.is_connected:
            self._client.publish(topic, payload, qos=1)

    def publish_retained(self, topic: str, payload: bytes) -> None:
        """Leave a message with the broker for whoever subscribes later; an empty one removes what was left."""
        self._client.publish(topic, payload, qos=0, retain=True)

    def pause(self, paused: bool) -> None:
        """Stop or go on reading from the broker: backpressure for a full queue."""
        transport = getattr(self._client._connection, "_transport", None)
        if transport is None or transport.is_closing():
            return
        if paused:
            transport.pause_reading()
        else:
            transport.resume_reading()

    async def close(self) -> None:
        """Disconnect in good order."""
        for task in self._background:
            task.cancel()
        if self._client._connection is not None:
            await self._client.disconnect()
