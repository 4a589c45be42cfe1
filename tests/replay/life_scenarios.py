"""Scenarios of the lifecycle workflows, one for each way to end; `python -m tests.replay.record` saves their histories.

`LIVES` names them by workflow. A workflow of devices' lives that is not here yet adds its own: a function that takes a
server, runs the workflow to its end there, and returns its handle.
"""

from collections import deque
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

from temporalio.client import WorkflowHandle
from temporalio.testing import WorkflowEnvironment

from models.diagnostics import DiagnosticState, EndedQuestion
from models.identity import DeviceHappening
from models.lifecycle import CertificatesSeen, RotateFleetInput, RotationSeen
from models.protocol import DiagnosticType
from tests.replay.health_scenarios import HEALTH
from tests.replay.job_scenarios import JOBS
from tests.replay.notification_scenarios import NOTIFICATION
from tests.replay.provisioning_scenarios import PROVISIONING
from tests.workflow.life_stage import LifeStage
from workflows.lifecycle_client import start_fleet_rotation

Ended = WorkflowHandle[Any, Any]
Scenario = Callable[[WorkflowEnvironment], Awaitable[Ended]]

NOTHING, NEW = RotationSeen(), RotationSeen(issued="new")
PROVED = RotationSeen(issued="new", confirmed="new")


def _played(act: Callable[[LifeStage], Awaitable[None]]) -> Scenario:
    """A scenario with workers and a script around it."""

    async def play(environment: WorkflowEnvironment) -> Ended:
        stage = LifeStage(environment, device_id=f"recorded-{act.__name__.replace('_', '-')}")
        await stage.start_workers()
        try:
            await act(stage)
            await stage.result()
        finally:
            await stage.stop_workers()
        return stage.handle

    return play


async def applied(stage: LifeStage) -> None:
    """The device reports the version."""
    await stage.configure()
    await stage.until_asked("hint_configuration")
    await stage.tell(DeviceHappening.CONFIGURED, version=1)


async def applied_after_reminders(stage: LifeStage) -> None:
    """Its report is found by the third reminder."""
    stage.script.applied_on_hint = 3
    await stage.configure()


async def replaced(stage: LifeStage) -> None:
    """A newer configuration comes while the first is waited for."""
    await stage.configure()
    await stage.until_asked("hint_configuration")
    await stage.configure(config={"interval": 7})
    await stage.until_asked("hint_configuration", 2)
    await stage.tell(DeviceHappening.CONFIGURED, version=2)


async def timed_out(stage: LifeStage) -> None:
    """No report within an hour."""
    await stage.configure(limit=timedelta(hours=1))


async def configuration_refused(stage: LifeStage) -> None:
    """The device is retired."""
    stage.script.refusal = "cannot configure motor-7: it is retired"
    await stage.configure()


async def rotated(stage: LifeStage) -> None:
    """It comes and connects."""
    stage.script.rotation = deque([NOTHING, NEW, NEW, PROVED])
    await stage.rotate()
    await stage.until_asked("ask_for_rotation")
    await stage.tell(DeviceHappening.CERTIFICATE_ISSUED, certificate_id="new")
    await stage.until_asked("ask_for_rotation", 3)
    await stage.tell(DeviceHappening.CERTIFICATE_CONFIRMED, certificate_id="new")


async def settled(stage: LifeStage) -> None:
    """It came by itself, and has been seen."""
    stage.script.certificates = CertificatesSeen(old=("old",), settled="new")
    await stage.rotate(ask=False)


async def unanswered(stage: LifeStage) -> None:
    """It never comes."""
    await stage.rotate(renew_within=timedelta(days=1))


async def reverted(stage: LifeStage) -> None:
    """It is not seen with the new one."""
    stage.script.rotation = deque([NEW])
    await stage.rotate(overlap=timedelta(hours=1))


async def rotation_refused(stage: LifeStage) -> None:
    """It is barred."""
    stage.script.refusal = "cannot rotate the certificate of motor-7: nothing that it says is used"
    await stage.rotate()


async def rotated_unsigned(stage: LifeStage) -> None:
    """No worker has the CA's key."""
    stage.script.signs = False
    stage.script.rotation = deque([NEW, PROVED])
    await stage.rotate()


async def wiped(stage: LifeStage) -> None:
    """It answers."""
    await stage.decommission()
    await stage.until_asked("ask_to_wipe")
    stage.script.wiped = True
    await stage.tell(DeviceHappening.COMMAND_ANSWERED, request_id="wipe-1", status="succeeded")


async def never_answered(stage: LifeStage) -> None:
    """It does not answer."""
    await stage.decommission(wipe_within=timedelta(minutes=5))


async def not_heard(stage: LifeStage) -> None:
    """It is barred already; no signer, a broker that does not follow, retained messages that stay."""
    stage.script.answers, stage.script.signs, stage.script.behind = False, False, ("mosquitto",)
    stage.script.retained_error = "the broker does not answer"
    await stage.decommission()


async def swept(stage: LifeStage) -> None:
    """A sweep."""
    asked = RotateFleetInput(actor="alice")
    stage.started.append(await start_fleet_rotation(stage.environment.client, asked))


async def confirmed(stage: LifeStage) -> None:
    """The device reports something else, then what is wanted."""
    await stage.sync_shadow(limit=timedelta(hours=1))
    await stage.until_asked("want_shadow")
    await stage.tell(DeviceHappening.SHADOW_REPORTED, shadow="", version=4)
    await stage.until_asked("check_shadow")
    stage.script.shadow_reported = True
    await stage.tell(DeviceHappening.SHADOW_REPORTED, shadow="", version=5)


async def confirmed_at_once(stage: LifeStage) -> None:
    """It reports that already."""
    stage.script.shadow_reported = True
    await stage.sync_shadow()


async def unconfirmed(stage: LifeStage) -> None:
    """It says nothing within the limit."""
    await stage.sync_shadow(limit=timedelta(minutes=1))


async def shadow_refused(stage: LifeStage) -> None:
    """The device is retired."""
    stage.script.refusal = "cannot configure motor-7: it is retired"
    await stage.sync_shadow()


async def answered(stage: LifeStage) -> None:
    """The device answers."""
    stage.script.question = EndedQuestion(state=DiagnosticState.ANSWERED)
    await stage.diagnose(request_id="a" * 32)
    await stage.until_asked("publish_question")
    await stage.tell(DeviceHappening.DIAGNOSED, request_id="a" * 32)


async def not_answered(stage: LifeStage) -> None:
    """It does not."""
    await stage.diagnose(DiagnosticType.LOG_TAIL, request_id="b" * 32, lines=20)


async def not_asked(stage: LifeStage) -> None:
    """It is barred."""
    stage.script.refusal = "cannot ask it: nothing that it says is used"
    await stage.diagnose(request_id="c" * 32)


async def rebooted(stage: LifeStage) -> None:
    """It reboots, and is found to be back by the second look."""
    stage.script.question = EndedQuestion(state=DiagnosticState.ANSWERED)
    stage.script.boots = deque([None, 12.5])
    await stage.diagnose(DiagnosticType.REBOOT, request_id="d" * 32, wait_for_boot=True)


async def not_rebooted(stage: LifeStage) -> None:
    """It said that it would, and is not heard again."""
    stage.script.question = EndedQuestion(state=DiagnosticState.ANSWERED)
    limit = timedelta(minutes=1)
    await stage.diagnose(DiagnosticType.REBOOT, request_id="e" * 32, wait_for_boot=True, boot_limit=limit)


LIVES: dict[str, dict[str, Scenario]] = {
    "ConfigurationWorkflow": {
        "applied": _played(applied),
        "applied-after-reminders": _played(applied_after_reminders),
        "replaced": _played(replaced),
        "timed-out": _played(timed_out),
        "refused": _played(configuration_refused),
    },
    "CertificateRotationWorkflow": {
        "rotated": _played(rotated),
        "settled": _played(settled),
        "unanswered": _played(unanswered),
        "reverted": _played(reverted),
        "refused": _played(rotation_refused),
        "unsigned": _played(rotated_unsigned),
    },
    "DecommissionWorkflow": {
        "wiped": _played(wiped),
        "never-answered": _played(never_answered),
        "not-heard": _played(not_heard),
    },
    "FleetRotationWorkflow": {"swept": _played(swept)},
    "ShadowSyncWorkflow": {
        "confirmed": _played(confirmed),
        "confirmed-at-once": _played(confirmed_at_once),
        "timed-out": _played(unconfirmed),
        "refused": _played(shadow_refused),
    },
    "DiagnosticWorkflow": {
        "answered": _played(answered),
        "timed-out": _played(not_answered),
        "refused": _played(not_asked),
        "rebooted": _played(rebooted),
        "not-rebooted": _played(not_rebooted),
    },
    **PROVISIONING,
    **JOBS,
    **NOTIFICATION,
    **HEALTH,
}
