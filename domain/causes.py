r"""From what devices said when they failed to what went wrong: the same cause is one line, however many devices tell it.

A reason is a device's own text. What differs from one device to the next (numbers, hashes, addresses, paths, quoted
names) is collapsed, so that texts of one cause become equal; what they have in common is what is shown.

>>> normalise("slot b cannot be written at 0x1f40: sector 77")
'slot b cannot be written at <hex>: sector <n>'
>>> normalise("/dev/mtd3: No space left (28 of 4096 blocks)")
'<path>: No space left (<n> of <n> blocks)'
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

MAX_REASON_CHARS = 200
MAX_READ_CHARS = 2000
"""Of a reason, before it is collapsed: bounds the work that one text can cost."""
NO_REASON = "no reason given"

_BLANK = re.compile(r"[\x00-\x20\x7f-\xa0\u2028\u2029]+")
_RULES = (
    (re.compile(r"\b[a-z][a-z0-9+.-]{1,11}://[^\s\"'<>]{1,500}", re.I), "<url>"),
    (re.compile(r"(?<![\w.:<])(?:/[\w.@%+,=~-]{1,100}){1,30}/?"), "<path>"),
    (re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b", re.I), "<hex>"),
    (re.compile(r"\b0x[0-9a-f]{1,64}\b", re.I), "<hex>"),
    (re.compile(r"\b(?=[a-f]*[0-9])[0-9a-f]{8,200}\b", re.I), "<hex>"),
    (re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d{1,5})?\b"), "<address>"),
    (re.compile(r"\d{1,30}(?:\.\d{1,30})*"), "<n>"),
)


def normalise(reason: str | None) -> str:
    """What a reason has in common with others of its cause."""
    text = _BLANK.sub(" ", (reason or "")[:MAX_READ_CHARS]).strip()
    for pattern, mark in _RULES:
        text = pattern.sub(mark, text)
    if len(text) > MAX_REASON_CHARS:
        text = text[: MAX_REASON_CHARS - 1] + "…"
    return text or NO_REASON


@dataclass(frozen=True, slots=True)
class FailureGroup:
    """Failures of one class with one and the same text. `example` is one of the devices."""

    failure_class: str
    reason: str | None
    count: int
    example: str
    first_at: datetime | None = None
    last_at: datetime | None = None
    diagnosed: int = 0
    """Devices among them that answered diagnostic requests; the example is one of these where there is one."""


@dataclass(frozen=True, slots=True)
class Cause:
    """Failures with one cause."""

    failure_class: str
    reason: str
    count: int
    share: float
    example: str
    example_reason: str
    first_at: datetime | None
    last_at: datetime | None
    diagnosed: int


def causes_of(groups: Iterable[FailureGroup], total: int | None = None) -> list[Cause]:
    """Failures by cause, the most frequent first.

    Args:
        groups: failures, those with the same text counted already.
        total: all failures, where `groups` are not all of them.
    """
    merged: dict[tuple[str, str], list[FailureGroup]] = {}
    counted = 0
    for group in groups:
        counted += group.count
        merged.setdefault((group.failure_class, normalise(group.reason)), []).append(group)
    whole = max(counted, total or 0, 1)
    found = [_cause(*key, alike, whole) for key, alike in merged.items()]
    return sorted(found, key=lambda cause: (-cause.count, cause.failure_class, cause.reason))


def _cause(failure_class: str, reason: str, alike: list[FailureGroup], whole: int) -> Cause:
    count = sum(group.count for group in alike)
    shown = min(alike, key=lambda group: (not group.diagnosed, -group.count, group.example))
    return Cause(
        failure_class=failure_class,
        reason=reason,
        count=count,
        share=count / whole,
        example=shown.example,
        example_reason=shown.reason or "",
        first_at=min((group.first_at for group in alike if group.first_at), default=None),
        last_at=max((group.last_at for group in alike if group.last_at), default=None),
        diagnosed=sum(group.diagnosed for group in alike),
    )
