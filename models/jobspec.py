"""A fleet job's specification as an operator writes it, with its defaults.

```yaml
name: restart-berlin
operation: restart
target: {sites: [berlin]}
max_parallel: 20
retry: {max_attempts: 3, backoff: 30s}
```
"""

from datetime import datetime, timedelta
from enum import StrEnum
from fractions import Fraction
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from models.device import DeviceFilter
from models.documents import document_problem
from models.ids import JOB_NAME, parse_release_ref
from models.protocol import DiagnosticType, JobOperation
from models.quantities import Duration, Share
from models.spec import DeadlineSpec, GateSpec, WaveSpec


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Membership(StrEnum):
    """SNAPSHOT: the devices that match when the job is planned. CONTINUOUS: later ones join as well, until it ends."""

    SNAPSHOT = "snapshot"
    CONTINUOUS = "continuous"


class RetrySpec(_Strict):
    """What follows a failure: attempts in all, and the pause before each: `backoff * multiplier ** (attempt - 1)`."""

    max_attempts: int = Field(default=1, ge=1, le=20)
    backoff: Duration = timedelta(seconds=30)
    backoff_multiplier: float = Field(default=2.0, ge=1, le=100)
    max_backoff: Duration = timedelta(hours=1)

    def pause_after(self, attempt: int) -> timedelta:
        """How long to wait after attempt number `attempt` (from 1) has failed.

        >>> RetrySpec(max_attempts=3, backoff=timedelta(seconds=2)).pause_after(2)
        datetime.timedelta(seconds=4)
        """
        return min(self.max_backoff, self.backoff * self.backoff_multiplier ** (attempt - 1))


class FleetJobSpec(_Strict):
    """A whole specification. Every key but name and operation has a default.

    `document` is what devices get beside the operation (custom jobs), `config` what config-sync has them take (None: what
    is wanted of each already), `diagnostics` what a diagnostic job asks, `release` what a firmware-update installs.
    """

    name: str
    operation: JobOperation
    document: dict[str, Any] = Field(default_factory=dict)
    config: dict[str, Any] | None = None
    diagnostics: tuple[str, ...] = ()
    release: str | None = None
    target: DeviceFilter = DeviceFilter()
    membership: Membership = Membership.SNAPSHOT
    start_at: datetime | None = None
    end_at: datetime | None = None
    max_parallel: int = Field(default=100, ge=1)
    per_minute: int | None = Field(default=None, ge=1)
    retry: RetrySpec = RetrySpec()
    waves: tuple[WaveSpec, ...] = Field(default=(WaveSpec(name="all", size=Fraction(1)),), min_length=1, max_length=50)
    gate: GateSpec | None = None
    """None: failures are counted and recorded, and stop nothing."""
    completion: Share = Fraction(95, 100)
    deadlines: DeadlineSpec = DeadlineSpec()
    retry_of: str | None = None
    """A job whose failed devices are the target, instead of `target`."""

    @field_validator("name", "retry_of")
    @classmethod
    def _name(cls, value: str | None) -> str | None:
        if value is not None and not JOB_NAME.fullmatch(value):
            raise ValueError(f"expected letters, digits, dots and dashes, at most 63, got {value!r}")
        return value

    @field_validator("start_at", "end_at")
    @classmethod
    def _zoned(cls, value: datetime | None) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError(f"expected a time with its zone, as in 2026-11-30T02:00:00Z, got {value.isoformat()}")
        return value

    @field_validator("document")
    @classmethod
    def _deliverable(cls, value: dict[str, Any]) -> dict[str, Any]:
        problem = document_problem(value)
        if problem is not None:
            raise ValueError(f"cannot be given to a device: {problem}")
        return value

    @field_validator("config")
    @classmethod
    def _configurable(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        problem = None if value is None else document_problem(value, reserved=())
        if problem is not None:
            raise ValueError(f"cannot be given to a device: {problem}")
        return value

    @field_validator("diagnostics")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        known = [str(kind) for kind in DiagnosticType if kind is not DiagnosticType.REBOOT]
        for asked in value:
            if asked not in known:
                raise ValueError(f"expected some of {', '.join(known)}, got {asked!r:.40}; operation restart reboots")
        return value

    @model_validator(mode="after")
    def _fits_operation(self) -> "FleetJobSpec":
        firmware = self.operation is JobOperation.FIRMWARE_UPDATE
        if firmware != (self.release is not None):
            raise ValueError(
                "release: expected with operation firmware-update, and with no other; "
                f"got {self.release!r} with {self.operation}"
            )
        if self.release is not None:
            try:
                parse_release_ref(self.release)
            except Exception as error:
                raise ValueError(f"release: {error}") from None
        if self.config is not None and self.operation is not JobOperation.CONFIG_SYNC:
            raise ValueError(f"config: expected with operation config-sync alone, got it with {self.operation}")
        if self.document and self.operation is not JobOperation.CUSTOM:
            raise ValueError(f"document: expected with operation custom alone, got it with {self.operation}")
        if self.diagnostics and self.operation is not JobOperation.DIAGNOSTIC:
            raise ValueError(f"diagnostics: expected with operation diagnostic alone, got it with {self.operation}")
        if self.membership is Membership.CONTINUOUS and self.retry_of is not None:
            raise ValueError("membership: a job over the failed devices of another is a snapshot")
        if self.end_at is not None and self.start_at is not None and self.end_at <= self.start_at:
            raise ValueError(f"end_at: expected after start_at {self.start_at}, got {self.end_at}")
        return self
