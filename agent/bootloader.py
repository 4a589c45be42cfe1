"""The boot loader model: which slot runs, decided from the boot record and the slots' bytes alone.

On a trial the try counter goes down, durably, before the jump; when no try is left, or the slot's bytes are not the
signed ones, the confirmed slot runs and the record says why. It never writes a slot.

What it is not: a loader of code. "Running an image" is the agent starting with the `Boot` it is handed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from agent.errors import BrickedError, RecordError
from agent.slots import BootRecord, Fallback, Slots, SlotState, given_up, other


@dataclass(frozen=True, slots=True)
class Boot:
    """What was jumped to. `trial`: it runs unconfirmed, and the next reset counts against it."""

    slot: str
    version: str
    sha256: str
    trial: bool


def plan_boot(record: BootRecord, verifies: Callable[[str], bool]) -> tuple[BootRecord, Boot]:
    """The decision, without I/O: the record to store before the jump, and where to jump.

    Raises:
        BrickedError: no slot may run.
    """
    trial = record.trial
    if trial is not None and trial.tries_left > 0 and verifies(trial.slot):
        slot = record.slot(trial.slot)
        counted = replace(record, trial=replace(trial, tries_left=trial.tries_left - 1))
        return counted, Boot(trial.slot, slot.version, slot.sha256, trial=True)
    if trial is not None:
        record = given_up(record, _why(record, trial.tries_left))
    if not verifies(record.active):
        record = _spare(record, verifies)
    slot = record.slot(record.active)
    return record, Boot(record.active, slot.version, slot.sha256, trial=False)


def _why(record: BootRecord, tries_left: int) -> str:
    assert record.trial is not None
    if tries_left > 0:
        return f"slot {record.trial.slot} does not verify"
    return f"no try left, never confirmed; last try: {record.trial.cause or 'ended without a word (crash or power)'}"


def _spare(record: BootRecord, verifies: Callable[[str], bool]) -> BootRecord:
    """The record with the other slot active: it was confirmed once, still verifies, and is not below the floor."""
    spare = other(record.active)
    slot = record.slot(spare)
    if slot.state is not SlotState.GOOD or slot.security_counter < record.security_floor or not verifies(spare):
        raise BrickedError(f"cannot boot: slot {record.active} does not verify, slot {spare} is {slot.state}")
    rotten = replace(record.slot(record.active), state=SlotState.INVALID)
    reason = f"slot {record.active} does not verify any more"
    fallback = record.fallback or Fallback("", rotten.version, reason)
    return replace(record.with_slot(record.active, rotten), active=spare, fallback=fallback)


class BootLoader:
    """The boot loader of one device."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots

    def boot(self) -> Boot:
        """Decide, note the decision, jump.

        A record that cannot be written (disk full) never leads to an uncounted try: the confirmed slot runs instead.

        Raises:
            BrickedError: nothing can be booted.
        """
        try:
            record = self._slots.load()
        except RecordError as error:
            raise BrickedError(f"cannot boot: {error}") from error
        planned, boot = plan_boot(record, lambda slot: self._slots.holds(slot, record.slot(slot)))
        if planned == record:
            return boot
        try:
            self._slots.store(planned)
        except OSError:
            if not boot.trial:
                return boot
            _, boot = plan_boot(replace(record, trial=None), lambda slot: self._slots.holds(slot, record.slot(slot)))
        return boot
