"""Devices for benchmarks: the agent's protocol, its verification, its slots and boot loader, and no bytes behind them.

Each device asks, has both envelopes verified by firmware.verify exactly as the agent does, reports installing,
confirming and its result, and waits for every answer. Tasks of fleet jobs are verified by firmware.task; what they order is
modelled: a restart counts a boot, a config-sync says the version that the order names, a custom task does nothing. Slots are the agent's own, with hashes instead of contents;
nothing is downloaded and nothing is written. A reboot goes through the boot loader but keeps the MQTT connection.

There is one callback per message and one sweep per second for all devices, no task per device.
"""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import orjson

from agent.bootloader import Boot, BootLoader
from agent.configuration import Configuration
from agent.diagnostics import Diagnostics
from agent.faults import Fate
from agent.jobs import Execution, failure_details, parse_execution, update_request
from agent.logbook import LogBook
from agent.slots import BootRecord, Slot, Slots, SlotState
from firmware.errors import FirmwareError
from firmware.keys import TrustedKeys
from firmware.manifest import FIRMWARE_UPDATE, attempt_key
from firmware.task import Task, verify_task
from firmware.verify import DeviceFacts, verify_update
from models.protocol import ErrorCode, ExecutionState, FailureClass, JobOperation, Step, diagnostics_topic, jobs_topic

Publish = Callable[[str, bytes], None]


class ModelSlots(Slots):
    """The agent's slots without storage: the record in memory, contents modelled by their hashes."""

    def __init__(self, version: str, sha256: str) -> None:
        good = Slot(SlotState.GOOD, sha256, 0, version)
        self.record = BootRecord(active="a", slots={"a": good, "b": Slot()})

    def load(self) -> BootRecord:
        return self.record

    def store(self, record: BootRecord) -> None:
        self.record = record

    def holds(self, slot: str, wanted: Slot) -> bool:
        return bool(wanted.sha256)

    def _write_slot(self, slot: str, image: bytes) -> None:
        """Nothing is written; the record says what would be there."""


@dataclass(frozen=True, slots=True)
class Rhythm:
    """How long a device waits, in seconds: for an answer, and until it asks again after an empty one."""

    answer_seconds: float = 15.0
    retry_seconds: float = 2.0
    poll_seconds: float = 900.0


class Stage(StrEnum):
    """What the device waits for. HUSHED: it will never speak again."""

    IDLE = "idle"
    ASKED = "asked"
    INSTALLING = "installing"
    CONFIRMING = "confirming"
    RESTARTING = "restarting"
    REPORTING = "reporting"
    HUSHED = "hushed"


class SimulatedDevice:
    """One device. `due` is when the sweep has to look at it again, in monotonic seconds."""

    __slots__ = (
        "_body", "_count", "_execution", "_fate", "_fruitless", "_hardware", "_hinted", "_key", "_keys", "_parts", "_publish",
        "_rhythm", "_slots", "_started", "_version", "_wanted", "boots", "device_id", "due", "finished", "installs", "outcomes", "stage",
    )  # fmt: skip

    def __init__(
        self,
        device_id: str,
        hardware: str,
        keys: TrustedKeys,
        slots: ModelSlots,
        fate: Callable[[str, str], Fate],
        publish: Publish,
        rhythm: Rhythm,
    ) -> None:
        self.device_id = device_id
        self._hardware = hardware
        self._keys = keys
        self._slots = slots
        self._fate = fate
        self._publish = publish
        self._rhythm = rhythm
        self._wanted = Slot()
        self._hinted = False
        self._fruitless = 0
        self._execution: Execution | None = None
        self._key = ""
        self._version = 0
        self._count = 0
        self._parts: tuple[str, ...] = ()
        self._body: dict[str, Any] = {}
        self._started = time.monotonic()
        self.stage = Stage.IDLE
        self.due: float | None = None
        self.boots = 1
        self.installs = 0
        self.finished: frozenset[str] = frozenset()
        self.outcomes: dict[str, str] = {}

    @property
    def running(self) -> Slot:
        """The confirmed slot."""
        return self._slots.record.slot(self._slots.record.active)

    @property
    def slot(self) -> str:
        """Its name."""
        return self._slots.record.active

    def ask(self) -> None:
        """Ask for work, unless there is some."""
        if self.stage is Stage.IDLE:
            self._send(Stage.ASKED, ("start-next",), {})

    def again(self) -> None:
        """No answer came in time, or the connection was lost: the same request once more; nothing pending: ask."""
        if self.stage is Stage.IDLE:
            self.ask()
        elif self.stage is not Stage.HUSHED:
            self._send(self.stage, self._parts, self._body)

    def receive(self, topic: str, payload: memoryview) -> None:
        """A message for this device."""
        if topic.endswith("/diagnostics/request"):
            self._diagnose(payload)
            return
        if topic.endswith("/notify-next"):
            if b'"execution"' in bytes(payload):
                self._fruitless, self._hinted = 0, self.stage is not Stage.IDLE
                self.ask()
            return
        body = orjson.loads(payload)
        if body.get("clientToken") != str(self._count) or self.stage in (Stage.IDLE, Stage.HUSHED):
            return
        self.due = None
        if topic.endswith("/rejected"):
            self._rejected(body)
        elif self.stage is Stage.ASKED:
            self._answered(body)
        else:
            self._accepted()

    def _diagnose(self, payload: memoryview) -> None:
        """Modelled figures, and the outcomes as its log; no reboot, for there is nothing to boot."""
        try:
            asked = orjson.loads(payload)
        except orjson.JSONDecodeError:
            return
        if isinstance(asked, dict):
            self._answer_question(asked)

    def _answer_question(self, asked: dict[str, Any]) -> None:
        log = LogBook()
        for job_id, status in self.outcomes.items():
            log.note(f"job {job_id}: {status or 'ended by the server'}")
        answer = Diagnostics(self, log, Configuration).answer(str(asked.get("type")), asked)
        body = {"requestId": asked.get("requestId"), **answer}
        self._publish(diagnostics_topic(self.device_id, "response"), orjson.dumps(body))

    def system_info(self) -> dict[str, Any]:
        """See agent.diagnostics.Surroundings."""
        return {
            "uptime": int(time.monotonic() - self._started),
            "freeMemory": 64 * 2**20,
            "totalMemory": 256 * 2**20,
            "cpuTemperature": 45.0,
            "diskUsage": {"total": 2**30, "used": 2**28, "free": 3 * 2**28},
            "networkStatus": {"connected": True, "connectionErrors": 0, "interfaces": []},
        }

    def _answered(self, body: dict[str, Any]) -> None:
        execution = parse_execution(body)
        if execution is None:
            self.stage = Stage.IDLE
            self._fruitless = min(self._fruitless + 1, 10)
            pause = min(self._rhythm.poll_seconds, self._rhythm.retry_seconds * 2**self._fruitless)
            self.due = time.monotonic() + pause * random.uniform(0.5, 1.5)
            self._ask_if_hinted()
            return
        self._fruitless = 0
        self._execution, self._version = execution, execution.version_number
        if execution.document.get("operation") != FIRMWARE_UPDATE:
            self._task(execution)
            return
        facts = DeviceFacts(
            device_id=self.device_id,
            hardware=self._hardware,
            product=self.running.product,
            security_floor=self._slots.record.security_floor,
            running_sha256=self.running.sha256,
            finished_orders=self.finished,
            latest_known_time=0,
        )
        try:
            verified = verify_update(execution.document, self._keys, facts, int(time.time()), job_id=execution.job_id)
        except FirmwareError as error:
            self._finish(ExecutionState.FAILED, failure_details(error.failure_class, str(error)))
            return
        release = verified.release
        self._key = verified.order.key
        self._wanted = Slot(
            SlotState.READY, release.sha256, release.size_bytes, release.version, release.product,
            release.security_counter,
        )  # fmt: skip
        if release.sha256 == self.running.sha256:
            self._finish(ExecutionState.SUCCEEDED, {})
            return
        self._report(Stage.INSTALLING, {"step": Step.INSTALLING, "via": "delta" if verified.deltas else "full"})

    def _task(self, execution: Execution) -> None:
        """An order of a fleet job that is no firmware."""
        order, now = execution.document.get("order"), int(time.time())
        try:
            verified = verify_task(
                order if isinstance(order, dict) else {},
                self._keys,
                self.device_id,
                self.finished,
                now,
                job_id=execution.job_id,
                attempt=execution.attempt,
            )
        except FirmwareError as error:
            details = failure_details(error.failure_class, str(error))
            self._report(Stage.REPORTING, details, ExecutionState.FAILED)
            return
        task = verified.task
        fate = self._fate(self.device_id, task.key)
        if fate is Fate.SILENT:
            self.stage = Stage.HUSHED
        elif fate is not Fate.HEALTHY:
            details = failure_details(_FAILED_TASK[fate], f"{task.operation} has failed (simulated fault {fate})")
            self._report(Stage.REPORTING, details, ExecutionState.FAILED)
        elif verified.operation is JobOperation.RESTART:
            self._report(Stage.RESTARTING, {"step": Step.REBOOTING})
        else:
            self._report(Stage.REPORTING, self._carried_out(task), ExecutionState.SUCCEEDED)

    def _carried_out(self, task: Task) -> dict[str, str]:
        """What a task has brought about, as details of its report."""
        match task.operation:
            case JobOperation.CONFIG_SYNC:
                return {"configVersion": str(task.payload.get("configVersion", 0))}
            case JobOperation.DIAGNOSTIC:
                requests = task.payload.get("requests", [])
                for request in requests:
                    self._answer_question(request)
                return {"answered": str(len(requests))}
        return {}

    def _accepted(self) -> None:
        if self.stage is Stage.INSTALLING:
            self._installed()
        elif self.stage is Stage.CONFIRMING:
            self._slots.confirm()
            self._finish(ExecutionState.SUCCEEDED, {})
        elif self.stage is Stage.RESTARTING:
            self.boots += 1
            self._report(Stage.REPORTING, {"bootId": f"{self.boots:016x}"}, ExecutionState.SUCCEEDED)
        else:
            self._end(self._body["status"])

    def _installed(self) -> None:
        """Write, arm, reboot: everything between `installing` and the first word of the new image."""
        target = self._slots.begin(self.slot)
        fate = self._fate(self.device_id, self._wanted.version)
        if fate is Fate.FAIL:
            self._finish(ExecutionState.FAILED, failure_details(FailureClass.FLASH, f"slot {target} cannot be written"))
            return
        self.installs += 1
        self._slots.keep(target, b"", self._wanted)
        self._slots.arm(target, self._key)
        boot = self._boot(fate)
        if fate is Fate.SILENT:
            self.stage = Stage.HUSHED
        elif boot.trial:
            self._report(Stage.CONFIRMING, {"step": Step.CONFIRMING})
        else:
            fallback = self._slots.record.fallback
            reason = fallback.reason if fallback else "the old image runs"
            self._finish(ExecutionState.FAILED, failure_details(FailureClass.ROLLED_BACK, reason))

    def _boot(self, fate: Fate) -> Boot:
        """Through the boot loader; an image that dies or stays mute is reset until its tries are used up."""
        while True:
            self.boots += 1
            boot = BootLoader(self._slots).boot()
            if not boot.trial or fate not in (Fate.CRASH, Fate.NO_CONFIRM):
                return boot

    def _rejected(self, body: dict[str, Any]) -> None:
        state = body.get("executionState") or {}
        code = body.get("code")
        if code == ErrorCode.VERSION_MISMATCH and state.get("status") == ExecutionState.IN_PROGRESS:
            self._body["expectedVersion"] = state["versionNumber"]
            self._version = state["versionNumber"] + 1
            self.again()
        elif code in (ErrorCode.INTERNAL_ERROR, ErrorCode.REQUEST_THROTTLED) or self.stage is Stage.ASKED:
            self.due = time.monotonic() + self._rhythm.answer_seconds
        else:
            if self._slots.record.trial is not None:
                self._slots.abandon("the gateway had ended the update")
                self._boot(Fate.HEALTHY)
            self._end("")

    def _finish(self, status: ExecutionState, details: dict[str, str]) -> None:
        running = {"version": self.running.version, "sha256": self.running.sha256, "slot": self.slot}
        self._report(Stage.REPORTING, details | running, status)

    def _end(self, status: str) -> None:
        execution, self._execution = self._execution, None
        self.stage, self.due = Stage.IDLE, None
        if execution is not None:
            self.outcomes[execution.job_id] = str(status)
            self.finished |= {attempt_key(execution.job_id, execution.attempt)}
        self._ask_if_hinted()

    def _ask_if_hinted(self) -> None:
        """A hint that came while the device was busy has not been lost."""
        if self._hinted:
            self._hinted = False
            self.ask()

    def _report(
        self, stage: Stage, details: dict[str, str], status: ExecutionState = ExecutionState.IN_PROGRESS
    ) -> None:
        execution = self._execution
        assert execution is not None
        body = update_request(status, details, self._version, execution.attempt)
        self._version += 1
        self._send(stage, (execution.job_id, "update"), body)

    def _send(self, stage: Stage, parts: tuple[str, ...], body: dict[str, Any]) -> None:
        self._count += 1
        self.stage, self._parts, self._body = stage, parts, body
        self.due = time.monotonic() + self._rhythm.answer_seconds
        body["clientToken"] = str(self._count)
        self._publish(jobs_topic(self.device_id, *parts), orjson.dumps(body))


_FAILED_TASK = {
    Fate.FAIL: FailureClass.INTERNAL,
    Fate.CRASH: FailureClass.POWER,
    Fate.NO_CONFIRM: FailureClass.NETWORK,
}
"""How a task fails on a simulated device."""


def filters_of(device_id: str) -> list[str]:
    """What a simulated device subscribes to: answers and hints, none of its own requests."""
    return [
        jobs_topic(device_id, "notify-next"),
        jobs_topic(device_id, "start-next", "+"),
        jobs_topic(device_id, "+", "update", "+"),
        diagnostics_topic(device_id, "request"),
    ]


async def sweep(devices: list[SimulatedDevice], stop: asyncio.Event) -> None:
    """Once a second, wake the devices whose answer is overdue."""
    while not stop.is_set():
        await asyncio.sleep(1)
        now = time.monotonic()
        for device in devices:
            if device.due is not None and device.due <= now:
                device.due = None
                device.again()
