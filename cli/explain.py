"""Where one device stands in a rollout and why, in a sentence or two. Pure: views in, text out."""

from datetime import datetime

from cli.output import rough, when
from domain.selector import matches
from models.device import DeviceRecord, DeviceStatus
from models.protocol import ExecutionState, FailureClass
from models.rollout import JobStatus, Phase, WaveProgress, WaveStatus
from models.views import ExecutionView, RolloutView

FAILURES = {
    FailureClass.NETWORK: "it could not download the image",
    FailureClass.VERIFY: "a signature, hash, size or date of what it was given did not hold",
    FailureClass.FLASH: "it could not write the image",
    FailureClass.INCOMPATIBLE: "the image is not for this device",
    FailureClass.POWER: "its power failed, or was too low",
    FailureClass.ROLLED_BACK: "the new image did not come up healthy, and the device fell back to the old one by itself",
    FailureClass.REJECTED_BY_USER: "somebody at the device said no",
    FailureClass.INTERNAL: "an error of the device's own",
    FailureClass.SILENT: "it went silent",
}


def why_here(execution: ExecutionView, rollout: RolloutView, now: datetime) -> str:
    """Why the device is in this state, and what comes next."""
    match execution.state:
        case ExecutionState.PENDING:
            return _why_pending(execution, rollout)
        case ExecutionState.QUEUED:
            return _why_queued(execution, rollout, now)
        case ExecutionState.IN_PROGRESS:
            step = f"it is {execution.step}" if execution.step else "it has started"
            return f"{step} since {when(execution.updated_at)}{_deadline(execution, now)}"
        case ExecutionState.SUCCEEDED:
            how = {True: "from a delta", False: "from the full image", None: ""}[execution.by_delta]
            return (
                f"it runs {rollout.target_version or 'the release'} {how}".rstrip() + ", confirmed by the device itself"
            )
        case ExecutionState.CANCELED | ExecutionState.REMOVED:
            return (
                f"it had not started when the rollout ended ({rollout.reason or rollout.status}), so it was withdrawn"
            )
        case _:
            return _why_failed(execution)


def _why_pending(execution: ExecutionView, rollout: RolloutView) -> str:
    if rollout.phase in (Phase.HOLDING, Phase.WAITING_APPROVAL, Phase.PAUSED):
        return f"its wave {execution.wave} ({execution.wave_name}) is not open; {rollout.reason or rollout.phase}"
    running = next((wave for wave in reversed(rollout.waves) if wave.status is WaveStatus.OPEN), None)
    before = f"; wave {running.wave} ({running.name}) is {rollout.phase}" if running else ""
    return f"its wave {execution.wave} ({execution.wave_name}) is not open yet{before}"


def _why_queued(execution: ExecutionView, rollout: RolloutView, now: datetime) -> str:
    if rollout.status is JobStatus.PAUSED:
        return f"the rollout is paused, so no device starts: {rollout.reason}"
    if rollout.status in (JobStatus.HALTED, JobStatus.FINISHED):
        return f"the rollout is {rollout.status}, so no device starts any more: {rollout.reason}"
    wave = _wave(execution, rollout)
    if wave is not None and wave.tripped:
        return f"the gate of wave {wave.wave} has tripped, so no device starts any more"
    if rollout.in_flight >= rollout.in_flight_cap:
        return f"it may start when one of {rollout.in_flight} devices in flight has ended (cap {rollout.in_flight_cap})"
    return (
        "it may start as soon as it asks; it has not asked, or is kept back by the pace "
        f"({rollout.per_minute or 'no limit'} per minute){_deadline(execution, now)}"
    )


def _why_failed(execution: ExecutionView) -> str:
    said = f": {execution.reason}" if execution.reason else ""
    if execution.failure_class is None:
        return f"it ended {execution.state}{said}"
    return f"{FAILURES[execution.failure_class]} ({execution.failure_class}){said}"


def why_not_in(device: DeviceRecord, rollout: RolloutView, now: datetime) -> str:
    """Why a device of the registry is no part of a rollout."""
    target = rollout.spec.target
    if device.status is DeviceStatus.RETIRED and DeviceStatus.RETIRED not in target.statuses:
        return "it is retired"
    if not matches(target, device, now):
        return f"it does not match the target {target.model_dump_json(exclude_defaults=True)}"
    if device.firmware_sha256 is not None and device.firmware_sha256 == rollout.target_sha256:
        return f"it runs {rollout.target_version} already"
    return f"it matches the target now, but did not, or was not there, when the rollout was planned ({when(rollout.created_at)})"


def _wave(execution: ExecutionView, rollout: RolloutView) -> WaveProgress | None:
    return next((wave for wave in rollout.waves if wave.wave == execution.wave), None)


def _deadline(execution: ExecutionView, now: datetime) -> str:
    if execution.deadline_at is None:
        return ""
    if execution.deadline_at <= now:
        return f"; its deadline passed at {when(execution.deadline_at)}"
    return f"; counts as failed in {rough(execution.deadline_at - now)} unless it says more"
