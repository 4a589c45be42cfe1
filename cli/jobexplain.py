"""Why a device does, or does not, what a fleet job wants of it, in a sentence or two. Pure: views in, text out."""

from datetime import datetime

from cli.explain import FAILURES
from cli.output import ago, rough, when
from domain.selector import matches
from models.device import DeviceRecord, DeviceStatus
from models.fleetjob import FleetJobView
from models.jobspec import FleetJobSpec
from models.protocol import ExecutionState, FailureClass, JobOperation
from models.rollout import JobStatus, Phase
from models.views import ExecutionView


def why_here(execution: ExecutionView, job: FleetJobView, device: DeviceRecord, now: datetime) -> str:
    """Why the device is in this state, and what comes next."""
    attempt = f"attempt {execution.execution_number} of {job.max_attempts}"
    match execution.state:
        case ExecutionState.PENDING:
            return f"its wave {execution.wave} ({execution.wave_name}) is not open yet; the job is {job.phase}"
        case ExecutionState.QUEUED:
            return _why_queued(execution, job, device, now)
        case ExecutionState.IN_PROGRESS:
            step = f"it is {execution.step}" if execution.step else "it has started"
            return f"{attempt}: {step} since {when(execution.updated_at)}{_deadline(execution, now)}"
        case ExecutionState.SUCCEEDED:
            return f"done with {attempt}, at {when(execution.finished_at)}"
        case ExecutionState.CANCELED | ExecutionState.REMOVED:
            return f"it was withdrawn when the job ended: {job.reason or job.status}"
    said = f": {execution.reason}" if execution.reason else ""
    kind, named = execution.failure_class, f"it ended {execution.state}"
    if kind is not None:
        firmware = job.operation is JobOperation.FIRMWARE_UPDATE or kind is FailureClass.SILENT
        named = f"{FAILURES[kind] if firmware else 'it failed'} ({kind})"
    last = "it said no, and is not asked again" if execution.state is ExecutionState.REJECTED else "no attempt is left"
    return f"{attempt}: {named}{said}; {last}, 'job retry {job.name}' gives it another job"


def _why_queued(execution: ExecutionView, job: FleetJobView, device: DeviceRecord, now: datetime) -> str:
    spec = FleetJobSpec.model_validate(job.spec)
    if job.status is JobStatus.PAUSED or job.phase is Phase.PAUSED:
        return f"the job is paused, so no device starts: {job.reason}; 'job resume {job.name}' lets them"
    if job.status in (JobStatus.HALTED, JobStatus.FINISHED):
        return f"the job is {job.status}, so no device starts any more: {job.reason}"
    if execution.retry_at is not None and execution.retry_at > now:
        return (
            f"attempt {execution.execution_number - 1} failed{_last(execution)}; it waits for attempt "
            f"{execution.execution_number} of {job.max_attempts} until {when(execution.retry_at)}, "
            f"in {rough(execution.retry_at - now)}"
        )
    tripped = next((wave for wave in job.waves if wave.tripped), None)
    if tripped is not None:
        return f"the gate of wave {tripped.wave} has tripped, so no device starts any more"
    if job.progress.in_progress >= job.in_flight_cap:
        return (
            f"it may start when one of {job.progress.in_progress} devices in progress has ended "
            f"(at most {job.in_flight_cap} at a time)"
        )
    return f"it may start as soon as it asks; {_not_asked(device, spec, now)}{_deadline(execution, now)}"


def _last(execution: ExecutionView) -> str:
    failure = f" ({execution.failure_class})" if execution.failure_class else ""
    return f"{failure}: {execution.reason}" if execution.reason else failure


def _not_asked(device: DeviceRecord, spec: FleetJobSpec, now: datetime) -> str:
    heard = f"last heard of {ago(device.last_heartbeat, now)}" if device.last_heartbeat else "never heard of"
    causes = [f"it has not asked yet ({heard})", "is busy with another job"]
    if spec.per_minute:
        causes.append(f"is kept back by the pace ({spec.per_minute} per minute)")
    return f"{', '.join(causes[:-1])}, or {causes[-1]}"


def why_not_in(device: DeviceRecord, job: FleetJobView, now: datetime) -> str:
    """Why a device of the registry is no part of a job."""
    spec = FleetJobSpec.model_validate(job.spec)
    if device.status is DeviceStatus.RETIRED:
        return "it is retired"
    if spec.retry_of is not None:
        return f"the job is for the devices that have failed in job {spec.retry_of}, and it has not"
    if not matches(spec.target, device, now):
        return f"it does not match the target {spec.target.model_dump_json(exclude_defaults=True)}"
    if device.status is DeviceStatus.PROVISIONING:
        return "it has never been heard of, and the target does not ask for such devices"
    if spec.operation is JobOperation.CONFIG_SYNC and spec.config is None:
        return "no configuration is wanted of it, or it was not there when the job was planned"
    if job.continuous and job.outcome is None:
        return "it matches the target now, and joins within a minute or so"
    return (
        f"it matches the target now, but did not, or was not there, when the job was planned ({when(job.created_at)})"
    )


def _deadline(execution: ExecutionView, now: datetime) -> str:
    if execution.deadline_at is None:
        return ""
    if execution.deadline_at <= now:
        return f"; its deadline passed at {when(execution.deadline_at)}"
    return f"; counts as failed in {rough(execution.deadline_at - now)} unless it says more"
