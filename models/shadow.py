"""What passes between the workflow that waits for a device to report a wanted state, its activities and the command line.

Fields added later have defaults. Times are UTC. A shadow's name is empty for the classic one.
"""

from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from models.device import DeviceId


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class SyncShadowInput(_Frozen):
    """Starts `shadow:<device>/<shadow>/<token>`. `patch` None: nothing is wanted any more."""

    device_id: DeviceId
    shadow: str = ""
    patch: dict[str, Any] | None
    actor: str
    reason: str = ""
    limit: timedelta = timedelta(seconds=30)
    expected_version: int | None = None
    mark: str = ""
    """Of the run that wrote it, for the runs that continue that one."""
    until: datetime | None = None


class SyncOutcome(StrEnum):
    """The device reports all that was wanted; has not done so in time (it stays wanted); or it could not be wanted."""

    CONFIRMED = "confirmed"
    TIMED_OUT = "timed-out"
    REFUSED = "refused"


class SyncShadowResult(_Frozen):
    """What became of it. `differs`: what was wanted and is not reported."""

    device_id: str
    shadow: str = ""
    version: int = 0
    outcome: SyncOutcome
    reason: str
    differs: dict[str, Any] = Field(default_factory=dict)
    last_heard: datetime | None = None
    offline_since: datetime | None = None


class SyncShadowStatus(_Frozen):
    """Where the wait stands, as far as the workflow knows."""

    device_id: str
    shadow: str = ""
    phase: str
    version: int = 0
    until: datetime | None = None


class WantShadowInput(_Frozen):
    """Write what is wanted, once for each `mark`, and wait for the device's word."""

    device_id: DeviceId
    shadow: str = ""
    patch: dict[str, Any] | None
    actor: str
    reason: str = ""
    expected_version: int | None = None
    workflow_id: str
    mark: str


class CheckShadowInput(_Frozen):
    """Look whether the device has reported it, and wait on where not. `remind`: tell it once more what differs."""

    device_id: DeviceId
    shadow: str = ""
    patch: dict[str, Any] | None
    workflow_id: str
    remind: bool = False


class EndShadowInput(_Frozen):
    """Wait no longer; what is wanted stays wanted."""

    device_id: DeviceId
    shadow: str = ""
    patch: dict[str, Any] | None
    workflow_id: str
    limit: timedelta


class ShadowSeen(_Frozen):
    """The shadow at this moment; `differs` is what of the patch the device does not report."""

    version: int
    confirmed: bool
    differs: dict[str, Any] = Field(default_factory=dict)
    reason: str = ""
    """For a person, at the end of a wait."""
    last_heard: datetime | None = None
    offline_since: datetime | None = None
