"""Whether what an operator asks of a rollout makes sense now, and if not, why. Pure: texts out, nothing changed.

Each function takes the rollout's state and the request, and returns None, or one sentence saying what stands in the
way and what to do instead. RolloutWorkflow's validators raise that sentence, the command line prints it.
"""

from models.rollout import AdjustRolloutInput, Phase, RolloutState
from models.spec import PaceSpec


def why_not_pause(state: RolloutState) -> str | None:
    """Why a rollout cannot be paused now."""
    if state.paused_by:
        return f"cannot pause: it is paused already, by {state.paused_by}"
    return _not_steerable("pause", state)


def why_not_resume(state: RolloutState) -> str | None:
    """Why a rollout cannot be resumed now."""
    if not state.paused_by:
        return f"cannot resume: it is not paused, it is {_where(state)}"
    return _not_steerable("resume", state)


def why_not_approve(state: RolloutState) -> str | None:
    """Why there is nothing to approve now."""
    if state.phase is not Phase.WAITING_APPROVAL:
        return f"cannot approve: it waits for no approval, it is {_where(state)}"
    return _not_steerable("approve", state)


def why_not_promote(state: RolloutState) -> str | None:
    """Why a wave cannot be promoted by a person now. Whether a breaker has tripped is asked of PostgreSQL later."""
    if state.paused_by:
        return f"cannot promote: it is paused by {state.paused_by}; resume it first"
    if state.promoted_by:
        return f"cannot promote: wave {state.wave} has been promoted already, by {state.promoted_by}"
    if state.phase not in (Phase.SOAKING, Phase.HOLDING):
        return (
            f"cannot promote: only a wave that soaks or is held can be promoted, it is {_where(state)}; "
            "a wave that runs promotes itself when it has answered"
        )
    return _not_steerable("promote", state)


def why_not_abort(state: RolloutState) -> str | None:
    """Why a rollout cannot be aborted now."""
    if state.aborted_by:
        return f"cannot abort: it is being aborted already, by {state.aborted_by}"
    if state.phase in (Phase.DRAINING, Phase.DONE):
        return f"cannot abort: it is {_where(state)}"
    return None


def why_not_adjust(state: RolloutState, asked: AdjustRolloutInput) -> str | None:
    """Why the pace cannot be changed as asked."""
    if asked.per_minute is not None and asked.unlimited_per_minute:
        return "cannot adjust: per_minute and unlimited_per_minute exclude each other; give one of them"
    if asked.in_flight is None and asked.per_minute is None and not asked.unlimited_per_minute:
        return "cannot adjust: nothing was given; give in_flight, per_minute or unlimited_per_minute"
    return _not_steerable("adjust", state)


def adjusted_pace(pace: PaceSpec, asked: AdjustRolloutInput) -> PaceSpec:
    """The new pace: what was not given stays."""
    per_minute = None if asked.unlimited_per_minute else asked.per_minute or pace.per_minute
    return PaceSpec(in_flight=asked.in_flight or pace.in_flight, per_minute=per_minute)


def _not_steerable(verb: str, state: RolloutState) -> str | None:
    if state.aborted_by or state.phase in (Phase.DRAINING, Phase.DONE):
        return f"cannot {verb}: it is {_where(state)}"
    if state.plan is None:
        return f"cannot {verb}: it is still being planned; try again in a moment"
    return None


def _where(state: RolloutState) -> str:
    """`rolling, wave 2 of 3 (early)`."""
    if state.phase is Phase.DONE:
        return f"over: {state.outcome}" if state.outcome else "over"
    if state.aborted_by:
        return f"ending, aborted by {state.aborted_by}"
    if state.phase is Phase.DRAINING:
        return f"ending, {state.outcome}; devices in progress are waited for"
    place = state.planned_wave(state.wave)
    waves = len(state.plan.waves) if state.plan else 0
    return f"{state.shown_phase}" + (f", wave {place.wave} of {waves} ({place.name})" if place else "")
