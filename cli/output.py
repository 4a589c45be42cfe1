"""How commands speak: tables for people or JSON for programs on stdout, messages on stderr, and exit statuses.

Text from devices and files never reaches a terminal raw: control characters are written as escapes, and nothing of it
is read as markup.
"""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_json
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Column, Table
from rich.text import Text

from models.errors import (
    ConflictError,
    ImportRowError,
    InvalidInputError,
    Mistake,
    NotFoundError,
    RefusedError,
    SpecError,
    StillWaitingError,
)
from models.quantities import format_duration
from models.rollout import Outcome

WIDE = 160
"""Columns where stdout is not a terminal: tables go to files and pipes unfolded."""
LONGEST_NAME = 18
"""Columns of what is kept in one piece on a narrow terminal: a state, a name, but no time and no reason."""
LEAST_TEXT = 8
"""Columns that a text keeps on a narrow terminal, before names beside it are broken."""


class ExitStatus(IntEnum):
    """What a command's exit status says. A rollout's outcome decides for `start --wait` and `watch`, and a
    job's alike: cancelled is ABORTED, and a job that has ended as it should is SUCCEEDED though devices have failed in it."""

    SUCCEEDED = 0
    ERROR = 1
    USAGE = 2
    HALTED = 3
    ABORTED = 4
    WAITING = 5
    REFUSED = 6
    INTERRUPTED = 130


EXIT_HELP = (
    "Exit status: 0 done, or the rollout or job succeeded; 1 an error, a server that does not answer, a rollout or job that "
    "failed; 2 wrong input, or no such thing; 3 halted by the gate; 4 aborted or cancelled; 5 waits for a person, or the waiting time is over; "
    "6 refused: the state of things does not allow it."
)

_OF_OUTCOME = {
    Outcome.SUCCEEDED: ExitStatus.SUCCEEDED,
    Outcome.HALTED: ExitStatus.HALTED,
    Outcome.ABORTED: ExitStatus.ABORTED,
    Outcome.REFUSED: ExitStatus.REFUSED,
    Outcome.FAILED: ExitStatus.ERROR,
}


def status_of_outcome(outcome: Outcome) -> ExitStatus:
    """The exit status that says how a rollout ended."""
    return _OF_OUTCOME[outcome]


def status_of_error(error: BaseException) -> ExitStatus:
    """The exit status of a command that ended in an error."""
    if isinstance(error, ConflictError | RefusedError):
        return ExitStatus.REFUSED
    if isinstance(error, InvalidInputError | NotFoundError):
        return ExitStatus.USAGE
    if isinstance(error, StillWaitingError):
        return ExitStatus.WAITING
    return ExitStatus.ERROR


class Output:
    """Where a command's words go. With `as_json`, stdout carries JSON alone."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else WIDE
        self.console = Console(width=width, highlight=False)
        self.messages = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A message for the person; not part of the result."""
        self.messages.print(printable(text, "\n"), markup=False)

    def result(self, data: BaseModel | dict[str, Any], shown: RenderableType | Iterable[RenderableType]) -> None:
        """The command's result: `data` as JSON, or what is `shown`."""
        if self.as_json:
            print(as_json(data))
            return
        parts = [shown] if isinstance(shown, str | Text | Table) or not isinstance(shown, Iterable) else shown
        for part in parts:
            self.console.print(printable(part, "\n") if isinstance(part, str) else part, markup=False, soft_wrap=True)

    def error(self, error: BaseException, message: str) -> ExitStatus:
        """Tell what went wrong, on stderr; for programs on stdout too. Returns the exit status."""
        status = status_of_error(error)
        self.messages.print(Text("error: ", style="bold red"), Text(printable(message, "\n")), sep="")
        if self.as_json:
            detail: dict[str, Any] = {"kind": type(error).__name__, "message": message}
            if isinstance(error, SpecError | ImportRowError):
                detail["mistakes"] = [_mistake(m) for m in error.mistakes]
            print(as_json({"error": detail, "exit_status": int(status)}))
        return status


def as_json(data: Any) -> str:
    """One line of JSON; times in ISO 8601, durations and shares as in a specification; unprintable characters escaped."""
    text = data.model_dump_json() if isinstance(data, BaseModel) else to_json(data).decode()
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(char: str) -> str:
    r"""As JSON escapes it, so that it means the same and moves no cursor.

    >>> _escaped(chr(0x9B)), _escaped(chr(0xE0001))
    ('\\u009b', '\\udb40\\udc01')
    """
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at] << 8 | units[at + 1]:04x}" for at in range(0, len(units), 2))


def as_dict(model: BaseModel) -> dict[str, Any]:
    """A model as the JSON object that `as_json` writes."""
    found: dict[str, Any] = json.loads(model.model_dump_json())
    return found


def printable(text: str, kept: str = "") -> str:
    """Text with every character written out that is not to be seen: controls, escapes, marks that turn the direction of
    writing, but for those in `kept`.

    >>> printable("a\\x1b[2J")
    'a\\\\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


class FittedTable(Table):
    """A table that on a narrow terminal leaves empty columns out and breaks long texts, not numbers, states and names."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if sum(map(_natural_width, self.columns)) + 3 * len(self.columns) + 1 > options.max_width:
            self.columns = [column for column in self.columns if any(map(str, column.cells))] or self.columns
            self._keep_whole(options.max_width)
        yield from super().__rich_console__(console, options)

    def _keep_whole(self, width: int) -> None:
        """Keep the narrowest columns in one piece, as long as enough is left of the others to be read."""
        columns = sorted(self.columns, key=_natural_width)
        room = width - 3 * len(columns) - 1
        for number, column in enumerate(columns, start=1):
            room -= _natural_width(column)
            column.no_wrap = _natural_width(column) <= LONGEST_NAME and room >= sum(map(_least_width, columns[number:]))


def _natural_width(column: Column) -> int:
    return max(cell_len(str(cell)) for cell in (column.header, *column.cells))


def _least_width(column: Column) -> int:
    words = " ".join(str(cell) for cell in (column.header, *column.cells)).split()
    return min(LEAST_TEXT, max(map(cell_len, words), default=0))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> Table:
    """A table of text; None is shown as nothing, and nothing is read as markup.

    Args:
        right: columns that are numbers.
    """
    made = FittedTable(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, header_style="bold")
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(printable(_cell(cell))) for cell in row))
    return made


def facts(pairs: Iterable[tuple[str, object]]) -> Table:
    """`name  value` lines; pairs without a value are left out."""
    made = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in pairs:
        if value is not None and value != "":
            made.add_row(Text(printable(name)), value if isinstance(value, Text) else Text(printable(_cell(value))))
    return made


def when(moment: datetime | None) -> str:
    """A time as shown: UTC, to the second."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ") if moment else ""


def ago(moment: datetime | None, now: datetime) -> str:
    """`3m20s ago`; empty for never."""
    return f"{rough(now - moment)} ago" if moment else ""


def rough(span: timedelta) -> str:
    """A duration to two places that matter: `2h5m`, `12s`.

    >>> rough(timedelta(hours=2, minutes=5, seconds=9))
    '2h5m'
    """
    seconds = max(0, round(span.total_seconds()))
    size = 86400 if seconds >= 86400 * 10 else 3600 if seconds >= 86400 else 60 if seconds >= 3600 else 1
    return format_duration(timedelta(seconds=seconds // size * size))


def size(size_bytes: int) -> str:
    """`1.2 MiB`."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, datetime):
        return when(value)
    if isinstance(value, dict):
        return ", ".join(f"{key}={inner}" for key, inner in value.items())
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    return str(value)


def _mistake(mistake: Mistake) -> dict[str, Any]:
    return {"line": mistake.line, "path": mistake.path, "message": mistake.message}
