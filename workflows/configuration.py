"""A device's configuration: write what is wanted, tell the device, wait until it says that it runs it.

Started by signal-with-start, so that there is one for each device: a newer configuration replaces what is waited for,
and each that was asked for is a version in the device's history. That the device does not answer in time is a result;
what is wanted stays wanted, and the device is given it whenever it asks.
"""

from collections import deque

from temporalio import workflow
from temporalio.exceptions import ActivityError

from workflows.sandbox import decisions

with workflow.unsafe.imports_passed_through():
    from models.identity import (
        ConfigureDeviceInput,
        ConfigureDeviceResult,
        ConfigureOutcome,
        DeviceEvent,
        DeviceHappening,
    )
    from models.lifecycle import (
        EndConfigurationInput,
        HintConfigurationInput,
        LifecycleStatus,
        WantConfigurationInput,
    )
    from models.quantities import format_duration
    from workflows import lifecycle_steps as steps
    from workflows import options
    from workflows.answers import refusal, said_by

with decisions():
    from domain.reminders import longer, next_pause


@workflow.defn
class ConfigurationWorkflow:
    """See the module."""

    @workflow.init
    def __init__(self, asked: ConfigureDeviceInput) -> None:
        self._device_id = asked.device_id
        self._requests: deque[ConfigureDeviceInput] = deque()
        self._reported = 0
        self._status = LifecycleStatus(device_id=asked.device_id, phase="writing")

    @workflow.run
    async def run(self, asked: ConfigureDeviceInput) -> ConfigureDeviceResult:
        """One request after the other; the last one's result. Without a signal the start itself is the request."""
        if not self._requests:
            self._requests.append(asked)
        while True:
            result = await self._configure(self._requests.popleft())
            if not self._requests:
                break
            if workflow.info().is_continue_as_new_suggested():
                workflow.continue_as_new(self._requests[-1])
        self._show("done", f"**{result.outcome}** {result.reason}", outcome=result.outcome)
        return result

    async def _configure(self, asked: ConfigureDeviceInput) -> ConfigureDeviceResult:
        """Write it, and wait for the device, or for the next request."""
        device_id, version = self._device_id, 0
        deadline = workflow.now() + asked.limit
        try:
            wanted = await steps.want_configuration(
                WantConfigurationInput(
                    device_id=device_id,
                    config=asked.config,
                    actor=asked.actor,
                    reason=asked.reason,
                    workflow_id=workflow.info().workflow_id,
                )
            )
            version, applied = wanted.version, wanted.applied
            self._status = self._status.model_copy(update={"version": version, "until": deadline})
            self._show(
                "waiting",
                f"**waiting** for the device to report version {version}\n\n"
                f"Next limit: {deadline:%Y-%m-%d %H:%M:%S} UTC\n\n{said_by('Asked', asked.actor, asked.reason)}",
            )
            pause = options.FIRST_REMINDER
            while not applied and not self._requests and workflow.now() < deadline:
                applied = (await self._hint(version)) or await self._wait(
                    version, next_pause(pause, deadline - workflow.now()).total_seconds()
                )
                pause = longer(pause, options.RAREST_REMINDER)
            if not applied and not self._requests:
                waited = f"no report of version {version} within {format_duration(asked.limit)}; it stays wanted"
                ended = await steps.end_configuration(
                    EndConfigurationInput(
                        device_id=device_id,
                        version=version,
                        workflow_id=workflow.info().workflow_id,
                        actor=asked.actor,
                        reason=waited,
                    )
                )
                if not ended.applied:
                    return self._result(version, ConfigureOutcome.TIMED_OUT, waited)
        except ActivityError as error:
            refused = refusal(error)
            if refused is None:
                raise
            return self._result(version, ConfigureOutcome.REFUSED, refused)
        return self._result(version, ConfigureOutcome.APPLIED, f"the device runs version {version}")

    async def _hint(self, version: int) -> bool:
        return (
            await steps.hint_configuration(HintConfigurationInput(device_id=self._device_id, version=version))
        ).applied

    async def _wait(self, version: int, seconds: float) -> bool:
        """Whether the device has said so, before the time is over or something newer is wanted."""
        try:
            await workflow.wait_condition(
                lambda: self._reported >= version or bool(self._requests),
                timeout=seconds,
                timeout_summary=f"next reminder of version {version}",
            )
        except TimeoutError:
            return False
        return self._reported >= version

    def _result(self, version: int, outcome: ConfigureOutcome, reason: str) -> ConfigureDeviceResult:
        return ConfigureDeviceResult(device_id=self._device_id, version=version, outcome=outcome, reason=reason)

    def _show(self, phase: str, details: str, outcome: str | None = None) -> None:
        self._status = self._status.model_copy(update={"phase": phase})
        steps.show(phase, details, outcome)

    @workflow.signal(name=options.CONFIGURE)
    def configure(self, asked: ConfigureDeviceInput) -> None:
        """A newer configuration."""
        self._requests.append(asked)

    @workflow.signal(name=options.DEVICE_EVENT)
    def device_event(self, event: DeviceEvent) -> None:
        """The device has reported. An older version, or the same twice, changes nothing."""
        version = event.detail.get("version")
        if event.happening is DeviceHappening.CONFIGURED and isinstance(version, int):
            self._reported = max(self._reported, version)

    @workflow.query
    def status(self) -> LifecycleStatus:
        """Where it stands, as far as the workflow knows."""
        return self._status
