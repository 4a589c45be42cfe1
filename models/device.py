"""A device in the registry, and the filter that selects devices.

Field names are the requirements document's. A device's `device_type` is the hardware a release is matched against.
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from models.ids import THING_NAME

DeviceId = Annotated[str, StringConstraints(pattern=f"^{THING_NAME.pattern}$")]
Label = Annotated[str, StringConstraints(min_length=1, max_length=100)]


class DeviceStatus(StrEnum):
    """Where a device stands in its life."""

    PROVISIONING = "provisioning"
    CONFIGURED = "configured"
    ACTIVE = "active"
    INACTIVE = "inactive"
    ERROR = "error"
    RETIRED = "retired"


class DeviceFacts(BaseModel):
    """What the registry knows of one device and the lookup cache holds (store/lookup.py). Times are UTC.

    Each field is a column of `devices`. Not among them: presence, which changes with each heartbeat, and whether the
    device is barred, which nobody is to decide by what a cache says.
    """

    model_config = ConfigDict(extra="forbid")

    device_id: DeviceId
    device_type: Label
    serial_number: Annotated[str, StringConstraints(min_length=1, max_length=255)]
    manufacturer: str | None = None
    site_id: Label
    zone: str | None = None
    tags: dict[str, str] = Field(default_factory=dict)
    status: DeviceStatus = DeviceStatus.ACTIVE
    firmware_version: str | None = None
    firmware_sha256: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    desired_config: dict[str, Any] | None = None
    config_version: int = Field(default=0, ge=0, le=2**31 - 1)
    created_at: datetime | None = None
    updated_at: datetime | None = None
    retired_at: datetime | None = None
    desired_config_version: int = Field(default=0, ge=0)
    config_reported_at: datetime | None = None


class DeviceRecord(DeviceFacts):
    """One device as it is imported and shown: the facts, when it was last heard, and whether it may speak."""

    last_heartbeat: datetime | None = None
    uptime: int | None = Field(default=None, ge=0, le=2**63 - 1)
    offline_since: datetime | None = None
    """When it was found to be silent for too long; None: it is heard, or never was."""
    config_state: str | None = None
    barred_at: datetime | None = None
    barred_reason: str | None = None


KEPT_BY_TIDEGATE = frozenset(
    {"desired_config_version", "config_state", "config_reported_at", "barred_at", "barred_reason", "offline_since"}
)
"""Fields that are shown and never imported: what they say follows from what was wanted, reported and decided."""


class DeviceChanges(BaseModel):
    """What to change about a device, or about many: keys that are not set stay as they are; None clears."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device_type: Label | None = None
    manufacturer: str | None = None
    site_id: Label | None = None
    zone: str | None = None
    tags: dict[str, str] = Field(default_factory=dict)
    status: DeviceStatus = DeviceStatus.ACTIVE
    firmware_version: str | None = None
    firmware_sha256: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    desired_config: dict[str, Any] | None = None

    @field_validator("device_type", "site_id")
    @classmethod
    def _kept(cls, value: str | None) -> str:
        if value is None:
            raise ValueError("cannot be cleared, every device has one")
        return value


class DeviceFilter(BaseModel):
    """Which devices: every key that is given must match; an empty filter matches all that are not retired.

    A tag's value is matched exactly (`production`), or compared as text with one of `< <= > >= !=` in front
    (`<2026-03-12`: ISO dates compare as they should). `ids` and `statuses` are any-of.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: str | None = None
    tags: dict[str, str] = Field(default_factory=dict)
    sites: tuple[str, ...] = ()
    statuses: tuple[DeviceStatus, ...] = ()
    versions: tuple[str, ...] = ()
    ids: tuple[DeviceId, ...] = ()
    inactive_minutes: int | None = Field(default=None, ge=1, description="no heartbeat for this long")
