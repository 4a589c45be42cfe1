"""Whether a device reports what was wanted of it, and what to tell a person where it does not. Pure.

>>> still_missing({"power": "on", "old": None}, Document(reported={"power": "off"}))
{'power': 'on'}
"""

from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any

import orjson

from domain.differences import delta_of
from domain.shadow import Document, without_nulls
from models.quantities import format_duration

MOST_SHOWN = 5
MOST_CHARS = 60


def still_missing(patch: Mapping[str, Any] | None, document: Document) -> dict[str, Any]:
    """What of a patch is not reported. Keys that it deletes are wanted of nobody."""
    return delta_of(without_nulls(patch or {}), document.reported or {})


def unconfirmed(
    device_id: str,
    patch: Mapping[str, Any] | None,
    document: Document,
    limit: timedelta,
    now: datetime,
    last_heard: datetime | None,
    offline_since: datetime | None,
) -> str:
    """Why a wait has ended without the device's word: what differs, and whether anybody is there to say so."""
    differs = still_missing(patch, document)
    said = [
        f"{name} is {_shown(have)}, wanted {_shown(want)}" for name, want, have in _leaves(differs, document.reported)
    ]
    more = f" and {len(said) - MOST_SHOWN} more" if len(said) > MOST_SHOWN else ""
    parts = [
        f"{device_id} has not reported it within {format_duration(limit)}: {', '.join(said[:MOST_SHOWN])}{more}",
        _heard(now, last_heard, offline_since),
    ]
    if delta_of(without_nulls(patch or {}), document.desired or {}):
        parts.append("something else is wanted by now")
    else:
        parts.append("it stays wanted, and the device is given it when it asks")
    return "; ".join(parts)


def _heard(now: datetime, last_heard: datetime | None, offline_since: datetime | None) -> str:
    if last_heard is None:
        return "no heartbeat of it has ever been heard"
    ago = format_duration(timedelta(seconds=max(0, round((now - last_heard).total_seconds()))))
    if offline_since is not None:
        return f"it is offline since {offline_since:%Y-%m-%d %H:%M:%S}Z, last heard {ago} ago"
    return f"it is not offline, last heard {ago} ago"


def _leaves(differs: Mapping[str, Any], reported: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key, want in differs.items():
        have = reported.get(key, _NOTHING) if isinstance(reported, Mapping) else _NOTHING
        if isinstance(want, Mapping) and want and isinstance(have, Mapping):
            yield from _leaves(want, have, f"{path}{key}.")
        else:
            yield f"{path}{key}", want, have


_NOTHING = object()


def _shown(value: Any) -> str:
    if value is _NOTHING:
        return "not reported"
    text = orjson.dumps(value).decode()
    return text if len(text) <= MOST_CHARS else f"{text[:MOST_CHARS]}..."
