"""A device's provisioning: check, wait for a person where the batch asks for one, issue, and see the device at work.

The certificate is issued early, and the device fetches it at the enrolment server. Then the workflow waits to be told
(signal `device_event`, store/waits.py) that the device has connected, runs its configuration and sends heartbeats, each
within a limit of its own. Whatever runs out of time is undone: the certificate is revoked, the device is in `error`, and
the reason is the result. A refusal and a failure are results, not errors.

Everything is idempotent by the enrolment's number, so a second run for it takes up where the first one ended.
"""

import asyncio
from collections.abc import Callable
from datetime import timedelta

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError, FailureError, is_cancelled_exception

with workflow.unsafe.imports_passed_through():
    from models.identity import (
        ActivateDeviceInput,
        CheckEnrolmentInput,
        Decision,
        DeviceEvent,
        DeviceHappening,
        EnrolmentVerdict,
        IssueCertificateInput,
        IssueCertificateResult,
        MarkConfiguredInput,
        ProvisionDeviceInput,
        ProvisionDeviceResult,
        ProvisionOutcome,
        RefuseEnrolmentInput,
        UndoProvisioningInput,
    )
    from models.quantities import format_duration
    from workflows import options
    from workflows import provisioning_steps as steps
    from workflows.attributes import show_phase

_AWAITED = {
    DeviceHappening.CONNECTED: "its first connection",
    DeviceHappening.CONFIGURED: "its report that it runs its configuration",
    DeviceHappening.HEARTBEAT: "its first heartbeat",
}


class _Undone(Exception):
    """The process cannot go on; what was done is to be taken back."""


@workflow.defn
class ProvisioningWorkflow:
    """See the module."""

    @workflow.init
    def __init__(self, asked: ProvisionDeviceInput) -> None:
        self._asked = asked
        self._happened: set[DeviceHappening] = set()
        self._awaits_person = False
        self._approved: Decision | None = None
        self._rejected: Decision | None = None
        self._issued: IssueCertificateResult | None = None

    # --- the process, from top to bottom -------------------------------------------------------------------------------

    @workflow.run
    async def run(self, asked: ProvisionDeviceInput) -> ProvisionDeviceResult:
        """Provision one device."""
        try:
            result = await self._provision()
        except _Undone as error:
            result = await self._undo(str(error))
        except (asyncio.CancelledError, FailureError) as error:
            result = await self._undo(_said(error))
        show_phase("done", result.outcome.value)
        workflow.set_current_details(f"**{result.outcome}** {result.reason}")
        await workflow.wait_condition(workflow.all_handlers_finished)
        return result

    async def _provision(self) -> ProvisionDeviceResult:
        number = self._asked.enrolment_no
        checked = await steps.check(CheckEnrolmentInput(enrolment_no=number))
        if checked.verdict is EnrolmentVerdict.REFUSE:
            return self._result(ProvisionOutcome.REFUSED, checked.reason)
        if checked.verdict is EnrolmentVerdict.WAIT:
            rejected = await self._wait_for_person(checked.reason)
            if rejected is not None:
                return rejected
        actor = self._approved.actor if self._approved else f"batch:{checked.batch}"
        issued = await steps.issue(
            IssueCertificateInput(
                enrolment_no=number,
                workflow_id=workflow.info().workflow_id,
                actor=actor,
                reason=self._approved.reason if self._approved else "",
            )
        )
        if issued.refused:
            return self._result(ProvisionOutcome.REFUSED, issued.refused)
        self._issued = issued
        workflow.upsert_search_attributes(
            [options.PHASE.value_set("connecting"), options.DEVICE.value_set(issued.device_id)]
        )
        return await self._see_it_work(issued)

    async def _wait_for_person(self, reason: str) -> ProvisionDeviceResult | None:
        """None: approved."""
        self._awaits_person = True
        show_phase("waiting-approval")
        limit = self._asked.limits.approval
        workflow.set_current_details(
            f"**waiting for a person** {reason}: `starter.py enrolment approve {self._asked.enrolment_no}`"
            f"\n\n{_next_limit(limit)}"
        )
        decided = await self._within(limit, lambda: bool(self._approved or self._rejected), "a person's approval")
        self._awaits_person = False
        if not decided:
            raise _Undone(f"nobody approved it within {format_duration(limit)}")
        if self._rejected is None:
            return None
        said = f": {self._rejected.reason}" if self._rejected.reason else ""
        reason = f"rejected by {self._rejected.actor}{said}"
        await steps.refuse(
            RefuseEnrolmentInput(enrolment_no=self._asked.enrolment_no, actor=self._rejected.actor, reason=reason)
        )
        return self._result(ProvisionOutcome.REFUSED, reason)

    async def _see_it_work(self, issued: IssueCertificateResult) -> ProvisionDeviceResult:
        limits, device = self._asked.limits, issued.device_id
        await self._expect(DeviceHappening.CONNECTED, limits.connect, f"{device} did not connect")
        if issued.config_version is not None:
            late = f"{device} connected and did not take configuration version {issued.config_version}"
            await self._expect(DeviceHappening.CONFIGURED, limits.configure, late)
        if DeviceHappening.HEARTBEAT not in self._happened:
            await steps.mark_configured(MarkConfiguredInput(device_id=device))
            late = f"{device} was configured and sent no heartbeat"
            await self._expect(DeviceHappening.HEARTBEAT, limits.heartbeat, late)
        activated = await steps.activate(
            ActivateDeviceInput(
                enrolment_no=self._asked.enrolment_no,
                workflow_id=workflow.info().workflow_id,
                device_id=device,
                certificate_id=issued.certificate_id,
            )
        )
        if activated.refused:
            raise _Undone(activated.refused)
        return self._result(ProvisionOutcome.ACTIVE, f"{device} connected, is configured and sends heartbeats")

    async def _expect(self, happening: DeviceHappening, limit: timedelta, late: str) -> None:
        what = _AWAITED[happening]
        workflow.set_current_details(f"**waiting** for {what}\n\n{_next_limit(limit)}")
        if not await self._within(limit, lambda: happening in self._happened, what):
            raise _Undone(f"{late} within {format_duration(limit)}")

    async def _undo(self, reason: str) -> ProvisionDeviceResult:
        await steps.undo(
            UndoProvisioningInput(
                enrolment_no=self._asked.enrolment_no, workflow_id=workflow.info().workflow_id, reason=reason
            )
        )
        return self._result(ProvisionOutcome.FAILED, reason)

    # --- what comes from outside ---------------------------------------------------------------------------------------

    @workflow.signal(name=options.DEVICE_EVENT)
    def device_event(self, event: DeviceEvent) -> None:
        """The device has done something; may come twice, and from a time before this enrolment."""
        if self._issued is not None and event.device_id != self._issued.device_id:
            return
        self._happened.add(event.happening)

    @workflow.update
    def approve(self, decision: Decision) -> None:
        """A person lets the device in."""
        self._approved = decision

    @approve.validator
    def _may_approve(self, decision: Decision) -> None:
        self._must_wait("approve")

    @workflow.update
    def reject(self, decision: Decision) -> None:
        """A person does not."""
        self._rejected = decision

    @reject.validator
    def _may_reject(self, decision: Decision) -> None:
        self._must_wait("reject")

    def _must_wait(self, what: str) -> None:
        if not self._awaits_person or self._approved or self._rejected:
            raise ApplicationError(
                f"cannot {what} enrolment {self._asked.enrolment_no}: it does not wait for a person",
                type="RefusedError",
            )

    # --- small things ------------------------------------------------------------------------------------------------

    async def _within(self, limit: timedelta, condition: Callable[[], bool], what: str) -> bool:
        """Whether it came true in time. A durable timer, and none where it is true already."""
        if condition():
            return True
        try:
            await workflow.wait_condition(
                condition, timeout=limit, timeout_summary=f"{what}, within {format_duration(limit)}"
            )
        except TimeoutError:
            return condition()
        return True

    def _result(self, outcome: ProvisionOutcome, reason: str) -> ProvisionDeviceResult:
        issued = self._issued
        return ProvisionDeviceResult(
            serial_number=self._asked.serial_number,
            outcome=outcome,
            reason=reason,
            device_id=issued.device_id if issued else None,
            certificate_id=issued.certificate_id if issued else None,
        )


def _next_limit(limit: timedelta) -> str:
    return f"Next limit: {workflow.now() + limit:%Y-%m-%d %H:%M:%S} UTC"


def _said(error: BaseException) -> str:
    """Why the process was cut short, in words."""
    if is_cancelled_exception(error):
        return "the provisioning was cancelled"
    if isinstance(error, ActivityError) and isinstance(error.cause, ApplicationError):
        return error.cause.message
    return str(error)
