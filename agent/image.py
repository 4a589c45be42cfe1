"""What an image does when it runs. The model cannot execute firmware, so an image may say in its last line what it does.

`tidegate-image: {"version":"1.3.0","does":"crash"}` at the end of the bytes makes a test image; any other image, real
firmware included, runs well. The fleet simulator decides by its seed instead.

>>> behaviour_of(declared_image("1.3.0", Behaviour.CRASH)), behaviour_of(b"real firmware")
(<Behaviour.CRASH: 'crash'>, <Behaviour.HEALTHY: 'healthy'>)
"""

from enum import StrEnum
from typing import Any

import orjson

_MARK = b"\ntidegate-image: "
_MAX_LINE_BYTES = 300


class Behaviour(StrEnum):
    """CRASH: resets at once. HANG: stops feeding the watchdog. NO_NETWORK: runs and reaches nobody. SILENT: works, and
    never says another word. SELF_TEST: its own test fails."""

    HEALTHY = "healthy"
    CRASH = "crash"
    HANG = "hang"
    NO_NETWORK = "no-network"
    SILENT = "silent"
    SELF_TEST = "self-test"


def declared_image(version: str, does: Behaviour = Behaviour.HEALTHY, body: bytes = b"") -> bytes:
    """An image that says what it is and does."""
    return body + _MARK + orjson.dumps({"version": version, "does": does}) + b"\n"


def behaviour_of(image: bytes) -> Behaviour:
    """What the image does when it runs."""
    return Behaviour(_declared(image).get("does", Behaviour.HEALTHY))


def version_in(image: bytes) -> str | None:
    """The version that the running image itself claims; None where it claims none."""
    version = _declared(image).get("version")
    return version if isinstance(version, str) else None


def _declared(image: bytes) -> dict[str, Any]:
    _, mark, line = image[-_MAX_LINE_BYTES:].rpartition(_MARK)
    if not mark:
        return {}
    try:
        declared = orjson.loads(line)
    except orjson.JSONDecodeError:
        return {}
    return declared if isinstance(declared, dict) else {}
