"""`audit`: who did what to which identity, when and why. Reads; the lines are written with the deeds they tell of."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from cli.command import Session
from cli.output import as_dict, table
from models.errors import InvalidInputError
from models.quantities import parse_duration
from store.audit import AuditStore

_HASH = re.compile("[0-9a-f]{64}")


async def show_audit(
    session: Session,
    device: Annotated[
        str | None, typer.Option(metavar="ID", help="Of this device, and of the serial numbers it has borne.")
    ] = None,
    serial: Annotated[str | None, typer.Option(metavar="SERIAL", help="Of this serial number.")] = None,
    batch: Annotated[str | None, typer.Option(metavar="NAME", help="Of this claim batch.")] = None,
    actor: Annotated[str | None, typer.Option(metavar="NAME", help="By this person or part of Tidegate.")] = None,
    action: Annotated[
        str | None, typer.Option(metavar="ACTION", help="As certificate.revoked; * stands for anything: certificate.*")
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="WHEN", help="Not older than: 2h, 7d, 2026-11-24 or 2026-11-24T18:30Z.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most lines to show.")] = 50,
) -> None:
    """Show the audit, the newest line first: what was issued, revoked, refused, retired, by whom and why."""
    earliest = None if since is None else since_of(since, datetime.now(UTC))
    async with session.database() as db:
        store = AuditStore(db)
        subjects: Sequence[tuple[str, str]] | None = None
        if sum(given is not None for given in (device, serial, batch)) > 1:
            raise InvalidInputError("cannot show the audit: expected at most one of --device, --serial and --batch")
        if device is not None:
            subjects = await store.subjects_of_device(device)
        elif serial is not None:
            subjects = [("serial", serial)]
        elif batch is not None:
            subjects = [("batch", batch)]
        pattern = None if action is None else pattern_of(action)
        lines = await store.find(subjects=subjects, actor=actor, action=pattern, since=earliest, limit=limit)
    rows = [(e.at, e.actor, e.action, f"{e.subject_kind} {e.subject}", e.reason, _shortened(e.details)) for e in lines]
    columns = ("when", "actor", "action", "subject", "reason", "details")
    session.out.result({"events": [as_dict(e) for e in lines]}, [table("", columns, rows)] if rows else [])
    more = f"; --limit shows more than {limit}" if len(lines) == limit else ""
    session.out.say(f"{len(lines)} line{'' if len(lines) == 1 else 's'}{more}")


def _shortened(details: dict[str, Any]) -> dict[str, Any]:
    """Hashes as the other tables show them, by their beginning; --json has all of them.

    >>> _shortened({"certificate_id": "0123456789abcdef" * 4, "generation": 2})
    {'certificate_id': '0123456789abcdef', 'generation': 2}
    """
    return {name: _short(value) for name, value in details.items()}


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return ", ".join(str(_short(each)) for each in value)
    return value[:16] if isinstance(value, str) and _HASH.fullmatch(value) else value


def since_of(written: str, now: datetime) -> datetime:
    """`--since` as a time: so long ago, or a date or time of ISO 8601, in UTC where it names no zone.

    >>> since_of("2h", datetime(2026, 11, 24, 12, tzinfo=UTC)).isoformat()
    '2026-11-24T10:00:00+00:00'
    """
    try:
        return now - parse_duration(written)
    except OverflowError as error:
        raise InvalidInputError(f"not a time: {written!r}: {error}") from error
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(written)
    except ValueError as error:
        raise InvalidInputError(
            f"not a time: {written!r}, expected how long ago, as 2h or 7d, or a date or time, as 2026-11-24T18:30Z"
        ) from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def pattern_of(action: str) -> str:
    r"""`--action` as a pattern of LIKE: only `*` means something.

    >>> pattern_of("certificate.*"), pattern_of("100%_")
    ('certificate.%', '100\\%\\_')
    """
    escaped = action.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return escaped.replace("*", "%")
