"""Who may enrol: the rules, each with its one sentence. Pure; what is looked at was read in one transaction.

The order matters: what is wrong with the batch is said before anything is said about the serial number, so that a claim
certificate which counts for nothing any more cannot be used to ask which serial numbers exist.

>>> judge_batch(Batch("line-4", "motor", datetime(2026, 1, 1), 100, 1), datetime(2026, 1, 2))
'batch line-4 has expired on 2026-01-01 00:00Z; ask for a claim certificate of a batch that stands'
"""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from hashlib import sha256

from models.ids import MAX_COMMON_NAME_CHARS


@dataclass(frozen=True)
class Batch:
    """What is looked at of a claim batch."""

    name: str
    device_type: str
    expires_at: datetime
    max_devices: int
    enrolled: int
    listed_only: bool = False
    disabled: bool = False


@dataclass(frozen=True)
class KnownDevice:
    """A device that has the serial number already."""

    device_id: str
    device_type: str
    status: str
    has_certificate: bool
    barred: bool = False
    """Its word counts for nothing, and for another reason than an enrolment that was undone."""


@dataclass(frozen=True)
class Serial:
    """What is known of the serial number and of the key that come."""

    number: str
    listed_in: str | None = None
    """The batch on whose list it is."""
    retired_at: datetime | None = None
    """Of a tombstone that stands."""
    released: bool = False
    """There was a tombstone, and somebody has released it."""
    has_place: bool = False
    """It took one of the batch's places before."""
    enrolled_with_other_key: bool = False
    failed_before: bool = False
    """Its last enrolment came to nothing, and was undone."""
    key_known: bool = False
    """The key has, or had, a certificate, or another serial number asks for one with it."""
    refused_by: str | None = None
    """A person has refused this very key for this serial number."""
    device: KnownDevice | None = None


class Admission(StrEnum):
    """ADMIT: a place in the batch. CONFLICT: for a person to decide."""

    ADMIT = "admit"
    REFUSE = "refuse"
    CONFLICT = "conflict"


@dataclass(frozen=True)
class Judgement:
    """What becomes of a request, and why."""

    admission: Admission
    reason: str = ""


def judge_batch(batch: Batch, now: datetime) -> str:
    """Why this batch lets nobody in; empty when it does."""
    if batch.disabled:
        return f"batch {batch.name} is disabled; ask for a claim certificate of a batch that stands"
    if now >= batch.expires_at:
        when = f"{batch.expires_at:%Y-%m-%d %H:%M}Z"
        return f"batch {batch.name} has expired on {when}; ask for a claim certificate of a batch that stands"
    return ""


def judge_request(batch: Batch, serial: Serial) -> Judgement:
    """Whether a serial number may enrol with a key through a batch that stands."""
    refused = _refusal(batch, serial)
    if refused:
        return Judgement(Admission.REFUSE, refused)
    disputed = _dispute(serial)
    if disputed:
        return Judgement(Admission.CONFLICT, disputed)
    if not serial.has_place and batch.enrolled >= batch.max_devices:
        return Judgement(
            Admission.REFUSE,
            f"batch {batch.name} is full: {batch.enrolled} of {batch.max_devices} places are taken; "
            "make another batch for further devices",
        )
    return Judgement(Admission.ADMIT)


def _refusal(batch: Batch, serial: Serial) -> str:
    number = serial.number
    if serial.listed_in is not None and serial.listed_in != batch.name:
        return f"serial number {number} is on the list of another batch than {batch.name}; use that one's claim certificate"
    if batch.listed_only and serial.listed_in is None:
        return f"serial number {number} is not on the list of batch {batch.name}; 'claim allow' adds it"
    if serial.retired_at is not None:
        when = f"{serial.retired_at:%Y-%m-%d}"
        return f"serial number {number} was retired on {when}; it can enrol again after 'device release'"
    if serial.refused_by is not None:
        return f"serial number {number} was refused with this key by {serial.refused_by}"
    if serial.key_known:
        return f"the key that came for serial number {number} has been used already; make a new key"
    device = serial.device
    if device is not None and device.device_type != batch.device_type:
        return (
            f"serial number {number} is registered as a {device.device_type}, batch {batch.name} is for devices of type "
            f"{batch.device_type}; use the claim certificate of a batch for its type"
        )
    if device is not None and device.status == "retired" and not serial.released:
        return f"serial number {number} is retired in the registry; set its status to provisioning before it enrols"
    return ""


def _dispute(serial: Serial) -> str:
    """Why a person has to decide. A device that is registered and has no identity yet is nobody's but the enroller's."""
    if serial.enrolled_with_other_key:
        return f"serial number {serial.number} is enrolled with another key; a person has to decide which one holds"
    device = serial.device
    if device is None or (device.status == "retired" and serial.released and not device.has_certificate):
        return ""
    if device.has_certificate:
        return f"serial number {serial.number} has a valid certificate; a person has to decide whether it gets another"
    if device.barred:
        return f"serial number {serial.number} is barred; a person has to decide whether it is let in again"
    if device.status == "provisioning" or (device.status == "error" and serial.failed_before):
        return ""
    return (
        f"serial number {serial.number} is registered as {device.status}, expected provisioning; "
        "a person has to decide whether this is the device"
    )


def device_id_for(prefix: str, serial_number: str, *, taken: bool = False) -> str:
    """The thing name of a new device: prefix and serial number, made unlike any other where that is not enough.

    A thing name has no dot and fits into a common name; `taken` says that another serial number has the plain one.

    >>> device_id_for("motor-", "SN0017")
    'motor-SN0017'
    >>> device_id_for("", "4.2")
    '4_2-2912aa72'
    """
    plain = prefix + serial_number.replace(".", "_")
    if "." not in serial_number and len(plain) <= MAX_COMMON_NAME_CHARS and not taken:
        return plain
    mark = sha256(serial_number.encode()).hexdigest()[:8]
    return f"{plain[: MAX_COMMON_NAME_CHARS - 9]}-{mark}"
