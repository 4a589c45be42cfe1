"""A fleet job without a file: its specification from the options of `job start`.

A job for all devices has to be asked for by `--all`: options that were forgotten must not restart a whole fleet.
"""

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cli.device import filter_of
from cli.spec import load_spec
from domain.mistakes import faults_of, path_of
from domain.strict_json import parse_object
from models.device import DeviceFilter, DeviceStatus
from models.errors import InvalidInputError, Mistake, NotFoundError, SpecError
from models.jobspec import FleetJobSpec, Membership
from models.protocol import JobOperation


@dataclass(frozen=True)
class Target:
    """Which devices, as options."""

    type: str | None = None
    sites: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    statuses: list[DeviceStatus] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    inactive: str | None = None
    everything: bool = False

    @property
    def is_given(self) -> bool:
        """Whether any of them stands there."""
        return self != Target(everything=self.everything)

    def filter(self) -> DeviceFilter:
        """As a filter. Raises InvalidInputError, SpecError."""
        if self.is_given and self.everything:
            raise InvalidInputError("--all: expected alone, got it with options that choose devices")
        if not self.is_given and not self.everything:
            raise InvalidInputError(
                "no devices: expected options that choose them (--site, --tag, --type, --status, --version, --id, "
                "--inactive), or --all for every device that is not retired"
            )
        return filter_of(
            self.type, self.sites, self.tags, self.statuses, self.versions, self.ids, self.inactive, "start the job"
        )


@dataclass(frozen=True)
class Quick:
    """The options that make a specification; None where one is not given."""

    operation: JobOperation | None = None
    release: str | None = None
    document: Path | None = None
    config: Path | None = None
    ask: list[str] = field(default_factory=list)
    continuous: bool = False
    max_parallel: int | None = None
    per_minute: int | None = None
    attempts: int | None = None
    backoff: str | None = None
    start_at: str | None = None
    end_at: str | None = None


def specification_of(what: str, quick: Quick, target: Target) -> FleetJobSpec:
    """The specification that `job start WHAT` means: a file's, or the options' with WHAT as its name.

    Raises SpecError, InvalidInputError, NotFoundError.
    """
    if quick.operation is None:
        if quick != Quick() or target != Target():
            raise InvalidInputError(
                f"cannot start {what}: options that describe a job go with --operation and a name; a job of a file is "
                "described there alone"
            )
        if not Path(what).exists() and "." not in what and "/" not in what:
            raise InvalidInputError(
                f"cannot start {what}: expected a specification's file, or a name with --operation and devices, as in "
                f"'job start {what} --operation restart --site berlin'"
            )
        return load_spec(Path(what), FleetJobSpec)
    if quick.operation is JobOperation.CUSTOM and quick.document is None:
        raise InvalidInputError(
            f"cannot start {what}: expected --document FILE with operation custom, a JSON object that tells devices what "
            "to do"
        )
    given: dict[str, Any] = {
        "name": what,
        "operation": quick.operation,
        "release": quick.release,
        "document": _object_in(quick.document, "--document"),
        "config": _object_in(quick.config, "--config"),
        "diagnostics": quick.ask or None,
        "membership": Membership.CONTINUOUS if quick.continuous else None,
        "max_parallel": quick.max_parallel,
        "per_minute": quick.per_minute,
        "start_at": _time_in(quick.start_at, "--start-at"),
        "end_at": _time_in(quick.end_at, "--end-at"),
    }
    retry = {name: value for name, value in (("max_attempts", quick.attempts), ("backoff", quick.backoff)) if value}
    fields = {name: value for name, value in given.items() if value is not None}
    try:
        return FleetJobSpec.model_validate({**fields, "retry": retry, "target": target.filter()})
    except ValidationError as error:
        mistakes = [Mistake(path_of(f.where), f.message) for f in faults_of(error, FleetJobSpec)]
        raise SpecError("options", mistakes) from error


def _object_in(path: Path | None, option: str) -> dict[str, Any] | None:
    """The JSON object in a file."""
    if path is None:
        return None
    try:
        return parse_object(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFoundError(f"{option}: cannot read {path}: there is no such file") from error
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{option}: cannot read {path}: {error}") from error


def _time_in(text: str | None, option: str) -> datetime | None:
    try:
        return None if text is None else datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidInputError(
            f"{option}: expected a time with its zone, as in 2026-11-30T02:00:00Z, got {text!r}"
        ) from error
