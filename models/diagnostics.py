"""Questions to devices: what workflows are started with and end with, and what is shown.

Answers themselves stay in PostgreSQL; a workflow carries what became of the question.
"""

import hashlib
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from models.device import DeviceId
from models.ids import diagnose_workflow_id
from models.protocol import DiagnosticType

ANSWER_LIMIT = timedelta(seconds=30)
"""The requirement's: a device that is there answers within a second or two."""
BOOT_LIMIT = timedelta(minutes=10)
"""How long a device may take to come back from a reboot, its first heartbeat included."""
AUTOMATIC_TYPES = (DiagnosticType.SYSTEM_INFO, DiagnosticType.LOG_TAIL)
"""What a device is asked after its update has failed."""
MAX_LINES = 1000
MAX_DELAY_SECONDS = 3600


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class DiagnosticState(StrEnum):
    """Of a question. FAILED: the device answered that it cannot, or will not."""

    REQUESTED = "requested"
    ANSWERED = "answered"
    FAILED = "failed"
    TIMED_OUT = "timed-out"
    CANCELED = "canceled"


class AskDeviceInput(_Frozen):
    """Starts `diagnose:<device>/<request>`."""

    device_id: DeviceId
    request_id: str = Field(pattern=r"^[0-9a-f]{32}$")
    type: DiagnosticType
    lines: int | None = Field(default=None, ge=1, le=MAX_LINES)
    delay_seconds: int | None = Field(default=None, ge=0, le=MAX_DELAY_SECONDS)
    actor: str
    reason: str = ""
    limit: timedelta = ANSWER_LIMIT
    wait_for_boot: bool = False
    """After a reboot was scheduled: wait for a heartbeat of another boot."""
    boot_limit: timedelta = BOOT_LIMIT
    job_no: int | None = None
    execution_number: int | None = None

    @property
    def workflow_id(self) -> str:
        """Of the workflow that asks."""
        return diagnose_workflow_id(self.device_id, self.request_id)

    @property
    def parameters(self) -> dict[str, Any]:
        """As the device is told them."""
        found: dict[str, Any] = {}
        if self.type is DiagnosticType.LOG_TAIL and self.lines is not None:
            found["lines"] = self.lines
        if self.type is DiagnosticType.REBOOT:
            found["delaySeconds"] = 10 if self.delay_seconds is None else self.delay_seconds
        return found


class AskOutcome(StrEnum):
    """How asking ended."""

    ANSWERED = "answered"
    FAILED = "failed"
    TIMED_OUT = "timed-out"
    REFUSED = "refused"
    REBOOTED = "rebooted"
    NOT_REBOOTED = "not-rebooted"
    """The reboot was scheduled, and no heartbeat of another boot has come in time."""


class AskDeviceResult(_Frozen):
    """What became of a question, in a sentence; the answer itself is in PostgreSQL under the request id."""

    device_id: str
    request_id: str
    type: DiagnosticType
    outcome: AskOutcome
    text: str
    boot_seconds: float | None = None
    """From the answer to the first heartbeat of the new boot."""


class OpenedQuestion(_Frozen):
    """A question as it stands: `state` may be that of an earlier attempt. `boot_id`: of the device's last heartbeat."""

    state: DiagnosticState
    expires_at: datetime
    boot_id: str | None = None


class PublishQuestionInput(_Frozen):
    """Tell the device, unless the question is over."""

    device_id: DeviceId
    request_id: str


class EndQuestionInput(_Frozen):
    """Wait no longer."""

    device_id: DeviceId
    request_id: str
    workflow_id: str
    boot_id: str | None = None
    watch_boot: bool = False
    """Wait for heartbeats from here on, if it was answered."""


class EndedQuestion(_Frozen):
    """What became of it, and what is known of the device."""

    state: DiagnosticState
    text: str = ""
    answered_at: datetime | None = None


class LookAtBootInput(_Frozen):
    """Whether the device has booted since; if not, wait for its next heartbeat. With `last`, wait no longer."""

    device_id: DeviceId
    request_id: str
    workflow_id: str
    boot_id: str | None = None
    last: bool = False


class BootSeen(_Frozen):
    """`seconds` from the answer to the heartbeat of another boot; None: none has come."""

    seconds: float | None = None


class DiagnosticView(_Frozen):
    """A question and its answer, as PostgreSQL has them."""

    request_id: str
    device_id: str
    type: DiagnosticType
    parameters: dict[str, Any] = Field(default_factory=dict)
    state: DiagnosticState
    requested_by: str
    job_no: int | None = None
    execution_number: int | None = None
    created_at: datetime
    expires_at: datetime
    answered_at: datetime | None = None
    answer: dict[str, Any] | None = None
    error: str | None = None


class CauseView(_Frozen):
    """Failures of a rollout that have one cause, as far as devices told it."""

    failure_class: str
    reason: str
    """Without what differs from device to device: numbers, hashes, paths."""
    count: int
    share: float
    """Of all failures of the rollout."""
    example: str
    """A device, one with diagnostics where there is one."""
    example_reason: str = ""
    """What it said in full."""
    first_at: datetime | None = None
    last_at: datetime | None = None
    diagnosed: int = 0
    """Devices of this cause that have answered diagnostic requests about it."""
    said: str = ""
    """What the example's diagnostics said, in a line."""


def automatic_request_id(job_no: int, device_id: str, attempt: int, what: DiagnosticType) -> str:
    """The request id of a question that a failed update brings about: the same however often it is asked."""
    return hashlib.sha256(f"failed/{job_no}/{device_id}/{attempt}/{what}".encode()).hexdigest()[:32]
