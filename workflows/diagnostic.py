"""A question to a device: write it, send it, wait for the answer; after a reboot, wait until the device is back.

A workflow for each question. That a device does not answer in time is a result, and so is that it refuses. The answer
itself stays in PostgreSQL, for whoever asks about the device, and out of the workflow's history.
"""

from datetime import timedelta

from temporalio import workflow
from temporalio.exceptions import ActivityError

from workflows.sandbox import decisions

with workflow.unsafe.imports_passed_through():
    from models.diagnostics import (
        AskDeviceInput,
        AskDeviceResult,
        AskOutcome,
        DiagnosticState,
        EndQuestionInput,
        LookAtBootInput,
        OpenedQuestion,
        PublishQuestionInput,
    )
    from models.identity import DeviceEvent, DeviceHappening
    from models.lifecycle import LifecycleStatus
    from models.protocol import DiagnosticType
    from models.quantities import format_duration
    from workflows import lifecycle_steps as steps
    from workflows import options
    from workflows.answers import refusal, said_by
    from workflows.details import plain

with decisions():
    from domain.reminders import next_pause

_OF_STATE = {
    DiagnosticState.ANSWERED: AskOutcome.ANSWERED,
    DiagnosticState.FAILED: AskOutcome.FAILED,
    DiagnosticState.TIMED_OUT: AskOutcome.TIMED_OUT,
    DiagnosticState.CANCELED: AskOutcome.FAILED,
}


@workflow.defn
class DiagnosticWorkflow:
    """See the module."""

    @workflow.init
    def __init__(self, asked: AskDeviceInput) -> None:
        self._asked = asked
        self._answered = False
        self._beats = 0
        self._status = LifecycleStatus(device_id=asked.device_id, phase="asking")

    @workflow.run
    async def run(self, asked: AskDeviceInput) -> AskDeviceResult:
        """To the answer, or the end of the time for it."""
        try:
            result = await self._ask(asked)
        except ActivityError as error:
            refused = refusal(error)
            if refused is None:
                raise
            result = self._result(AskOutcome.REFUSED, refused)
        self._show("done", f"**{result.outcome}** {plain(result.text)}", outcome=result.outcome)
        return result

    async def _ask(self, asked: AskDeviceInput) -> AskDeviceResult:
        deadline = workflow.now() + asked.limit
        opened = await steps.open_question(asked)
        self._status = self._status.model_copy(update={"until": deadline})
        self._show(
            "waiting",
            f"**waiting** for {asked.device_id} to answer {asked.type}\n\n"
            f"Next limit: {deadline:%Y-%m-%d %H:%M:%S} UTC\n\n{said_by('Asked', asked.actor, asked.reason)}",
        )
        times = 0
        while opened.state is DiagnosticState.REQUESTED and not self._answered and workflow.now() < deadline:
            if times <= options.QUESTION_REPEATS:
                times += 1
                await steps.publish_question(
                    PublishQuestionInput(device_id=asked.device_id, request_id=asked.request_id), times
                )
            pause = asked.limit / (options.QUESTION_REPEATS + 1)
            await self._wait(next_pause(pause, deadline - workflow.now()))
        ended = await steps.end_question(
            EndQuestionInput(
                device_id=asked.device_id,
                request_id=asked.request_id,
                workflow_id=workflow.info().workflow_id,
                boot_id=opened.boot_id,
                watch_boot=self._watches_boot,
            )
        )
        if ended.state is DiagnosticState.ANSWERED and self._watches_boot:
            return await self._boot(opened)
        outcome = _OF_STATE.get(ended.state, AskOutcome.TIMED_OUT)
        return self._result(outcome, ended.text or f"{asked.device_id} has answered {asked.type}")

    async def _boot(self, opened: OpenedQuestion) -> AskDeviceResult:
        """Until a heartbeat of another boot."""
        asked = self._asked
        limit = asked.boot_limit + timedelta(seconds=asked.parameters.get("delaySeconds", 0))
        deadline = workflow.now() + limit
        self._status = self._status.model_copy(update={"until": deadline})
        self._show("rebooting", f"**rebooting**, until {deadline:%Y-%m-%d %H:%M:%S} UTC at most")
        while True:
            seen, last = self._beats, workflow.now() >= deadline
            booted = await steps.look_at_boot(
                LookAtBootInput(
                    device_id=asked.device_id,
                    request_id=asked.request_id,
                    workflow_id=workflow.info().workflow_id,
                    boot_id=opened.boot_id,
                    last=last,
                )
            )
            if booted.seconds is not None:
                back = timedelta(seconds=round(booted.seconds))
                text = f"{asked.device_id} has rebooted: it was heard again {format_duration(back)} after it said so"
                return self._result(AskOutcome.REBOOTED, text, booted.seconds)
            if last:
                text = f"no heartbeat of another boot within {format_duration(limit)}"
                return self._result(AskOutcome.NOT_REBOOTED, text)
            await self._wait_for_beat(seen, next_pause(options.BOOT_LOOK, deadline - workflow.now()))

    @property
    def _watches_boot(self) -> bool:
        return self._asked.type is DiagnosticType.REBOOT and self._asked.wait_for_boot

    async def _wait(self, pause: timedelta) -> None:
        try:
            await workflow.wait_condition(
                lambda: self._answered,
                timeout=pause.total_seconds(),
                timeout_summary=f"until {self._asked.type} is sent again, or its time is over",
            )
        except TimeoutError:
            return

    async def _wait_for_beat(self, seen: int, pause: timedelta) -> None:
        try:
            await workflow.wait_condition(
                lambda: self._beats > seen, timeout=pause.total_seconds(), timeout_summary="until the next look"
            )
        except TimeoutError:
            return

    def _result(self, outcome: AskOutcome, text: str, boot_seconds: float | None = None) -> AskDeviceResult:
        return AskDeviceResult(
            device_id=self._asked.device_id,
            request_id=self._asked.request_id,
            type=self._asked.type,
            outcome=outcome,
            text=text[:500],
            boot_seconds=boot_seconds,
        )

    def _show(self, phase: str, details: str, outcome: str | None = None) -> None:
        self._status = self._status.model_copy(update={"phase": phase})
        steps.show(phase, details, outcome)

    @workflow.signal(name=options.DEVICE_EVENT)
    def device_event(self, event: DeviceEvent) -> None:
        """The device has answered, or has been heard. The same twice changes nothing."""
        if event.happening is DeviceHappening.HEARTBEAT:
            self._beats += 1
        elif event.detail.get("request_id") == self._asked.request_id:
            self._answered = True

    @workflow.query
    def status(self) -> LifecycleStatus:
        """Where it stands, as far as the workflow knows."""
        return self._status
