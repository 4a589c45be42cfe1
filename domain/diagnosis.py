"""What an answer to a diagnostic request comes to, in a few words. Pure.

Answers are what a device chose to send: every field may be missing, or anything at all. What is not of the expected kind
is left out.
"""

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from models.protocol import DiagnosticType
from models.quantities import format_duration

MAX_LINE_CHARS = 160
_QUESTION = re.compile(r"asked for '[^']*': ")
"""What a device notes of being asked: the last line of every log that was asked for, and no news."""


def number(value: Any) -> float | None:
    """A number a person can read; None for anything else.

    >>> number(3), number("3"), number(True), number(None)
    (3.0, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e15:
        return None
    return float(value)


def percent(part: Any, whole: Any) -> float | None:
    """How many of a hundred; None where that makes no sense.

    >>> percent(1, 4), percent(1, 0), percent(5, 4)
    (25.0, None, None)
    """
    some, all_of_it = number(part), number(whole)
    if some is None or all_of_it is None or all_of_it <= 0 or not 0 <= some <= all_of_it:
        return None
    return 100 * some / all_of_it


def span(seconds: Any) -> str | None:
    """`2h5m`; None for what is no number of seconds.

    >>> span(7509), span(-1)
    ('2h5m9s', None)
    """
    value = number(seconds)
    if value is None or not 0 <= value < 1e9:
        return None
    return format_duration(timedelta(seconds=int(value)))


def summary(what: str, answer: Mapping[str, Any]) -> str:
    """An answer in a few words; empty where it says nothing.

    >>> summary("system-info", {"uptime": 90, "freeMemory": 1, "totalMemory": 4, "diskUsage": {"used": 9, "total": 10}})
    'up 1m30s, 25% of memory free, disk 90% full'
    >>> summary("log-tail", {"logs": ["one", "the last one"]})
    'its log ends: the last one'
    >>> summary("log-tail", {"logs": ["fell back", "asked for 'system-info': answered"]})
    'its log ends: fell back'
    """
    if what == DiagnosticType.SYSTEM_INFO:
        disk = answer.get("diskUsage")
        free, full = percent(answer.get("freeMemory"), answer.get("totalMemory")), None
        if isinstance(disk, Mapping):
            full = percent(disk.get("used"), disk.get("total"))
        parts = [
            f"up {up}" if (up := span(answer.get("uptime"))) else "",
            f"{free:.0f}% of memory free" if free is not None else "",
            f"{degrees:.0f} °C" if (degrees := number(answer.get("cpuTemperature"))) is not None else "",
            f"disk {full:.0f}% full" if full is not None else "",
        ]
        return ", ".join(filter(None, parts))
    if what == DiagnosticType.LOG_TAIL:
        logs = answer.get("logs")
        lines = [line for line in logs if isinstance(line, str) and line.strip()] if isinstance(logs, list) else []
        own = [line for line in lines if not _QUESTION.search(line)]
        return f"its log ends: {(own or lines)[-1][:MAX_LINE_CHARS]}" if lines else ""
    return ""
