"""What starting and steering have in common for rollouts and jobs: requests to a workflow, and its answers in words."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import typer
from temporalio.client import WorkflowUpdateFailedError, WorkflowUpdateRPCTimeoutOrCancelledError
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from models.errors import NotFoundError, RefusedError, UnavailableError

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


def _words_of(error: WorkflowUpdateFailedError) -> str:
    cause: BaseException | None = error.cause
    while cause is not None and not isinstance(cause, ApplicationError):
        cause = cause.__cause__
    return cause.message if isinstance(cause, ApplicationError) else str(error.cause)
