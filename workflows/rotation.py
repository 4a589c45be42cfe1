"""A new certificate for a device: ask for it, wait until it is issued, wait until it has been seen to connect.

Both certificates are valid while they overlap, and never longer: then the old one is revoked, or, where the device was
not seen with the new one, the new one, unless the old one is about to end by itself. A device that never comes keeps
what it has. All of these are results.

A signal only says that it is time to look: which certificates there are is PostgreSQL's, and is read under the lock of
whoever revokes one (store/rotation.py).
"""

from collections.abc import Callable
from datetime import datetime

from temporalio import workflow
from temporalio.exceptions import ActivityError

from workflows.sandbox import decisions

with workflow.unsafe.imports_passed_through():
    from models.identity import (
        DeviceEvent,
        DeviceHappening,
        RotateCertificateInput,
        RotateCertificateResult,
        RotateOutcome,
    )
    from models.lifecycle import (
        AskForRotationInput,
        CertificatesSeen,
        EndedRotation,
        EndRotationInput,
        LifecycleStatus,
        RotationSeen,
    )
    from models.quantities import format_duration
    from workflows import lifecycle_steps as steps
    from workflows import options
    from workflows.answers import refusal, said_by

with decisions():
    from domain.reminders import longer, next_pause


@workflow.defn
class CertificateRotationWorkflow:
    """See the module."""

    @workflow.init
    def __init__(self, asked: RotateCertificateInput) -> None:
        self._asked = asked
        self._news = 0
        self._status = LifecycleStatus(device_id=asked.device_id, phase="looking")

    @workflow.run
    async def run(self, asked: RotateCertificateInput) -> RotateCertificateResult:
        """Rotate."""
        try:
            result = await self._rotate()
        except ActivityError as error:
            refused = refusal(error)
            if refused is None:
                raise
            result = self._result(RotateOutcome.REFUSED, EndedRotation(reason=refused))
        self._show("done", f"**{result.outcome}** {result.reason}", outcome=result.outcome)
        return result

    async def _rotate(self) -> RotateCertificateResult:
        asked = self._asked
        seen = await steps.look_at_certificates(asked)
        if seen.settled is not None:
            return await self._settled(await steps.settle_rotation(self._end(seen, asked.reason)))
        if not seen.new:
            ended = await self._until_issued(seen)
            if ended is not None:
                return self._result(RotateOutcome.UNANSWERED, ended)
        return await self._overlap(seen)

    async def _until_issued(self, seen: CertificatesSeen) -> EndedRotation | None:
        """Ask until a certificate is issued; what is left when none is."""
        limit = self._asked.renew_within
        until = workflow.now() + limit
        self._show(
            "asked" if self._asked.ask else "waiting", "**waiting** for the device to fetch a certificate", until
        )
        if (await self._watch(seen, until, lambda now: now.issued is not None)) is not None:
            return None
        waited = f"the device has not fetched a new certificate within {format_duration(limit)}"
        ended = await steps.give_up_rotation(self._end(seen, waited))
        return None if ended.issued else ended

    async def _overlap(self, seen: CertificatesSeen) -> RotateCertificateResult:
        """Both are valid: until the new one has been seen to connect, or the time is over."""
        limit = self._asked.overlap
        until = workflow.now() + limit
        self._show("overlap", "**overlap** both certificates are valid until the new one has been seen", until)
        if (await self._watch(seen, until, lambda now: now.confirmed is not None)) is not None:
            ended = await steps.settle_rotation(self._end(seen, self._asked.reason))
            if ended.confirmed:
                return await self._settled(ended)
        unseen = f"not seen to connect with its new certificate within {format_duration(limit)}"
        ended = await steps.revert_rotation(self._end(seen, unseen))
        if ended.confirmed:
            return await self._settled(ended)
        if ended.revoked:
            await steps.publish_crls(self._asked.actor)
        return self._result(RotateOutcome.REVERTED, ended)

    async def _watch(
        self, seen: CertificatesSeen, until: datetime, ready: Callable[[RotationSeen], bool]
    ) -> RotationSeen | None:
        """Look whenever something has happened and at each reminder, which asks the device again; None: time over."""
        pause = options.FIRST_REMINDER
        while True:
            news = self._news
            now = await steps.ask_for_rotation(
                AskForRotationInput(
                    device_id=self._asked.device_id,
                    workflow_id=workflow.info().workflow_id,
                    old=seen.old,
                    actor=self._asked.actor,
                    ask=self._asked.ask,
                    until=until,
                )
            )
            if ready(now):
                return now
            left = until - workflow.now()
            if left.total_seconds() <= 0:
                return None
            try:
                await workflow.wait_condition(
                    self._newer_than(news),
                    timeout=next_pause(pause, left),
                    timeout_summary="look again",
                )
            except TimeoutError:
                pause = longer(pause, options.RAREST_REMINDER)

    def _newer_than(self, news: int) -> Callable[[], bool]:
        return lambda: self._news != news

    async def _settled(self, ended: EndedRotation) -> RotateCertificateResult:
        if ended.revoked:
            await steps.publish_crls(self._asked.actor)
        return self._result(RotateOutcome.ROTATED, ended)

    def _end(self, seen: CertificatesSeen, reason: str) -> EndRotationInput:
        return EndRotationInput(
            device_id=self._asked.device_id,
            workflow_id=workflow.info().workflow_id,
            old=seen.old,
            actor=self._asked.actor,
            reason=reason,
        )

    def _result(self, outcome: RotateOutcome, ended: EndedRotation) -> RotateCertificateResult:
        many = len(ended.revoked)
        reason = (
            ended.reason or f"seen with its new certificate; {many} superseded one{'' if many == 1 else 's'} revoked"
        )
        return RotateCertificateResult(
            device_id=self._asked.device_id,
            outcome=outcome,
            reason=reason,
            certificate_id=ended.kept,
            revoked=ended.revoked,
        )

    def _show(self, phase: str, details: str, until: datetime | None = None, outcome: str | None = None) -> None:
        self._status = LifecycleStatus(device_id=self._asked.device_id, phase=phase, until=until)
        ends = f"\n\nNext limit: {until:%Y-%m-%d %H:%M:%S} UTC" if until else ""
        steps.show(phase, f"{details}{ends}\n\n{said_by('Asked', self._asked.actor, self._asked.reason)}", outcome)

    @workflow.signal(name=options.DEVICE_EVENT)
    def device_event(self, event: DeviceEvent) -> None:
        """Time to look."""
        if event.happening in (DeviceHappening.CERTIFICATE_ISSUED, DeviceHappening.CERTIFICATE_CONFIRMED):
            self._news += 1

    @workflow.query
    def status(self) -> LifecycleStatus:
        """Where it stands, as far as the workflow knows."""
        return self._status
