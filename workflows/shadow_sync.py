"""A wait for a device: write what is wanted of its shadow, tell it, wait until it reports that, or the limit has passed.

That the device does not report it in time is a result that says what differs and whether the device is there at all;
what is wanted stays wanted. Whoever asked may have gone meanwhile: the wait goes on without, and can be joined.
"""

from datetime import datetime, timedelta

from temporalio import workflow
from temporalio.exceptions import ActivityError

from workflows.sandbox import decisions

with workflow.unsafe.imports_passed_through():
    from models.identity import DeviceEvent, DeviceHappening
    from models.shadow import (
        CheckShadowInput,
        EndShadowInput,
        ShadowSeen,
        SyncOutcome,
        SyncShadowInput,
        SyncShadowResult,
        SyncShadowStatus,
        WantShadowInput,
    )
    from workflows import lifecycle_steps as steps
    from workflows import options
    from workflows.answers import refusal, said_by

with decisions():
    from domain.reminders import longer, next_pause


@workflow.defn
class ShadowSyncWorkflow:
    """See the module."""

    @workflow.init
    def __init__(self, asked: SyncShadowInput) -> None:
        self._asked = asked
        self._has_reported = False
        self._status = SyncShadowStatus(device_id=asked.device_id, shadow=asked.shadow, phase="writing")

    @workflow.run
    async def run(self, asked: SyncShadowInput) -> SyncShadowResult:
        """Want it, and wait for the device's word."""
        deadline = asked.until or workflow.now() + asked.limit
        try:
            seen = await self._want(asked, deadline)
            pause = options.FIRST_SHADOW_REMINDER
            while not seen.confirmed and workflow.now() < deadline:
                if await self._wait(next_pause(pause, deadline - workflow.now())):
                    seen = await self._check(remind=False)
                    await self._rest(seen, deadline)
                else:
                    seen = await self._check(remind=workflow.now() < deadline)
                    pause = longer(pause, options.RAREST_REMINDER)
                self._continue_before_history_is_long(seen, deadline)
            if not seen.confirmed:
                seen = await steps.end_shadow(
                    EndShadowInput(
                        device_id=asked.device_id,
                        shadow=asked.shadow,
                        patch=asked.patch,
                        workflow_id=workflow.info().workflow_id,
                        limit=asked.limit,
                    )
                )
        except ActivityError as error:
            refused = refusal(error)
            if refused is None:
                raise
            return self._result(SyncOutcome.REFUSED, refused)
        if seen.confirmed:
            return self._result(SyncOutcome.CONFIRMED, f"{asked.device_id} reports what is wanted", seen)
        return self._result(SyncOutcome.TIMED_OUT, seen.reason, seen)

    async def _want(self, asked: SyncShadowInput, deadline: datetime) -> ShadowSeen:
        seen = await steps.want_shadow(
            WantShadowInput(
                device_id=asked.device_id,
                shadow=asked.shadow,
                patch=asked.patch,
                actor=asked.actor,
                reason=asked.reason,
                expected_version=asked.expected_version,
                workflow_id=workflow.info().workflow_id,
                mark=self._mark,
            )
        )
        self._status = self._status.model_copy(update={"version": seen.version, "until": deadline})
        self._show(
            "waiting",
            f"**waiting** for {asked.device_id} to report what is wanted\n\n"
            f"Until: {deadline:%Y-%m-%d %H:%M:%S} UTC\n\n{said_by('Asked', asked.actor, asked.reason)}",
        )
        return seen

    @property
    def _mark(self) -> str:
        """Of this wait, and of no other that wanted the same."""
        return self._asked.mark or workflow.info().run_id

    async def _wait(self, pause: timedelta) -> bool:
        """Whether the device has reported something, before the time is over."""
        try:
            await workflow.wait_condition(
                lambda: self._has_reported, timeout=pause.total_seconds(), timeout_summary="next reminder, or the limit"
            )
        except TimeoutError:
            return False
        self._has_reported = False
        return True

    async def _check(self, *, remind: bool) -> ShadowSeen:
        asked = self._asked
        return await steps.check_shadow(
            CheckShadowInput(
                device_id=asked.device_id,
                shadow=asked.shadow,
                patch=asked.patch,
                workflow_id=workflow.info().workflow_id,
                remind=remind,
            )
        )

    async def _rest(self, seen: ShadowSeen, deadline: datetime) -> None:
        """A device that reports all the time is looked at now and then."""
        left = deadline - workflow.now()
        if not seen.confirmed and left > timedelta(0):
            await workflow.sleep(min(options.SHADOW_REST, left), summary="the next look")

    def _continue_before_history_is_long(self, seen: ShadowSeen, deadline: datetime) -> None:
        if not seen.confirmed and workflow.info().is_continue_as_new_suggested():
            carried = {"mark": self._mark, "until": deadline, "expected_version": None}
            workflow.continue_as_new(self._asked.model_copy(update=carried))

    def _result(self, outcome: SyncOutcome, reason: str, seen: ShadowSeen | None = None) -> SyncShadowResult:
        self._show("done", f"**{outcome}** {reason}", outcome)
        seen = seen or ShadowSeen(version=0, confirmed=False)
        return SyncShadowResult(
            device_id=self._asked.device_id,
            shadow=self._asked.shadow,
            version=seen.version,
            outcome=outcome,
            reason=reason,
            differs=seen.differs,
            last_heard=seen.last_heard,
            offline_since=seen.offline_since,
        )

    def _show(self, phase: str, details: str, outcome: str | None = None) -> None:
        self._status = self._status.model_copy(update={"phase": phase})
        steps.show(phase, details, outcome)

    @workflow.signal(name=options.DEVICE_EVENT)
    def device_event(self, event: DeviceEvent) -> None:
        """The device has reported something, of this shadow or another: what it is stands in PostgreSQL."""
        if event.happening is DeviceHappening.SHADOW_REPORTED:
            self._has_reported = True

    @workflow.query
    def status(self) -> SyncShadowStatus:
        """Where it stands, as far as the workflow knows."""
        return self._status
