"""What a person may ask of a fleet job at the moment, or why not. Pure; the rollout's are domain/steering.py's."""

from models.fleetjob import CancelFleetJobInput, FleetJobState
from models.rollout import Phase


def why_not_pause(state: FleetJobState) -> str | None:
    """A job that is over, or ends, is not paused; nor one that is paused."""
    if (over := _over("pause", state)) is not None:
        return over
    if state.paused_by:
        return f"cannot pause job {state.name}: it is paused by {state.paused_by} already"
    return None


def why_not_resume(state: FleetJobState) -> str | None:
    """There is something to resume after a pause, and where a wave is held for a person."""
    if (over := _over("resume", state)) is not None:
        return over
    if not state.paused_by and state.phase is not Phase.HOLDING:
        return f"cannot resume job {state.name}: it is neither paused nor held, it is {state.phase}"
    return None


def why_not_cancel(state: FleetJobState, asked: CancelFleetJobInput) -> str | None:
    """A job ends once; while devices in progress are waited for, `force` ends the waiting."""
    if state.phase is Phase.DRAINING and asked.force and not state.force:
        return None
    if state.phase is Phase.DRAINING:
        more = "" if state.force else "; cancel it with force to end the devices in progress as well"
        return f"cannot cancel job {state.name}: it is ending already ({state.reason}){more}"
    return _over("cancel", state)


def _over(what: str, state: FleetJobState) -> str | None:
    if state.phase is Phase.DONE:
        return f"cannot {what} job {state.name}: it is over ({state.reason})"
    if state.phase is Phase.DRAINING or state.canceled_by or state.time_is_up:
        return f"cannot {what} job {state.name}: it is ending ({state.reason or 'canceled by ' + state.canceled_by})"
    return None
