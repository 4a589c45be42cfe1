"""The steps of a decommissioning that touch PostgreSQL, Temporal or the broker. Each is idempotent; see its docstring."""

import asyncio
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog
from temporalio import activity
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory

from activities.lifecycle import DecommissionRecords, DeviceFlows, RetainedCleaner, command_hint
from activities.notices import withdrawn_notices
from activities.rollout_records import NoticePublisher
from models.identity import DecommissionDeviceInput
from models.ids import configure_workflow_id, provision_workflow_id, rotate_workflow_id
from models.lifecycle import (
    AskToWipeInput,
    AwaitBrokersInput,
    BeginDecommissionInput,
    BegunDecommission,
    BrokersSeen,
    ClearedRetained,
    ClearRetainedInput,
    EndDecommissionInput,
    RetiredDevice,
    RetireDeviceInput,
    StopFlowsInput,
    WipeAsked,
)
from models.protocol import THINGS

LOOK_EVERY = timedelta(milliseconds=200)
"""Between two looks at brokers; they apply a change within about a second."""

BROKER_ALERT, RETAINED_ALERT = "broker-behind", "retained-left"

log = structlog.get_logger()


@dataclass
class DecommissionActivities:
    """Collaborators: what is true of the device, its other workflows, a way to tell it, and what brokers keep of it."""

    records: DecommissionRecords
    flows: DeviceFlows
    publisher: NoticePublisher
    retained: RetainedCleaner

    @activity.defn
    async def begin_decommission(self, asked: BeginDecommissionInput) -> BegunDecommission:
        """Out of every rollout. Idempotent: what is removed is not removed again. Raises NotFoundError, RefusedError."""
        begun = await self.records.begin(asked)
        for topic, payload in withdrawn_notices(asked.device_id, int(time.time())):
            await self.publisher.publish(topic, payload)
        return begun

    @activity.defn
    async def stop_flows(self, asked: StopFlowsInput) -> None:
        """End provisioning, configuration and rotation of this device. Idempotent: what does not run is passed over.

        They hold nothing but where they stand, and what they did is the business of `retire_device`; so they are
        ended at once, and not asked to undo anything.
        """
        for workflow_id in (
            provision_workflow_id(asked.serial_number),
            configure_workflow_id(asked.device_id),
            rotate_workflow_id(asked.device_id),
        ):
            if await self.flows.end(workflow_id, asked.reason):
                log.info("ended a workflow", workflow=workflow_id, reason=asked.reason)

    @activity.defn
    async def ask_to_wipe(self, asked: AskToWipeInput) -> WipeAsked:
        """Ask the device. Idempotent: a command that is open is opened once, and a hint may come twice."""
        wipe = await self.records.ask_to_wipe(asked)
        if not wipe.answered:
            await self.publisher.publish(*command_hint(asked.device_id))
        return wipe

    @activity.defn
    async def retire_device(self, asked: RetireDeviceInput) -> RetiredDevice:
        """The one transaction. Idempotent: a device that was retired so is left as it is."""
        return await self.records.retire(asked)

    @activity.defn
    async def await_brokers(self, asked: AwaitBrokersInput) -> BrokersSeen:
        """Wait until brokers enforce it, or the time is over; then people are told. Reads, and raises an alert once."""
        deadline = activity.info().scheduled_time + asked.within
        while behind := await self.records.brokers_behind(asked.revision):
            if datetime.now(UTC) >= deadline:
                text = (
                    f"broker {', '.join(behind)} does not enforce revision {asked.revision} of access, with which "
                    f"{asked.device_id} was shut out, {asked.within.total_seconds():.0f} s after it was asked to; the "
                    "engine ignores the device already, the broker may still let it in: look at its 'python -m access'"
                )
                for broker in behind:
                    await self.records.alert(BROKER_ALERT, broker, text)
                return BrokersSeen(behind=tuple(behind))
            _stop_with_the_worker()
            activity.heartbeat()
            await asyncio.sleep(LOOK_EVERY.total_seconds())
        return BrokersSeen()

    @activity.defn
    async def clear_retained(self, asked: ClearRetainedInput) -> ClearedRetained:
        """Clear what brokers keep of the device's topics. Idempotent: it clears what it finds."""
        device_id = asked.device_id
        topics = await self.retained.clear((f"{THINGS}/{device_id}/#", f"devices/{device_id}/#"))
        return ClearedRetained(topics=len(topics))

    @activity.defn
    async def end_decommission(self, asked: EndDecommissionInput) -> None:
        """Note that it is over. Idempotent: one line for each retirement."""
        await self.records.end(asked)

    @activity.defn
    async def alert_retained_left(self, asked: DecommissionDeviceInput) -> None:
        """Retained messages could not be cleared: people are told. Idempotent: one alert for each device."""
        text = (
            f"messages that a broker keeps of {asked.device_id} could not be cleared when it was decommissioned; "
            "whoever takes its name would be given them: clear them by hand (mosquitto_sub --retained-only)"
        )
        await self.records.alert(RETAINED_ALERT, asked.device_id, text)


def _stop_with_the_worker() -> None:
    """Let another worker go on at once."""
    if activity.is_worker_shutdown():
        raise ApplicationError(
            "this worker shuts down; another one goes on",
            type="WorkerShutdown",
            category=ApplicationErrorCategory.BENIGN,
            next_retry_delay=timedelta(milliseconds=100),
        )
