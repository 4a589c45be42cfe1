"""The end of a device: out of every rollout, its credentials wiped if it answers, and then all that it is, ended.

```
stop its executions and workflows -> ask it to wipe, wait a bounded time -> retire: one transaction -> revocation list
-> brokers shut it out -> what they keep of it is cleared -> done
```

From the transaction on nothing that the device says changes anything. What follows is for the brokers, and each of it
is bounded: a broker or a signer that is away is a person's business, and not a reason to keep the device.
"""

from collections.abc import Callable
from datetime import datetime, timedelta

from temporalio import workflow

from workflows.sandbox import decisions

with workflow.unsafe.imports_passed_through():
    from models.identity import (
        DecommissionDeviceInput,
        DecommissionDeviceResult,
        DeviceEvent,
        DeviceHappening,
    )
    from models.lifecycle import (
        AskToWipeInput,
        AwaitBrokersInput,
        BeginDecommissionInput,
        EndDecommissionInput,
        LifecycleStatus,
        RetireDeviceInput,
        StopFlowsInput,
    )
    from workflows import lifecycle_steps as steps
    from workflows import options
    from workflows.answers import said_by

with decisions():
    from domain.reminders import longer, next_pause


@workflow.defn
class DecommissionWorkflow:
    """See the module."""

    @workflow.init
    def __init__(self, asked: DecommissionDeviceInput) -> None:
        self._asked = asked
        self._answered: set[str] = set()
        self._status = LifecycleStatus(device_id=asked.device_id, phase="stopping")

    @workflow.run
    async def run(self, asked: DecommissionDeviceInput) -> DecommissionDeviceResult:
        """Decommission."""
        device_id, actor, reason = asked.device_id, asked.actor, asked.reason
        self._show("stopping", "out of every rollout, and its other workflows ended")
        begun = await steps.begin_decommission(BeginDecommissionInput(device_id=device_id, actor=actor, reason=reason))
        stop = StopFlowsInput(
            device_id=device_id, serial_number=begun.serial_number, reason=f"{device_id} is decommissioned by {actor}"
        )
        await steps.stop_flows(stop)
        if begun.answers and asked.wipe_within > timedelta(0):
            await self._wipe()

        self._show("retiring", "its certificates, its word, its status, its serial number")
        retired = await steps.retire_device(RetireDeviceInput(device_id=device_id, actor=actor, reason=reason))
        # What began while the device was asked: from here on none begins any more.
        await steps.stop_flows(stop)

        self._show("shutting-out", "a revocation list, and brokers that shut it out")
        signed = await steps.publish_crls(actor)
        seen = await steps.await_brokers(
            AwaitBrokersInput(device_id=device_id, revision=retired.revision, within=asked.broker_within)
        )
        self._show("clearing", "what brokers keep of its topics")
        cleared = await steps.clear_retained(asked)
        said = _said(retired.wiped, signed, seen.behind, cleared)
        await steps.end_decommission(EndDecommissionInput(device_id=device_id, actor=actor, reason=said))
        self._show("done", said, outcome="retired")
        return DecommissionDeviceResult(
            device_id=device_id,
            serial_number=begun.serial_number,
            wiped=retired.wiped,
            executions_removed=retired.executions_removed,
            certificates_revoked=retired.certificates_revoked,
            retained_cleared=cleared,
            reason=said,
        )

    async def _wipe(self) -> None:
        """Ask until the device answers, or the time is over. What it answered is read where it is retired."""
        until = workflow.now() + self._asked.wipe_within
        self._show("wiping", "the device is asked to wipe its credentials", until)
        pause = options.FIRST_WIPE_REMINDER
        while (left := until - workflow.now()) > timedelta(0):
            wipe = await steps.ask_to_wipe(
                AskToWipeInput(
                    device_id=self._asked.device_id,
                    workflow_id=workflow.info().workflow_id,
                    actor=self._asked.actor,
                    until=until,
                )
            )
            if wipe.answered:
                return
            try:
                await workflow.wait_condition(
                    self._has_answered(wipe.request_id),
                    timeout=next_pause(pause, left),
                    timeout_summary="ask again",
                )
                return
            except TimeoutError:
                pause = longer(pause, options.RAREST_WIPE_REMINDER)

    def _has_answered(self, request_id: str) -> Callable[[], bool]:
        return lambda: request_id in self._answered

    def _show(self, phase: str, what: str, until: datetime | None = None, outcome: str | None = None) -> None:
        self._status = LifecycleStatus(device_id=self._asked.device_id, phase=phase, until=until)
        ends = f"\n\nNext limit: {until:%Y-%m-%d %H:%M:%S} UTC" if until else ""
        asked = self._asked
        steps.show(phase, f"**{phase}** {what}{ends}\n\n{said_by('Asked', asked.actor, asked.reason)}", outcome)

    @workflow.signal(name=options.DEVICE_EVENT)
    def device_event(self, event: DeviceEvent) -> None:
        """The device has answered a command."""
        request_id = event.detail.get("request_id")
        if event.happening is DeviceHappening.COMMAND_ANSWERED and isinstance(request_id, str):
            self._answered.add(request_id)

    @workflow.query
    def status(self) -> LifecycleStatus:
        """Where it stands, as far as the workflow knows."""
        return self._status


def _said(wiped: bool, signed: bool, behind: tuple[str, ...], cleared: int) -> str:
    parts = ["its credentials are wiped" if wiped else "it did not say that its credentials are wiped"]
    if not signed:
        parts.append("no revocation list was signed yet")
    if behind:
        parts.append(f"broker {', '.join(behind)} does not shut it out yet")
    parts.append(f"{cleared} retained message{'' if cleared == 1 else 's'} cleared")
    return "; ".join(parts)
