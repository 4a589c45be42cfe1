"""A sweep over the fleet: one heartbeating activity that asks devices for new keys, at a pace.

What it has done is in PostgreSQL (a command for each device that was asked), so a sweep that is interrupted between any
two devices begins anew and goes on where it was: those asked lately are not found again, and a rotation that was just
started and has not opened its command yet runs already.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from temporalio import activity
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory

from activities.lifecycle import DeviceFlows, RotationRecords
from models.identity import RotateCertificateInput
from models.lifecycle import DueCertificate, RotateFleetInput, RotateFleetResult

PAGE = 500
"""Devices found at a time; a page at a slow pace is hours old at its end, and the rotation itself looks again."""

BEAT_EVERY = timedelta(seconds=1)


@dataclass
class FleetRotationActivities:
    """Collaborators: certificates, and the workflows of devices. `clock` is monotonic seconds; tests give their own."""

    records: RotationRecords
    flows: DeviceFlows
    clock: Callable[[], float] = time.monotonic

    @activity.defn
    async def rotate_fleet(self, asked: RotateFleetInput) -> RotateFleetResult:
        """Start `rotate:<device>` for each device that is due. Idempotent: see the module."""
        done = _so_far() or RotateFleetResult(due=await self.records.count_due(asked))
        pause, last, after = 60.0 / asked.per_minute, -1e9, None
        while page := await self.records.due(asked, PAGE, after):
            for device in page:
                await self._rest(last + pause, done)
                last = self.clock()
                started = await self.flows.start_rotation(_rotation(asked, device))
                done = done.model_copy(
                    update={"started": done.started + started, "running": done.running + (not started)}
                )
                after = device
        return done

    async def _rest(self, until: float, done: RotateFleetResult) -> None:
        """Beat until it is time for the next device."""
        while True:
            if activity.is_worker_shutdown():
                raise ApplicationError(
                    "this worker shuts down; another one goes on",
                    type="WorkerShutdown",
                    category=ApplicationErrorCategory.BENIGN,
                    next_retry_delay=timedelta(milliseconds=100),
                )
            activity.heartbeat(done)
            left = until - self.clock()
            if left <= 0:
                return
            await asyncio.sleep(min(left, BEAT_EVERY.total_seconds()))


def _so_far() -> RotateFleetResult | None:
    """What an attempt before this one had done, for the figures alone."""
    details = activity.info().heartbeat_details
    return RotateFleetResult.model_validate(details[0]) if details else None


def _rotation(asked: RotateFleetInput, device: DueCertificate) -> RotateCertificateInput:
    said = f"{device.reason} ({asked.reason})" if asked.reason else device.reason
    return RotateCertificateInput(
        device_id=device.device_id,
        actor=asked.actor,
        reason=said,
        ask=device.ask,
        renew_within=asked.renew_within,
        overlap=asked.overlap,
    )
