"""The states of an execution: which moves are legal, who may make them, and what the gate makes of an end.

One transition table as data; everything that changes a state asks it.
"""

from enum import Enum

from models.protocol import ExecutionState, FailureClass, Step

S = ExecutionState

SERVER_MOVES: dict[ExecutionState, frozenset[ExecutionState]] = {
    S.PENDING: frozenset({S.QUEUED, S.CANCELED, S.REMOVED}),
    S.QUEUED: frozenset({S.TIMED_OUT, S.CANCELED, S.REMOVED}),
    S.IN_PROGRESS: frozenset({S.TIMED_OUT, S.CANCELED, S.REMOVED}),
}
"""Moves that the server makes by itself."""

DEVICE_MOVES: dict[ExecutionState, frozenset[ExecutionState]] = {
    S.QUEUED: frozenset({S.IN_PROGRESS, S.REJECTED}),
    S.IN_PROGRESS: frozenset({S.IN_PROGRESS, S.SUCCEEDED, S.FAILED, S.REJECTED}),
}
"""Moves that a device may ask for. QUEUED to IN_PROGRESS goes through admission."""


class GateEffect(Enum):
    """What an ended execution says about the release."""

    SUCCESS = "success"
    FAILURE = "failure"
    NEUTRAL = "neutral"


def gate_effect(state: ExecutionState, failure: FailureClass | None, *, started: bool) -> GateEffect:
    """What the gate counts. A device that never started, or whose user said no, says nothing about the release."""
    if state is S.SUCCEEDED:
        return GateEffect.SUCCESS
    if state is S.FAILED or (state is S.TIMED_OUT and started):
        return GateEffect.FAILURE
    if state is S.REJECTED and failure is not FailureClass.REJECTED_BY_USER:
        return GateEffect.FAILURE
    return GateEffect.NEUTRAL


class DeadlinePhase(Enum):
    """Stretches of an update that have a deadline of their own, in order."""

    DOWNLOAD = 0
    INSTALL = 1
    CONFIRM = 2


PHASE_OF_STEP: dict[str, DeadlinePhase] = {
    Step.ACCEPTED: DeadlinePhase.DOWNLOAD,
    Step.DOWNLOADING: DeadlinePhase.DOWNLOAD,
    Step.DOWNLOADED: DeadlinePhase.INSTALL,
    Step.INSTALLING: DeadlinePhase.INSTALL,
    Step.REBOOTING: DeadlinePhase.CONFIRM,
    Step.CONFIRMING: DeadlinePhase.CONFIRM,
}


def enters_later_phase(before: str | None, after: str | None) -> DeadlinePhase | None:
    """The phase that a step report opens, or None: repeating or going back a step never prolongs a deadline."""
    new = PHASE_OF_STEP.get(after or "")
    if new is None:
        return None
    old = PHASE_OF_STEP.get(before or "", DeadlinePhase.DOWNLOAD)
    return new if new.value > old.value else None
