"""What workflows answer to those who ask something of them: refusals, and who asked for what.

`refuse` is for what a workflow decides by itself, `in_its_words` for what an activity has refused.
"""

from collections.abc import Awaitable

from temporalio.exceptions import ActivityError, ApplicationError

from workflows import options


def refuse(why: str | None) -> None:
    """Refuse an update with a sentence that a person can act on; None: there is nothing to refuse."""
    if why is not None:
        raise ApplicationError(why, type="RefusedError", non_retryable=True)


def refusal(error: BaseException) -> str | None:
    """The sentence with which an activity refused what no repetition mends; None for any other error."""
    cause = error.cause if isinstance(error, ActivityError) else None
    return cause.message if isinstance(cause, ApplicationError) and cause.type in options.NEVER_MENDED else None


async def in_its_words(step: Awaitable[None]) -> None:
    """Await a step of an update; when it refuses, say why in its own words rather than "activity failed"."""
    try:
        await step
    except ActivityError as error:
        cause = error.cause
        if isinstance(cause, ApplicationError) and refusal(error) is not None:
            raise ApplicationError(cause.message, type=cause.type, non_retryable=True) from error
        raise


def root_of(error: BaseException) -> str:
    """What the innermost error says."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


def said_by(done: str, actor: str, reason: str) -> str:
    """Who did it, and why.

    >>> said_by("paused", "alice", "storm"), said_by("Asked", "alice", "")
    ('paused by alice: storm', 'Asked by alice')
    """
    return f"{done} by {actor}: {reason}" if reason else f"{done} by {actor}"
