"""A device's configuration as both sides see it: what a report changes, whether the two agree, and what still differs.

Pure. The version is the server's: it names a configuration that was wanted. A device reports the version it runs, and may
add the configuration itself; what it reports never changes what is wanted.

>>> DeviceConfig("motor-7", {"interval": 5}, 2, {"interval": 7}, 2, 9).delta()
{'config': {'interval': 5}}
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from domain.differences import delta_of, is_same

MAX_VERSION = 10**9
"""A device may report any version up to here; the column holds twice as much."""
MAX_CONFIG_BYTES = 8 * 1024
"""Of a configuration as JSON, wanted or reported: two of them and their differences fit in one answer to a device."""
MAX_CONFIG_DEPTH = 8
"""As in a device shadow: how deep objects and arrays may be nested, the configuration itself being the first level."""


class ConfigState(StrEnum):
    """Where a device's configuration stands.

    NONE: nothing is wanted. PENDING: the device has not said yet that it runs the wanted version. DRIFTED: it had said
    so and says something else now, or names the wanted version and runs another configuration, or a version that never
    was wanted.
    """

    NONE = "none"
    IN_SYNC = "in-sync"
    PENDING = "pending"
    DRIFTED = "drifted"


@dataclass(frozen=True, slots=True)
class ConfigReport:
    """What a device says it runs. `config` None: it speaks of the version alone."""

    version: int
    config: dict[str, Any] | None = None


@dataclass(slots=True)
class DeviceConfig:
    """A device's configuration, as PostgreSQL has it and as reports change it. Times are epoch seconds."""

    device_id: str
    desired: dict[str, Any] | None
    desired_version: int
    reported: dict[str, Any]
    reported_version: int
    document_version: int
    """Of the shadow document: grows with every accepted change of either side."""
    desired_at: float | None = None
    reported_at: float | None = None
    acknowledged: bool = False
    """Whether the device has said at some time that it runs the wanted version."""
    versions: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Earlier configurations, by version, as far as they are needed."""
    confirmed: set[int] = field(default_factory=set)
    """Versions that the device has confirmed just now."""
    changed: bool = False

    @property
    def exists(self) -> bool:
        """Whether there is anything to speak of."""
        return self.desired_version > 0 or self.reported_at is not None

    @property
    def in_sync(self) -> bool:
        """Whether the device runs what is wanted, as far as it has told."""
        return self.reported_version == self.desired_version and is_same(self.reported, self.desired)

    @property
    def state(self) -> ConfigState:
        """See ConfigState."""
        if self.desired_version == 0 or self.desired is None:
            return ConfigState.NONE
        if self.in_sync:
            return ConfigState.IN_SYNC
        if self.reported_version < self.desired_version and not self.acknowledged:
            return ConfigState.PENDING
        return ConfigState.DRIFTED

    def report(self, report: ConfigReport, now: float) -> None:
        """Take what the device says. A version that it confirms by the configuration it names is added to `confirmed`."""
        known = self.desired if report.version == self.desired_version else self.versions.get(report.version)
        if report.config is not None:
            self.reported = report.config
        elif known is not None:
            self.reported = known
        self.reported_version = report.version
        self.reported_at = now
        self.document_version += 1
        self.changed = True
        if known is not None and is_same(self.reported, known):
            self.confirmed.add(report.version)
            self.acknowledged = self.acknowledged or report.version == self.desired_version

    def delta(self) -> dict[str, Any]:
        """What of the wanted state is not reported: `version` and `config`, each where it differs."""
        if self.desired is None or self.desired_version == 0:
            return {}
        delta: dict[str, Any] = {}
        if self.reported_version != self.desired_version:
            delta["version"] = self.desired_version
        if differing := delta_of(self.desired, self.reported):
            delta["config"] = differing
        elif not is_same(self.reported, self.desired):
            delta["version"] = self.desired_version  # the device has more than is wanted: no leaf of it says so
        return delta


def delta_message(config: DeviceConfig, now: float, token: str | None = None) -> dict[str, Any] | None:
    """The body of `.../shadow/name/config/update/delta`; None when nothing differs."""
    state = config.delta()
    if not state:
        return None
    message: dict[str, Any] = {"version": config.document_version, "timestamp": int(now), "state": state}
    if token is not None:
        message["clientToken"] = token
    return message
