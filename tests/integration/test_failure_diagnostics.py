"""A failed update is asked about by itself, within bounds, and what failed is shown by cause."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_asyncio
from psycopg.types.json import Jsonb
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

import cli.output
from activities.artifact_store import ArtifactStore
from activities.artifacts import ArtifactActivities
from activities.diagnostics import DiagnosticActivities
from activities.examining import Examiner
from activities.relay import OutboxRelay
from activities.rollouts import RolloutActivities
from firmware.keys import generate_private_key
from models.diagnostics import AUTOMATIC_TYPES, AskDeviceInput, DiagnosticState
from models.protocol import DiagnosticType, ExecutionState
from models.rollout import Outcome, StartRolloutInput
from store.causes import PER_CAUSE, PER_JOB, failures_to_diagnose
from store.deltas import DeltaStore
from store.diagnostics import DiagnosticAnswer, DiagnosticStore, answer_questions, open_question
from store.engine import Database
from store.executions import ExecutionStore
from store.rollouts import RolloutStore
from tests.cli_runner import run
from tests.integration.diagnostic_setup import background
from tests.integration.hinted_devices import FAILURE, SUCCESS, HintedDevices
from tests.integration.life_setup import rows
from tests.integration.rollout_setup import Fleet, add_devices, add_release, prepare, specification
from tests.workflow.life_stage import life_workers
from workflows import options
from workflows.client import start_rollout
from workflows.lifecycle_client import TemporalFlows
from workflows.rollout import RolloutWorkflow
from workflows.wave import WaveWorkflow

HOSTILE = "\x1b[31mred\x1b]0;title\x07 [bold]markup[/] \u202eturned\u202c \u009b2J <script>alert(1)</script> \u2028line"


async def fail(db: Database, job_no: int, device: str, failure: str = "flash", reason: str = "x", **more: Any) -> None:
    """As the ledger leaves a failed execution."""
    fields = {"state": "FAILED", "wave": 1, "ago": 0, **more}
    async with db.pool.connection() as connection:
        await connection.execute(
            "UPDATE executions SET state = %s, failure_class = %s, reason = %s, wave = %s, started_at = now(), "
            "finished_at = now() - make_interval(secs => %s) WHERE job_no = %s AND device_id = %s",
            (fields["state"], failure, reason, fields["wave"], fields["ago"], job_no, device),
        )


async def chosen(fleet: Fleet, db: Database) -> list[str]:
    async with db.pool.connection() as connection:
        return [each.device_id for each in await failures_to_diagnose(connection, fleet.plan.job_no)]


def question(fleet: Fleet, device: str, what: DiagnosticType, number: int) -> AskDeviceInput:
    return AskDeviceInput(
        device_id=device, request_id=f"{number:032x}", type=what, actor="tidegate",
        job_no=fleet.plan.job_no, execution_number=1,
    )  # fmt: skip


async def answer(
    db: Database, fleet: Fleet, device: str, what: DiagnosticType, body: dict[str, Any], number: int
) -> None:
    asked = question(fleet, device, what, number)
    async with db.pool.connection() as connection:
        await open_question(connection, asked)
        assert await answer_questions(connection, [DiagnosticAnswer(device, asked.request_id, body)]) == 1


def unprintable(text: str) -> set[str]:
    """Characters that a terminal would do something with."""
    return {char for char in text if not char.isprintable() and char != "\n"}


# --- whom to ask -----------------------------------------------------------------------------------------------------


async def test_the_first_of_each_class_and_wave_are_asked_and_later_failures_do_not_change_who(db: Database) -> None:
    fleet = await prepare(db, 40)
    job = fleet.plan.job_no
    for number in range(1, 21):
        await fail(db, job, f"motor-{number}", "flash" if number % 2 else "power", ago=100 - number)
    first = await chosen(fleet, db)
    assert first == [f"motor-{number}" for number in range(1, 2 * PER_CAUSE + 1)]
    for number in range(21, 41):
        await fail(db, job, f"motor-{number}", "flash", ago=0, wave=1)
    assert await chosen(fleet, db) == first


async def test_what_a_person_refused_and_what_never_began_is_not_asked_about(db: Database) -> None:
    fleet = await prepare(db, 4)
    job = fleet.plan.job_no
    await fail(db, job, "motor-1", "rejected-by-user", state="REJECTED")
    await fail(db, job, "motor-2", "incompatible", state="REJECTED")
    await fail(db, job, "motor-3", "silent", state="TIMED_OUT")
    async with db.pool.connection() as connection:
        await connection.execute("UPDATE executions SET state = 'TIMED_OUT' WHERE device_id = 'motor-4'")
    assert await chosen(fleet, db) == ["motor-2", "motor-3"]


async def test_a_job_asks_no_more_than_its_bound_however_many_classes_and_waves_fail(db: Database) -> None:
    fleet = await prepare(db, 200)
    async with db.pool.connection() as connection:
        await connection.execute(
            "UPDATE executions SET state = 'FAILED', failure_class = 'flash', wave = 1 + rank %% 40, "
            "finished_at = now() + make_interval(secs => rank) WHERE job_no = %s",
            (fleet.plan.job_no,),
        )
    assert len(await chosen(fleet, db)) == PER_JOB


async def test_a_device_is_asked_until_every_question_has_been_opened(db: Database) -> None:
    fleet = await prepare(db, 1)
    await fail(db, fleet.plan.job_no, "motor-1")
    for number, what in enumerate(AUTOMATIC_TYPES):
        assert await chosen(fleet, db) == ["motor-1"]
        async with db.pool.connection() as connection:
            await open_question(connection, question(fleet, "motor-1", what, number))
    assert await chosen(fleet, db) == []


async def test_a_rollout_that_ends_leaves_its_questions_to_those_who_wait_for_the_answers(db: Database) -> None:
    fleet = await prepare(db, 1)
    await fail(db, fleet.plan.job_no, "motor-1")
    asked = question(fleet, "motor-1", DiagnosticType.SYSTEM_INFO, 1)
    async with db.pool.connection() as connection:
        await open_question(connection, asked)
    await fleet.store.finish(fleet.plan.job_no, Outcome.HALTED, "halt")
    async with db.pool.connection() as connection:
        assert await answer_questions(connection, [DiagnosticAnswer("motor-1", asked.request_id, {"uptime": 1})]) == 1


async def test_what_failed_a_day_ago_is_not_asked_about_any_more(db: Database) -> None:
    fleet = await prepare(db, 1)
    await fail(db, fleet.plan.job_no, "motor-1", ago=86_500)
    assert await chosen(fleet, db) == []


# --- asking ----------------------------------------------------------------------------------------------------------


@dataclass
class Flows:
    """Workflows that were started; `breaks_at` is the start at which Temporal is away, or the worker killed."""

    started: list[AskDeviceInput] = field(default_factory=list)
    breaks_at: int | None = None
    error: BaseException = field(default_factory=lambda: RPCError("away", RPCStatusCode.UNAVAILABLE, b""))

    async def start_diagnosis(self, asked: AskDeviceInput, /) -> bool:
        if self.breaks_at == len(self.started):
            self.breaks_at = None
            raise self.error
        known = any(each.request_id == asked.request_id for each in self.started)
        if not known:
            self.started.append(asked)
        return not known


@pytest.mark.parametrize("killed", [False, True])
async def test_whoever_was_killed_or_cut_off_in_between_is_replaced_and_each_question_is_asked_once(
    db: Database, killed: bool
) -> None:
    fleet = await prepare(db, 8)
    for number in range(1, 9):
        await fail(db, fleet.plan.job_no, f"motor-{number}", ago=10 - number)
    flows = Flows(breaks_at=3)
    examiner = Examiner(fleet.plan.job_no, fleet.store, flows, clock=lambda: 100.0)
    if killed:
        flows.error = asyncio.CancelledError()
        with pytest.raises(asyncio.CancelledError):
            await examiner.look(8)
        examiner = Examiner(fleet.plan.job_no, fleet.store, flows, clock=lambda: 100.0)
    else:
        assert await examiner.look(8) == 1
        examiner._next = 0.0
    await examiner.look(8)
    assert [(each.device_id, each.type) for each in flows.started] == [
        (f"motor-{number}", what) for number in range(1, PER_CAUSE + 1) for what in AUTOMATIC_TYPES
    ]
    assert len({each.request_id for each in flows.started}) == 2 * PER_CAUSE
    assert await examiner.look(8) == 0 and await examiner.look() == 0


async def test_looks_are_spaced_and_made_only_after_failures(db: Database) -> None:
    fleet, looks, now = await prepare(db, 1), 0, 100.0

    class Counting:
        async def failures_to_diagnose(self, job_no: int) -> list[tuple[str, int]]:
            nonlocal looks
            looks += 1
            return []

    examiner = Examiner(fleet.plan.job_no, Counting(), Flows(), clock=lambda: now)  # type: ignore[arg-type]
    for failed in (0, 1, 2, 3):
        await examiner.look(failed)
    assert looks == 1
    now += 10
    for _ in range(5):
        await examiner.look(3)
    assert looks == 2
    assert await Examiner(1, Counting(), None).look(5) == 0 and looks == 2  # type: ignore[arg-type]


# --- a rollout that fails ----------------------------------------------------------------------------------------------


class AnsweringDevices:
    """In place of the broker: what devices are asked, they answer at once, as the gateway records it."""

    def __init__(self, db: Database) -> None:
        self.db, self.asked = db, 0

    async def publish(self, topic: str, payload: bytes) -> None:
        self.asked += 1
        device, asked = topic.split("/")[1], orjson.loads(payload)
        said: dict[str, Any] = {"uptime": 90, "freeMemory": 10, "totalMemory": 100}
        if asked["type"] == DiagnosticType.LOG_TAIL:
            said = {"logs": ["boot", f"{device}: sector is worn {HOSTILE}"]}
        async with self.db.pool.connection() as connection:
            await answer_questions(connection, [DiagnosticAnswer(device, asked["requestId"], said)])


@pytest_asyncio.fixture
async def failing(db: Database, temporal: Client, tmp_path: Path) -> AsyncIterator[HintedDevices]:
    """Workers with everything real behind them, and devices of which most fail."""
    store, devices = RolloutStore(db), HintedDevices(ExecutionStore(db))
    rollouts = RolloutActivities(store, devices, TemporalFlows(temporal))
    artifacts = ArtifactActivities(ArtifactStore.open(tmp_path.as_uri()), DeltaStore(db), store)
    asking = DiagnosticActivities(DiagnosticStore(db), AnsweringDevices(db))
    steps = [
        rollouts.plan_rollout, rollouts.write_plain_document, rollouts.drive_wave, rollouts.close_wave,
        rollouts.check_promotable, rollouts.set_job_status, rollouts.adjust_pace, rollouts.finish_rollout,
        artifacts.prepare_artifacts, asking.open_question, asking.publish_question, asking.end_question,
        asking.look_at_boot,
    ]  # fmt: skip
    async with (
        life_workers(temporal, steps, [RolloutWorkflow, WaveWorkflow]),
        background(OutboxRelay(db, temporal, options.DEVICE_EVENT).run(asyncio.Event())),
    ):
        yield devices
        await devices.settle()


async def test_a_rollout_that_fails_everywhere_asks_a_few_and_shows_causes_and_what_they_said(
    db: Database, temporal: Client, failing: HintedDevices
) -> None:
    await add_devices(db, 60)
    await add_release(db, generate_private_key())

    def fate(thing: str) -> Any:
        number = int(thing.split("-")[1])
        if number % 3 == 0:
            return (
                ExecutionState.FAILED,
                {"failure": "flash", "reason": f"sector {number} of /dev/mtd{number} is worn"},
            )
        return FAILURE if number % 10 else SUCCESS

    failing.fate = fate
    handle = await start_rollout(temporal, StartRolloutInput(spec=specification(), requested_by="alice"))
    with suppress(RPCError):
        result = await asyncio.wait_for(handle.result(), 60)
    assert result.outcome is Outcome.HALTED
    async with asyncio.timeout(30):
        while await rows(db, "SELECT FROM diagnostics WHERE state = 'requested'") or not await rows(
            db, "SELECT FROM diagnostics HAVING count(*) >= 20"
        ):
            await asyncio.sleep(0.1)
    asked = await rows(db, "SELECT device_id, type, state, job_no, execution_number, requested_by FROM diagnostics")
    assert len(asked) == 2 * 2 * PER_CAUSE, "five of each class, two questions each"
    assert {(row["state"], row["execution_number"], row["requested_by"]) for row in asked} == {
        ("answered", 1, "tidegate")
    }
    environment = {"TIDEGATE_DATABASE_URL": db.url}
    shown = await asyncio.to_thread(run, "rollout", "show", "motor-1.3.0", **environment)
    assert "sector <n> of <path> is worn" in shown.out and "fell back" in shown.out
    assert "10% of memory free" in shown.out and "its log ends" in shown.out
    assert not unprintable(shown.out)
    assert "[bold]markup[/]" in shown.out
    data = (await asyncio.to_thread(run, "rollout", "show", "motor-1.3.0", "--json", **environment)).json
    causes = data["causes"]
    assert {cause["failure_class"] for cause in causes} == {"flash", "rolled-back"}
    assert abs(sum(cause["share"] for cause in causes) - 1) < 0.001
    assert sum(cause["count"] for cause in causes) == result.failed
    example = causes[0]["example"]
    one = await asyncio.to_thread(run, "rollout", "show", "motor-1.3.0", "--device", example, **environment)
    assert f"starter.py diagnose {example}" in one.out and "its system-info" in one.out
    assert not unprintable(one.out)
    past = await asyncio.to_thread(run, "diagnose", example, **environment)
    assert "log-tail" in past.out and "worn" in past.out
    assert not unprintable(past.out)


# --- what is shown ---------------------------------------------------------------------------------------------------


def hostile_answers() -> list[tuple[DiagnosticType, dict[str, Any]]]:
    nested: dict[str, Any] = {HOSTILE: {HOSTILE: [HOSTILE, {HOSTILE: 1}]}, "config": {HOSTILE: HOSTILE}}
    return [
        (DiagnosticType.SYSTEM_INFO, {"uptime": HOSTILE, "diskUsage": HOSTILE, "networkStatus": {"interfaces": [{"name": HOSTILE, "state": HOSTILE}, HOSTILE, None]}, HOSTILE: HOSTILE}),
        (DiagnosticType.SYSTEM_INFO, {"uptime": -1, "freeMemory": 2, "totalMemory": 1, "cpuTemperature": 10**18, "diskUsage": {"used": 5, "total": 0}}),
        (DiagnosticType.SYSTEM_INFO, {"freeMemory": -5, "totalMemory": "x", "networkStatus": {"connectionErrors": "x", "interfaces": 5}}),
        (DiagnosticType.LOG_TAIL, {"logs": [HOSTILE, 5, None, {HOSTILE: 1}, "plain"], "truncated": HOSTILE}),
        (DiagnosticType.LOG_TAIL, {"logs": HOSTILE}),
        (DiagnosticType.CONFIG_DUMP, {"config": nested, "configVersion": HOSTILE}),
        (DiagnosticType.CONFIG_DUMP, {"config": [HOSTILE]}),
        (DiagnosticType.PING, {"pong": HOSTILE}),
        (DiagnosticType.REBOOT, {"scheduled": HOSTILE, "delaySeconds": HOSTILE}),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(len(hostile_answers())))
async def test_no_answer_of_a_device_reaches_a_terminal_as_more_than_text(db: Database, number: int) -> None:
    fleet = await prepare(db, 1)
    what, body = hostile_answers()[number]
    await fail(db, fleet.plan.job_no, "motor-1", reason=HOSTILE)
    await answer(db, fleet, "motor-1", what, body, number)
    async with db.pool.connection() as connection:
        asked = question(fleet, "motor-1", DiagnosticType.REBOOT, 99)
        await open_question(connection, asked)
        await answer_questions(connection, [DiagnosticAnswer("motor-1", asked.request_id, None, HOSTILE)])
        details = Jsonb({HOSTILE: HOSTILE, "step": HOSTILE})
        await connection.execute("UPDATE executions SET status_details = %s, base_version = %s", (details, HOSTILE))
        await connection.execute("UPDATE devices SET firmware_version = %s, barred_reason = %s", (HOSTILE, HOSTILE))
    for words in (
        ("device", "show", "motor-1"),
        ("device", "list"),
        ("diagnose", "motor-1"),
        ("rollout", "show", "motor-1.3.0", "--device", "motor-1"),
        ("rollout", "show", "motor-1.3.0"),
        ("rollout", "devices", "motor-1.3.0"),
        ("alert", "list"),
        ("audit",),
    ):
        ran = await asyncio.to_thread(run, *words, TIDEGATE_DATABASE_URL=db.url)
        assert ran.status == 0, (words, ran.err)
        assert not unprintable(ran.out + ran.err), words
        ran = await asyncio.to_thread(run, *words, "--json", TIDEGATE_DATABASE_URL=db.url)
        assert json.loads(ran.out) and not unprintable(ran.out), words


async def test_without_the_one_place_that_writes_controls_out_they_would_reach_the_terminal(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = await prepare(db, 1)
    await answer(db, fleet, "motor-1", DiagnosticType.SYSTEM_INFO, {HOSTILE: HOSTILE}, 1)
    monkeypatch.setattr(cli.output, "printable", lambda text, kept="": text)
    ran = await asyncio.to_thread(run, "diagnose", "motor-1", TIDEGATE_DATABASE_URL=db.url)
    assert "\x1b" in unprintable(ran.out)


async def test_the_answer_is_shown_with_units_and_shares(db: Database) -> None:
    fleet = await prepare(db, 1)
    body = {"uptime": 7509, "freeMemory": 256 * 2**20, "totalMemory": 2**30, "cpuTemperature": 48.25,
            "diskUsage": {"total": 2**30, "used": 2**29, "free": 2**29},
            "networkStatus": {"connected": True, "connectionErrors": 2, "interfaces": [{"name": "eth0", "state": "up"}]}}  # fmt: skip
    await answer(db, fleet, "motor-1", DiagnosticType.SYSTEM_INFO, body, 1)
    ran = await asyncio.to_thread(run, "diagnose", "motor-1", TIDEGATE_DATABASE_URL=db.url)
    for wanted in (
        "2h5m9s",
        "256.0 MiB of 1.0 GiB free (25%)",
        "48.2 °C",
        "512.0 MiB of 1.0 GiB used (50%)",
        "eth0 up",
    ):
        assert wanted in ran.out, (wanted, ran.out)
    data = (await asyncio.to_thread(run, "diagnose", "motor-1", "--json", TIDEGATE_DATABASE_URL=db.url)).json
    assert data["diagnostics"][0]["answer"] == body
    assert data["diagnostics"][0]["state"] == DiagnosticState.ANSWERED


async def test_a_device_that_was_never_asked_and_one_that_is_not_there(db: Database) -> None:
    await add_devices(db, 1)
    ran = await asyncio.to_thread(run, "diagnose", "motor-1", TIDEGATE_DATABASE_URL=db.url)
    assert ran.status == 0 and "was never asked" in ran.err
    ran = await asyncio.to_thread(run, "diagnose", "ghost", TIDEGATE_DATABASE_URL=db.url)
    assert ran.status == 2


@pytest.mark.parametrize(
    "words",
    [("ping", "--lines", "5"), ("ping", "--wait"), ("log-tail", "--delay", "1s"), ("reboot", "--delay", "2h"),
     ("reboot", "--delay", "soon"), ("log-tail", "--lines", "1001"), ("format",)],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused_before_anything_is_asked(words: tuple[str, ...]) -> None:
    assert run("diagnose", "motor-1", *words, TIDEGATE_DATABASE_URL="postgresql://nobody@127.0.0.1:1/none").status == 2
