"""What `job` says of a job and its devices, and what it makes of its options. Without a server."""

import io
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cli.jobexplain import why_here, why_not_in
from cli.joboptions import Quick, Target, specification_of
from cli.jobscreen import JobSnapshot, failure_groups, next_command, row_of
from cli.spec import parse_spec
from models.device import DeviceRecord, DeviceStatus
from models.errors import InvalidInputError, NotFoundError, SpecError
from models.fleetjob import FailureView, FleetJobProgress, FleetJobView
from models.jobspec import FleetJobSpec, Membership
from models.protocol import ExecutionState, FailureClass, JobOperation
from models.rollout import JobStatus, Outcome, Phase, WaveCounts, WaveProgress, WaveStatus
from models.views import ExecutionView

NOW = datetime(2026, 11, 30, 2, 0, tzinfo=UTC)
SPEC = FleetJobSpec.model_validate(
    {"name": "restart-berlin", "operation": "restart", "target": {"sites": ["berlin"]}, "retry": {"max_attempts": 3}}
)
DEVICE = DeviceRecord(
    device_id="motor-7", device_type="motor", serial_number="S7", site_id="berlin",
    last_heartbeat=NOW - timedelta(hours=3),
)  # fmt: skip


def job(**changes: Any) -> FleetJobView:
    wave = WaveProgress(
        wave=1, name="all", target_count=10, status=WaveStatus.OPEN, opened_at=NOW,
        counts=WaveCounts(succeeded=6, failed=1, in_progress=2, queued=1),
    )  # fmt: skip
    progress = FleetJobProgress(total=10, waiting=1, in_progress=2, succeeded=6, failed=1)
    fields = {
        "job_no": 1, "job_id": "_restart-berlin", "name": SPEC.name, "operation": SPEC.operation,
        "status": JobStatus.RUNNING, "phase": Phase.ROLLING, "requested_by": "anna", "in_flight_cap": 100,
        "max_attempts": 3, "created_at": NOW, "progress": progress, "waves": (wave,), "spec": SPEC.model_dump(mode="json"),
    }  # fmt: skip
    return FleetJobView.model_validate({**fields, **changes})


def place(state: ExecutionState, **changes: Any) -> ExecutionView:
    return ExecutionView(
        rollout=SPEC.name, device_id="motor-7", wave=1, wave_name="all", rank=1, state=state, **changes
    )


@pytest.mark.parametrize(
    ("execution", "changes", "words"),
    [
        (place(ExecutionState.QUEUED), {}, "last heard of 3h ago"),
        (
            place(ExecutionState.QUEUED),
            {"in_flight_cap": 2},
            "one of 2 devices in progress has ended (at most 2 at a time)",
        ),
        (
            place(ExecutionState.QUEUED),
            {"status": JobStatus.PAUSED, "reason": "lunch"},
            "paused, so no device starts: lunch",
        ),
        (place(ExecutionState.QUEUED), {"status": JobStatus.HALTED}, "no device starts any more"),
        (
            place(
                ExecutionState.QUEUED,
                execution_number=2,
                retry_at=NOW + timedelta(seconds=40),
                failure_class=FailureClass.POWER,
                reason="battery low",
            ),
            {},
            "attempt 1 failed (power): battery low; it waits for attempt 2 of 3 until 2026-11-30 02:00:40Z, in 40s",
        ),
        (place(ExecutionState.PENDING), {"phase": Phase.SCHEDULED}, "is not open yet; the job is scheduled"),
        (place(ExecutionState.IN_PROGRESS, updated_at=NOW), {}, "attempt 1 of 3: it has started since"),
        (place(ExecutionState.SUCCEEDED, finished_at=NOW), {}, "done with attempt 1 of 3"),
        (place(ExecutionState.CANCELED), {"reason": "wrong pump"}, "withdrawn when the job ended: wrong pump"),
        (
            place(ExecutionState.FAILED, execution_number=3, failure_class=FailureClass.INTERNAL, reason="blocked"),
            {},
            "attempt 3 of 3: it failed (internal): blocked; no attempt is left",
        ),
        (place(ExecutionState.REJECTED), {}, "it said no, and is not asked again"),
        (place(ExecutionState.TIMED_OUT, failure_class=FailureClass.SILENT), {}, "it went silent (silent)"),
    ],
)
def test_a_device_s_place_is_explained_in_a_sentence(
    execution: ExecutionView, changes: dict[str, Any], words: str
) -> None:
    assert words in why_here(execution, job(**changes), DEVICE, NOW)


def test_the_pace_is_named_where_there_is_one() -> None:
    spec = SPEC.model_copy(update={"per_minute": 5}).model_dump(mode="json")
    said = why_here(place(ExecutionState.QUEUED), job(spec=spec), DEVICE, NOW)
    assert said.endswith("is busy with another job, or is kept back by the pace (5 per minute)")


@pytest.mark.parametrize(
    ("device", "changes", "words"),
    [
        ({"status": DeviceStatus.RETIRED}, {}, "it is retired"),
        ({"site_id": "hamburg"}, {}, "does not match the target"),
        ({}, {}, "did not, or was not there, when the job was planned"),
        ({}, {"continuous": True}, "joins within"),
        ({"status": DeviceStatus.PROVISIONING}, {}, "never been heard of"),
        ({}, {"spec": SPEC.model_copy(update={"retry_of": "a"}).model_dump(mode="json")}, "have failed in job a"),
    ],
)
def test_a_device_that_is_no_part_of_a_job_is_told_why(
    device: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    assert words in why_not_in(DEVICE.model_copy(update=device), job(**changes), NOW)


@pytest.mark.parametrize(
    ("changes", "command"),
    [
        ({}, "job watch restart-berlin"),
        ({"phase": Phase.PAUSED, "status": JobStatus.PAUSED}, "job resume restart-berlin"),
        ({"phase": Phase.HOLDING}, "job resume restart-berlin, or job cancel restart-berlin"),
        ({"status": JobStatus.HALTED}, "job watch restart-berlin, or job cancel restart-berlin --force"),
        ({"outcome": Outcome.SUCCEEDED, "phase": Phase.DONE}, "job retry restart-berlin"),
        (
            {"outcome": Outcome.SUCCEEDED, "progress": FleetJobProgress(total=1, succeeded=1)},
            "job devices restart-berlin",
        ),
    ],
)
def test_the_next_command_follows_from_where_the_job_stands(changes: dict[str, Any], command: str) -> None:
    assert next_command(JobSnapshot(NOW, job(**changes))) == command


def failure(device: str, failure_class: str | None, reason: str | None, attempt: int = 1) -> FailureView:
    return FailureView(
        device_id=device, attempt=attempt, state="FAILED", failure_class=failure_class, reason=reason, failed_at=NOW
    )


def test_failures_are_grouped_by_class_with_the_most_frequent_words_and_each_device_once() -> None:
    found = [failure(f"m{n}", "internal", "pump blocked") for n in range(5)]
    found += [failure("m9", "internal", "no oil"), failure("p1", "network", None), failure("m0", "network", "old", 1)]
    first, second = failure_groups(found)
    assert (first.failure, first.devices, first.reasons) == ("internal", 6, (("pump blocked", 5), ("no oil", 1)))
    assert (second.failure, second.devices, second.reasons) == ("network", 1, (("no reason given", 1),))
    assert first.examples == ("m0", "m1", "m2")


@pytest.mark.parametrize("width", [80, 120])
def test_the_screen_shows_bars_figures_and_no_control_character_of_a_reason(width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    snapshot = JobSnapshot(NOW, job(reason="evil \x1b[2J"), ui_link="http://ui")
    console.print(snapshot.screen)
    text = console.export_text()
    assert "6 of 10 done, 1 failed" in text and "████" in text and "\x1b" not in text
    assert "withdrawn" in text and "…" not in text
    assert snapshot.line == "rolling | 6 ok, 1 failed, 2 in progress, 1 waiting of 10"


def test_a_list_of_jobs_says_where_each_stands_and_why_only_where_that_is_news() -> None:
    going = job(reason="paused by mara")
    assert row_of(going)[4:] == ("6 ok, 1 failed, 2 in progress, 1 waiting of 10", "paused by mara")
    ended = job(outcome=Outcome.SUCCEEDED, progress=FleetJobProgress(total=1, succeeded=1), reason="1 of 1 succeeded")
    assert row_of(ended)[4:] == ("1 ok of 1", "")
    assert row_of(job(progress=FleetJobProgress()))[4] == "none of 0"


def test_options_make_the_same_specification_as_a_file() -> None:
    quick = Quick(operation=JobOperation.RESTART, max_parallel=50, attempts=3, backoff="10s", continuous=True)
    target = Target(sites=["berlin"], tags=["environment=production", "maintenance-due < 2026-03-12"])
    by_options = specification_of("restart-berlin", quick, target)
    by_file = parse_spec(
        b"name: restart-berlin\noperation: restart\nmax_parallel: 50\nmembership: continuous\n"
        b"retry: {max_attempts: 3, backoff: 10s}\n"
        b"target: {sites: [berlin], tags: {environment: production, maintenance-due: '<2026-03-12'}}\n",
        "file",
        FleetJobSpec,
    )
    assert by_options == by_file and by_options.membership is Membership.CONTINUOUS


@pytest.mark.parametrize(
    ("quick", "target", "words"),
    [
        (Quick(operation=JobOperation.RESTART), Target(), "or --all for every device"),
        (Quick(operation=JobOperation.RESTART), Target(sites=["a"], everything=True), "--all: expected alone"),
        (
            Quick(operation=JobOperation.RESTART, start_at="noon"),
            Target(everything=True),
            "--start-at: expected a time",
        ),
        (Quick(attempts=3), Target(), "go with --operation and a name"),
        (Quick(), Target(), "or a name with --operation and devices"),
    ],
)
def test_options_that_mean_nothing_are_refused(quick: Quick, target: Target, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        specification_of("restart", quick, target)


def test_options_that_do_not_fit_the_operation_are_told_as_a_file_s_are(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="release: expected with operation firmware-update"):
        specification_of("a", Quick(operation=JobOperation.FIRMWARE_UPDATE), Target(everything=True))
    with pytest.raises(SpecError, match="operation restart reboots"):
        specification_of("a", Quick(operation=JobOperation.DIAGNOSTIC, ask=["reboot"]), Target(everything=True))
    with pytest.raises(InvalidInputError, match="expected --document FILE with operation custom"):
        specification_of("a", Quick(operation=JobOperation.CUSTOM), Target(everything=True))
    with pytest.raises(NotFoundError, match="--document"):
        specification_of("a", Quick(operation=JobOperation.CUSTOM, document=tmp_path / "no"), Target(everything=True))
    (tmp_path / "twice.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(InvalidInputError, match="stands twice"):
        quick = Quick(operation=JobOperation.CUSTOM, document=tmp_path / "twice.json")
        specification_of("a", quick, Target(everything=True))


JOB = b"name: a\noperation: restart\n"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (b"operation: restart\n", 1, "is missing"),
        (JOB + b"\nconfig: {a: 1}\n", 4, "expected with operation config-sync alone"),
        (JOB + b"release: a@1\n", 3, "expected with operation firmware-update"),
        (
            b"name: a\noperation: custom\ndocument:\n  when: 2026-11-30\n",
            4,
            "when: date is not JSON; write it as a text",
        ),
        (b"name: a\noperation: custom\ndocument: {order: 1}\n", 3, "has a member of this name already"),
        (JOB + b"retry: {max_attempts: 0}\n", 3, "greater than or equal to 1"),
        (JOB + b"start_at: 2026-11-30 02:00:00\n", 3, "expected a time with its zone"),
        (JOB + b"start_at: 2026-11-30T02:00:00Z\nend_at: 2026-11-30T01:00:00Z\n", 4, "expected after start_at"),
        (JOB + b"wavse: []\n", 3, "did you mean 'waves'?"),
    ],
)
def test_every_mistake_of_a_job_s_file_has_its_line_and_says_what_was_expected(
    text: bytes, line: int, words: str
) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(text, "job.yaml", FleetJobSpec)
    assert [(mistake.line, words in mistake.message) for mistake in caught.value.mistakes] == [(line, True)]


def test_a_time_in_a_file_keeps_its_zone() -> None:
    spec = parse_spec(JOB + b"start_at: 2026-11-30T02:00:00+02:00\n", "job.yaml", FleetJobSpec)
    assert spec.start_at == datetime(2026, 11, 30, 0, 0, tzinfo=UTC)
