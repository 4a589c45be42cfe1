"""A device's shadow: what is wanted, what the device says it is, and when each leaf of both was set.

Pure. A document is a value: an update gives another one, with a version more, or is refused. Rules (AWS IoT's): objects
are merged key by key, scalars and arrays replace whole, `null` deletes a key, a section that is `null` is dropped. The
limits are judged after the merge, so that no two small updates make one large document.

>>> now = Document().updated({"desired": {"power": "on", "level": 3}}, 1000.0)
>>> now = now.updated({"reported": {"power": "on", "level": 2}}, 1001.0)
>>> now.version, now.delta()
(2, {'level': 3})
>>> now.updated({"desired": {"level": None}}, 1002.0).delta()
{}
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import orjson

from domain.differences import delta_of, depth_of

MAX_SHADOW_BYTES = 8 * 1024
"""Of desired and reported as JSON, together; metadata is not counted."""
MAX_SHADOW_DEPTH = 8
"""How deep a section may be nested, the section itself being the first level."""
MAX_SHADOW_KEYS = 200
"""Keys of a section on all levels. What a device has to say fits; a document that is nothing but keys does not."""
MAX_SHADOWS = 100
"""Shadows of one device, those that were deleted within KEPT_HOURS included: each name is a row that stays."""
KEPT_HOURS = 48
"""How long the version of a shadow that was deleted goes on."""
RECENT_UPDATES = 10
"""Updates that are known again when a broker delivers them twice."""
SECTIONS = ("desired", "reported")


class ShadowRefusedError(ValueError):
    """Why an update is not accepted, with the code that its rejection carries."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Document:
    """A shadow at one version. A section that is None is not there; version 0 has never been. Times are epoch seconds.

    Nothing inside is ever changed in place: documents share what they have in common.
    """

    desired: dict[str, Any] | None = None
    reported: dict[str, Any] | None = None
    desired_metadata: dict[str, Any] | None = None
    reported_metadata: dict[str, Any] | None = None
    version: int = 0
    exists: bool = False
    """False: never there, or deleted; then the version is that of the one before."""

    def updated(self, patch: Mapping[str, Any], now: float, expected_version: int | None = None) -> "Document":
        """The document after an update of `desired`, `reported` or both.

        Raises ShadowRefusedError: 409 where another version was expected, 413 too large, 400 too deep or too many keys.
        """
        if expected_version is not None and expected_version != self.version:
            raise ShadowRefusedError(409, "Version conflict")
        changes: dict[str, Any] = {"version": self.version + 1, "exists": True}
        for section in SECTIONS:
            if section in patch:
                state, metadata = getattr(self, section), getattr(self, f"{section}_metadata")
                merged = merge_section(state, metadata, patch[section], int(now))
                changes[section], changes[f"{section}_metadata"] = merged
        after = replace(self, **changes)
        check_limits(after)
        return after

    def deleted(self, expected_version: int | None = None) -> "Document":
        """The document once it is gone: its version stays. Raises ShadowRefusedError: 409."""
        if expected_version is not None and expected_version != self.version:
            raise ShadowRefusedError(409, "Version conflict")
        return Document(version=self.version)

    def delta(self) -> dict[str, Any]:
        """What of the wanted state is not reported."""
        return delta_of(self.desired, self.reported or {}) if self.desired else {}

    def state(self) -> dict[str, Any]:
        """The sections that are there."""
        return {name: part for name in SECTIONS if (part := getattr(self, name)) is not None}

    def metadata(self) -> dict[str, Any]:
        """The sections' metadata."""
        return {name: part for name in SECTIONS if (part := getattr(self, f"{name}_metadata")) is not None}


def merge_section(
    state: dict[str, Any] | None, metadata: dict[str, Any] | None, patch: dict[str, Any] | None, timestamp: int
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """A section and its metadata after a patch; None for both where the patch drops it."""
    if patch is None:
        return None, None
    return merge(state or {}, metadata or {}, patch, timestamp)


def merge(
    state: dict[str, Any], metadata: dict[str, Any], patch: dict[str, Any], timestamp: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Merge a patch into an object and its metadata; neither is changed.

    >>> merge({"a": 1, "b": {"c": 2}}, {}, {"a": None, "b": {"d": [3]}}, 9)
    ({'b': {'c': 2, 'd': [3]}}, {'b': {'d': [{'timestamp': 9}]}})
    """
    state, metadata = dict(state), dict(metadata)
    for key, value in patch.items():
        if value is None:
            state.pop(key, None)
            metadata.pop(key, None)
        elif isinstance(value, dict):
            known = state.get(key)
            inner = (known, metadata.get(key) or {}) if isinstance(known, dict) else ({}, {})
            merged, inner_metadata = merge(*inner, value, timestamp)
            if merged or not value or key in state:  # to delete what is not there makes nothing
                state[key], metadata[key] = merged, inner_metadata
        else:
            state[key], metadata[key] = value, metadata_of(value, timestamp)
    return state, metadata


def metadata_of(value: Any, timestamp: int) -> Any:
    """`{"timestamp": ...}` for each leaf, each element of an array being one; keys that are deleted have none.

    >>> metadata_of({"power": "on", "rgb": [1, 2], "old": None}, 9)
    {'power': {'timestamp': 9}, 'rgb': [{'timestamp': 9}, {'timestamp': 9}]}
    """
    if isinstance(value, dict):
        return {key: metadata_of(inner, timestamp) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [metadata_of(inner, timestamp) for inner in value]
    return {"timestamp": timestamp}


def metadata_for(state: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Of `metadata` what belongs to the leaves of `state`, as for a delta."""
    return {
        key: metadata_for(value, metadata[key])
        if isinstance(value, dict) and isinstance(metadata[key], dict)
        else metadata[key]
        for key, value in state.items()
        if key in metadata
    }


def check_limits(document: Document) -> None:
    """Raise ShadowRefusedError where a document is larger than shadows may be."""
    sections = [part for name in SECTIONS if (part := getattr(document, name)) is not None]
    if max(map(depth_of, sections), default=0) > MAX_SHADOW_DEPTH:
        raise ShadowRefusedError(
            400, f"JSON contains too many levels of nesting; maximum is {MAX_SHADOW_DEPTH} in a section"
        )
    if (keys := max(map(keys_of, sections), default=0)) > MAX_SHADOW_KEYS:
        raise ShadowRefusedError(400, f"JSON contains too many keys: {keys} in a section, maximum is {MAX_SHADOW_KEYS}")
    if (size := size_of(document)) > MAX_SHADOW_BYTES:
        raise ShadowRefusedError(
            413,
            f"The payload exceeds the maximum size allowed: desired and reported are {size} bytes after the merge, "
            f"maximum is {MAX_SHADOW_BYTES}",
        )


def size_of(document: Document) -> int:
    """Bytes of both sections as JSON."""
    return sum(len(orjson.dumps(part)) for name in SECTIONS if (part := getattr(document, name)) is not None)


def keys_of(value: Any) -> int:
    """Keys of objects on all levels.

    >>> keys_of({"a": {"b": 1}, "c": [{"d": 2}]})
    4
    """
    if isinstance(value, dict):
        return len(value) + sum(keys_of(inner) for inner in value.values() if isinstance(inner, dict | list))
    if isinstance(value, list):
        return sum(keys_of(inner) for inner in value if isinstance(inner, dict | list))
    return 0


def without_nulls(patch: Mapping[str, Any]) -> dict[str, Any]:
    """What a patch wants to be there: without the keys that it deletes.

    >>> without_nulls({"power": "on", "old": None, "door": {"open": None}})
    {'power': 'on'}
    """
    return merge({}, {}, dict(patch), 0)[0]
