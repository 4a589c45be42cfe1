"""Judging heartbeats by the alert rules, inside the batch's transaction (docs/adr/0020).

A heartbeat costs one comparison for each rule, in memory. Only devices that are beyond a threshold, or on their way into
an alert or out of it, are looked up at all: whether the rule is meant for them, and how far they are. What follows is
written with the heartbeats themselves, so that a batch which is tried again counts once.

Rules are read again every few seconds with a batch, and at once where a device is judged and one of them has changed.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from operator import attrgetter

from prometheus_client import Counter, Gauge
from psycopg import AsyncConnection

from domain.alerting import COMPARE, WELL, Change, Progress, is_beyond, judge
from domain.selector import matches
from gateway.requests import Heartbeat
from models.alerting import AlertRuleSpec
from models.device import DeviceRecord
from store.alert_rules import load_rules
from store.alerting import Note, Place, Verdicts, load_suspects, lock_rules, save_verdicts

CHANGES = Counter("tidegate_gateway_alerts_total", "Alerts opened and cleared by heartbeats.", ["change"])
RULES = Gauge("tidegate_gateway_alert_rules", "Alert rules in use.")
REFRESH_SECONDS = 2.0

_FIELDS = {
    "cpuTemperature": "cpu_temperature",
    "errorCount": "error_count",
    "freeMemory": "free_memory",
    "uptime": "uptime",
    "networkSignalStrength": "signal_strength",
}

Reader = Callable[[Heartbeat], float | None]


def reader_of(metric: str) -> Reader:
    """What a heartbeat says of a metric, by its key on the wire; None where it says nothing."""
    if (name := _FIELDS.get(metric)) is not None:
        return attrgetter(name)
    return lambda beat: None if beat.extra is None else beat.extra.get(metric)


@dataclass(frozen=True, slots=True)
class Watched:
    """A rule, made ready."""

    spec: AlertRuleSpec
    revision: int
    read: Reader
    beyond: Callable[[float, float], bool]

    @classmethod
    def of(cls, spec: AlertRuleSpec, revision: int) -> "Watched":
        """Of a rule."""
        return cls(spec, revision, reader_of(spec.metric), COMPARE[spec.comparison])


@dataclass
class Judge:
    """The rules in use, and the judging. One of each gateway."""

    rules: tuple[Watched, ...] = ()
    _read_at: float = field(default=-REFRESH_SECONDS)

    async def refresh(self, connection: AsyncConnection) -> None:
        """Read the rules again, where that was not done within REFRESH_SECONDS."""
        if time.monotonic() - self._read_at >= REFRESH_SECONDS:
            await self._read(connection)

    async def _read(self, connection: AsyncConnection) -> None:
        self.rules = tuple(Watched.of(spec, revision) for spec, revision in await load_rules(connection))
        self._read_at = time.monotonic()
        RULES.set(len(self.rules))

    def beyond(self, beats: Iterable[Heartbeat]) -> set[str]:
        """The devices of which a heartbeat is beyond a rule's threshold, whether the rule is meant for them or not."""
        found: set[str] = set()
        for rule in self.rules:
            read, is_over, threshold = rule.read, rule.beyond, rule.spec.threshold
            for beat in beats:
                value = read(beat)
                if value is not None and is_over(value, threshold):
                    found.add(beat.device_id)
        return found

    async def judge(
        self, connection: AsyncConnection, beats: Sequence[Heartbeat], under_way: frozenset[str], now: float
    ) -> None:
        """Judge heartbeats in the order in which they came; none of them may have been judged before.

        Args:
            under_way: devices with progress of any rule.
            now: PostgreSQL's clock, in epoch seconds.
        """
        suspects = self.beyond(beats)
        if under_way:
            suspects |= under_way.intersection(beat.device_id for beat in beats)
        if not suspects:
            return
        if await lock_rules(connection) != {rule.spec.name: rule.revision for rule in self.rules}:
            await self._read(connection)
        known, before = await load_suspects(connection, sorted(suspects))
        verdicts = self._judged([beat for beat in beats if beat.device_id in known], known, before, now)
        await save_verdicts(connection, before, verdicts)

    def _judged(
        self,
        beats: Sequence[Heartbeat],
        known: dict[str, DeviceRecord],
        before: dict[Place, Progress],
        now: float,
    ) -> Verdicts:
        verdicts = Verdicts(dict(before))
        moment = datetime.fromtimestamp(now, UTC)
        for rule in self.rules:
            meant: dict[str, bool] = {}
            for beat in beats:
                device = beat.device_id
                if (is_meant := meant.get(device)) is None:
                    is_meant = meant[device] = matches(rule.spec.target, known[device], moment)
                _step(verdicts, rule, beat, now, is_meant)
        return verdicts


def _step(verdicts: Verdicts, rule: Watched, beat: Heartbeat, now: float, is_meant: bool) -> None:
    """One heartbeat by one rule. A device that the rule is not meant for any more is well, as far as it goes."""
    place = (beat.device_id, rule.spec.name)
    value, progress = rule.read(beat), verdicts.progress.get(place, WELL)
    if not is_meant:
        if progress.firing:
            verdicts.resolve(place)
        if progress != WELL:
            verdicts.progress[place] = WELL
        return
    after, change = judge(progress, value, now, rule.spec)
    if after != progress:
        verdicts.progress[place] = after
    if change is Change.CLEARED:
        verdicts.resolve(place)
    elif value is not None and after.firing and is_beyond(rule.spec, value):
        note = Note(_text(rule.spec, beat.device_id, value), rule.spec.severity.value)
        verdicts.raise_(place, note, opens=change is Change.OPENED)
    if change is not None:
        CHANGES.labels(change.value).inc()


def _text(rule: AlertRuleSpec, device: str, value: float) -> str:
    """`motor-12: cpuTemperature is 83.2; cpuTemperature > 80 for 2 heartbeats`."""
    return f"{device}: {rule.metric} is {value:.10g}; {rule.condition.partition(',')[0]}"
