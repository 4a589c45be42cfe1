"""Why devices failed, cause by cause, for a terminal."""

from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from cli.output import facts, printable, table, when
from models.diagnostics import CauseView

SHOWN = 10
"""Causes in the table; a fleet with more has one cause that makes a new text each time. `--json` has all of them."""


def cause_parts(causes: Sequence[CauseView], shown: int = SHOWN) -> list[RenderableType]:
    """A table of causes, and what the devices of each said when they were asked."""
    rows = [
        (cause.failure_class, cause.reason, cause.count, f"{100 * cause.share:.0f}%", cause.example,
         when(cause.first_at), when(cause.last_at))
        for cause in causes[:shown]
    ]  # fmt: skip
    columns = ("failure", "cause", "devices", "share", "for example", "first", "last")
    parts: list[RenderableType] = [table("why devices failed", columns, rows, right=("devices", "share"))]
    if len(causes) > shown:
        rest = sum(cause.count for cause in causes[shown:])
        parts.append(Text(f"and {len(causes) - shown} more causes of {rest} devices; --json has all", style="dim"))
    asked = [(cause.example, Text(printable(_said(cause)))) for cause in causes[:shown] if cause.diagnosed]
    if asked:
        parts += [Text("asked about their failure (starter.py diagnose DEVICE shows all of it)"), facts(asked)]
    return parts


def _said(cause: CauseView) -> str:
    others = f" (1 of {cause.diagnosed} that answered)" if cause.diagnosed > 1 else ""
    return (cause.said or "it answered") + others
