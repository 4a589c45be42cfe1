"""Shares and durations as people write them: `2%`, `4h`; exact as `Fraction` and `timedelta`.

No float stands at a boundary: `0.1%` is 1/1000. Both serialise back to the form a person would write.
"""

import re
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|[smhdw]))+")
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhdw])")
_MOST_PLACES = 30
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")


def parse_duration(value: Any) -> timedelta:
    """`4h`, `30m`, `1d12h`, `250ms`, `0`, or a timedelta. Raises ValueError saying what was expected."""
    if isinstance(value, timedelta):
        return value
    text = str(value).strip()
    if text == "0":
        return timedelta(0)
    if not _DURATION.fullmatch(text):
        raise ValueError(f"expected a duration as in 30m, 4h or 1d12h, got {value!r}")
    return timedelta(seconds=sum(float(n) * _UNITS[u] for n, u in _DURATION_PART.findall(text)))


def format_duration(value: timedelta) -> str:
    """The shortest exact writing: `4h`, `1d12h`, `90s` as `1m30s`, `0s`.

    >>> format_duration(timedelta(hours=36))
    '1d12h'
    """
    milliseconds = round(value / timedelta(milliseconds=1))
    parts = []
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, milliseconds = divmod(milliseconds, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


def parse_share(value: Any) -> Fraction:
    """`5%` or a Fraction; between 0 and 1. A bare number is refused: 5 could mean 5 % or 500 %."""
    if isinstance(value, Fraction):
        share = value
    else:
        match = _PERCENT.fullmatch(str(value).strip())
        if match is None:
            raise ValueError(f"expected a percentage as in 5%, got {value!r}")
        share = Fraction(match[1]) / 100
    if not 0 <= share <= 1:
        raise ValueError(f"expected a percentage from 0% to 100%, got {value!r}")
    return share


def format_share(value: Fraction) -> str:
    """`5%`, `0.1%`, exactly; shares that have no finite decimal are written to six places.

    >>> format_share(Fraction(1, 1000)), format_share(Fraction(1, 10**9))
    ('0.1%', '0.0000001%')
    """
    percent = value * 100
    places = next((n for n in range(_MOST_PLACES) if (percent * 10**n).denominator == 1), 6)
    text = f"{Decimal(round(percent * 10**places)).scaleb(-places):f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text}%"


Duration = Annotated[
    timedelta,
    BeforeValidator(parse_duration),
    PlainSerializer(format_duration, return_type=str),
    WithJsonSchema({"type": "string", "examples": ["4h", "30m"]}),
]
Share = Annotated[
    Fraction,
    BeforeValidator(parse_share),
    PlainSerializer(format_share, return_type=str),
    WithJsonSchema({"type": "string", "examples": ["5%"]}),
]
