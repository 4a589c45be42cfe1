"""What a device remembers apart from its slots: whom it trusts is given, what it has done is kept here.

One record, replaced durably as a whole: the orders that have ended, the latest moment it has seen signed, and the
journal of the update in progress. The journal says what was being done when the power went; the boot record says how
far it got.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from agent.errors import RecordError
from agent.records import decode_record, encode_record
from agent.storage import Storage, replace_durably
from firmware.manifest import attempt_key
from firmware.verify import VerifiedUpdate

STATE_NAME = "device.json"
STATE_KIND = "device"
MAX_FINISHED = 200
"""Ended orders that are remembered; beyond it the ones that expire first are dropped, and expiry refuses them."""


class Phase(StrEnum):
    """WORKING: up to the moment before the reboot. ARMED: the boot loader may have been told. RESULT: only to report."""

    WORKING = "working"
    ARMED = "armed"
    RESULT = "result"


@dataclass(frozen=True, slots=True)
class Update:
    """The journal of one attempt. `status` and `details` are the final report, once there is one."""

    job_id: str
    attempt: int
    key: str
    expires_at: int
    version: str
    sha256: str
    phase: Phase = Phase.WORKING
    via: str = ""
    status: str = ""
    details: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ended:
    """An attempt that has ended: until when its order is valid, and the status reported ("" when the server ended it)."""

    attempt: int
    expires_at: int
    status: str = ""


@dataclass(frozen=True, slots=True)
class DeviceState:
    """`finished`: by job, the last attempt that has ended. `downloads`: digests of which parts may lie in storage."""

    finished: Mapping[str, Ended] = field(default_factory=dict)
    latest_known_time: int = 0
    update: Update | None = None
    downloads: tuple[str, ...] = ()

    @property
    def finished_orders(self) -> frozenset[str]:
        """For `DeviceFacts`: earlier attempts of the same job count as ended with the last one."""
        return frozenset(attempt_key(job_id, ended.attempt) for job_id, ended in self.finished.items())

    def begun(self, verified: VerifiedUpdate) -> "DeviceState":
        """The state once an update has been verified and accepted."""
        order, release = verified.order, verified.release
        update = Update(order.job_id, order.attempt, order.key, order.expires_at, release.version, release.sha256)
        latest = max(self.latest_known_time, verified.latest_known_time)
        return replace(self, update=update, latest_known_time=latest, downloads=artifacts_of(verified))

    def ended(self) -> "DeviceState":
        """The state without its update; the attempt never starts again."""
        if self.update is None:
            return self
        finished = {job: entry for job, entry in self.finished.items() if entry.expires_at > self.latest_known_time} | {
            self.update.job_id: Ended(self.update.attempt, self.update.expires_at, self.update.status)
        }
        if len(finished) > MAX_FINISHED:
            finished = dict(sorted(finished.items(), key=lambda item: item[1].expires_at)[-MAX_FINISHED:])
        return replace(self, finished=finished, update=None)


def artifacts_of(verified: VerifiedUpdate) -> tuple[str, ...]:
    """Digests of what may be downloaded for an update."""
    return (verified.full.sha256, *(offer.sha256 for offer in verified.deltas))


class StateStore:
    """The device's state on its storage. A state that cannot be read is an empty one: the boot record is what bricks."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.state = self._load()

    def put(self, state: DeviceState) -> None:
        """Keep the state: in memory at once, then durably. Raises OSError when the storage refuses."""
        self.state = state
        replace_durably(self._storage, STATE_NAME, encode_record(STATE_KIND, asdict(state)))

    def _load(self) -> DeviceState:
        data = self._storage.read(STATE_NAME)
        if data is None:
            return DeviceState()
        try:
            fields: dict[str, Any] = decode_record(data, STATE_KIND)
        except RecordError:
            return DeviceState()
        update = fields.pop("update")
        finished = {job: Ended(**entry) for job, entry in fields.pop("finished").items()}
        return DeviceState(
            **fields | {"downloads": tuple(fields.get("downloads", ()))},
            finished=finished,
            update=Update(**{**update, "phase": Phase(update["phase"])}) if update else None,
        )
