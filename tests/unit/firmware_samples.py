"""What the firmware tests share: keys, a valid update, ways to break it, and modules with one defence switched off."""

import functools
import hashlib
import importlib
import inspect
from dataclasses import replace
from types import ModuleType
from typing import Any

from firmware.envelope import sign_envelope
from firmware.keys import TrustedKeys, generate_private_key
from firmware.manifest import (
    FIRMWARE_UPDATE,
    ORDER_PAYLOAD_TYPE,
    RELEASE_PAYLOAD_TYPE,
    Order,
    ReleaseStatement,
    encode_order,
    encode_release,
)
from firmware.verify import DeviceFacts

RELEASE_KEY = generate_private_key()
ORDER_KEY = generate_private_key()
STRANGER_KEY = generate_private_key()
TRUSTED = TrustedKeys.of(release=[RELEASE_KEY.public_key()], order=[ORDER_KEY.public_key()])

NOW = 1_800_000_000
JOB = "motor-1_3_0"
BASE_URL = "http://127.0.0.1:8080/files"
OLD_IMAGE = b"motor firmware 1.2.0 " * 300
NEW_IMAGE = b"motor firmware 1.3.0 " * 310


def digest(data: bytes) -> str:
    """Hex sha256."""
    return hashlib.sha256(data).hexdigest()


RELEASE = ReleaseStatement(
    product="motor-controller",
    version="1.3.0",
    hardware=("motor-v1", "motor-v2"),
    security_counter=5,
    sha256=digest(NEW_IMAGE),
    size_bytes=len(NEW_IMAGE),
    published_at=NOW - 86_400,
    expires_at=NOW + 7 * 86_400,
)
ORDER = Order(
    device_id="motor-7",
    job_id=JOB,
    attempt=2,
    operation=FIRMWARE_UPDATE,
    release_sha256=digest(encode_release(RELEASE)),
    issued_at=NOW - 60,
    expires_at=NOW + 3600,
    nonce="5e" * 16,
)
FACTS = DeviceFacts(
    device_id="motor-7",
    hardware="motor-v2",
    product="motor-controller",
    security_floor=5,
    running_sha256=digest(OLD_IMAGE),
    finished_orders=frozenset(),
    latest_known_time=NOW - 100_000,
)


def delta_entry(
    base: str = FACTS.running_sha256, sha256: str = "d1" * 32, size: int = 400, **other: Any
) -> dict[str, Any]:
    """An entry of a job document's `deltas`."""
    url = f"{BASE_URL}/artifacts/{sha256}"
    return {"base_sha256": base, "url": url, "sha256": sha256, "size": size, "codec": "bsdiff4", **other}


def document(
    release: ReleaseStatement = RELEASE,
    order: Order | None = None,
    *,
    release_key: Any = RELEASE_KEY,
    order_key: Any = ORDER_KEY,
    **changes: Any,
) -> dict[str, Any]:
    """A job document; the order is made to name the release unless one is given. `changes` replace its parts."""
    payload = encode_release(release)
    if order is None:
        order = replace(ORDER, release_sha256=digest(payload))
    whole = {
        "operation": FIRMWARE_UPDATE,
        "version": release.version,
        "order": sign_envelope(encode_order(order), ORDER_PAYLOAD_TYPE, order_key),
        "release": sign_envelope(payload, RELEASE_PAYLOAD_TYPE, release_key),
        "full": {
            "url": f"{BASE_URL}/artifacts/{release.sha256}",
            "sha256": release.sha256,
            "size": release.size_bytes,
            "compression": None,
        },
        "deltas": [delta_entry()],
    }
    return whole | changes


@functools.cache
def mutant(module: str, *changes: tuple[str, str]) -> ModuleType:
    """The same module without some defence: each change is (source text that occurs exactly once, what replaces it)."""
    original = importlib.import_module(module)
    source = inspect.getsource(original)
    for defence, instead in changes:
        assert source.count(defence) == 1, f"{defence!r} occurs {source.count(defence)} times in {module}"
        source = source.replace(defence, instead)
    changed = ModuleType(module)
    changed.__file__ = original.__file__
    exec(compile(source, f"<{module} without a defence>", "exec"), changed.__dict__)
    return changed
