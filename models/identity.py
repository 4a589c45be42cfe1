"""What passes between the lifecycle workflows, their activities and whoever starts them.

One input and one result for each workflow and activity; fields added later have defaults. Times are UTC.
"""

from datetime import datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from models.device import DeviceId, Label
from models.ids import BATCH_NAME, SERIAL_NUMBER

MAX_CERTIFICATE_DAYS = 90
"""No device certificate lives longer: what a revocation list misses ends by itself."""

SerialNumber = Annotated[str, StringConstraints(pattern=f"^{SERIAL_NUMBER.pattern}$")]
BatchName = Annotated[str, StringConstraints(pattern=f"^{BATCH_NAME.pattern}$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class AuthorityKind(StrEnum):
    """What a CA signs. Brokers trust device certificates alone; enrolment trusts those and claim certificates."""

    DEVICE = "device"
    CLAIM = "claim"
    SERVICE = "service"


class AuthorityState(StrEnum):
    """ACTIVE issues; TRUSTED is still believed, and issues nothing; RETIRED is neither."""

    ACTIVE = "active"
    TRUSTED = "trusted"
    RETIRED = "retired"


class RevocationReason(StrEnum):
    """Why a certificate was revoked, in RFC 5280's words."""

    UNSPECIFIED = "unspecified"
    KEY_COMPROMISE = "keyCompromise"
    SUPERSEDED = "superseded"
    CESSATION_OF_OPERATION = "cessationOfOperation"
    PRIVILEGE_WITHDRAWN = "privilegeWithdrawn"


class EnrolmentState(StrEnum):
    """Where a request for a first certificate stands.

    REQUESTED and WAITING (for a person) have no certificate yet; ISSUED has one; ACTIVE: the device has been seen to
    work. CONFLICT: another key has this serial number, a person decides. CLOSED: over, the serial number is free.
    """

    REQUESTED = "requested"
    WAITING = "waiting"
    ISSUED = "issued"
    ACTIVE = "active"
    REFUSED = "refused"
    FAILED = "failed"
    CONFLICT = "conflict"
    CLOSED = "closed"


class DeviceHappening(StrEnum):
    """What a lifecycle workflow can wait for; recorded by the gateway or the enrolment server (store/waits.py)."""

    CONNECTED = "connected"
    """Anything has come from the device over MQTT."""
    HEARTBEAT = "heartbeat"
    CONFIGURED = "configured"
    """The device reports a configuration version of at least what was asked for."""
    COMMAND_ANSWERED = "command-answered"
    """The device has answered a command for good (succeeded or failed)."""
    SHADOW_REPORTED = "shadow-reported"
    """The device has changed what a shadow reports: `shadow` and `version`."""
    DIAGNOSED = "diagnosed"
    """The device has answered a diagnostic request: `request_id`."""
    CERTIFICATE_ISSUED = "certificate-issued"
    CERTIFICATE_CONFIRMED = "certificate-confirmed"


class DeviceEvent(_Frozen):
    """The payload of the signal `device_event` of every lifecycle workflow. It may come twice."""

    device_id: str
    happening: DeviceHappening
    at: datetime
    detail: dict[str, Any] = Field(default_factory=dict)
    """CONFIGURED: `version`. COMMAND_ANSWERED: `request_id`, `status`, `reason`. CERTIFICATE_...: `certificate_id`."""


class Decision(_Frozen):
    """The payload of `approve` and `reject`: a person decides about an enrolment."""

    actor: str
    reason: str = ""


# --- provisioning ----------------------------------------------------------------------------------------------------


class ProvisioningLimits(_Frozen):
    """How long each wait of a provisioning may last. What runs out is undone, and the device is in `error`."""

    approval: timedelta = timedelta(days=7)
    connect: timedelta = timedelta(hours=24)
    configure: timedelta = timedelta(hours=1)
    heartbeat: timedelta = timedelta(hours=1)


class ProvisionDeviceInput(_Frozen):
    """Starts `provision:<serial>`. All that matters of the request is the row `enrolments.enrolment_no`."""

    enrolment_no: int
    serial_number: SerialNumber
    limits: ProvisioningLimits = ProvisioningLimits()


class ProvisionOutcome(StrEnum):
    """How a provisioning ended."""

    ACTIVE = "active"
    REFUSED = "refused"
    FAILED = "failed"


class ProvisionDeviceResult(_Frozen):
    """What became of it; `reason` for a person."""

    serial_number: str
    outcome: ProvisionOutcome
    reason: str
    device_id: str | None = None
    certificate_id: str | None = None


class EnrolmentVerdict(StrEnum):
    """What a check of an enrolment came to."""

    ISSUE = "issue"
    WAIT = "wait"
    """For a person, as the batch asks."""
    REFUSE = "refuse"


class CheckEnrolmentInput(_Frozen):
    """May this enrolment have a certificate?"""

    enrolment_no: int


class CheckEnrolmentResult(_Frozen):
    """The verdict, and why."""

    verdict: EnrolmentVerdict
    reason: str = ""
    batch: str = ""


class RefuseEnrolmentInput(_Frozen):
    """End an enrolment that has no certificate."""

    enrolment_no: int
    actor: str
    reason: str


class IssueCertificateInput(_Frozen):
    """Issue, register, configure: all of it or nothing. `workflow_id` is told what the device does from then on."""

    enrolment_no: int
    workflow_id: str
    actor: str
    reason: str = ""


class IssueCertificateResult(_Frozen):
    """What was issued; `refused` says why nothing was. `config_version` is None where no configuration is wanted."""

    refused: str = ""
    device_id: str = ""
    certificate_id: str = ""
    config_version: int | None = None


class MarkConfiguredInput(_Frozen):
    """The device runs its first configuration."""

    device_id: str


class ActivateDeviceInput(_Frozen):
    """The device has been seen to work."""

    enrolment_no: int
    workflow_id: str
    device_id: str
    certificate_id: str


class ActivateDeviceResult(_Frozen):
    """`refused` says why the device could not become active."""

    refused: str = ""


class UndoProvisioningInput(_Frozen):
    """Take back what was done: certificate revoked, the device in `error`, the enrolment failed."""

    enrolment_no: int
    workflow_id: str
    reason: str


class UndoProvisioningResult(_Frozen):
    """How many certificates were revoked."""

    revoked: int


class ReissueCertificateInput(_Frozen):
    """Starts `reissue:<device>/<key>`: a device that has a certificate asks for its next one, for another key."""

    device_id: DeviceId
    certificate_id: str
    """The certificate with which it asked."""
    public_key: str
    """PEM."""
    source: str | None = None


class ReissueCertificateResult(_Frozen):
    """The certificate, or why there is none."""

    certificate_id: str = ""
    certificate: str = ""
    refused: str = ""


# --- configuration ---------------------------------------------------------------------------------------------------


class ConfigureDeviceInput(_Frozen):
    """Starts `configure:<device>`, or replaces what a running one waits for."""

    device_id: DeviceId
    config: dict[str, Any]
    actor: str
    reason: str = ""
    limit: timedelta = timedelta(hours=24)


class ConfigureOutcome(StrEnum):
    """How it ended: the device runs it; has not said so in time (it stays wanted); or it could not be asked for."""

    APPLIED = "applied"
    TIMED_OUT = "timed-out"
    REFUSED = "refused"


class ConfigureDeviceResult(_Frozen):
    """The version that was wanted last, and what became of it."""

    device_id: str
    version: int
    outcome: ConfigureOutcome
    reason: str


# --- rotation --------------------------------------------------------------------------------------------------------


class RotateCertificateInput(_Frozen):
    """Starts `rotate:<device>`. `ask`: False where the device has come by itself and needs not be told."""

    device_id: DeviceId
    actor: str
    reason: str = ""
    ask: bool = True
    renew_within: timedelta = timedelta(days=7)
    """How long the device has to come for a new certificate."""
    overlap: timedelta = timedelta(hours=24)
    """How long both certificates may be valid. Then the one that was not seen to connect is revoked."""


class RotateOutcome(StrEnum):
    """ROTATED: the old certificate is revoked. UNANSWERED: the device never came. REVERTED: it came, and was not seen
    with the new certificate; the old one stays."""

    ROTATED = "rotated"
    UNANSWERED = "unanswered"
    REVERTED = "reverted"
    REFUSED = "refused"


class RotateCertificateResult(_Frozen):
    """What became of it."""

    device_id: str
    outcome: RotateOutcome
    reason: str
    certificate_id: str | None = None
    revoked: tuple[str, ...] = ()


# --- decommissioning -------------------------------------------------------------------------------------------------


class DecommissionDeviceInput(_Frozen):
    """Starts `decommission:<device>`."""

    device_id: DeviceId
    actor: str
    reason: str = ""
    wipe_within: timedelta = timedelta(minutes=10)
    """How long the device has to wipe its credentials and say so; then it goes on without."""
    broker_within: timedelta = timedelta(minutes=2)
    """How long to wait for brokers to enforce the revocation; then it goes on, with an alert."""


class DecommissionDeviceResult(_Frozen):
    """What was done."""

    device_id: str
    serial_number: str
    wiped: bool
    executions_removed: int
    certificates_revoked: int
    retained_cleared: int
    reason: str


# --- upkeep of revocation lists ----------------------------------------------------------------------------------------


class PublishCrlsInput(_Frozen):
    """Sign the revocation lists that are due, or with `force` all of them."""

    force: bool = False
    actor: str = "upkeep"


class PublishedCrlFacts(_Frozen):
    """A list that was signed just now, and why."""

    authority_id: str
    name: str
    number: int
    revoked: int
    next_update: datetime
    reason: str


class PublishCrlsResult(_Frozen):
    """`standing`: lists that were good as they are. `failed`: authorities for which no repetition will sign one."""

    signed: tuple[PublishedCrlFacts, ...] = ()
    standing: int = 0
    failed: tuple[str, ...] = ()


class CheckAuthoritiesInput(_Frozen):
    """Look whether lists are being renewed and authorities last; alerts say where not."""


class CheckAuthoritiesResult(_Frozen):
    """The texts of the alerts that stand."""

    alerts: tuple[str, ...] = ()


class KeepCrlsInput(_Frozen):
    """One round of upkeep (`upkeep:crl`)."""


class KeepCrlsResult(_Frozen):
    """What was signed, what is wrong; `reason` for a person."""

    reason: str
    signed: tuple[PublishedCrlFacts, ...] = ()
    alerts: tuple[str, ...] = ()


# --- what is shown ---------------------------------------------------------------------------------------------------


class AuthorityView(BaseModel):
    """A CA as it is shown."""

    authority_id: str
    kind: AuthorityKind
    name: str
    state: AuthorityState
    not_before: datetime
    not_after: datetime
    certificate: str
    key_reference: str
    crl_number: int = 0
    crl_next_update: datetime | None = None
    crl_revoked: int | None = None


class CertificateView(BaseModel):
    """A device certificate as it is shown."""

    certificate_id: str
    device_id: str
    authority_id: str
    generation: int
    serial_hex: str
    spki_sha256: str
    not_before: datetime
    not_after: datetime
    state: str
    issued_at: datetime
    confirmed_at: datetime | None = None
    revoked_at: datetime | None = None
    revocation_reason: str | None = None


class ConfigurationView(BaseModel):
    """A version of a device's configuration as it is shown."""

    device_id: str
    version: int
    config: dict[str, Any]
    actor: str
    reason: str = ""
    created_at: datetime
    acknowledged_at: datetime | None = None


class CommandView(BaseModel):
    """A command to a device as it is shown."""

    request_id: str
    device_id: str
    operation: str
    state: str
    requested_by: str
    created_at: datetime
    expires_at: datetime
    answered_at: datetime | None = None
    answer: str | None = None


class ClaimBatchSpec(BaseModel):
    """A batch as an operator describes it."""

    model_config = ConfigDict(extra="forbid")

    name: BatchName
    device_type: Label
    site_id: Label
    zone: str | None = None
    manufacturer: str | None = None
    tags: dict[str, str] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict)
    id_prefix: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9:_-]{0,60}$")] = ""
    approval: Annotated[str, StringConstraints(pattern="^(none|manual)$")] = "none"
    listed_only: bool = False
    max_devices: int = Field(ge=1, le=10_000_000)
    alarm_per_minute: int | None = Field(default=None, ge=1)
    expires_at: datetime


class ClaimBatchView(ClaimBatchSpec):
    """A batch as it stands."""

    enrolled: int
    listed: int
    disabled_at: datetime | None = None
    disabled_reason: str | None = None
    created_at: datetime
    created_by: str


class EnrolmentView(BaseModel):
    """An enrolment as it is shown."""

    enrolment_no: int
    serial_number: str
    spki_sha256: str
    batch: str
    state: EnrolmentState
    device_id: str | None = None
    certificate_id: str | None = None
    reason: str = ""
    source: str | None = None
    requested_at: datetime
    decided_at: datetime | None = None
    decided_by: str | None = None


class AuditView(BaseModel):
    """A line of the audit."""

    event_no: int
    at: datetime
    actor: str
    action: str
    subject_kind: str
    subject: str
    reason: str = ""
    details: dict[str, Any] = Field(default_factory=dict)


class AlertView(BaseModel):
    """An alert as it stands."""

    alert_no: int
    rule: str
    subject: str
    text: str
    severity: str = "warning"
    state: str
    occurrences: int
    opened_at: datetime
    last_at: datetime
    acknowledged_at: datetime | None = None
    acknowledged_by: str | None = None
    resolved_at: datetime | None = None
    resolved_by: str | None = None
