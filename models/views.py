"""What is shown: read models that the store fills and the command line prints, as tables or as JSON. All frozen.

Nothing here is sent between processes that act on it; a view may be out of date the moment it is read.
"""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, computed_field

from models.device import DeviceRecord
from models.protocol import ExecutionState, FailureClass, Step
from models.rollout import JobStatus, Outcome, Phase, WaveCounts, WaveProgress
from models.spec import RolloutSpec


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class EventView(_Frozen):
    """One thing that happened to a rollout; `event_no` grows, so "newer than the last I saw" is exact."""

    event_no: int
    at: datetime
    kind: str
    wave: int | None = None
    actor: str
    text: str


class RolloutView(_Frozen):
    """A rollout as PostgreSQL has it: the job's row, its waves, its failures by class. Times are UTC."""

    job_no: int
    job_id: str
    name: str
    release: str
    status: JobStatus
    phase: Phase
    outcome: Outcome | None = None
    reason: str = ""
    spec: RolloutSpec
    target_version: str | None = None
    target_sha256: str | None = None
    requested_by: str = "unknown"
    devices: int = 0
    in_flight: int = 0
    in_flight_cap: int = 0
    per_minute: int | None = None
    exposed: int = 0
    by_delta: int = 0
    created_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    waves: tuple[WaveProgress, ...] = ()
    failures: dict[FailureClass, int] = Field(default_factory=dict)

    @property
    def counts(self) -> WaveCounts:
        """Sums over all waves."""
        names = WaveCounts.model_fields
        return WaveCounts(**{name: sum(getattr(wave.counts, name) for wave in self.waves) for name in names})


class ExecutionView(_Frozen):
    """Where one device stands in one rollout, and why."""

    rollout: str
    device_id: str
    wave: int
    wave_name: str = ""
    rank: int
    state: ExecutionState
    step: Step | None = None
    version_number: int = 1
    execution_number: int = 1
    status_details: dict[str, str] = Field(default_factory=dict)
    failure_class: FailureClass | None = None
    reason: str | None = None
    base_version: str | None = None
    base_sha256: str | None = None
    by_delta: bool | None = None
    queued_at: datetime | None = None
    started_at: datetime | None = None
    updated_at: datetime | None = None
    finished_at: datetime | None = None
    deadline_at: datetime | None = None
    retry_at: datetime | None = None
    """While QUEUED after a failure: when the next attempt may begin."""


class ReleaseView(_Frozen):
    """A published release; `envelope` is the signed statement as it came."""

    release_id: int
    product: str
    version: str
    hardware: tuple[str, ...]
    security_counter: int
    sha256: str
    size_bytes: int
    key_id: str
    published_by: str | None = None
    created_at: datetime
    envelope: dict[str, Any] = Field(default_factory=dict)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ref(self) -> str:
        """`product@version`, as a specification names it."""
        return f"{self.product}@{self.version}"


class NewRelease(_Frozen):
    """A release as its publisher hands it in: the signed statement, and what of it is queried."""

    product: str
    version: str
    hardware: tuple[str, ...]
    security_counter: int
    sha256: str
    size_bytes: int
    key_id: str
    envelope: dict[str, Any]
    published_by: str | None = None


class PublishedRelease(_Frozen):
    """What publishing did: `created` is False when the very same statement was there before."""

    release: ReleaseView
    created: bool


class ImportResult(_Frozen):
    """What an import did; the three counts add up to `rows`."""

    rows: int
    created: int
    updated: int
    unchanged: int


class DevicePage(_Frozen):
    """Devices in the order of their ids, and how many the filter selects in all."""

    total: int
    devices: tuple[DeviceRecord, ...] = ()


class BrokerView(BaseModel):
    """A broker, and the revision of access that it enforces. `error`: what keeps it from the newest."""

    broker_id: str
    applied_revision: int
    applied_at: datetime | None = None
    crl_next_update: datetime | None = None
    seen_at: datetime
    error: str | None = None
