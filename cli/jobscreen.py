"""What a fleet job looks like: bars and numbers for a terminal, one line for a log, an object for a program. Pure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cli.output import as_dict, facts, printable, table, when
from cli.screen import EVENTS_SHOWN, OUTCOME_STYLE, PHASE_STYLE, Bar, event_lines, failures_in
from models.fleetjob import FailureView, FleetJobStatus, FleetJobView
from models.jobspec import FleetJobSpec, Membership
from models.protocol import JobOperation
from models.quantities import format_duration, format_share
from models.rollout import JobStatus, Outcome, Phase, WaveProgress, WaveStatus
from models.views import EventView, ExecutionView

MEANING = {Phase.HOLDING: "job resume, or job cancel", Phase.PAUSED: "job resume"}
TEXTS_SHOWN = 3
"""Different reasons shown of one class of failures."""


@dataclass(frozen=True)
class JobSnapshot:
    """A job at one moment: what PostgreSQL has, and what its workflow adds when it answers."""

    at: datetime
    view: FleetJobView
    events: tuple[EventView, ...] = ()
    status: FleetJobStatus | None = None
    ui_link: str | None = None
    trouble: str = ""

    @cached_property
    def spec(self) -> FleetJobSpec:
        """The job's specification."""
        return FleetJobSpec.model_validate(self.view.spec)

    @property
    def phase(self) -> Phase:
        """PostgreSQL's word; a job that admits nobody any more is on its way out before its workflow says so."""
        view = self.view
        return Phase.DRAINING if view.status is JobStatus.HALTED and view.outcome is None else view.phase

    @property
    def reason(self) -> str:
        """Why it stands where it stands."""
        said = self.status.reason if self.status is not None and self.status.phase is self.phase else ""
        return said or self.view.reason

    @property
    def outcome(self) -> Outcome | None:
        """How it has ended."""
        return self.view.outcome

    @property
    def needs_person(self) -> bool:
        """Whether it goes on only when somebody decides."""
        return self.phase is Phase.HOLDING

    @property
    def screen(self) -> RenderableType:
        """Everything worth knowing at a glance."""
        parts: list[RenderableType] = [
            _headline(self),
            _waves(self.view),
            facts([*_figures(self), ("UI", self.ui_link)]),
        ]
        if self.events:
            parts += [Text(""), event_lines(self.events[-EVENTS_SHOWN:])]
        if self.trouble:
            parts.append(Text(printable(self.trouble), style="yellow"))
        return Group(*parts)

    @property
    def line(self) -> str:
        """The job in one line, without the time."""
        p, wave = self.view.progress, current_wave(self.view)
        parts = [str(self.view.outcome or self.phase)]
        if wave is not None and len(self.view.waves) > 1:
            parts.append(f"wave {wave.wave}/{len(self.view.waves)} {wave.name}")
        retrying = f" ({p.retrying} after a failure)" if p.retrying else ""
        parts.append(
            f"{p.succeeded} ok, {p.failed} failed, {p.in_progress} in progress, {p.waiting} waiting{retrying} of {p.total}"
        )
        if p.withdrawn:
            parts.append(f"{p.withdrawn} withdrawn")
        if self.needs_person:
            parts.append(f"waits: {self.reason}")
        return printable(" | ".join(parts))

    @property
    def as_object(self) -> dict[str, Any]:
        """The job for a program: its view, and what is reckoned from it."""
        found = as_dict(self.view)
        found |= {"phase": str(self.phase), "reason": self.reason, "ui_url": self.ui_link, "next": next_command(self)}
        return found


def current_wave(view: FleetJobView) -> WaveProgress | None:
    """The last wave that was opened."""
    opened = [wave for wave in view.waves if wave.opened_at is not None or wave.status is WaveStatus.OPEN]
    return opened[-1] if opened else None


def next_command(seen: JobSnapshot) -> str:
    """What a person will want to run now."""
    name, phase = seen.view.name, seen.phase
    if seen.outcome is not None:
        return f"job retry {name}" if seen.view.progress.failed else f"job devices {name}"
    if phase is Phase.HOLDING:
        return f"job resume {name}, or job cancel {name}"
    if phase is Phase.PAUSED:
        return f"job resume {name}"
    if phase is Phase.DRAINING:
        return f"job watch {name}, or job cancel {name} --force"
    return f"job watch {name}"


def _headline(seen: JobSnapshot) -> Text:
    view, wave = seen.view, current_wave(seen.view)
    line = Text()
    line.append(printable(view.name), style="bold")
    line.append(f"  {printable(what(seen.spec))}  ")
    if view.outcome is not None:
        line.append(view.outcome.upper(), style=OUTCOME_STYLE.get(view.outcome, "bold red"))
        return line
    line.append(seen.phase, style=PHASE_STYLE.get(seen.phase, ""))
    if wave is not None and len(view.waves) > 1:
        line.append(f"  wave {wave.wave} of {len(view.waves)} ({printable(wave.name)})")
    return line


def what(spec: FleetJobSpec) -> str:
    """`restart`, `firmware-update to motor-controller@1.3.0`."""
    return f"{spec.operation} to {spec.release}" if spec.operation is JobOperation.FIRMWARE_UPDATE else spec.operation


def _waves(view: FleetJobView) -> Table:
    """A row per wave: bar and counts."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("wave", no_wrap=True)
    made.add_column("")
    for name in ("devices", "ok", "failed", "in progress", "waiting", "withdrawn"):
        made.add_column(name, justify="right", no_wrap=True)
    for wave in view.waves:
        c, failed = wave.counts, failures_in(wave.counts)
        made.add_row(
            Text(f"{wave.wave} {printable(wave.name)}"),
            Bar(c),
            str(c.total or wave.target_count),
            str(c.succeeded),
            Text(str(failed), style="red" if failed else ""),
            str(c.in_progress),
            str(c.queued + c.pending),
            str(c.canceled + c.removed),
        )
    return made


def _figures(seen: JobSnapshot) -> list[tuple[str, object]]:
    view, p, spec = seen.view, seen.view.progress, seen.spec
    action = MEANING.get(seen.phase)
    waits = f", {p.retrying} devices wait for their next one" if p.retrying else ""
    retried = f"{p.attempts_failed} failed{waits}" if p.attempts_failed else ""
    pace = f"{spec.per_minute} per minute" if spec.per_minute else "no limit per minute"
    joins = ", more join until it ends" if view.continuous and view.outcome is None else ""
    starts = when(spec.start_at) if seen.phase is Phase.SCHEDULED else ""
    return [
        ("devices", f"{p.succeeded} of {p.total} done, {p.failed} failed{joins}"),
        ("attempts", f"{retried}, at most {view.max_attempts} each" if retried else ""),
        ("in progress", f"{p.in_progress} of at most {view.in_flight_cap}, {pace}"),
        ("starts", starts),
        ("ends", when(spec.end_at) if view.outcome is None else ""),
        ("waits for", f"{seen.phase}: {action} {view.name}" if action else ""),
        ("reason", seen.reason),
    ]


def specification(spec: FleetJobSpec) -> list[tuple[str, object]]:
    """A specification as name and value, with its defaults."""
    retry, deadlines, gate = spec.retry, spec.deadlines, spec.gate
    pauses = f", {format_duration(retry.backoff)} after the first, times {retry.backoff_multiplier:g} after each"
    steps = [f"{name} {format_duration(getattr(deadlines, name))}" for name in type(deadlines).model_fields]
    waves = [f"{w['name']} {w['size']}" for w in spec.model_dump(mode="json")["waves"]]
    target = (
        f"the failed devices of {spec.retry_of}"
        if spec.retry_of
        else spec.target.model_dump_json(exclude_defaults=True)
    )
    return [
        ("operation", what(spec)),
        ("target", f"{target}{' (continuous)' if spec.membership is Membership.CONTINUOUS else ''}"),
        ("waves", "; ".join(waves) if len(waves) > 1 else ""),
        ("attempts", f"{retry.max_attempts}{pauses if retry.max_attempts > 1 else ''}"),
        ("pace", f"{spec.max_parallel} at a time, {spec.per_minute or 'no limit'} per minute"),
        ("gate", f"healthy {format_share(gate.healthy)}, limit {format_share(gate.limit)}" if gate else "none"),
        ("deadlines", ", ".join(steps)),
        ("document", spec.document or ""),
        ("config", spec.config or ""),
        ("questions", ", ".join(spec.diagnostics)),
    ]


@dataclass(frozen=True)
class FailureGroup:
    """Devices that have failed in one way. `reasons`: the most frequent texts, each with its count."""

    failure: str
    devices: int
    reasons: tuple[tuple[str, int], ...]
    examples: tuple[str, ...]


def failure_groups(failures: Sequence[FailureView]) -> list[FailureGroup]:
    """Failures by class, the most frequent first; each device once, by its last failure."""
    last: dict[str, FailureView] = {}
    for failure in failures:  # the newest first
        last.setdefault(failure.device_id, failure)
    classes: dict[str, list[FailureView]] = {}
    for failure in last.values():
        classes.setdefault(failure.failure_class or failure.state, []).append(failure)
    groups = []
    for name, entries in classes.items():
        reasons = Counter(entry.reason or "no reason given" for entry in entries).most_common(TEXTS_SHOWN)
        examples = tuple(sorted(entry.device_id for entry in entries)[:TEXTS_SHOWN])
        groups.append(FailureGroup(name, len(entries), tuple(reasons), examples))
    return sorted(groups, key=lambda group: -group.devices)


def failure_table(groups: Sequence[FailureGroup]) -> Table:
    """A row per class."""
    rows = []
    for group in groups:
        texts = [f"{text} ({count})" if count > 1 else text for text, count in group.reasons]
        more = ", ..." if group.devices > len(group.examples) else ""
        rows.append((group.failure, group.devices, "; ".join(texts), ", ".join(group.examples) + more))
    return table("", ("failure", "devices", "in their words", "for example"), rows, right=("devices",))


def row_of(view: FleetJobView) -> tuple[object, ...]:
    """A job in the list of jobs: few columns, so that a list fits 80 characters."""
    p = view.progress
    counts = (("ok", p.succeeded), ("failed", p.failed), ("in progress", p.in_progress), ("waiting", p.waiting))
    stands = f"{', '.join(f'{count} {name}' for name, count in counts if count) or 'none'} of {p.total}"
    told = "" if view.outcome is Outcome.SUCCEEDED else view.reason
    return view.name, view.operation, view.outcome or view.phase, when(view.created_at), stands, told


def devices_table(found: Sequence[ExecutionView]) -> Table:
    """A row per device."""
    columns = ("device", "wave", "state", "attempt", "step", "failure", "updated", "next attempt", "reason")
    rows = [
        (e.device_id, f"{e.wave} {e.wave_name}", e.state, e.execution_number, e.step, e.failure_class, e.updated_at,
         e.retry_at, e.reason)
        for e in found
    ]  # fmt: skip
    return table("", columns, rows, right=("attempt",))


def attempts_table(found: Sequence[FailureView]) -> Table:
    """A row per failed attempt."""
    rows = [
        (f.device_id, f.attempt, f.state, f.failure_class, f.failed_at, f.retry_at or "none", f.reason) for f in found
    ]
    return table(
        "", ("device", "attempt", "state", "failure", "failed", "next attempt", "reason"), rows, right=("attempt",)
    )
