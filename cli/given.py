"""What a command is given, read: a duration, or a JSON object in a file. Errors name the option or the file."""

from datetime import timedelta
from pathlib import Path
from typing import Any, overload

import typer

from domain.strict_json import parse_object
from models.errors import InvalidInputError, NotFoundError
from models.quantities import parse_duration


@overload
def duration_of(option: str, text: str) -> timedelta: ...
@overload
def duration_of(option: str, text: str | None) -> timedelta | None: ...
def duration_of(option: str, text: str | None) -> timedelta | None:
    """A duration given as an option; None where it is not given. Raises InvalidInputError."""
    try:
        return None if text is None else parse_duration(text)
    except (ValueError, OverflowError) as error:
        raise InvalidInputError(f"{option}: {error}") from error


def object_in(file: str, what: str) -> dict[str, Any]:
    """The JSON object in a file, or on standard input where its name is `-`.

    Args:
        what: it is to be, as in "a configuration"; for the words of an error.

    Raises:
        NotFoundError: there is no such file.
        InvalidInputError: it cannot be read, or is no JSON object.
    """
    try:
        text = typer.get_text_stream("stdin").read() if file == "-" else Path(file).read_text()
    except FileNotFoundError as error:
        raise NotFoundError(f"cannot read {file}: there is no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"cannot read {file}: {error}") from error
    try:
        return parse_object(text)
    except ValueError as error:
        raise InvalidInputError(f"cannot use {file} as {what}: {error}") from error
