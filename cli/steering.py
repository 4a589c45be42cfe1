"""What starting and steering have in common for rollouts and jobs: requests to a workflow, and its answers in words."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import typer
from temporalio.client import WorkflowUpdateFailedError, WorkflowUpdateRPCTimeoutOrCancelledError
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from cli.output import when
from models.errors import ConflictError, NotFoundError, RefusedError, UnavailableError
from models.fleetjob import FleetJobView
from models.views import RolloutView

PLAN_PATIENCE_SECONDS = 20.0
"""How long `start` waits to say what was planned; a plan for a million devices takes longer, and goes on."""
ANSWER_SECONDS = 30.0
"""How long an operator's request may wait for a worker."""

Timeout = Annotated[
    str | None, typer.Option(metavar="DURATION", help="Stop watching after this long, as in 30m (exit status 5).")
]
Stay = Annotated[
    bool | None,
    typer.Option(
        "--stay/--leave",
        help="While it waits for a person: stay (default on a terminal), or leave with exit status 5.",
        show_default=False,
    ),
]
Answer = TypeVar("Answer")
NotRunning = Callable[[], Awaitable[RefusedError | NotFoundError]]


async def steer(subject: str, answer: Awaitable[Answer], not_running: NotRunning) -> Answer:
    """Wait for a workflow's answer to an operator's request.

    Args:
        subject: `rollout a` or `job a`, for the words of an error.
        answer: the update, sent by awaiting it.
        not_running: says why there is no such workflow.

    Raises:
        RefusedError: the workflow's no, in its words.
        UnavailableError: no worker has taken it.
    """
    try:
        return await asyncio.wait_for(answer, ANSWER_SECONDS)
    except WorkflowUpdateFailedError as error:
        raise RefusedError(f"{subject}: {_words_of(error)}") from error
    except RPCError as error:
        if error.status is not RPCStatusCode.NOT_FOUND:
            raise
        raise await not_running() from error
    except (TimeoutError, WorkflowUpdateRPCTimeoutOrCancelledError) as error:
        kind = subject.partition(" ")[0]
        raise UnavailableError(
            f"no worker has taken the request to {subject} within {ANSWER_SECONDS:.0f} s, and whether it takes "
            f"effect later is not known; start a worker ('starter.py up'), then look at '{kind} show'"
        ) from error


async def refuse_ended(kind: str, name: str, known: Awaitable[RolloutView | FleetJobView]) -> None:
    """A name that has ended is not started again: its devices, events and figures belong to that one.

    Raises RefusedError.
    """
    try:
        found = await known
    except NotFoundError:
        return
    if found.outcome is not None:
        raise RefusedError(
            f"cannot start {kind} {name}: a {kind} of this name has ended ({found.outcome}, {when(found.finished_at)}); "
            "give this one another name"
        )


def already_running(kind: str, name: str) -> ConflictError:
    """What is said where a workflow of the name runs."""
    return ConflictError(
        f"cannot start {kind} {name}: it is running already; '{kind} watch {name}' shows it, "
        f"another {kind} needs another name"
    )


async def why_not_running(
    kind: str, name: str, known: Awaitable[RolloutView | FleetJobView]
) -> RefusedError | NotFoundError:
    """Why there is no workflow to ask: the name is unknown, the job is over, or somebody has ended its workflow."""
    try:
        found = await known
    except NotFoundError:
        return NotFoundError(f"no {kind} {name!r}; '{kind} list' shows those that exist")
    if found.outcome is None:
        return RefusedError(
            f"{kind} {name} stands at {found.phase}, but its workflow does not run; start it again with its specification"
        )
    return RefusedError(f"{kind} {name} has ended ({found.outcome}): {found.reason}")


def _words_of(error: WorkflowUpdateFailedError) -> str:
    cause: BaseException | None = error.cause
    while cause is not None and not isinstance(cause, ApplicationError):
        cause = cause.__cause__
    return cause.message if isinstance(cause, ApplicationError) else str(error.cause)
