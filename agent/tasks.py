"""Fleet jobs that are no firmware: restart, config-sync, diagnostic, custom. Only what the order key has signed.

`handle` is given what `start-next` answered, as the updater is, and can be called again at any moment. What has been
begun is in one record, kept through power cuts:

    verify -> (restart) accepted `rebooting` -> journal -> reboot -> report of the boot after it
           -> (others)  journal -> do it -> result in the journal -> report -> ended

A restart is over with the first boot after it was journalled, whoever caused that boot, so no attempt reboots a device
twice. A custom task that a power cut has interrupted is reported as failed: nobody knows how far it got, and another
attempt is the server's to grant. A config-sync or a diagnostic is begun again; both can be repeated. An attempt that has
ended is remembered until its order expires, and refused.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from agent.errors import RecordError, RequestError, TaskError
from agent.jobs import Answer, Execution, Reports, failure_details
from agent.records import decode_record, encode_record
from agent.state import MAX_FINISHED, Ended
from agent.storage import Storage, replace_durably
from agent.updater import Leg, Updater
from firmware.errors import FirmwareError
from firmware.keys import TrustedKeys
from firmware.manifest import attempt_key
from firmware.task import Task, VerifiedTask, verify_task
from models.protocol import ExecutionState, FailureClass, JobOperation, Step

TASKS_NAME = "tasks.json"
TASKS_KIND = "tasks"


class TaskPhase(StrEnum):
    """WORKING: begun. REBOOTING: over with the next boot. RESULT: only to report."""

    WORKING = "working"
    REBOOTING = "rebooting"
    RESULT = "result"


@dataclass(frozen=True, slots=True)
class Run:
    """The journal of one attempt. `status` and `details` are the final report, once there is one."""

    job_id: str
    attempt: int
    operation: str
    expires_at: int
    phase: TaskPhase = TaskPhase.WORKING
    status: str = ""
    details: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TaskState:
    """`finished`: by job, the last attempt that has ended."""

    finished: Mapping[str, Ended] = field(default_factory=dict)
    latest_known_time: int = 0
    run: Run | None = None

    @property
    def finished_tasks(self) -> frozenset[str]:
        """For `verify_task`: earlier attempts of the same job count as ended with the last one."""
        return frozenset(attempt_key(job_id, ended.attempt) for job_id, ended in self.finished.items())

    def ended(self) -> "TaskState":
        """The state without its run; the attempt never starts again."""
        if self.run is None:
            return self
        finished = {job: entry for job, entry in self.finished.items() if entry.expires_at > self.latest_known_time}
        finished[self.run.job_id] = Ended(self.run.attempt, self.run.expires_at, self.run.status)
        if len(finished) > MAX_FINISHED:
            finished = dict(sorted(finished.items(), key=lambda item: item[1].expires_at)[-MAX_FINISHED:])
        return replace(self, finished=finished, run=None)


class TaskStore:
    """That state on the device's storage. One that cannot be read is an empty one."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.state = self._load()

    def put(self, state: TaskState) -> None:
        """Keep it: in memory at once, then durably. Raises OSError when the storage refuses."""
        self.state = state
        replace_durably(self._storage, TASKS_NAME, encode_record(TASKS_KIND, asdict(state)))

    def _load(self) -> TaskState:
        data = self._storage.read(TASKS_NAME)
        if data is None:
            return TaskState()
        try:
            fields: dict[str, Any] = decode_record(data, TASKS_KIND)
        except RecordError:
            return TaskState()
        run = fields["run"]
        return TaskState(
            finished={job: Ended(**entry) for job, entry in fields["finished"].items()},
            latest_known_time=fields["latest_known_time"],
            run=Run(**{**run, "phase": TaskPhase(run["phase"])}) if run else None,
        )


Custom = Callable[[Task], Awaitable[Mapping[str, str]]]
"""Does what a custom task's payload says; what it returns is reported. Raises TaskError."""


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a device can do. `custom`: None where it knows no custom operation, and refuses them.

    `sync_config` takes and reports the configuration that is wanted, and returns the version that runs; it may raise
    RequestError and OSError. `diagnose` answers one request, and publishes the answer; it may raise RequestError.
    """

    sync_config: Callable[[], Awaitable[int]]
    diagnose: Callable[[Mapping[str, Any]], Awaitable[None]]
    custom: Custom | None = None


class Tasker:
    """Carries out tasks on one device, for the time of one boot."""

    def __init__(
        self,
        device_id: str,
        keys: TrustedKeys,
        storage: Storage,
        boot_id: str,
        abilities: Abilities,
        clock: Callable[[], float],
    ) -> None:
        self._device_id = device_id
        self._keys = keys
        self._store = TaskStore(storage)
        self._boot_id = boot_id
        self._abilities = abilities
        self._clock = clock
        run = self._store.state.run
        self._inherited = (run.job_id, run.attempt) if run is not None else None
        """The attempt that a boot before this one has begun."""

    @property
    def run(self) -> Run | None:
        """The task in progress, if any."""
        return self._store.state.run

    async def handle(self, execution: Execution | None, reports: Reports | None) -> Leg:
        """Go on with what the gateway answered; `execution` is None when it has no task for this device."""
        run = self.run
        if run is None or execution is None or (execution.job_id, execution.attempt) != (run.job_id, run.attempt):
            self._forget()
            if execution is None or reports is None:
                return Leg.IDLE
            return await self._start(execution, reports)
        assert reports is not None
        if run.phase is TaskPhase.RESULT:
            return await self._report(reports)
        if self._inherited != (run.job_id, run.attempt):
            return await self._start(execution, reports)  # its word did not get through in this same boot
        if run.phase is TaskPhase.REBOOTING:
            self._succeed({})
            return await self._report(reports)
        if run.operation == JobOperation.CUSTOM:
            reason = "the device started anew while it ran; how far it got is not known"
            self._fail(FailureClass.POWER, reason)
            return await self._report(reports)
        return await self._start(execution, reports)

    async def _start(self, execution: Execution, reports: Reports) -> Leg:
        state = self._store.state
        try:
            verified = verify_task(
                _order(execution.document),
                self._keys,
                self._device_id,
                state.finished_tasks,
                int(self._clock()),
                job_id=execution.job_id,
                attempt=execution.attempt,
                latest_known_time=state.latest_known_time,
            )
        except FirmwareError as error:
            details = failure_details(error.failure_class, str(error))
            return _leg(await reports.finish(ExecutionState.FAILED, details))
        if verified.operation is JobOperation.CUSTOM and self._abilities.custom is None:
            reason = "operation custom: this device knows no custom operation"
            details = failure_details(FailureClass.INCOMPATIBLE, reason)
            return _leg(await reports.finish(ExecutionState.REJECTED, details))
        try:
            if verified.operation is JobOperation.RESTART:
                return await self._restart(verified, reports)
            return await self._work(verified, reports)
        except OSError as error:
            self._begin_in_memory(verified)
            self._fail(FailureClass.FLASH, f"the storage refused: {error.strerror or error}")
        return await self._report(reports)

    async def _restart(self, verified: VerifiedTask, reports: Reports) -> Leg:
        """The word first, so that a job that is over reboots nobody; then the journal, and nothing after it."""
        match await reports.step(Step.REBOOTING):
            case Answer.OVER:
                return Leg.IDLE
            case Answer.UNREACHABLE:
                return Leg.WAIT
        self._begin(verified, TaskPhase.REBOOTING)
        return Leg.REBOOT

    async def _work(self, verified: VerifiedTask, reports: Reports) -> Leg:
        if verified.operation is JobOperation.CUSTOM:
            match await reports.step(Step.ACCEPTED):
                case Answer.OVER:
                    return Leg.IDLE
                case Answer.UNREACHABLE:
                    return Leg.WAIT
        self._begin(verified, TaskPhase.WORKING)
        try:
            self._succeed(await self._carry_out(verified))
        except TaskError as error:
            self._fail(error.failure_class, str(error))
        except RequestError as error:
            self._fail(FailureClass.NETWORK, str(error))
        return await self._report(reports)

    async def _carry_out(self, verified: VerifiedTask) -> Mapping[str, str]:
        task = verified.task
        match verified.operation:
            case JobOperation.CONFIG_SYNC:
                return {"configVersion": str(await self._sync_config(task))}
            case JobOperation.DIAGNOSTIC:
                requests = task.payload.get("requests")
                if not isinstance(requests, list) or not all(isinstance(request, dict) for request in requests):
                    raise TaskError(FailureClass.INCOMPATIBLE, "requests: expected a list of objects")
                for request in requests:
                    await self._abilities.diagnose(request)
                return {"answered": str(len(requests))}
        assert self._abilities.custom is not None
        return await self._abilities.custom(task)

    async def _sync_config(self, task: Task) -> int:
        runs, wanted = await self._abilities.sync_config(), task.payload.get("configVersion", 0)
        if type(wanted) is not int or runs < wanted:
            raise TaskError(FailureClass.INTERNAL, f"it runs configuration {runs}, expected {wanted!r:.40}")
        return runs

    def _begin(self, verified: VerifiedTask, phase: TaskPhase) -> None:
        """Journal the attempt. Raises OSError."""
        self._inherited = None
        self._store.put(self._begun(verified, phase))

    def _begin_in_memory(self, verified: VerifiedTask) -> None:
        self._inherited = None
        self._store.state = self._begun(verified, TaskPhase.WORKING)

    def _begun(self, verified: VerifiedTask, phase: TaskPhase) -> TaskState:
        task, state = verified.task, self._store.state
        run = Run(task.job_id, task.attempt, task.operation, task.expires_at, phase)
        return replace(state, run=run, latest_known_time=verified.latest_known_time)

    def _succeed(self, details: Mapping[str, str]) -> None:
        self._result(ExecutionState.SUCCEEDED, {**details, "bootId": self._boot_id})

    def _fail(self, failure: FailureClass, reason: str) -> None:
        self._result(ExecutionState.FAILED, failure_details(failure, reason))

    def _result(self, status: ExecutionState, details: Mapping[str, str]) -> None:
        assert self.run is not None
        run = replace(self.run, phase=TaskPhase.RESULT, status=str(status), details=dict(details))
        self._keep(replace(self._store.state, run=run))

    async def _report(self, reports: Reports) -> Leg:
        run = self.run
        assert run is not None
        if await reports.finish(ExecutionState(run.status), run.details) is Answer.UNREACHABLE:
            return Leg.WAIT
        self._forget()
        return Leg.IDLE

    def _forget(self) -> None:
        if self.run is not None:
            self._keep(self._store.state.ended())

    def _keep(self, state: TaskState) -> None:
        """Keep a state whose loss costs a repeated report at most: a full disk must not stop the report itself."""
        try:
            self._store.put(state)
        except OSError:
            self._store.state = state


async def next_leg(updater: Updater, tasker: Tasker, execution: Execution | None, reports: Reports | None) -> Leg:
    """Firmware to the updater, everything else to the tasker; an image on trial is the updater's alone until it has ended.

    The gateway gives what is in progress before what waits, so neither hears of the other's work while it has its own.
    """
    if updater.on_trial or (execution is not None and _is_firmware(execution)):
        return await updater.handle(execution, reports)
    if execution is None:
        await updater.handle(None, None)
    return await tasker.handle(execution, reports)


def _is_firmware(execution: Execution) -> bool:
    return execution.document.get("operation") == JobOperation.FIRMWARE_UPDATE


def _order(document: Mapping[str, Any]) -> Any:
    """The envelope; what is none is refused by firmware.envelope in its words."""
    return document.get("order")


def _leg(answer: Answer) -> Leg:
    return Leg.WAIT if answer is Answer.UNREACHABLE else Leg.IDLE
