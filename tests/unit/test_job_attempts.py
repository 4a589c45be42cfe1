"""Attempts of one execution: backoff, late reports, what may begin, and counters that follow from any order of events."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import domain.admission
from domain.admission import Ledger
from domain.gate import NEVER, breaker_of
from domain.ledger_rows import COUNTERS, ExecutionRow, JobRow, Refusal, Report, WaveRow
from domain.lifecycle import GateEffect, gate_effect
from models.jobspec import RetrySpec
from models.protocol import TERMINAL_STATES, ErrorCode, ExecutionState, FailureClass
from models.rollout import JobStatus
from models.spec import GateSpec

S = ExecutionState
FAILED = Report(S.FAILED, {"failure": "internal", "reason": "out of memory"})


def job_of(devices: int, *, attempts: int = 3, cap: int = 4, operation: str = "custom", gated: bool = False) -> Ledger:
    counts = dict.fromkeys(COUNTERS.values(), 0) | {"queued": devices}
    wave = WaveRow(1, 1, "open", devices, counts, 0, 0, breaker_of(GateSpec()) if gated else NEVER)
    job = JobRow(
        1, "_job", operation, "running", cap, None, 0, 0, 0, {}, (100.0, 50.0, 10.0), None, None, {1: wave},
        accept_seconds=1000.0, max_attempts=attempts, backoff_seconds=10.0, backoff_multiplier=3.0,
        max_backoff_seconds=60.0,
    )  # fmt: skip
    rows = [
        ExecutionRow(1, f"d{i}", 1, S.QUEUED, 1, 1, None, None, None, None, None, None, 1.0, None, 1.0, None, 1000.0)
        for i in range(devices)
    ]
    return Ledger([job], rows)


def only(book: Ledger) -> ExecutionRow:
    return book.by_key[(1, "d0")]


def fail(book: Ledger, now: float) -> None:
    assert book.admit(only(book), now, None) is None
    assert book.report(only(book), FAILED, now) is None


def test_a_failed_attempt_goes_back_to_the_queue_and_its_end_is_recorded() -> None:
    book = job_of(1)
    fail(book, 100.0)
    execution, wave = only(book), book.jobs[1].waves[1]
    assert (execution.state, execution.execution_number, execution.version_number) == (S.QUEUED, 2, 1)
    assert (execution.retry_at, execution.deadline_at, execution.started_at) == (110.0, 1110.0, None)
    assert (execution.step, execution.details, execution.failure_class, execution.reason) == (None, None, None, None)
    [failure] = book.failures
    assert (failure.attempt, failure.state, failure.failure_class, failure.reason) == (
        1,
        S.FAILED,
        "internal",
        "out of memory",
    )
    assert (failure.failed_at, failure.retry_at) == (100.0, 110.0)
    assert (wave.counts["queued"], wave.retrying, wave.attempts_failed, wave.gate_failed) == (1, 1, 1, 0)
    assert book.jobs[1].in_flight == 0
    assert execution.ended_attempt == failure


def test_the_pause_grows_with_every_attempt_up_to_its_bound_as_the_specification_says() -> None:
    book, spec = (
        job_of(1, attempts=5),
        RetrySpec(
            max_attempts=5, backoff=timedelta(seconds=10), backoff_multiplier=3, max_backoff=timedelta(seconds=60)
        ),
    )
    now = 100.0
    for attempt in range(1, 5):
        fail(book, now)
        due = only(book).retry_at
        assert due is not None
        assert due - now == spec.pause_after(attempt).total_seconds() == book.jobs[1].pause_after(attempt)
        now = due
    assert [f.retry_at and f.retry_at - f.failed_at for f in book.failures] == [10.0, 30.0, 60.0, 60.0]


def test_the_last_attempt_ends_the_execution_and_counts_for_the_gate_once() -> None:
    book, now = job_of(1), 100.0
    for _ in range(3):
        fail(book, now)
        now = only(book).retry_at or now
    wave = book.jobs[1].waves[1]
    assert (only(book).state, only(book).execution_number, only(book).retry_at) == (S.FAILED, 3, None)
    assert [f.attempt for f in book.failures] == [1, 2, 3]
    assert book.failures[-1].retry_at is None
    assert (wave.gate_failed, wave.attempts_failed, wave.retrying, wave.counts["failed"]) == (1, 3, 0, 1)


def test_before_its_time_the_next_attempt_is_neither_shown_nor_begun() -> None:
    book = job_of(1)
    fail(book, 100.0)
    assert book.pending_of("d0", 109.9) == []
    refused = book.admit(only(book), 109.9, None)
    assert refused == "it waits for its next attempt until 1970-01-01T00:01:50Z"
    assert book.pending_of("d0", 110.0) == [only(book)]
    assert book.admit(only(book), 110.0, None) is None
    assert (only(book).retry_at, book.jobs[1].waves[1].retrying) == (None, 0)


@pytest.mark.parametrize("status", [S.IN_PROGRESS, S.FAILED, S.SUCCEEDED, S.REJECTED])
@pytest.mark.parametrize("number", [1, None])
def test_a_late_report_of_the_attempt_before_changes_nothing(status: S, number: int | None) -> None:
    begins = number is None and status in (S.IN_PROGRESS, S.REJECTED)
    code = ErrorCode.REQUEST_THROTTLED if begins else ErrorCode.TERMINAL_STATE_REACHED
    book = job_of(1)
    fail(book, 100.0)
    refusal = book.report(only(book), Report(status, {}, execution_number=number), 105.0)
    assert refusal is not None and refusal.code is code
    assert (only(book).state, only(book).execution_number, book.jobs[1].in_flight) == (S.QUEUED, 2, 0)
    assert len(book.failures) == 1


def test_a_numbered_report_of_the_attempt_before_does_not_even_change_the_next_one_while_it_runs() -> None:
    book = job_of(1)
    fail(book, 100.0)
    assert book.admit(only(book), 120.0, None) is None
    refusal = book.report(only(book), Report(S.FAILED, {}, execution_number=1), 121.0)
    assert refusal is not None and refusal.code is ErrorCode.TERMINAL_STATE_REACHED
    assert only(book).state is S.IN_PROGRESS
    unknown = book.report(only(book), Report(S.FAILED, {}, execution_number=3), 121.0)
    assert unknown is not None and unknown.code is ErrorCode.RESOURCE_NOT_FOUND


def test_without_the_rule_about_time_a_late_report_would_begin_the_next_attempt() -> None:
    book = job_of(1)
    fail(book, 100.0)
    only(book).retry_at = None  # the rule, switched off
    assert book.report(only(book), Report(S.IN_PROGRESS, {}), 101.0) is None
    assert only(book).state is S.IN_PROGRESS


@pytest.mark.parametrize("status", [S.IN_PROGRESS, S.REJECTED])
def test_what_a_broker_delivers_again_without_a_number_does_not_begin_the_next_attempt(status: S) -> None:
    book = job_of(1)
    fail(book, 100.0)
    refusal = book.report(only(book), Report(status, {}, duplicate=True), 500.0)
    assert refusal is not None and refusal.code is ErrorCode.REQUEST_THROTTLED
    assert (only(book).state, len(book.failures)) == (S.QUEUED, 1)
    assert book.report(only(book), Report(status, {}, execution_number=2, duplicate=True), 500.0) is None


def test_without_the_mark_of_a_repetition_it_would() -> None:
    book = job_of(1)
    fail(book, 100.0)
    assert book.report(only(book), Report(S.IN_PROGRESS, {}), 500.0) is None


def test_a_device_that_says_no_is_not_asked_again() -> None:
    book = job_of(1)
    assert book.report(only(book), Report(S.REJECTED, {"failure": "incompatible"}), 100.0) is None
    assert only(book).state is S.REJECTED
    assert [(f.attempt, f.state, f.retry_at) for f in book.failures] == [(1, S.REJECTED, None)]


def test_silence_in_an_attempt_is_followed_by_another_one_but_an_offer_that_nobody_took_is_over() -> None:
    silent, away = job_of(1), job_of(1)
    assert silent.admit(only(silent), 100.0, None) is None
    assert silent.expire(only(silent), 200.0)
    assert (only(silent).state, only(silent).execution_number, only(silent).retry_at) == (S.QUEUED, 2, 210.0)
    assert silent.failures[0].failure_class == FailureClass.SILENT
    assert away.expire(only(away), 1000.0)
    assert (only(away).state, only(away).execution_number) == (S.TIMED_OUT, 1)


def test_a_device_that_fails_and_is_never_heard_of_again_has_failed() -> None:
    book = job_of(1)
    fail(book, 100.0)
    assert book.expire(only(book), 1110.0)
    wave = book.jobs[1].waves[1]
    assert (only(book).state, wave.gate_failed, wave.retrying, wave.attempts_failed) == (S.TIMED_OUT, 1, 0, 2)
    assert gate_effect(S.TIMED_OUT, None, started=False) is GateEffect.NEUTRAL


@pytest.mark.parametrize("status", [JobStatus.HALTED, JobStatus.FINISHED])
def test_a_job_that_ends_grants_no_further_attempt(status: JobStatus) -> None:
    book = job_of(1)
    assert book.admit(only(book), 100.0, None) is None
    book.jobs[1].status = status
    assert book.report(only(book), FAILED, 101.0) is None
    assert (only(book).state, book.failures[0].retry_at) == (S.FAILED, None)


def test_a_paused_job_keeps_its_attempts() -> None:
    book = job_of(1)
    assert book.admit(only(book), 100.0, None) is None
    book.jobs[1].status = JobStatus.PAUSED
    assert book.report(only(book), FAILED, 101.0) is None
    assert only(book).state is S.QUEUED
    assert book.admit(only(book), 200.0, None) == "the job is paused"


def test_what_runs_can_be_cancelled_and_its_late_report_is_refused() -> None:
    book = job_of(1)
    assert not book.cancel(only(book), "enough", 99.0), "it has not started: that is withdrawn"
    assert book.admit(only(book), 100.0, None) is None
    assert book.cancel(only(book), "enough", 101.0)
    wave = book.jobs[1].waves[1]
    assert (only(book).state, book.jobs[1].in_flight, wave.counts["canceled"], wave.gate_failed) == (
        S.CANCELED,
        0,
        1,
        0,
    )
    late = book.report(only(book), Report(S.SUCCEEDED, {}), 102.0)
    assert late is not None and late.code is ErrorCode.TERMINAL_STATE_REACHED


@pytest.mark.parametrize(
    ("reported", "state"), [({"configVersion": "7"}, S.SUCCEEDED), ({"configVersion": "6"}, S.FAILED), ({}, S.FAILED)]
)
def test_a_configuration_is_taken_when_the_device_names_the_version_that_is_wanted(
    reported: dict[str, str], state: S
) -> None:
    book = job_of(1, attempts=1, operation="config-sync")
    only(book).wanted_config = 7
    assert book.admit(only(book), 100.0, None) is None
    assert book.report(only(book), Report(S.SUCCEEDED, reported), 101.0) is None
    assert only(book).state is state
    if state is S.FAILED:
        assert "expected 7" in (only(book).reason or "")


@pytest.mark.parametrize(
    ("known", "told", "after", "state"),
    [
        ("boot-1", {}, {"bootId": "boot-2"}, S.SUCCEEDED),
        ("boot-1", {}, {"bootId": "boot-1"}, S.FAILED),
        ("boot-1", {}, {}, S.FAILED),
        ("boot-0", {"bootId": "boot-1"}, {"bootId": "boot-1"}, S.FAILED),
        (None, {}, {}, S.SUCCEEDED),
    ],
)
def test_a_restart_is_done_when_another_boot_says_so(
    known: str | None, told: dict[str, str], after: dict[str, str], state: S
) -> None:
    book = job_of(1, attempts=1, operation="restart")
    only(book).known_boot = known
    assert book.admit(only(book), 100.0, told) is None
    only(book).known_boot = "whatever heartbeats say later"
    assert book.report(only(book), Report(S.SUCCEEDED, after), 101.0) is None
    assert only(book).state is state


def test_without_a_gate_no_number_of_failures_trips_the_breaker_and_with_one_only_ends_count() -> None:
    calm, strict = job_of(60, attempts=1, cap=60), job_of(60, attempts=2, cap=60, gated=True)
    for book in (calm, strict):
        for execution in book.by_key.values():
            book.admit(execution, 100.0, None)
            book.report(execution, FAILED, 100.0)
    assert calm.jobs[1].waves[1].tripped_at is None
    assert calm.jobs[1].waves[1].gate_failed == 60
    assert (strict.jobs[1].waves[1].gate_failed, strict.jobs[1].waves[1].tripped_at) == (0, None)


class Attempts(RuleBasedStateMachine):
    """Any order of asking, reporting, repeating, falling silent, pausing and ending, over twelve devices."""

    def __init__(self) -> None:
        super().__init__()
        self.book = job_of(12)
        self.now = 100.0
        self.ends: dict[str, int] = {}
        self.last_failure: dict[str, float] = {}

    def of(self, device: int) -> ExecutionRow:
        return self.book.by_key[(1, f"d{device}")]

    def did(self, device: int, before: S) -> None:
        execution = self.of(device)
        if before not in TERMINAL_STATES and execution.state in TERMINAL_STATES:
            self.ends[execution.device_id] = self.ends.get(execution.device_id, 0) + 1
        assert not (before in TERMINAL_STATES and execution.state is not before), "an end is an end"

    @rule(seconds=st.sampled_from([0.5, 5.0, 40.0, 400.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(device=st.integers(0, 11))
    def asks(self, device: int) -> None:
        execution = self.of(device)
        if execution.state is S.QUEUED:
            due = execution.retry_at
            if self.book.admit(execution, self.now, None) is None:
                assert due is None or due <= self.now, "not before its time"

    @rule(
        device=st.integers(0, 11),
        status=st.sampled_from([S.IN_PROGRESS, S.SUCCEEDED, S.FAILED, S.REJECTED]),
        number=st.sampled_from([None, 1, 2, 3]),
    )
    def reports(self, device: int, status: S, number: int | None) -> None:
        before = self.of(device).state
        self.book.report(self.of(device), Report(status, {}, execution_number=number), self.now)
        self.did(device, before)

    @rule(device=st.integers(0, 11))
    def falls_silent(self, device: int) -> None:
        before = self.of(device).state
        self.book.expire(self.of(device), self.now)
        self.did(device, before)

    @rule(device=st.integers(0, 11), how=st.sampled_from(["withdraw", "cancel", "remove"]))
    def is_ended(self, device: int, how: str) -> None:
        before = self.of(device).state
        getattr(self.book, how)(self.of(device), "why", self.now)
        self.did(device, before)

    @rule(status=st.sampled_from(["running", "running", "running", "paused", "halted"]))
    def job_becomes(self, status: str) -> None:
        self.book.jobs[1].status = status

    @invariant()
    def counters_are_a_recount(self) -> None:
        job, wave = self.book.jobs[1], self.book.jobs[1].waves[1]
        rows = list(self.book.by_key.values())
        states = [row.state for row in rows]
        assert wave.counts == {COUNTERS[state]: states.count(state) for state in S}
        assert job.in_flight == states.count(S.IN_PROGRESS) <= job.in_flight_cap
        assert wave.retrying == sum(row.state is S.QUEUED and row.execution_number > 1 for row in rows)
        assert wave.attempts_failed == len(self.book.failures)
        assert wave.gate_succeeded == states.count(S.SUCCEEDED)

    @invariant()
    def attempts_are_bounded_and_recorded_once(self) -> None:
        for row in self.book.by_key.values():
            assert 1 <= row.execution_number <= 3
            mine = [f for f in self.book.failures if f.device_id == row.device_id]
            assert [f.attempt for f in mine] == list(range(1, len(mine) + 1))
            assert sum(f.retry_at is None for f in mine) <= 1
            assert (row.state in {S.FAILED, S.REJECTED, S.TIMED_OUT}) is any(f.retry_at is None for f in mine)
        assert set(self.ends.values()) <= {1}


TestAttempts = Attempts.TestCase
TestAttempts.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


def second_attempt_hears_the_first_one_fail(**more: Any) -> tuple[ExecutionRow, Refusal | None]:
    """The second attempt is on, and the broker delivers the failure of the first again."""
    book = job_of(1)
    fail(book, 100.0)
    execution = only(book)
    assert book.admit(execution, 200.0, None) is None
    return execution, book.report(execution, replace(FAILED, duplicate=True, **more), 201.0)


def test_a_failure_that_comes_again_does_not_end_the_attempt_after_it() -> None:
    execution, refusal = second_attempt_hears_the_first_one_fail()
    assert refusal is not None and "say it with its executionNumber" in refusal.message
    assert (execution.state, execution.execution_number) == (S.IN_PROGRESS, 2)
    _, refusal = second_attempt_hears_the_first_one_fail(execution_number=1)
    assert refusal is not None and refusal.code is ErrorCode.TERMINAL_STATE_REACHED


@pytest.mark.parametrize("named", [{"execution_number": 2}, {"expected_version": 2}])
def test_a_failure_that_says_whose_it_is_counts_although_it_comes_again(named: dict[str, int]) -> None:
    execution, refusal = second_attempt_hears_the_first_one_fail(**named)
    assert refusal is None and (execution.state, execution.execution_number) == (S.QUEUED, 3)


def test_without_the_question_whose_it_is_it_would_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domain.admission, "_of_an_earlier_attempt", lambda *_: None)
    execution, refusal = second_attempt_hears_the_first_one_fail()
    assert refusal is None and (execution.state, execution.execution_number) == (S.QUEUED, 3)


def test_the_first_attempts_failure_counts_whether_it_comes_again_or_not() -> None:
    book = job_of(1)
    assert book.admit(only(book), 100.0, None) is None
    assert book.report(only(book), replace(FAILED, duplicate=True), 101.0) is None
    assert only(book).execution_number == 2
