"""Health of devices: what sweeps and upkeep are asked for, and what they found."""

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field

from models.device import DeviceRecord, Label


class SweepOfflineInput(BaseModel):
    """Look once who has fallen silent, and who is heard again."""

    model_config = ConfigDict(frozen=True)


class SweepOfflineResult(BaseModel):
    """What one look has found. `listening`: devices could have been heard; without it nobody is declared offline."""

    model_config = ConfigDict(frozen=True)

    listening: bool = False
    offline: int = 0
    back: int = 0
    alerts: tuple[str, ...] = ()
    """Alerts beyond those of single devices."""
    reason: str = ""


class KeepHistoryInput(BaseModel):
    """Make the partitions of the next days, and let go what is older than it is to be."""

    model_config = ConfigDict(frozen=True)


class KeepHistoryResult(BaseModel):
    """What was made, dropped and deleted."""

    model_config = ConfigDict(frozen=True)

    made: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    moved: int = 0
    """Rows that had come while no partition was there for their day."""
    deleted: dict[str, int] = Field(default_factory=dict)
    """By table, of those that are not kept by days."""
    reason: str = ""


class DeviceTypeView(BaseModel):
    """A device type and how long its devices may be silent."""

    device_type: Label
    devices: int
    offline_after_seconds: float | None = None
    """None: the setting TIDEGATE_OFFLINE_MINUTES holds."""


class HealthGroup(BaseModel):
    """How the devices of a site or of a type are."""

    name: str
    devices: int
    online: int
    offline: int
    never_heard: int


class FleetHealth(BaseModel):
    """How the fleet is, without retired devices."""

    devices: int
    online: int
    offline: int
    never_heard: int
    sites: tuple[HealthGroup, ...] = ()
    types: tuple[HealthGroup, ...] = ()
    listening: bool = False
    pulsed_at: datetime | None = None
    covered_since: datetime | None = None


class Spread(BaseModel):
    """One measurement over time."""

    name: str
    least: float
    mean: float
    most: float
    newest: float
    course: tuple[float | None, ...] = ()
    """Means of equal parts of the time; None where nothing was said."""


class PresenceView(BaseModel):
    """What a device said last, and whether it counts as offline."""

    device_id: str
    last_heartbeat: datetime | None = None
    offline_since: datetime | None = None
    offline_after_seconds: float | None = None
    """Its type's limit; None: the setting's."""
    device_time: datetime | None = None
    uptime: int | None = None
    free_memory: int | None = None
    cpu_temperature: float | None = None
    signal_strength: float | None = None
    error_count: int | None = None
    firmware_version: str | None = None
    boot_id: str | None = None
    extra: dict[str, float] | None = None


class DeviceShown(DeviceRecord):
    """A device with what it said last."""

    presence: PresenceView


class DeviceHealth(BaseModel):
    """A device's presence, and its heartbeats of some time."""

    presence: PresenceView
    since: datetime
    heartbeats: int
    boots: int
    longest_silence_seconds: float | None = None
    """Between two heartbeats of that time."""
    measurements: tuple[Spread, ...] = ()
