"""Which MQTT broker a stack runs, and the question whether it answers; asked in raw bytes, for any broker alike."""

import asyncio
import os
import shutil
import ssl
from pathlib import Path
from typing import Literal

from models.errors import UnavailableError

BrokerKind = Literal["mosquitto", "nats"]

MAX_PACKET_BYTES = 256 * 1024
"""Largest message a broker takes: eight times what the gateway accepts, so that an oversized request is seen, answered
and counted there, and a hostile one is not carried at all."""

_CONNECT = bytes([0x10, 19, 0, 4]) + b"MQTT" + bytes([4, 2, 0, 10, 0, 7]) + b"tgprobe"
_CONNACK_ACCEPTED = bytes([0x20, 2, 0, 0])
_DISCONNECT = bytes([0xE0, 0])


def mosquitto_binary() -> Path | None:
    """Mosquitto, also where an ordinary user's PATH has no sbin; None where it is not installed."""
    places = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"))
    found = shutil.which("mosquitto", path=places)
    return Path(found) if found else None


def choose_broker(wanted: BrokerKind | None = None) -> BrokerKind:
    """Mosquitto where it is installed, else nats. Raises UnavailableError when Mosquitto is wanted and is not there."""
    if wanted == "mosquitto" and mosquitto_binary() is None:
        raise UnavailableError(
            "cannot start Mosquitto: it is not on the PATH; install it ('apt-get install mosquitto'), "
            "or leave the choice open to use nats-server"
        )
    return wanted or ("mosquitto" if mosquitto_binary() else "nats")


async def mqtt_answers(port: int, tls: ssl.SSLContext | None = None) -> bool:
    """Whether a broker on this loopback port accepts an MQTT 3.1.1 CONNECT. Raises OSError while nobody listens."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
    try:
        writer.write(_CONNECT)
        answer = await asyncio.wait_for(reader.readexactly(4), 2)
        writer.write(_DISCONNECT)
        await writer.drain()
    except (asyncio.IncompleteReadError, TimeoutError, OSError):
        return False
    finally:
        writer.close()
    return answer == _CONNACK_ACCEPTED
