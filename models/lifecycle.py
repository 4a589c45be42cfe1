"""What lifecycle workflows ask of their activities, and what they are told. Workflows' own inputs: models/identity.py.

One input and one result for each activity; fields added later have defaults. Times are UTC.
"""

from datetime import datetime, timedelta
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from models.device import DeviceId, Label


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


# --- configuration ---------------------------------------------------------------------------------------------------


class WantConfigurationInput(_Frozen):
    """Write what a device is to run, and wait for it."""

    device_id: DeviceId
    config: dict[str, Any]
    actor: str
    reason: str = ""
    workflow_id: str


class WantedConfiguration(_Frozen):
    """The version that is wanted now, and whether the device runs it already."""

    version: int
    applied: bool = False


class HintConfigurationInput(_Frozen):
    """Tell a device that something else is wanted of it than it has reported."""

    device_id: DeviceId
    version: int


class EndConfigurationInput(_Frozen):
    """Wait no longer; what is wanted stays wanted."""

    device_id: DeviceId
    version: int
    workflow_id: str
    actor: str
    reason: str


class ConfigurationSeen(_Frozen):
    """Whether the device runs the version, or a later one, at this moment."""

    applied: bool


# --- rotation --------------------------------------------------------------------------------------------------------


class CertificatesSeen(_Frozen):
    """`old`: to be replaced, the newest of them first. `new`: issued already, and not seen to connect yet.

    `settled`: a newer one has been seen to connect before anybody waited for it; `old` is what it replaces.
    """

    old: tuple[str, ...]
    new: tuple[str, ...] = ()
    settled: str | None = None


class AskForRotationInput(_Frozen):
    """Wait for a new certificate, and ask the device to come for one. Sent again as a reminder."""

    device_id: DeviceId
    workflow_id: str
    old: tuple[str, ...]
    actor: str
    ask: bool = True
    until: datetime


class RotationSeen(_Frozen):
    """The newest certificate that is not one of the old ones, and the newest of those that was seen to connect."""

    issued: str | None = None
    confirmed: str | None = None


class EndRotationInput(_Frozen):
    """Bring a rotation to its end: revoke what is not to stay, wait no longer, tell people where they must know."""

    device_id: DeviceId
    workflow_id: str
    old: tuple[str, ...]
    actor: str
    reason: str = ""
    overlapped: timedelta = timedelta(0)


class EndedRotation(_Frozen):
    """What PostgreSQL said in the transaction that ended it; `kept` is the certificate that stays."""

    kept: str | None = None
    confirmed: bool = False
    issued: bool = False
    revoked: tuple[str, ...] = ()
    reason: str = ""


# --- fleet-wide rotation -----------------------------------------------------------------------------------------------


class RotateFleetInput(_Frozen):
    """Starts a sweep: every device whose certificate is due is asked for a new key, at a pace."""

    actor: str = "tidegate"
    reason: str = ""
    everything: bool = False
    """Not only certificates that are due: all of them."""
    sites: tuple[Label, ...] = ()
    per_minute: int = Field(default=60, ge=1, le=60_000)
    ask_below_percent: int = Field(default=40, ge=1, le=99)
    """Due: less than this share of its life is left. 40: asked when three fifths are over, before two thirds are."""
    left_alone: timedelta = timedelta(hours=24)
    """A device that was asked, or got a certificate, within this time is not asked again."""
    renew_within: timedelta = timedelta(days=7)
    overlap: timedelta = timedelta(hours=24)


class RotateFleetResult(_Frozen):
    """What a sweep did; also what its heartbeat shows."""

    due: int = 0
    started: int = 0
    running: int = 0
    """Left alone, because a rotation of theirs ran already."""


class DueCertificate(_Frozen):
    """A device whose certificate is due, and why."""

    device_id: str
    certificate_id: str
    not_after: datetime
    reason: str
    ask: bool = True
    """False: it has a new one already, and nobody saw to it that one of the two was revoked."""


class RotationFigures(_Frozen):
    """Where the fleet's certificates stand."""

    valid: int = 0
    """Devices with a certificate that is valid now."""
    due: int = 0
    of_former_authorities: int = 0
    asked: int = 0
    """Asked within the last 24 hours."""
    unconfirmed: int = 0
    """Two certificates are valid, and the newer one has not been seen to connect."""
    ending: int = 0
    """Less than a tenth of its life is left."""
    expired: int = 0
    """Not retired, and without a certificate that is still valid; they have had one."""
    next_end: datetime | None = None


# --- decommissioning -------------------------------------------------------------------------------------------------


class BeginDecommissionInput(_Frozen):
    """Stop what the device has to do, and what others do with it."""

    device_id: DeviceId
    actor: str
    reason: str = ""


class BegunDecommission(_Frozen):
    """`answers`: whether it makes sense to ask the device for anything."""

    serial_number: str
    answers: bool


class StopFlowsInput(_Frozen):
    """End the other lifecycle workflows of a device."""

    device_id: DeviceId
    serial_number: str
    reason: str


class AskToWipeInput(_Frozen):
    """Ask a device to wipe its credentials. Sent again as a reminder."""

    device_id: DeviceId
    workflow_id: str
    actor: str
    until: datetime


class WipeAsked(_Frozen):
    """The open command, or the answer that has come."""

    request_id: str
    answered: bool = False


class RetireDeviceInput(_Frozen):
    """End its identity: certificates, word, status, serial number."""

    device_id: DeviceId
    actor: str
    reason: str = ""


class RetiredDevice(_Frozen):
    """What was done, now or by an earlier attempt."""

    revision: int
    wiped: bool
    executions_removed: int
    certificates_revoked: int


class AwaitBrokersInput(_Frozen):
    """Wait until every broker that is alive enforces a revision of access."""

    device_id: DeviceId
    revision: int
    within: timedelta


class BrokersSeen(_Frozen):
    """Brokers that did not get there in time; none, if all is well."""

    behind: tuple[str, ...] = ()


class ClearRetainedInput(_Frozen):
    """Clear what brokers keep of a device's topics."""

    device_id: DeviceId


class ClearedRetained(_Frozen):
    """How many topics were cleared."""

    topics: int = 0


class EndDecommissionInput(_Frozen):
    """Note that it is over."""

    device_id: DeviceId
    actor: str
    reason: str


# --- what is shown ---------------------------------------------------------------------------------------------------


class LifecycleStatus(_Frozen):
    """Answer of the query `status` of each of these workflows."""

    device_id: str
    phase: str
    waiting_for: str = ""
    until: datetime | None = None
    version: int | None = None
