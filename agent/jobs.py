"""The jobs protocol from the device's side, without I/O: what is sent, what the answers mean.

An execution's `version_number` travels with every update as `expectedVersion`; a VersionMismatch carries the current
state, so a device whose answer was lost can tell "it arrived" from "somebody ended it".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from agent.errors import RejectedError
from models.protocol import (
    MAX_STATUS_DETAILS,
    MAX_STATUS_VALUE_CHARS,
    TERMINAL_STATES,
    ErrorCode,
    ExecutionState,
    FailureClass,
    Step,
)


class Answer(StrEnum):
    """What became of a report. OVER: the server has ended the execution, its word counts. UNREACHABLE: nobody answered."""

    ACCEPTED = "accepted"
    OVER = "over"
    UNREACHABLE = "unreachable"


class Reports(Protocol):
    """How an update tells the gateway about itself; one for each execution."""

    async def step(self, step: Step, **details: str) -> Answer:
        """IN_PROGRESS, with the step and more details. Never raises for a gateway that is away."""

    async def finish(self, status: ExecutionState, details: Mapping[str, str]) -> Answer:
        """SUCCEEDED, FAILED or REJECTED."""


@dataclass(frozen=True, slots=True)
class Execution:
    """One job that is IN_PROGRESS on this device, as `start-next` gives it."""

    job_id: str
    attempt: int
    version_number: int
    document: Mapping[str, Any]


def parse_execution(answer: Mapping[str, Any]) -> Execution | None:
    """The execution in an answer; None where there is none, or none that can be read."""
    found = answer.get("execution")
    if not isinstance(found, Mapping):
        return None
    job_id, version = found.get("jobId"), found.get("versionNumber", 1)
    attempt, document = found.get("executionNumber", 1), found.get("jobDocument", {})
    if not isinstance(job_id, str) or type(version) is not int or type(attempt) is not int:
        return None
    if not isinstance(document, Mapping) or found.get("status") != ExecutionState.IN_PROGRESS:
        return None
    return Execution(job_id, attempt, version, document)


def update_request(
    status: ExecutionState, details: Mapping[str, str], version_number: int, attempt: int
) -> dict[str, Any]:
    """Body of an `update`, within the protocol's bounds on details."""
    bounded = {name: value[:MAX_STATUS_VALUE_CHARS] for name, value in list(details.items())[:MAX_STATUS_DETAILS]}
    return {
        "status": status,
        "statusDetails": bounded,
        "expectedVersion": version_number,
        "executionNumber": attempt,
    }


def failure_details(failure: FailureClass, reason: str) -> dict[str, str]:
    """`statusDetails` of a failure."""
    return {"failure": failure, "reason": reason[:MAX_STATUS_VALUE_CHARS]}


_OVER = {ErrorCode.TERMINAL_STATE_REACHED, ErrorCode.RESOURCE_NOT_FOUND, ErrorCode.INVALID_STATE_TRANSITION}
_AGAIN = {ErrorCode.INTERNAL_ERROR, ErrorCode.REQUEST_THROTTLED}


class Refusal(StrEnum):
    """What to do about a rejected update."""

    OVER = "over"
    AGAIN = "again"
    NEW_VERSION = "new-version"
    WRONG = "wrong"


def judge_rejection(error: RejectedError) -> tuple[Refusal, int]:
    """What a rejected update means, and for NEW_VERSION the version number to send next."""
    if error.code in _OVER:
        return Refusal.OVER, 0
    if error.code in _AGAIN:
        return Refusal.AGAIN, 0
    if error.code != ErrorCode.VERSION_MISMATCH or error.state is None:
        return Refusal.WRONG, 0
    status, version = error.state.get("status"), error.state.get("versionNumber")
    if status in TERMINAL_STATES or status == ExecutionState.QUEUED:
        return Refusal.OVER, 0
    return (Refusal.NEW_VERSION, version) if type(version) is int else (Refusal.WRONG, 0)
