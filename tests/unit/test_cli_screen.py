"""What a rollout looks like, and what is reckoned for it: pure functions over views."""

import io
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from cli.explain import why_here, why_not_in
from cli.output import ExitStatus, printable, rough, size, status_of_error, status_of_outcome
from cli.screen import BAR_WIDTH, Snapshot, bar, current_wave, gate_distance, line_of, object_of, screen
from domain.gate import breaker_of
from models.device import DeviceRecord
from models.errors import ConflictError, NotFoundError, RefusedError, SpecError, UnavailableError
from models.protocol import ExecutionState, FailureClass, Step
from models.rollout import JobStatus, Outcome, Phase, RolloutStatus, Verdict, WaveCounts, WaveProgress, WaveStatus
from models.spec import GateSpec, RolloutSpec
from models.views import EventView, ExecutionView, RolloutView

NOW = datetime(2026, 3, 12, 12, tzinfo=UTC)
SPEC = RolloutSpec.model_validate(
    {
        "name": "motor-1.3.0",
        "release": "motor-controller@1.3.0",
        "target": {"type": "motor"},
        "waves": [{"name": "canary", "size": "5%", "soak": "4h"}, {"name": "fleet", "size": "100%"}],
    }
)


def wave(number: int = 1, **changes: Any) -> WaveProgress:
    """An open wave of forty, with changes; keys of its counters go there."""
    counts = {name: changes.pop(name) for name in list(changes) if name in WaveCounts.model_fields}
    counts.setdefault("gate_succeeded", counts.get("succeeded", 0))
    counts.setdefault("gate_failed", counts.get("failed", 0))
    values = {
        "wave": number,
        "name": SPEC.waves[number - 1].name,
        "status": WaveStatus.OPEN,
        "counts": WaveCounts(**counts),
        "opened_at": NOW - timedelta(hours=1),
        "target_count": 40,
    }
    return WaveProgress(**{**values, **changes})


def rollout(*waves: WaveProgress, **changes: Any) -> RolloutView:
    """A running rollout."""
    values = {
        "job_no": 1,
        "job_id": "motor-1_3_0",
        "name": SPEC.name,
        "release": SPEC.release,
        "status": JobStatus.RUNNING,
        "phase": Phase.ROLLING,
        "spec": SPEC,
        "devices": 40,
        "in_flight_cap": 500,
        "waves": waves,
    }
    return RolloutView(**{**values, **changes})


def text_of(snapshot: Snapshot, width: int = 120) -> str:
    """The screen as a terminal of so many columns shows it."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(screen(snapshot))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# --- the gate's distance ---------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(failed=st.integers(0, 30), succeeded=st.integers(0, 400), updating=st.integers(0, 60), others=st.integers(0, 60))
def test_so_many_further_failures_trip_the_breaker_and_one_less_does_not(
    failed: int, succeeded: int, updating: int, others: int
) -> None:
    breaker = breaker_of(GateSpec())
    distance = gate_distance(wave(failed=failed, succeeded=succeeded, in_progress=updating), GateSpec())

    def trips_after(more: int) -> bool:
        started = max(0, more - updating)  # those that update now fail first
        return breaker.trips(failed + more, failed + succeeded + updating + started)

    assert trips_after(distance.failures_left)
    assert distance.failures_left == 0 or not trips_after(distance.failures_left - 1)


def test_a_tripped_wave_is_at_no_distance_whatever_is_reported_later() -> None:
    late = wave(failed=5, succeeded=400, tripped=True, tripped_failed=5, tripped_exposed=5)
    assert gate_distance(late, GateSpec()).failures_left == 0


# --- bars ------------------------------------------------------------------------------------------------------------

_COUNT = st.integers(0, 3000)


@settings(deadline=None)
@given(st.builds(WaveCounts, pending=_COUNT, queued=_COUNT, in_progress=_COUNT, succeeded=_COUNT, failed=_COUNT))
def test_a_bar_is_as_wide_as_the_wave_and_hides_no_failure(counts: WaveCounts) -> None:
    drawn = bar(counts)
    assert len(drawn) == (BAR_WIDTH if counts.total else 0)
    if counts.failed * 3 > counts.total:
        assert any(span.style == "red" for span in drawn.spans)


def test_one_failure_in_a_thousand_is_seen() -> None:
    assert any(span.style == "red" for span in bar(WaveCounts(succeeded=500, failed=1, queued=499)).spans)


@pytest.mark.parametrize("width", [72, 80, 120])
def test_on_a_narrow_terminal_the_bar_gives_way_and_no_number_does(width: int) -> None:
    seen = Snapshot(NOW, rollout(wave(succeeded=10345, failed=678, in_progress=901, queued=421)))
    drawn = text_of(seen, width)
    table = next(line for line in drawn.splitlines() if "canary" in line and "█" in line)
    assert [word for word in table.split() if word.isdigit()][:6] == ["1", "12345", "10345", "678", "901", "421"]
    assert all(name in drawn for name in ("devices", "ok", "failed", "updating", "queued")) and "…" not in drawn


# --- the screen ------------------------------------------------------------------------------------------------------


def test_the_screen_shows_counts_failures_gate_and_soak() -> None:
    view = rollout(
        wave(1, succeeded=36, failed=2, in_progress=1, queued=1, answered_at=NOW - timedelta(minutes=30)),
        wave(2, pending=40, status=WaveStatus.PENDING, opened_at=None),
        phase=Phase.SOAKING,
        in_flight=1,
        failures={FailureClass.ROLLED_BACK: 2},
        reason="promote: 38 of 40",
    )
    event = EventView(event_no=1, at=NOW, kind="wave-opened", actor="tidegate", text="wave 1 opened")
    shown = text_of(Snapshot(NOW, view, (event,), ui_link="http://ui/x"))
    for words in (
        "soaking  wave 1 of 2 (canary)",
        "halts at 6.0 failed, 5 left",
        "not open",
        "1 of at most 500, no limit per minute",
        "rolled-back 2",
        "3h30m left, until 2026-03-12 15:30:00Z",
        "wave 1 opened",
        "http://ui/x",
    ):
        assert words in shown


def test_hostile_names_and_reasons_reach_no_terminal() -> None:
    view = rollout(wave(1, name="\x1b[2Jcanary[bold]"), reason="[red]\x1b]0;owned\x07", name="a\x1b[31m")
    snapshot = Snapshot(NOW, view, (EventView(event_no=1, at=NOW, kind="x", actor="\x1b[1m", text="\x9b31m"),))
    console = Console(file=io.StringIO(), width=120, force_terminal=False)
    console.print(screen(snapshot))
    shown = console.file.getvalue() + line_of(snapshot)  # type: ignore[attr-defined]
    assert not {"\x1b", "\x07", "\x9b"} & set(shown)
    assert "[bold]" in shown


def test_words_of_a_moment_ago_are_not_shown_with_the_counts_of_now() -> None:
    """The workflow was asked while wave 1 soaked; PostgreSQL has opened wave 2 since."""
    old = RolloutStatus(name="a", phase=Phase.SOAKING, wave=1, soak_until=NOW, reason="wave 1 soaks")
    view = rollout(wave(1, succeeded=2, verdict=Verdict.PROMOTE), wave(2, queued=38), phase=Phase.ROLLING)
    snapshot = Snapshot(NOW, view, status=old)
    assert (snapshot.phase, snapshot.soak_until) == (Phase.ROLLING, None)
    assert "wave 1 soaks" not in text_of(snapshot)


def test_the_workflows_own_timer_is_preferred_to_the_reckoned_one() -> None:
    view = rollout(wave(1, succeeded=2, answered_at=NOW), phase=Phase.SOAKING)
    status = RolloutStatus(name="a", phase=Phase.SOAKING, wave=1, soak_until=NOW + timedelta(hours=1))
    assert Snapshot(NOW, view, status=status).soak_until == NOW + timedelta(hours=1)
    assert Snapshot(NOW, view).soak_until == NOW + timedelta(hours=4)


def test_a_job_that_admits_nobody_any_more_is_draining() -> None:
    assert Snapshot(NOW, rollout(wave(), status=JobStatus.HALTED)).phase is Phase.DRAINING


@pytest.mark.parametrize("phase", [Phase.HOLDING, Phase.WAITING_APPROVAL])
def test_who_waits_for_a_person_says_which_command_helps(phase: Phase) -> None:
    snapshot = Snapshot(NOW, rollout(wave(), phase=phase, reason="too few answers"))
    assert snapshot.needs_person
    assert "rollout approve motor-1.3.0" in text_of(snapshot) or "rollout promote, or rollout abort" in text_of(
        snapshot
    )


def test_a_line_is_the_same_while_nothing_changes() -> None:
    first = Snapshot(NOW, rollout(wave(succeeded=3)))
    later = Snapshot(NOW + timedelta(minutes=5), rollout(wave(succeeded=3)))
    assert line_of(first) == line_of(later)
    assert line_of(first) != line_of(Snapshot(NOW, rollout(wave(succeeded=4))))


def test_a_program_gets_the_view_and_what_is_reckoned_from_it() -> None:
    found = object_of(Snapshot(NOW, rollout(wave(succeeded=3, failed=1)), ui_link="http://ui"))
    assert found["waves"][0]["counts"]["succeeded"] == 3
    assert found["gate_distances"][0]["failures_left"] == 4
    assert found["spec"]["waves"][0]["soak"] == "4h"
    assert found["ui_url"] == "http://ui"


def test_the_current_wave_is_the_last_one_opened() -> None:
    waves = (wave(1, status=WaveStatus.OPEN), wave(2, status=WaveStatus.PENDING, opened_at=None))
    assert current_wave(rollout(*waves)) == waves[0]
    assert current_wave(rollout(wave(1, status=WaveStatus.PENDING, opened_at=None))) is None


# --- why a device is where it is -------------------------------------------------------------------------------------


def execution(state: ExecutionState, **changes: Any) -> ExecutionView:
    """A device's execution in the canary wave."""
    values = {"rollout": SPEC.name, "device_id": "m1", "wave": 1, "wave_name": "canary", "rank": 1, "state": state}
    return ExecutionView(**{**values, **changes})


@pytest.mark.parametrize(
    ("found", "view", "words"),
    [
        (execution(ExecutionState.PENDING, wave=2, wave_name="fleet"), rollout(wave()), "wave 1 (canary) is rolling"),
        (execution(ExecutionState.PENDING), rollout(wave(), phase=Phase.HOLDING, reason="too few"), "too few"),
        (execution(ExecutionState.QUEUED), rollout(wave(), status=JobStatus.PAUSED, reason="by anna"), "paused"),
        (
            execution(ExecutionState.QUEUED),
            rollout(wave(), status=JobStatus.HALTED, reason="x"),
            "no device starts any",
        ),
        (execution(ExecutionState.QUEUED), rollout(wave(tripped=True)), "the gate of wave 1 has tripped"),
        (execution(ExecutionState.QUEUED), rollout(wave(), in_flight=5, in_flight_cap=5), "cap 5"),
        (execution(ExecutionState.QUEUED), rollout(wave()), "as soon as it asks"),
        (
            execution(ExecutionState.IN_PROGRESS, step=Step.DOWNLOADING, deadline_at=NOW + timedelta(minutes=9)),
            rollout(wave()),
            "it is downloading since ; counts as failed in 9m",
        ),
        (execution(ExecutionState.IN_PROGRESS, deadline_at=NOW), rollout(wave()), "its deadline passed"),
        (
            execution(ExecutionState.SUCCEEDED, by_delta=True),
            rollout(wave(), target_version="1.3.0"),
            "1.3.0 from a delta",
        ),
        (execution(ExecutionState.CANCELED), rollout(wave(), reason="halt: 5 of 5"), "withdrawn"),
        (
            execution(ExecutionState.FAILED, failure_class=FailureClass.ROLLED_BACK, reason="x"),
            rollout(wave()),
            "fell back",
        ),
        (execution(ExecutionState.TIMED_OUT, failure_class=FailureClass.SILENT), rollout(wave()), "went silent"),
        (execution(ExecutionState.REJECTED), rollout(wave()), "it ended REJECTED"),
    ],
)
def test_a_device_is_told_where_it_stands_and_why(found: ExecutionView, view: RolloutView, words: str) -> None:
    assert words in why_here(found, view, NOW)


@pytest.mark.parametrize("state", list(ExecutionState))
@pytest.mark.parametrize("failure", [None, *FailureClass])
def test_every_state_and_failure_has_an_explanation(state: ExecutionState, failure: FailureClass | None) -> None:
    assert why_here(execution(state, failure_class=failure), rollout(wave()), NOW)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"status": "retired"}, "it is retired"),
        ({"device_type": "pump"}, "does not match the target"),
        ({"firmware_sha256": "ab"}, "it runs 1.3.0 already"),
        ({}, "when the rollout was planned"),
    ],
)
def test_a_device_that_is_not_in_a_rollout_is_told_why(changes: dict[str, str], words: str) -> None:
    device = DeviceRecord.model_validate(
        {"device_id": "m1", "device_type": "motor", "serial_number": "S1", "site_id": "berlin", **changes}
    )
    assert words in why_not_in(device, rollout(wave(), target_version="1.3.0", target_sha256="ab"), NOW)


# --- small things ----------------------------------------------------------------------------------------------------


def test_every_outcome_has_its_exit_status() -> None:
    assert {outcome: int(status_of_outcome(outcome)) for outcome in Outcome} == {
        Outcome.SUCCEEDED: 0,
        Outcome.COMPLETED: 1,
        Outcome.HALTED: 3,
        Outcome.ABORTED: 4,
        Outcome.REFUSED: 6,
        Outcome.FAILED: 1,
    }


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (SpecError("a", []), ExitStatus.USAGE),
        (NotFoundError("a"), ExitStatus.USAGE),
        (ConflictError("a"), ExitStatus.REFUSED),
        (RefusedError("a"), ExitStatus.REFUSED),
        (UnavailableError("a"), ExitStatus.ERROR),
        (KeyError("a"), ExitStatus.ERROR),
    ],
)
def test_every_error_has_its_exit_status(error: Exception, status: ExitStatus) -> None:
    assert status_of_error(error) is status


@settings(deadline=None)
@given(st.text())
def test_what_is_printed_holds_no_control_character(text: str) -> None:
    assert printable(text).isprintable()


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0s"), (59.4, "59s"), (3599, "59m59s"), (7509, "2h5m"), (90061, "1d1h"), (864001, "10d")]
)
def test_durations_are_shown_to_two_places(seconds: float, shown: str) -> None:
    assert rough(timedelta(seconds=seconds)) == shown


@pytest.mark.parametrize(("count", "shown"), [(17, "17 B"), (320016, "312.5 KiB"), (5 * 1024**3, "5.0 GiB")])
def test_sizes_are_shown_in_binary_units(count: int, shown: str) -> None:
    assert size(count) == shown
