"""What a person reads on a workflow's page in the Temporal UI, as Markdown. Pure: state in, text out."""

import re
from datetime import datetime

from domain.gate import breaker_of
from models.fleetjob import FleetJobProgress, FleetJobState
from models.jobspec import FleetJobSpec
from models.quantities import format_duration, format_share
from models.rollout import Phase, PlannedWave, RolloutState, RunWaveInput, Verdict
from models.spec import GateSpec, RolloutSpec

_MARKDOWN = re.compile(r"[!-/:-@\[-`{-~]")
"""ASCII punctuation: Markdown takes each of them literally behind a backslash."""

_MARKS = {Verdict.PROMOTE: "promoted", Verdict.HALT: "HALTED", Verdict.HOLD: "held"}


def rollout_details(spec: RolloutSpec, state: RolloutState) -> str:
    """The rollout's page: where it stands, the wave table, the gate, what comes next."""
    lines = [f"**{state.shown_phase}** {_one_line(state.reason)}".rstrip()]
    if state.paused_by:
        lines.append(f"Paused by {_one_line(state.paused_by)}{_said(state.pause_reason)}. No device starts.")
    if state.waiting_for:
        lines.append(f"Waits for: {state.waiting_for}")
    if state.plan is not None:
        lines.append(_wave_table(spec, state))
    if state.soak_until is not None:
        lines.append(f"Next timer: soak ends {_time(state.soak_until)}")
    pace = state.pace
    lines.append(gate_line(spec.gate))
    lines.append(f"Pace: {pace.in_flight} in flight, {pace.per_minute or 'no limit'} per minute")
    return "\n\n".join(lines)


def fleet_job_details(spec: FleetJobSpec, state: FleetJobState, progress: FleetJobProgress) -> str:
    """A fleet job's page: where it stands, its waves, and its figures when it is over."""
    lines = [f"**{state.shown_phase}** {_one_line(state.reason)}".rstrip()]
    if state.paused_by:
        lines.append(f"Paused by {_one_line(state.paused_by)}{_said(state.pause_reason)}. No device starts.")
    verdicts = {decided.wave: _one_line(decided.verdict.reason) for decided in state.decided}
    for planned in state.plan.waves if state.plan else ():
        shown = verdicts.get(planned.wave) or (str(state.shown_phase) if planned.wave == state.wave else "")
        lines.append(f"Wave {planned.wave} ({planned.name}), {planned.devices} devices: {shown}".rstrip(": "))
    if progress.total:
        lines.append(
            f"{progress.succeeded} of {progress.total} succeeded, {progress.failed} failed for good, "
            f"{progress.withdrawn} withdrawn; {progress.attempts_failed} attempts failed"
        )
    elif state.plan is not None:
        lines.append(f"Figures so far: `starter.py job show {state.name}`")
    lines.append(f"At most {spec.max_parallel} at a time, {spec.retry.max_attempts} attempts")
    lines.append(gate_line(spec.gate))
    return "\n\n".join(lines)


def wave_details(asked: RunWaveInput, phase: Phase, reason: str, soak_until: datetime | None) -> str:
    """A wave's page. Live counts are the heartbeat of its pending activity."""
    lines = [
        f"**{phase}** wave {asked.wave} ({asked.name}) of `{asked.rollout}`, {asked.target_count} devices",
        _one_line(reason) or "Counts so far: heartbeat details of the pending activity `drive_wave`",
    ]
    if soak_until is not None:
        lines.append(f"Next timer: soak ends {_time(soak_until)}")
    lines.append(gate_line(asked.spec.gate))
    return "\n\n".join(lines)


def gate_line(gate: GateSpec | None) -> str:
    """The breaker's boundary in numbers a person can check: an offset and a slope."""
    if gate is None:
        return "Gate: none, failures are counted and stop nothing"
    breaker = breaker_of(gate)
    offset = breaker.boundary(0)
    slope = breaker.boundary(1) - offset
    return (
        f"Gate: halt when failed ≥ {offset:.4f} + {slope:.6f} × exposed "
        f"(healthy {format_share(gate.healthy)}, limit {format_share(gate.limit)})"
    )


def _wave_table(spec: RolloutSpec, state: RolloutState) -> str:
    soaks = {wave.name: format_duration(wave.soak) for wave in spec.waves}
    verdicts = {decided.wave: decided.verdict for decided in state.decided}
    rows = ["| wave | devices | soak | verdict | reason |", "|---|---:|---|---|---|"]
    for planned in state.plan.waves if state.plan else ():
        verdict = verdicts.get(planned.wave)
        shown = _MARKS.get(verdict.verdict, str(verdict.verdict)) if verdict else _running(planned, state)
        reason = _one_line(verdict.reason).replace("|", "\\|") if verdict else ""
        rows.append(
            f"| {planned.wave} {planned.name} | {planned.devices} | {soaks.get(planned.name, '')} | {shown} | {reason} |"
        )
    return "\n".join(rows)


def _running(planned: PlannedWave, state: RolloutState) -> str:
    return str(state.shown_phase) if planned.wave == state.wave else ""


def plain(text: str) -> str:
    r"""What others have said, as it reads: in one line, with nothing in it that is a link, an image or a heading.

    >>> plain("no ![x](http://spy.example/x)\n# done")
    'no \\!\\[x\\]\\(http\\:\\/\\/spy\\.example\\/x\\) \\# done'
    """
    return _MARKDOWN.sub(r"\\\g<0>", _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _said(reason: str) -> str:
    return f" ({_one_line(reason)})" if reason else ""


def _time(when: datetime) -> str:
    return when.strftime("%Y-%m-%d %H:%M:%S UTC")
