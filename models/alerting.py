"""Alert rules as an operator writes them, and what a notification of alerts says.

```yaml
name: overheating
when: cpuTemperature > 80 for 2 heartbeats, clear < 75 for 3 heartbeats
severity: critical
target: {type: motor}
```

`when` is a short way to write `metric`, `comparison`, `threshold`, `heartbeats`, `for`, `clear` and `clear_heartbeats`.

>>> rule = parse_condition("cpuTemperature > 80 for 2 heartbeats, clear < 75 for 3 heartbeats")
>>> rule["metric"], rule["threshold"], rule["heartbeats"], rule["clear"]
('cpuTemperature', 80.0, 2, 75.0)
"""

import math
import re
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from models.device import DeviceFilter
from models.ids import RULE_NAME
from models.quantities import Duration, format_duration, parse_duration

MAX_HEARTBEATS = 10_000
_METRIC = re.compile(r"[A-Za-z_][A-Za-z0-9_.:/-]{0,99}")
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
MAX_CONDITION_CHARS = 500
NOT_NUMBERS = frozenset({"deviceId", "timestamp", "firmwareVersion", "firmwareSha256", "bootId", "clientToken"})
"""Keys of a heartbeat that no rule can compare."""


class Severity(StrEnum):
    """How much an alert matters, the least first."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        """For comparing: 0 is the least."""
        return list(Severity).index(self)


class Comparison(StrEnum):
    """How a value is compared with the threshold."""

    ABOVE = ">"
    AT_LEAST = ">="
    BELOW = "<"
    AT_MOST = "<="
    EQUAL = "=="
    UNEQUAL = "!="

    @property
    def back(self) -> "Comparison | None":
        """How a value that is back within the limit compares with `clear`; None where there is no way back but one."""
        if self in (Comparison.ABOVE, Comparison.AT_LEAST):
            return Comparison.BELOW
        return Comparison.ABOVE if self in (Comparison.BELOW, Comparison.AT_MOST) else None


SEVERITIES = {
    "cloned-device": Severity.CRITICAL,
    "crl-half-life": Severity.CRITICAL,
    "crl-not-renewed": Severity.CRITICAL,
    "crl-not-signed": Severity.CRITICAL,
    "crl-unusable": Severity.CRITICAL,
    "authority-ending": Severity.CRITICAL,
    "enrolment-conflict": Severity.CRITICAL,
    "broker-behind": Severity.CRITICAL,
    "ingest-silent": Severity.CRITICAL,
    "site-offline": Severity.CRITICAL,
    "reboot-refused": Severity.CRITICAL,
    "certificate-ending": Severity.WARNING,
    "claim-rate": Severity.WARNING,
    "device-offline": Severity.WARNING,
    "retained-left": Severity.WARNING,
    "rotation-reverted": Severity.WARNING,
}
"""What Tidegate's own alerts are worth where who raises one does not say. No rule of a person's bears such a name."""


def severity_of(rule: str) -> Severity:
    """Of an alert that Tidegate raises by itself."""
    return SEVERITIES.get(rule, Severity.WARNING)


class AlertRuleSpec(BaseModel):
    """When a heartbeat gives cause for an alert, and when it is over.

    It opens when `heartbeats` in a row were beyond the threshold, and the first of them came `for` ago or more. It is
    over when `clear_heartbeats` in a row were back within `clear`; where that is not given, within the threshold.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    name: str
    metric: str
    comparison: Comparison
    threshold: float
    heartbeats: int = Field(default=1, ge=1, le=MAX_HEARTBEATS)
    lasting: Duration = Field(default=timedelta(0), alias="for")
    clear: float | None = None
    clear_heartbeats: int = Field(default=1, ge=1, le=MAX_HEARTBEATS)
    severity: Severity = Severity.WARNING
    target: DeviceFilter = DeviceFilter()
    enabled: bool = True

    @model_validator(mode="before")
    @classmethod
    def _unfolded(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "when" not in given:
            return given
        rest = {key: value for key, value in given.items() if key != "when"}
        condition = parse_condition(given["when"])
        if twice := sorted(rest.keys() & condition.keys()):
            raise ValueError(f"expected either when or {', '.join(twice)}, got both")
        return rest | condition

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not RULE_NAME.fullmatch(value):
            raise ValueError(f"expected small letters, digits and dashes, at most 64, got {value!r}")
        if value in SEVERITIES:
            raise ValueError(f"expected a name that Tidegate's own alerts do not bear, got {value!r}")
        return value

    @field_validator("metric")
    @classmethod
    def _metric(cls, value: str) -> str:
        if not _METRIC.fullmatch(value) or value in NOT_NUMBERS:
            raise ValueError(f"expected a heartbeat's key that is a number, as cpuTemperature, got {value!r}")
        return value

    @field_validator("threshold", "clear")
    @classmethod
    def _finite(cls, value: float | None) -> float | None:
        if value is not None and not math.isfinite(value):
            raise ValueError(f"expected a finite number, got {value}")
        return value

    @field_validator("target")
    @classmethod
    def _targets(cls, value: DeviceFilter) -> DeviceFilter:
        if value.inactive_minutes is not None:
            raise ValueError("inactive_minutes: a device that is silent sends no heartbeat to judge; leave it out")
        return value

    @model_validator(mode="after")
    def _hysteresis(self) -> "AlertRuleSpec":
        if self.clear is None:
            return self
        if self.comparison.back is None:
            raise ValueError(f"clear: expected none with {self.comparison}, which has no side to come back from")
        if (self.clear > self.threshold) if self.comparison.back is Comparison.BELOW else self.clear < self.threshold:
            side = "at most" if self.comparison.back is Comparison.BELOW else "at least"
            raise ValueError(f"clear: expected {side} the threshold {self.threshold:g}, got {self.clear:g}")
        return self

    @property
    def condition(self) -> str:
        """As `parse_condition` reads it."""
        lasting = [f"{self.heartbeats} heartbeats"] if self.heartbeats > 1 else []
        lasting += [format_duration(self.lasting)] if self.lasting else []
        text = f"{self.metric} {self.comparison} {self.threshold:.15g}"
        text += f" for {' and '.join(lasting)}" if lasting else ""
        if self.clear is not None:
            text += f", clear {self.comparison.back} {self.clear:.15g}"
        elif self.clear_heartbeats > 1:
            text += ", clear"
        return text + (f" for {self.clear_heartbeats} heartbeats" if self.clear_heartbeats > 1 else "")


_BEYOND = (
    (re.compile(rf"\s*({_METRIC.pattern})\s*"), "a heartbeat's key, as cpuTemperature"),
    (re.compile(r"(>=|<=|==|!=|>|<)(?![<>=!])\s*"), "one of > >= < <= == !="),
    (re.compile(rf"({_NUMBER})(?![\w.%])\s*"), "a number"),
)
_CLEAR = re.compile(
    rf"\s*clear(?:\s*(?P<side>[<>])\s*(?P<bound>{_NUMBER}))?(?:\s+for\s+(?P<count>\d+)\s+heartbeats?)?\s*"
)
_LASTING = re.compile(
    r"for\s+(?:(?P<count>\d+)\s+heartbeats?(?:\s+and\s+(?P<also>[\w.]+))?|(?P<time>[\w.]+))\s*", re.ASCII
)


def parse_condition(text: Any) -> dict[str, Any]:
    """Read `cpuTemperature > 80 for 2 heartbeats and 10m, clear < 75 for 3 heartbeats`; all behind the number is optional.

    Returns:
        The keys of an AlertRuleSpec that it gives.

    Raises:
        ValueError: saying what was expected, and what stands there instead.
    """
    if not isinstance(text, str):
        raise ValueError(f"expected text as in 'cpuTemperature > 80 for 2 heartbeats', got {text!r}")
    if len(text) > MAX_CONDITION_CHARS:
        raise ValueError(f"expected a condition of at most {MAX_CONDITION_CHARS} characters, got {len(text)}")
    beyond, comma, back = text.partition(",")
    words, at = [], 0
    for pattern, expected in _BEYOND:
        found = pattern.match(beyond, at)
        if found is None:
            raise ValueError(f"expected {expected}, got {beyond[at:] or 'nothing'!r} in {text!r}")
        words.append(found[1])
        at = found.end()
    comparison = Comparison(words[1])
    parsed: dict[str, Any] = {"metric": words[0], "comparison": comparison.value, "threshold": float(words[2])}
    parsed |= _lasting(beyond[at:], text)
    if comma:
        parsed |= _cleared(back, comparison, text)
    return parsed


def _lasting(written: str, text: str) -> dict[str, Any]:
    if not written:
        return {}
    found = _LASTING.fullmatch(written)
    if found is None:
        raise ValueError(f"expected 'for N heartbeats', 'for 10m' or ', clear ...', got {written!r} in {text!r}")
    parsed: dict[str, Any] = {"heartbeats": int(found["count"])} if found["count"] else {}
    if duration := found["also"] or found["time"]:
        parsed["for"] = format_duration(parse_duration(duration))
    return parsed


def _cleared(written: str, comparison: Comparison, text: str) -> dict[str, Any]:
    found = _CLEAR.fullmatch(written)
    if found is None:
        example = f"clear {comparison.back} 75 for 3 heartbeats" if comparison.back else "clear for 3 heartbeats"
        raise ValueError(f"expected '{example}', got {written.strip()!r} in {text!r}")
    if found["side"] and found["side"] != comparison.back:
        expected = f"clear {comparison.back}" if comparison.back else "clear without a threshold"
        raise ValueError(f"expected {expected!r} after {comparison.value!r}, got 'clear {found['side']}' in {text!r}")
    parsed: dict[str, Any] = {"clear": float(found["bound"])} if found["bound"] else {}
    return parsed | ({"clear_heartbeats": int(found["count"])} if found["count"] else {})


BUILT_IN = (
    AlertRuleSpec.model_validate(
        {
            "name": "overheating",
            "when": "cpuTemperature > 80 for 2 heartbeats, clear < 75 for 3 heartbeats",
            "severity": "critical",
        }
    ),
    AlertRuleSpec.model_validate({"name": "high-error-rate", "when": "errorCount > 100"}),
)
"""Rules that every installation begins with (migration 0003); `alert rule` changes, disables and deletes them."""


class AlertRuleView(BaseModel):
    """A rule as it stands."""

    spec: AlertRuleSpec
    revision: int
    created_by: str
    updated_at: datetime
    standing: int = 0
    """Alerts of it that are not resolved."""


class RuleTrial(BaseModel):
    """What a rule would have made of the heartbeats that are kept."""

    heartbeats: int = 0
    devices: int = 0
    """That said something of the metric."""
    alerting: int = 0
    """Devices of these that would have had an alert."""
    alerts: int = 0
    still_open: int = 0
    first: tuple[str, ...] = ()
    """The first few of the alerting devices."""


class AlertQuery(BaseModel):
    """Which alerts; `severity` is the least."""

    model_config = ConfigDict(frozen=True)

    rule: str | None = None
    device: str | None = None
    severity: Severity | None = None
    site: str | None = None


class AlertGroup(BaseModel):
    """The alerts of one rule."""

    rule: str
    severities: list[str]
    count: int
    open: int
    acknowledged: int
    resolved: int
    first_at: datetime
    last_at: datetime
    first_subject: str
    sites: dict[str, int]


class AlertTold(BaseModel):
    """One change of an alert, and the notification that told of it; `none` where nobody is told of anything."""

    event: str
    at: datetime
    handed_over_at: datetime | None = None
    digest: str | None = None


class AlertEvent(StrEnum):
    """What has happened to alerts that somebody is told of."""

    OPENED = "opened"
    ACKNOWLEDGED = "acknowledged"
    RESOLVED = "resolved"


class NotedAlert(BaseModel):
    """One of the alerts that a notification tells of."""

    model_config = ConfigDict(frozen=True)

    alert_no: int
    subject: str
    text: str
    severity: Severity = Severity.WARNING
    at: datetime
    site: str | None = None


class NotifyInput(BaseModel):
    """What to tell: alerts of one rule that have come to the same state, the first of them by name.

    `channel`: this one alone, whatever it takes (`alert channel test`).
    """

    model_config = ConfigDict(frozen=True)

    digest: str
    rule: str
    event: AlertEvent
    severity: Severity
    summary: str
    count: int
    sites: dict[str, int] = Field(default_factory=dict)
    alerts: tuple[NotedAlert, ...] = ()
    at: datetime
    channel: str | None = None


class ChosenChannels(BaseModel):
    """The channels that want a notification, by name."""

    model_config = ConfigDict(frozen=True)

    names: tuple[str, ...] = ()


class DeliverInput(BaseModel):
    """One notification to one channel."""

    model_config = ConfigDict(frozen=True)

    channel: str
    notification: NotifyInput


class Delivery(BaseModel):
    """What became of a notification in one channel."""

    model_config = ConfigDict(frozen=True)

    channel: str
    delivered: bool
    reason: str = ""


class NotifyResult(BaseModel):
    """What became of a notification."""

    model_config = ConfigDict(frozen=True)

    digest: str
    deliveries: tuple[Delivery, ...] = ()
    reason: str = ""
