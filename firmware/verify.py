"""May this device install this update? Both signatures, then every rule, in one function without I/O.

Nothing in a job document is trusted but what a verified envelope says: the order (online key) must be for this device,
this job, an attempt that has not ended, and a moment that is not over; the release (offline key) must be the one that
the order names, for this product and hardware, not below the device's security floor, and not expired. URLs, sizes and
digests of the document are used only where they agree with it.

A device whose clock is wrong does not accept what has expired: the time used is never before `latest_known_time`, the
latest moment the device has seen signed. `VerifiedUpdate.latest_known_time` is its new value, to be kept.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from firmware.envelope import open_envelope
from firmware.errors import (
    DowngradeError,
    ExpiredError,
    IncompatibleError,
    MisdirectedError,
    ReplayError,
    StatementError,
)
from firmware.keys import TrustedKeys
from firmware.manifest import (
    FIRMWARE_UPDATE,
    MAX_DELTAS,
    MAX_IMAGE_BYTES,
    ORDER_PAYLOAD_TYPE,
    RELEASE_PAYLOAD_TYPE,
    Order,
    ReleaseStatement,
    decode_order,
    decode_release,
    last_attempt,
)
from models.ids import SHA256

MAX_URL_CHARS = 2048

_ARTIFACT_URL = re.compile(
    r"https?://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
    r"(?:/(?!\.{1,2}/)[A-Za-z0-9._~-]+)*/artifacts/([0-9a-f]{64})"
)
"""`http(s)://host[:port][/path]/artifacts/<sha256>`: no user, no query, no `..`, no escape that could mean another."""


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What a device knows of itself, from its own storage.

    `product`: None until the first release has been confirmed. `security_floor`: counter of the last confirmed image.
    `finished_orders`: nonces and attempt keys (`manifest.attempt_key`) of orders that have ended, however.
    `latest_known_time`: epoch seconds; at least the build time of the running image.
    """

    device_id: str
    hardware: str
    product: str | None
    security_floor: int
    running_sha256: str
    finished_orders: frozenset[str]
    latest_known_time: int


@dataclass(frozen=True, slots=True)
class FullImage:
    """Where the image itself can be had. Digest and size are the signed ones."""

    url: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class DeltaOffer:
    """A delta for the image that runs. What it gives is checked against the release, not against this."""

    url: str
    base_sha256: str
    sha256: str
    size_bytes: int
    codec: str


@dataclass(frozen=True, slots=True)
class VerifiedUpdate:
    """An update that may be installed. `deltas`: those for the running image, smallest first, each smaller than it."""

    release: ReleaseStatement
    order: Order
    full: FullImage
    deltas: tuple[DeltaOffer, ...]
    latest_known_time: int


def verify_update(
    document: Mapping[str, Any], keys: TrustedKeys, facts: DeviceFacts, now: int, *, job_id: str
) -> VerifiedUpdate:
    """The update that `document` orders, if this device may install it.

    Args:
        document: a firmware-update job document (docs/protocol.md), as parsed from JSON; it is not changed.
        keys: the keys the device was made with.
        facts: what the device knows of itself.
        now: the device's clock, in epoch seconds; it may be wrong.
        job_id: the execution under which the document came.

    Raises:
        FirmwareError: the first rule that did not hold; `.failure_class` is what to report.
    """
    if not isinstance(document, Mapping):
        raise StatementError(f"cannot read the job document: expected an object, found {type(document).__name__}")
    order = decode_order(open_envelope(_part(document, "order"), ORDER_PAYLOAD_TYPE, keys.order))
    release_payload = open_envelope(_part(document, "release"), RELEASE_PAYLOAD_TYPE, keys.release)
    release = decode_release(release_payload)
    _check_order(order, facts, job_id, document)
    _check_release(release, release_payload, order, facts, document)
    # What is signed was signed in the past, so it moves a clock that is behind, and never one that is right.
    latest = max(facts.latest_known_time, order.issued_at, release.published_at)
    _check_times(order, release, max(now, latest))
    return VerifiedUpdate(
        release=release,
        order=order,
        full=_full(_part(document, "full"), release),
        deltas=_deltas(document.get("deltas", []), release, order, facts),
        latest_known_time=latest,
    )


def _check_order(order: Order, facts: DeviceFacts, job_id: str, document: Mapping[str, Any]) -> None:
    if order.device_id != facts.device_id:
        raise MisdirectedError(f"refused the order: it is for device {order.device_id}, this is {facts.device_id}")
    if order.job_id != job_id:
        raise MisdirectedError(f"refused the order: it is for job {order.job_id}, it came with job {job_id:.64}")
    if order.operation != FIRMWARE_UPDATE or document.get("operation") != FIRMWARE_UPDATE:
        raise MisdirectedError(f"refused the order: it is to {order.operation}, expected {FIRMWARE_UPDATE}")
    if order.nonce in facts.finished_orders or order.attempt <= last_attempt(facts.finished_orders, job_id):
        raise ReplayError(f"refused the order: attempt {order.attempt} of job {job_id}, or a later one, has ended here")


def _check_release(
    release: ReleaseStatement, payload: bytes, order: Order, facts: DeviceFacts, document: Mapping[str, Any]
) -> None:
    digest = hashlib.sha256(payload).hexdigest()
    if order.release_sha256 != digest:
        raise MisdirectedError(
            f"refused the release: the order names statement {order.release_sha256[:16]}, this is {digest[:16]}"
        )
    if document.get("version", release.version) != release.version:
        raise MisdirectedError(
            f"refused the release: the job document says version {document.get('version')!r:.60}, "
            f"the release is {release.version}"
        )
    if facts.product is not None and release.product != facts.product:
        raise IncompatibleError(f"refused the release: it is {release.product}, this device runs {facts.product}")
    if facts.hardware not in release.hardware:
        raise IncompatibleError(
            f"refused the release: it is for {', '.join(release.hardware):.200}, this is {facts.hardware}"
        )
    if release.security_counter < facts.security_floor:
        raise DowngradeError(
            f"refused the release: security counter {release.security_counter}, "
            f"this device has confirmed {facts.security_floor}"
        )


def _check_times(order: Order, release: ReleaseStatement, now: int) -> None:
    if now >= order.expires_at:
        raise ExpiredError(f"refused the order: it was valid until {order.expires_at}, it is {now}")
    if release.expires_at is not None and now >= release.expires_at:
        raise ExpiredError(f"refused the release: it was valid until {release.expires_at}, it is {now}")


def _full(entry: Mapping[str, Any], release: ReleaseStatement) -> FullImage:
    if entry.get("sha256") != release.sha256 or entry.get("size") != release.size_bytes:
        raise MisdirectedError(
            f"refused the job document: its image is {entry.get('sha256')!r:.20}, {entry.get('size')!r:.20} bytes; "
            f"the release is {release.sha256[:16]} of {release.size_bytes} bytes"
        )
    if entry.get("compression") is not None:
        raise StatementError(f"refused the job document: unknown compression {entry.get('compression')!r:.40}")
    if not _is_artifact_url(entry.get("url"), release.sha256):
        raise StatementError(f"refused the job document: {entry.get('url')!r:.100} is not the image's address")
    return FullImage(url=entry["url"], sha256=release.sha256, size_bytes=release.size_bytes)


def _deltas(entries: object, release: ReleaseStatement, order: Order, facts: DeviceFacts) -> tuple[DeltaOffer, ...]:
    """The offers that fit. One that does not is passed over, never a reason to refuse: there is the full image."""
    if not isinstance(entries, Sequence) or isinstance(entries, str) or len(entries) > MAX_DELTAS:
        return ()
    offers = (_offer(entry) for entry in entries)
    fitting = (
        offer
        for offer in offers
        if offer is not None
        and offer.base_sha256 == facts.running_sha256
        and offer.size_bytes < release.size_bytes
        and (order.deltas is None or offer.sha256 in order.deltas)
    )
    return tuple(sorted(fitting, key=lambda offer: offer.size_bytes))


def _offer(entry: object) -> DeltaOffer | None:
    if not isinstance(entry, Mapping):
        return None
    base, sha256, size, codec, url = (entry.get(name) for name in ("base_sha256", "sha256", "size", "codec", "url"))
    if not all(isinstance(digest, str) and SHA256.fullmatch(digest) for digest in (base, sha256)):
        return None
    if type(size) is not int or not 0 < size <= MAX_IMAGE_BYTES or not isinstance(codec, str):
        return None
    if not isinstance(url, str) or not _is_artifact_url(url, str(sha256)):
        return None
    return DeltaOffer(url=url, base_sha256=str(base), sha256=str(sha256), size_bytes=size, codec=codec)


def _is_artifact_url(url: object, sha256: str) -> bool:
    if not isinstance(url, str) or len(url) > MAX_URL_CHARS:
        return False
    match = _ARTIFACT_URL.fullmatch(url)
    return match is not None and match[1] == sha256


def _part(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = document.get(name)
    if not isinstance(part, Mapping):
        raise StatementError(f"cannot read the job document: {name} is {type(part).__name__}, expected an object")
    return part
