"""What a rollout looks like: bars and numbers for a terminal, one line for a log, an object for a program. Pure."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from cli.output import as_dict, facts, printable, rough, when
from domain.gate import breaker_of
from models.quantities import format_duration, format_share
from models.rollout import JobStatus, Outcome, Phase, RolloutStatus, Verdict, WaveCounts, WaveProgress, WaveStatus
from models.spec import GateSpec, RolloutSpec
from models.views import EventView, RolloutView

BAR_WIDTH = 24
EVENTS_SHOWN = 6
MEANING = {
    Phase.WAITING_APPROVAL: "rollout approve",
    Phase.HOLDING: "rollout promote, or rollout abort",
    Phase.PAUSED: "rollout resume",
}
PHASE_STYLE = {
    Phase.ROLLING: "cyan",
    Phase.SOAKING: "blue",
    Phase.PAUSED: "yellow",
    Phase.HOLDING: "yellow",
    Phase.WAITING_APPROVAL: "yellow",
    Phase.DRAINING: "magenta",
}
OUTCOME_STYLE = {Outcome.SUCCEEDED: "bold green", Outcome.ABORTED: "bold yellow"}


@dataclass(frozen=True)
class Snapshot:
    """A rollout at one moment: what PostgreSQL has, and what its workflow adds when it answers."""

    at: datetime
    view: RolloutView
    events: tuple[EventView, ...] = ()
    status: RolloutStatus | None = None
    ui_link: str | None = None
    trouble: str = ""

    @property
    def phase(self) -> Phase:
        """PostgreSQL's word; a job that admits nobody any more is on its way out before its workflow says so."""
        view = self.view
        return Phase.DRAINING if view.status is JobStatus.HALTED and view.outcome is None else view.phase

    @property
    def workflow(self) -> RolloutStatus | None:
        """What the workflow says, where that is about this same phase and wave and not from a moment ago."""
        wave = current_wave(self.view)
        if self.status is None or self.status.phase is not self.phase:
            return None
        return self.status if wave is None or self.status.wave == wave.wave else None

    @property
    def reason(self) -> str:
        """Why it stands where it stands."""
        return (self.workflow.reason if self.workflow else "") or self.view.reason

    @property
    def waiting_for(self) -> str:
        """What a person has to decide, where one has."""
        if not self.needs_person:
            return ""
        return (self.workflow.waiting_for if self.workflow else "") or self.view.reason

    @property
    def soak_until(self) -> datetime | None:
        """When the soak is over: by the workflow's timer, else reckoned from the moment the wave had answered."""
        if self.phase is not Phase.SOAKING:
            return None
        if self.workflow is not None and self.workflow.soak_until is not None:
            return self.workflow.soak_until
        wave = current_wave(self.view)
        soaks = {spec.name: spec.soak for spec in self.view.spec.waves}
        return wave.answered_at + soaks.get(wave.name, timedelta(0)) if wave and wave.answered_at else None

    @property
    def needs_person(self) -> bool:
        """Whether it goes on only when somebody decides."""
        return self.phase in (Phase.HOLDING, Phase.WAITING_APPROVAL)

    @property
    def outcome(self) -> Outcome | None:
        """How it has ended."""
        return self.view.outcome

    @property
    def screen(self) -> RenderableType:
        """See `screen`."""
        return screen(self)

    @property
    def line(self) -> str:
        """See `line_of`."""
        return line_of(self)

    @property
    def as_object(self) -> dict[str, Any]:
        """See `object_of`."""
        return object_of(self)


@dataclass(frozen=True)
class GateDistance:
    """How far a wave is from being halted.

    `boundary`: failures at which it halts with so many devices exposed. `failures_left`: further failures, without a
    success between them, that halt it: of devices that update now first, then of others.
    """

    wave: int
    failed: int
    exposed: int
    boundary: float
    failures_left: int
    tripped: bool


def gate_distance(wave: WaveProgress, gate: GateSpec) -> GateDistance:
    """The wave's evidence against the boundary of its breaker."""
    breaker, counts = breaker_of(gate), wave.counts
    missing = breaker.halt_threshold - breaker.evidence(counts.gate_failed, counts.exposed)
    updating = breaker.failure_weight - breaker.success_weight  # it counts as not failed until it fails
    left = math.ceil(missing / updating)
    if left > counts.in_progress:
        left = counts.in_progress + math.ceil((missing - counts.in_progress * updating) / breaker.failure_weight)
    return GateDistance(
        wave=wave.wave,
        failed=counts.gate_failed,
        exposed=counts.exposed,
        boundary=round(breaker.boundary(counts.exposed), 2),
        failures_left=0 if wave.tripped else max(0, left),
        tripped=wave.tripped,
    )


def current_wave(view: RolloutView) -> WaveProgress | None:
    """The wave that runs or soaks; after the end, the last one that was opened. Waves before it stay open too."""
    opened = [wave for wave in view.waves if wave.opened_at is not None or wave.status is WaveStatus.OPEN]
    return opened[-1] if opened else None


# --- for a terminal --------------------------------------------------------------------------------------------------


def screen(snapshot: Snapshot) -> RenderableType:
    """Everything worth knowing at a glance."""
    view = snapshot.view
    parts: list[RenderableType] = [_headline(snapshot), wave_table(view)]
    parts.append(facts([*_figures(snapshot), ("UI", snapshot.ui_link)]))
    if snapshot.events:
        parts += [Text(""), event_lines(snapshot.events[-EVENTS_SHOWN:])]
    if snapshot.trouble:
        parts.append(Text(printable(snapshot.trouble), style="yellow"))
    return Group(*parts)


def _headline(snapshot: Snapshot) -> Text:
    view, wave = snapshot.view, current_wave(snapshot.view)
    line = Text()
    line.append(printable(view.name), style="bold")
    line.append(f"  {printable(view.release)}  ")
    if view.outcome is not None:
        line.append(view.outcome.upper(), style=OUTCOME_STYLE.get(view.outcome, "bold red"))
    else:
        line.append(snapshot.phase, style=PHASE_STYLE.get(snapshot.phase, ""))
        if wave is not None:
            line.append(f"  wave {wave.wave} of {len(view.waves)} ({printable(wave.name)})")
    return line


def wave_table(view: RolloutView) -> Table:
    """A row per wave: bar, counts, verdict."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("wave", no_wrap=True)
    made.add_column("")
    for name in ("devices", "ok", "failed", "updating", "queued"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("gate", overflow="fold")
    for wave in view.waves:
        c = wave.counts
        made.add_row(
            Text(f"{wave.wave} {printable(wave.name)}"),
            Bar(c),
            str(c.total or wave.target_count),
            str(c.succeeded),
            Text(str(failures_in(c)), style="red" if failures_in(c) else ""),
            str(c.in_progress),
            str(c.queued),
            _gate_cell(wave, view.spec.gate),
        )
    return made


@dataclass(frozen=True)
class Bar:
    """A bar in a table, where it gives way: on a narrow terminal it is the bar that shrinks, and no number is cut."""

    counts: WaveCounts

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, BAR_WIDTH)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield bar(self.counts, min(BAR_WIDTH, options.max_width))


def bar(counts: WaveCounts, width: int = BAR_WIDTH) -> Text:
    """Succeeded, failed, updating and queued as shares of the wave; what has not been opened is a dot."""
    shares = [
        (counts.succeeded, "█", "green"),
        (failures_in(counts), "█", "red"),
        (counts.in_progress, "▓", "cyan"),
        (counts.queued, "░", ""),
        (counts.pending, "·", "dim"),
        (counts.canceled + counts.removed, "-", "dim"),
    ]
    line, upto, drawn = Text(), 0, 0
    for count, mark, style in shares:
        upto += count
        end = round(width * upto / counts.total) if counts.total else 0
        if count and end == drawn and end < width:
            end += 1  # one of a thousand still is something
        line.append(mark * (end - drawn), style=style)
        drawn = max(drawn, end)
    return line


def _gate_cell(wave: WaveProgress, gate: GateSpec) -> Text:
    distance = gate_distance(wave, gate)
    if wave.tripped:
        return Text(f"tripped: {wave.tripped_failed} of {wave.tripped_exposed} failed", style="bold red")
    if wave.verdict is Verdict.PROMOTE:
        return Text("promoted", style="green")
    if wave.verdict is not None and wave.verdict is not Verdict.CONTINUE:
        return Text(str(wave.verdict), style="red" if wave.verdict is Verdict.HALT else "yellow")
    if wave.opened_at is None:
        return Text("not open", style="dim")
    style = "red" if distance.failures_left <= 1 else "yellow" if distance.failed else ""
    return Text(f"halts at {distance.boundary:.1f} failed, {distance.failures_left} left", style=style)


def _figures(snapshot: Snapshot) -> list[tuple[str, object]]:
    view, counts = snapshot.view, snapshot.view.counts
    pace = f"{view.per_minute} per minute" if view.per_minute else "no limit per minute"
    soak = snapshot.soak_until
    action = MEANING.get(snapshot.phase)
    waiting = f"{snapshot.waiting_for or snapshot.phase}: {action} {view.name}" if action else ""
    return [
        ("devices", f"{counts.succeeded} of {view.devices} updated, {view.by_delta} by delta, {view.exposed} exposed"),
        ("in flight", f"{view.in_flight} of at most {view.in_flight_cap}, {pace}"),
        ("failures", ", ".join(f"{kind} {count}" for kind, count in view.failures.items())),
        ("soak", f"{rough(soak - snapshot.at)} left, until {when(soak)}" if soak else ""),
        ("waits for", waiting),
        ("reason", "" if snapshot.reason == snapshot.waiting_for else snapshot.reason),
    ]


def specification(spec: RolloutSpec) -> list[tuple[str, object]]:
    """A specification as name and value, with its defaults."""
    waves = [f"{w['name']} {w['size']}, soak {w['soak']}" for w in spec.model_dump(mode="json")["waves"]]
    gate, deadlines, pace = spec.gate, spec.deadlines, spec.pace
    rates = [f"healthy {format_share(gate.healthy)}", f"limit {format_share(gate.limit)}"]
    rates += [f"false halt {format_share(gate.false_halt)}", f"missed halt {format_share(gate.missed_halt)}"]
    steps = [f"{name} {format_duration(getattr(deadlines, name))}" for name in type(deadlines).model_fields]
    return [
        ("target", spec.target.model_dump_json(exclude_defaults=True)),
        ("waves", "; ".join(waves)),
        ("gate", ", ".join(rates)),
        ("completion", format_share(spec.completion)),
        ("deadlines", ", ".join(steps)),
        ("pace", f"{pace.in_flight} in flight, {pace.per_minute or 'no limit'} per minute"),
        ("approval", spec.approval),
    ]


def event_lines(events: Sequence[EventView]) -> Text:
    """Events with their time of day."""
    lines = Text()
    for event in events:
        lines.append(f"{event.at.astimezone(UTC):%H:%M:%S} ", style="dim")
        lines.append(printable(event_text(event)) + "\n")
    lines.rstrip()
    return lines


def event_text(event: EventView) -> str:
    """An event in a line; who did it where it was a person."""
    waits = "waits for " if event.kind == Phase.WAITING_APPROVAL else ""
    by = "" if event.actor in ("tidegate", "workflow") or event.actor in event.text else f" ({event.actor})"
    return f"{waits}{event.text or event.kind}{by}"


def failures_in(counts: WaveCounts) -> int:
    """Devices of a wave that have failed, however."""
    return counts.failed + counts.timed_out + counts.rejected


# --- for a log and for programs --------------------------------------------------------------------------------------


def line_of(snapshot: Snapshot) -> str:
    """The rollout in one line, without the time, so that two lines differ only when something has changed."""
    view, wave = snapshot.view, current_wave(snapshot.view)
    parts = [str(view.outcome or snapshot.phase)]
    if wave is not None:
        c, distance = wave.counts, gate_distance(wave, view.spec.gate)
        parts.append(
            f"wave {wave.wave}/{len(view.waves)} {wave.name}: {c.succeeded} ok, {failures_in(c)} failed, "
            f"{c.in_progress} updating, {c.queued} queued of {c.total}"
        )
        if wave.tripped:
            parts.append(f"gate tripped at {wave.tripped_failed} failed of {wave.tripped_exposed}")
        elif view.outcome is None:
            parts.append(f"gate halts at {distance.boundary:.1f}, {distance.failures_left} left")
    parts.append(f"in flight {view.in_flight}/{view.in_flight_cap}")
    if view.failures:
        parts.append(", ".join(f"{kind} {count}" for kind, count in view.failures.items()))
    if snapshot.soak_until is not None:
        parts.append(f"soak until {when(snapshot.soak_until)}")
    if snapshot.needs_person:
        parts.append(f"waits: {snapshot.waiting_for or snapshot.reason}")
    return printable(" | ".join(parts))


def object_of(snapshot: Snapshot) -> dict[str, Any]:
    """The rollout for a program: its view, and what is reckoned from it."""
    found = as_dict(snapshot.view)
    found["phase"], found["reason"] = str(snapshot.phase), snapshot.reason
    found["soak_until"] = snapshot.soak_until
    found["waiting_for"] = snapshot.waiting_for
    found["ui_url"] = snapshot.ui_link
    found["gate_distances"] = [asdict(gate_distance(wave, snapshot.view.spec.gate)) for wave in snapshot.view.waves]
    return found
