"""The Ledger: every legal and every illegal move, and that counters, caps and breaker follow from any order of events."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.admission import Ledger
from domain.gate import breaker_of
from domain.ledger_rows import COUNTERS, ExecutionRow, JobRow, Report, WaveRow
from domain.lifecycle import DEVICE_MOVES, SERVER_MOVES, GateEffect, enters_later_phase, gate_effect
from models.protocol import TERMINAL_STATES, ErrorCode, ExecutionState, FailureClass
from models.spec import GateSpec

S = ExecutionState
NEW = "b" * 64
SUCCESS = {"version": "2", "sha256": NEW}


def ledger(devices: int, cap: int = 500, per_minute: int | None = None, state: S = S.QUEUED) -> Ledger:
    counts = dict.fromkeys(COUNTERS.values(), 0)
    counts[COUNTERS[state]] = devices
    wave = WaveRow(1, 1, "open", devices, counts, 0, 0, breaker_of(GateSpec()))
    job = JobRow(
        1, "job", "firmware-update", "running", cap, per_minute, 0, 0, 0, {}, (100.0, 50.0, 10.0), "2", NEW, {1: wave}
    )
    executions = [
        ExecutionRow(1, f"d{i}", 1, state, 1, 1, None, None, None, None, None, None, 1.0, None, 1.0, None, 1e9)
        for i in range(devices)
    ]
    return Ledger([job], executions)


def only(book: Ledger) -> ExecutionRow:
    return book.by_key[(1, "d0")]


DEVICE_ASKS = (S.IN_PROGRESS, S.SUCCEEDED, S.FAILED, S.REJECTED)


@pytest.mark.parametrize(("before", "after"), list(itertools.product(S, DEVICE_ASKS)))
def test_a_device_can_make_exactly_the_moves_of_the_table(before: S, after: S) -> None:
    book = ledger(1, state=before)
    refusal = book.report(only(book), Report(after, SUCCESS), 5.0)
    legal = after in DEVICE_MOVES.get(before, frozenset())
    assert (refusal is None) is legal
    assert only(book).state is (after if legal else before)
    if refusal is not None:
        expected = ErrorCode.TERMINAL_STATE_REACHED if before in TERMINAL_STATES else ErrorCode.INVALID_STATE_TRANSITION
        assert refusal.code is expected


@pytest.mark.parametrize("before", list(S))
def test_the_server_times_out_and_withdraws_only_what_the_table_allows(before: S) -> None:
    expiring, withdrawing = ledger(1, state=before), ledger(1, state=before)
    only(expiring).deadline_at = 4.0
    legal = S.TIMED_OUT in SERVER_MOVES.get(before, frozenset())
    assert expiring.expire(only(expiring), 5.0) is legal
    assert withdrawing.withdraw(only(withdrawing), "why", 5.0) is (before in (S.PENDING, S.QUEUED))
    assert S.CANCELED in SERVER_MOVES.get(before, {S.CANCELED}) or before in TERMINAL_STATES


@pytest.mark.parametrize("before", list(S))
def test_what_is_not_over_can_be_removed_and_removal_frees_its_place_and_says_nothing_of_the_release(before: S) -> None:
    book = ledger(2, state=before)
    job = book.jobs[1]
    job.in_flight = 2 if before is S.IN_PROGRESS else 0
    only(book).started_at = 1.0
    removed = book.remove(only(book), "decommissioned", 5.0)
    assert removed is (S.REMOVED in SERVER_MOVES.get(before, frozenset())) is (before not in TERMINAL_STATES)
    wave = job.waves[1]
    assert (wave.gate_succeeded, wave.gate_failed, wave.tripped_at) == (0, 0, None)
    if removed:
        assert (only(book).state, only(book).finished_at, only(book).deadline_at) == (S.REMOVED, 5.0, None)
        assert (wave.counts["removed"], wave.counts[COUNTERS[before]]) == (1, 1)
        assert job.in_flight == (1 if before is S.IN_PROGRESS else 0)
        assert wave.news
    assert not book.remove(only(book), "again", 6.0)


def test_a_report_of_a_device_that_was_removed_is_refused_and_changes_nothing() -> None:
    book = ledger(1)
    assert book.admit(only(book), 2.0, None) is None
    book.remove(only(book), "decommissioned", 3.0)
    refusal = book.report(only(book), Report(S.SUCCEEDED, SUCCESS), 4.0)
    assert refusal is not None
    assert refusal.code is ErrorCode.TERMINAL_STATE_REACHED
    assert book.jobs[1].waves[1].counts["succeeded"] == 0


@pytest.mark.parametrize(
    ("state", "failure", "started", "effect"),
    [
        (S.SUCCEEDED, None, True, GateEffect.SUCCESS),
        (S.FAILED, FailureClass.NETWORK, True, GateEffect.FAILURE),
        (S.TIMED_OUT, FailureClass.SILENT, True, GateEffect.FAILURE),
        (S.TIMED_OUT, None, False, GateEffect.NEUTRAL),
        (S.REJECTED, FailureClass.INCOMPATIBLE, False, GateEffect.FAILURE),
        (S.REJECTED, FailureClass.REJECTED_BY_USER, False, GateEffect.NEUTRAL),
        (S.CANCELED, None, False, GateEffect.NEUTRAL),
        (S.REMOVED, None, True, GateEffect.NEUTRAL),
    ],
)
def test_what_an_end_says_about_the_release(
    state: S, failure: FailureClass | None, started: bool, effect: GateEffect
) -> None:
    assert gate_effect(state, failure, started=started) is effect


EVENTS = st.lists(
    st.tuples(st.integers(0, 29), st.sampled_from(["ask", "ok", "fail", "lie", "expire", "step", "withdraw"])),
    max_size=200,
)


@given(EVENTS, st.integers(1, 8))
def test_any_order_of_events_keeps_the_cap_the_sums_and_the_closed_door_behind_a_tripped_breaker(
    events: list[tuple[int, str]], cap: int
) -> None:
    book = ledger(30, cap)
    job, wave = book.jobs[1], book.jobs[1].waves[1]
    for now, (device, event) in enumerate(events, start=10):
        execution = book.by_key[(1, f"d{device}")]
        tripped, started = wave.tripped_at is not None, execution.started_at
        match event:
            case "ask":
                if execution.state is S.QUEUED:
                    book.admit(execution, now, None)
            case "ok":
                book.report(execution, Report(S.SUCCEEDED, SUCCESS), now)
            case "fail":
                book.report(execution, Report(S.FAILED, {"failure": "flash"}), now)
            case "lie":
                book.report(execution, Report(S.SUCCEEDED, {"version": "2"}), now)
            case "step":
                book.report(execution, Report(S.IN_PROGRESS, {"step": "installing"}), now)
            case "expire":
                execution.deadline_at = now - 1 if execution.deadline_at else None
                book.expire(execution, now)
            case "withdraw":
                book.withdraw(execution, "why", now)
        assert not (tripped and started is None and execution.started_at is not None)
        assert job.in_flight <= cap
    states = [execution.state for execution in book.by_key.values()]
    assert wave.counts == {COUNTERS[state]: states.count(state) for state in S}
    assert job.in_flight == states.count(S.IN_PROGRESS)
    assert job.exposed == sum(e.started_at is not None for e in book.by_key.values())
    assert wave.gate_succeeded == states.count(S.SUCCEEDED)


def test_the_pace_never_lets_more_than_its_number_into_any_sixty_seconds() -> None:
    book = ledger(500, per_minute=20)
    admitted: list[float] = []
    for tick in range(2000):
        now = 100 + tick * 0.1
        waiting = next((e for e in book.by_key.values() if e.state is S.QUEUED), None)
        if waiting is not None and book.admit(waiting, now, None) is None:
            admitted.append(now)
    assert all(sum(at <= other < at + 60 for other in admitted) <= 20 for at in admitted)
    assert len(admitted) >= 60, "and it does not stand still"


def test_repeating_a_step_does_not_prolong_its_deadline_and_a_later_step_opens_the_next() -> None:
    book = ledger(1)
    execution = only(book)
    assert book.admit(execution, 10.0, {"step": "accepted"}) is None and execution.deadline_at == 110.0
    for now, step, deadline in [
        (20.0, "downloading", 110.0),
        (30.0, "installing", 80.0),
        (40.0, "installing", 80.0),
        (45.0, "downloading", 80.0),
        (50.0, "rebooting", 60.0),
        (55.0, "confirming", 60.0),
    ]:
        assert book.report(execution, Report(S.IN_PROGRESS, {"step": step}), now) is None
        assert execution.deadline_at == deadline, step
    assert enters_later_phase("rebooting", "no such step") is None


def test_a_duplicate_report_after_the_end_changes_nothing() -> None:
    book = ledger(1)
    execution = only(book)
    book.admit(execution, 10.0, None)
    assert book.report(execution, Report(S.SUCCEEDED, SUCCESS), 20.0) is None
    before = (execution.version_number, dict(book.jobs[1].waves[1].counts))
    refusal = book.report(execution, Report(S.FAILED), 30.0)
    assert refusal is not None and refusal.code is ErrorCode.TERMINAL_STATE_REACHED
    assert (execution.version_number, book.jobs[1].waves[1].counts) == before


def test_a_stale_version_and_another_attempt_are_refused() -> None:
    book = ledger(1)
    execution = only(book)
    book.admit(execution, 10.0, None)
    stale = book.report(execution, Report(S.FAILED, expected_version=1), 20.0)
    other = book.report(execution, Report(S.FAILED, execution_number=2), 20.0)
    assert stale is not None and stale.code is ErrorCode.VERSION_MISMATCH
    assert other is not None and other.code is ErrorCode.RESOURCE_NOT_FOUND
    assert execution.state is S.IN_PROGRESS


def test_a_device_cannot_claim_the_silence_that_only_the_server_can_tell() -> None:
    book = ledger(1)
    book.admit(only(book), 10.0, None)
    book.report(only(book), Report(S.FAILED, {"failure": "silent", "reason": "?"}), 20.0)
    assert only(book).failure_class == "internal"


APPLIED = Report(S.IN_PROGRESS, {"step": "installing"})


@pytest.mark.parametrize(
    ("again", "known"),
    [
        (APPLIED, True),
        (Report(S.IN_PROGRESS), True),
        (Report(S.IN_PROGRESS, {"step": "installing"}, expected_version=2, execution_number=1), True),
        (Report(S.IN_PROGRESS, {"step": "installing"}, expected_version=3), False),
        (Report(S.IN_PROGRESS, {"step": "installing"}, expected_version=1), False),
        (Report(S.IN_PROGRESS, {"step": "confirming"}), False),
        (Report(S.IN_PROGRESS, {}), False),
        (Report(S.SUCCEEDED, {"step": "installing"}), False),
        (Report(S.IN_PROGRESS, {"step": "installing"}, execution_number=2), False),
    ],
)
def test_a_report_that_comes_again_is_known_by_its_status_details_attempt_and_version(
    again: Report, known: bool
) -> None:
    book = ledger(1)
    book.admit(only(book), 1.0, None)
    assert book.report(only(book), APPLIED, 2.0) is None and only(book).version_number == 3
    assert book.has_applied(only(book), again) is known
    assert not book.has_applied(None, again)


@pytest.mark.parametrize(
    "report", [Report(S.SUCCEEDED, SUCCESS), Report(S.SUCCEEDED, {"version": "1"}), Report(S.FAILED, {"reason": "no"})]
)
def test_a_last_report_is_known_whatever_it_was_judged_to_be(report: Report) -> None:
    book = ledger(1)
    book.admit(only(book), 1.0, None)
    assert not book.has_applied(only(book), report)
    book.report(only(book), report, 2.0)
    assert book.has_applied(only(book), report)
