"""Scenarios of provisioning and of a next certificate, one for each way to end, with activities from a script."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from temporalio import activity
from temporalio.client import WorkflowHandle
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Worker

from models.identity import (
    ActivateDeviceInput,
    ActivateDeviceResult,
    CheckEnrolmentInput,
    CheckEnrolmentResult,
    Decision,
    DeviceEvent,
    DeviceHappening,
    EnrolmentVerdict,
    IssueCertificateInput,
    IssueCertificateResult,
    MarkConfiguredInput,
    ProvisionDeviceInput,
    PublishCrlsInput,
    PublishCrlsResult,
    RefuseEnrolmentInput,
    ReissueCertificateInput,
    ReissueCertificateResult,
    UndoProvisioningInput,
    UndoProvisioningResult,
)
from workflows import options
from workflows.client import start_provisioning, start_reissue
from workflows.provisioning import ProvisioningWorkflow
from workflows.reissue import ReissueCertificateWorkflow
from workflows.sandbox import runner

Handle = WorkflowHandle[Any, Any]


@dataclass
class Script:
    """What the activities answer, and what was asked of them."""

    check: CheckEnrolmentResult = field(
        default_factory=lambda: CheckEnrolmentResult(verdict=EnrolmentVerdict.ISSUE, batch="line-4")
    )
    issue: IssueCertificateResult = field(
        default_factory=lambda: IssueCertificateResult(device_id="motor-7", certificate_id="ab" * 32, config_version=1)
    )
    activate: ActivateDeviceResult = field(default_factory=ActivateDeviceResult)
    reissue: ReissueCertificateResult = field(
        default_factory=lambda: ReissueCertificateResult(certificate_id="cd" * 32, certificate="PEM")
    )
    asked: list[str] = field(default_factory=list)

    def activities(self) -> list[Callable[..., Any]]:
        """Under the names of the real ones."""

        @activity.defn
        async def check_enrolment(asked: CheckEnrolmentInput) -> CheckEnrolmentResult:
            return self.check

        @activity.defn
        async def refuse_enrolment(asked: RefuseEnrolmentInput) -> None:
            return None

        @activity.defn
        async def issue_certificate(asked: IssueCertificateInput) -> IssueCertificateResult:
            self.asked.append("issue")
            return self.issue

        @activity.defn
        async def mark_configured(asked: MarkConfiguredInput) -> None:
            self.asked.append("configured")

        @activity.defn
        async def activate_device(asked: ActivateDeviceInput) -> ActivateDeviceResult:
            return self.activate

        @activity.defn
        async def undo_provisioning(asked: UndoProvisioningInput) -> UndoProvisioningResult:
            return UndoProvisioningResult(revoked=1)

        @activity.defn
        async def publish_crls(asked: PublishCrlsInput) -> PublishCrlsResult:
            return PublishCrlsResult()

        @activity.defn
        async def reissue_certificate(asked: ReissueCertificateInput) -> ReissueCertificateResult:
            return self.reissue

        return [
            check_enrolment,
            refuse_enrolment,
            issue_certificate,
            mark_configured,
            activate_device,
            undo_provisioning,
            publish_crls,
            reissue_certificate,
        ]


@dataclass
class Playing:
    """A scenario that runs."""

    environment: WorkflowEnvironment
    script: Script
    name: str

    async def start(self) -> Handle:
        """Its provisioning."""
        asked = ProvisionDeviceInput(enrolment_no=7, serial_number=f"recorded-{self.name}")
        return await start_provisioning(self.environment.client, asked)

    async def until(self, what: str) -> None:
        """Until it was asked for."""
        while what not in self.script.asked:
            await asyncio.sleep(0.01)

    async def tell(self, handle: Handle, *happenings: DeviceHappening) -> None:
        """What the relay delivers."""
        for each in happenings:
            event = DeviceEvent(device_id="motor-7", happening=each, at=datetime(2026, 11, 24, tzinfo=UTC))
            await handle.signal(options.DEVICE_EVENT, event)

    async def waiting(self) -> Handle:
        """A provisioning that waits for a person."""
        self.script.check = CheckEnrolmentResult(verdict=EnrolmentVerdict.WAIT, reason="manual", batch="line-4")
        return await self.start()

    async def decide(self, handle: Handle, update: Any) -> None:
        """Once it waits for a person."""
        while "waiting for a person" not in (await handle.query("__temporal_workflow_metadata")).current_details:
            await asyncio.sleep(0.01)
        await handle.execute_update(update, Decision(actor="alice", reason="seen"))


Act = Callable[[Playing], Awaitable[Handle]]


def played(name: str, act: Act) -> Callable[[WorkflowEnvironment], Awaitable[Handle]]:
    """A scenario with workers around it."""

    async def play(environment: WorkflowEnvironment) -> Handle:
        script = Script()
        async with AsyncExitStack() as stack:
            for queue, flows in (
                (options.TASK_QUEUE, [ProvisioningWorkflow, ReissueCertificateWorkflow]),
                (options.CA_QUEUE, []),
            ):
                worker = Worker(
                    environment.client,
                    task_queue=queue,
                    workflows=flows,
                    activities=script.activities(),
                    workflow_runner=runner(),
                )
                await stack.enter_async_context(worker)
            handle = await act(Playing(environment, script, name))
            await handle.result()
        return handle

    return play


async def active(playing: Playing) -> Handle:
    """One thing after the other."""
    handle = await playing.start()
    await playing.until("issue")
    await playing.tell(handle, DeviceHappening.CONNECTED, DeviceHappening.CONFIGURED)
    await playing.until("configured")
    await playing.tell(handle, DeviceHappening.HEARTBEAT)
    return handle


async def unconfigured(playing: Playing) -> Handle:
    """No configuration is wanted, and the heartbeat is the first thing that comes."""
    playing.script.issue = playing.script.issue.model_copy(update={"config_version": None})
    handle = await playing.start()
    await playing.until("issue")
    await playing.tell(handle, DeviceHappening.HEARTBEAT, DeviceHappening.CONNECTED)
    return handle


async def refused(playing: Playing) -> Handle:
    """The hook says no."""
    playing.script.check = CheckEnrolmentResult(verdict=EnrolmentVerdict.REFUSE, reason="the enrolment hook refused")
    return await playing.start()


async def refused_at_issue(playing: Playing) -> Handle:
    """The batch was disabled meanwhile."""
    playing.script.issue = IssueCertificateResult(refused="batch line-4 is disabled")
    return await playing.start()


async def approved(playing: Playing) -> Handle:
    """A person lets it in."""
    handle = await playing.waiting()
    await playing.decide(handle, ProvisioningWorkflow.approve)
    await playing.until("issue")
    await playing.tell(handle, DeviceHappening.CONNECTED, DeviceHappening.CONFIGURED, DeviceHappening.HEARTBEAT)
    return handle


async def rejected(playing: Playing) -> Handle:
    """A person does not."""
    handle = await playing.waiting()
    await playing.decide(handle, ProvisioningWorkflow.reject)
    return handle


async def unapproved(playing: Playing) -> Handle:
    """Nobody decides."""
    return await playing.waiting()


async def never_connected(playing: Playing) -> Handle:
    """The first limit runs out."""
    return await playing.start()


async def never_configured(playing: Playing) -> Handle:
    """The second."""
    handle = await playing.start()
    await playing.until("issue")
    await playing.tell(handle, DeviceHappening.CONNECTED)
    return handle


async def barred(playing: Playing) -> Handle:
    """The device is barred before it becomes active."""
    playing.script.activate = ActivateDeviceResult(refused="device motor-7 became error (cloned)")
    return await unconfigured(playing)


async def reissued(playing: Playing) -> Handle:
    """A device's next certificate."""
    asked = ReissueCertificateInput(device_id=f"recorded-{playing.name}", certificate_id="ab" * 32, public_key="PEM")
    return await start_reissue(playing.environment.client, asked, "ef" * 32)


async def not_reissued(playing: Playing) -> Handle:
    """None."""
    playing.script.reissue = ReissueCertificateResult(refused="the key that came has been used already")
    return await reissued(playing)


_PROVISIONING: dict[str, Act] = {
    "active": active,
    "unconfigured": unconfigured,
    "refused": refused,
    "refused-at-issue": refused_at_issue,
    "approved": approved,
    "rejected": rejected,
    "unapproved": unapproved,
    "never-connected": never_connected,
    "never-configured": never_configured,
    "barred": barred,
}
_REISSUE: dict[str, Act] = {"issued": reissued, "refused": not_reissued}

PROVISIONING = {
    "ProvisioningWorkflow": {name: played(name, act) for name, act in _PROVISIONING.items()},
    "ReissueCertificateWorkflow": {name: played(name, act) for name, act in _REISSUE.items()},
}
"""As `LIVES` of tests.replay.life_scenarios, which takes them up."""
