"""The two slots and the boot record that says what is in them.

The boot record is the boot loader's and the agent's common memory, changed only by `replace_durably`. What an update
does to it, in this order: `begin` (the target is invalid from now on), the write, `keep` (read back, and it holds what
was signed), `arm` (the next boot tries it), and after the round trip `confirm`. The security floor stands in the same
record, so that it rises exactly when an image is confirmed and never without it. The slot that runs is never written.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from agent.errors import FlashError, RecordError
from agent.records import decode_record, encode_record
from agent.storage import Storage, folder_of, replace_durably

RECORD_NAME = "boot.json"
RECORD_KIND = "boot"
SLOT_NAMES = ("a", "b")
TRIES = 3
"""Boots that a new image gets. A power cut during a trial costs one, so one is too few; a dead image costs them all."""


class SlotState(StrEnum):
    """EMPTY: never written. INVALID: being written, or given up. READY: holds what was signed. GOOD: has been confirmed."""

    EMPTY = "empty"
    INVALID = "invalid"
    READY = "ready"
    GOOD = "good"


@dataclass(frozen=True, slots=True)
class Slot:
    """What a slot holds, by the signed release statement. `product` is None for the image the device was made with."""

    state: SlotState = SlotState.EMPTY
    sha256: str = ""
    size_bytes: int = 0
    version: str = ""
    product: str | None = None
    security_counter: int = 0


@dataclass(frozen=True, slots=True)
class Trial:
    """A slot that is tried until it is confirmed. `key` names the order; `cause` why the last try ended."""

    slot: str
    key: str
    tries_left: int = TRIES
    cause: str = ""


@dataclass(frozen=True, slots=True)
class Fallback:
    """A trial that ended with the old image, and why."""

    key: str
    version: str
    reason: str


@dataclass(frozen=True, slots=True)
class BootRecord:
    """Everything the boot loader decides by. `writes` counts slots that were begun, in the device's life."""

    active: str
    slots: Mapping[str, Slot] = field(default_factory=dict)
    trial: Trial | None = None
    fallback: Fallback | None = None
    security_floor: int = 0
    writes: int = 0

    def slot(self, name: str) -> Slot:
        """The slot of that name."""
        return self.slots[name]

    def with_slot(self, name: str, slot: Slot) -> "BootRecord":
        """The record with one slot changed."""
        return replace(self, slots={**self.slots, name: slot})


def other(slot: str) -> str:
    """The slot that this one is not."""
    return SLOT_NAMES[1 - SLOT_NAMES.index(slot)]


def encode_boot_record(record: BootRecord) -> bytes:
    """The record as it is stored."""
    return encode_record(RECORD_KIND, asdict(record))


def decode_boot_record(data: bytes) -> BootRecord:
    """Inverse of `encode_boot_record`. Raises RecordError."""
    fields: dict[str, Any] = decode_record(data, RECORD_KIND)
    slots = {name: Slot(**{**entry, "state": SlotState(entry["state"])}) for name, entry in fields.pop("slots").items()}
    trial, fallback = fields.pop("trial"), fields.pop("fallback")
    return BootRecord(
        **fields,
        slots=slots,
        trial=Trial(**trial) if trial else None,
        fallback=Fallback(**fallback) if fallback else None,
    )


def slot_name(slot: str) -> str:
    """The file that stands for a slot's partition."""
    return f"slots/{slot}.img"


class Slots:
    """The slots of one device on its storage."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def made(self) -> bool:
        """Whether the device has been made: `make` has run to its end."""
        return self._storage.size(RECORD_NAME) is not None

    def make(self, image: bytes, version: str) -> BootRecord:
        """What the factory does: the first image into slot a. Repeated after a power cut it does the same again."""
        self._write_slot("a", image)
        digest = hashlib.sha256(image).hexdigest()
        first = Slot(SlotState.GOOD, digest, len(image), version)
        record = BootRecord(active="a", slots={"a": first, "b": Slot()})
        self.store(record)
        return record

    def load(self) -> BootRecord:
        """The boot record. Raises RecordError where there is none that can be believed."""
        data = self._storage.read(RECORD_NAME)
        if data is None:
            raise RecordError("cannot read the boot record: there is none; was the device made (--base)?")
        return decode_boot_record(data)

    def store(self, record: BootRecord) -> None:
        """Change the boot record, durably."""
        replace_durably(self._storage, RECORD_NAME, encode_boot_record(record))

    def image(self, slot: str) -> bytes:
        """The bytes of the image in a slot; empty where nothing is."""
        return (self._storage.read(slot_name(slot)) or b"")[: self.load().slot(slot).size_bytes]

    def holds(self, slot: str, wanted: Slot) -> bool:
        """Whether the slot's bytes, read back, are the ones that `wanted` names."""
        data = self._storage.read(slot_name(slot))
        return data is not None and bool(wanted.sha256) and hashlib.sha256(data).hexdigest() == wanted.sha256

    def begin(self, running: str) -> str:
        """Mark the slot that does not run as invalid, and name it: from here on the boot loader will not try it."""
        record, target = self.load(), other(running)
        if record.active == target:
            raise FlashError(f"cannot write slot {target}: it is the confirmed one")
        invalid = replace(record.slot(target), state=SlotState.INVALID)
        self.store(replace(record.with_slot(target, invalid), trial=None, writes=record.writes + 1))
        return target

    def keep(self, target: str, image: bytes, wanted: Slot) -> None:
        """Write the image, read it back, and only then say that the slot is ready. Raises FlashError."""
        self._write_slot(target, image)
        if not self.holds(target, wanted):
            raise FlashError(f"slot {target} does not read back as {wanted.sha256[:16]}, which was written to it")
        record = self.load()
        self.store(record.with_slot(target, replace(wanted, state=SlotState.READY)))

    def ready(self, running: str, sha256: str) -> str | None:
        """The slot beside the running one, if it is ready and really holds this image."""
        target = other(running)
        slot = self.load().slot(target)
        usable = slot.sha256 == sha256 and slot.state in (SlotState.READY, SlotState.GOOD)
        return target if usable and self.holds(target, slot) else None

    def arm(self, target: str, key: str, tries: int = TRIES) -> None:
        """Let the next boot try the slot."""
        self.store(replace(self.load(), trial=Trial(target, key, tries), fallback=None))

    def note_cause(self, cause: str) -> None:
        """Keep why this try ends, for the report after a fall-back."""
        record = self.load()
        if record.trial is not None:
            self.store(replace(record, trial=replace(record.trial, cause=cause)))

    def confirm(self) -> None:
        """The slot on trial is good: it is active from now on, and the security floor is its counter, in one write."""
        record = self.load()
        if record.trial is None:
            return
        slot = record.slot(record.trial.slot)
        confirmed = record.with_slot(record.trial.slot, replace(slot, state=SlotState.GOOD))
        floor = max(record.security_floor, slot.security_counter)
        self.store(replace(confirmed, active=record.trial.slot, trial=None, fallback=None, security_floor=floor))

    def abandon(self, reason: str) -> None:
        """End the trial: the next boot is the confirmed slot's."""
        self.store(given_up(self.load(), reason))

    def _write_slot(self, slot: str, image: bytes) -> None:
        name = slot_name(slot)
        self._storage.write(name, image)
        self._storage.sync(name)
        self._storage.sync_folder(folder_of(name))


def given_up(record: BootRecord, reason: str) -> BootRecord:
    """The record after its trial has been given up, with the reason in it."""
    if record.trial is None:
        return record
    slot = record.slot(record.trial.slot)
    fallback = Fallback(record.trial.key, slot.version, reason)
    without = record.with_slot(record.trial.slot, replace(slot, state=SlotState.INVALID))
    return replace(without, trial=None, fallback=fallback)
