"""What a device says when it is asked how it is: system-info, log-tail, config-dump, ping.

Reads only. `Diagnostics.answer` never raises: a question that cannot be answered has an answer with `error`. Whoever
asks (diagnoser.py over MQTT, a job's diagnostic operation) gets the same. A reboot is none of these, because it does
something: it needs an order (reboot.py).

Answers fit a message: lists of lines are cut from their old end, and say so with `truncated`.
"""

import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import orjson

from agent.configuration import Configuration
from agent.logbook import MAX_LINES, LogBook
from models.protocol import DiagnosticType

MAX_ANSWER_BYTES = 28 * 1024
"""Of the answer's JSON; a request to the gateway may have 32 KiB, topic and request id included."""
DEFAULT_LINES = 50
MASK = "********"
_SECRET = re.compile(
    r"(?i:passw|passphrase|secret|token|credential|api.?key|private|^key$|[_-]key$|^psk$|^pin$)|[a-z]Key$"
)
_MOST_INTERFACES = 16


class Surroundings(Protocol):
    """Where the figures of `system-info` come from."""

    def system_info(self) -> dict[str, Any]:
        """uptime, freeMemory, totalMemory, cpuTemperature, diskUsage, networkStatus."""


class Diagnostics:
    """Answers questions about one device."""

    def __init__(
        self,
        surroundings: Surroundings,
        log: LogBook,
        configuration: Callable[[], Configuration],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._surroundings = surroundings
        self._log = log
        self._configuration = configuration
        self._clock = clock

    def answer(self, asked: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of the answer; `error` where there is none."""
        try:
            match asked:
                case DiagnosticType.SYSTEM_INFO:
                    found = self._surroundings.system_info()
                case DiagnosticType.LOG_TAIL:
                    return self._log_tail(parameters)
                case DiagnosticType.CONFIG_DUMP:
                    found = self._config_dump()
                case DiagnosticType.PING:
                    found = {"pong": True, "timestamp": int(self._clock() * 1000)}
                case DiagnosticType.REBOOT:
                    return {"error": "a reboot needs an order of its own"}
                case _:
                    return {"error": f"unknown request type: {asked[:40]}"}
            size = len(orjson.dumps(found))
        except (OSError, ValueError, TypeError) as error:
            return {"error": f"cannot answer {asked}: {error}"[:300]}
        if size > MAX_ANSWER_BYTES:
            return {"error": f"the answer has {size} bytes, at most {MAX_ANSWER_BYTES} fit a message"}
        return found

    def _log_tail(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        lines = parameters.get("lines", DEFAULT_LINES)
        if isinstance(lines, bool) or not isinstance(lines, int) or not 1 <= lines <= MAX_LINES:
            return {"error": f"lines: expected an integer from 1 to {MAX_LINES}, got {lines!r:.40}"}
        return fitted(self._log.tail(lines))

    def _config_dump(self) -> dict[str, Any]:
        current = self._configuration()
        return {"config": masked(dict(current.config)), "configVersion": current.version}


def fitted(lines: list[str], most: int = MAX_ANSWER_BYTES) -> dict[str, Any]:
    """`logs`, without its oldest lines where all of them do not fit.

    >>> fitted(["one", "two"], 39)
    {'logs': ['two'], 'truncated': True}
    """
    kept, room = len(lines), most - len(b'{"logs":[],"truncated":true}')
    while kept and (room := room - len(orjson.dumps(lines[kept - 1])) - 1) >= 0:
        kept -= 1
    return {"logs": lines[kept:], **({"truncated": True} if kept else {})}


def masked(value: Any, depth: int = 0) -> Any:
    """A configuration without its secrets: whatever stands under a key that sounds like one.

    >>> masked({"mqtt": {"password": "x", "port": 1}, "apiKey": "y"})
    {'mqtt': {'password': '********', 'port': 1}, 'apiKey': '********'}
    """
    if depth > 20:
        return MASK
    if isinstance(value, Mapping):
        return {key: MASK if _SECRET.search(str(key)) else masked(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [masked(item, depth + 1) for item in value]
    return value


class LinuxSurroundings:
    """Figures of the machine that the agent runs on. What the machine does not tell is null."""

    def __init__(
        self, folder: Callable[[], Path], uptime: Callable[[], float], connection_errors: Callable[[], int]
    ) -> None:
        self._folder = folder
        self._uptime = uptime
        self._connection_errors = connection_errors

    def system_info(self) -> dict[str, Any]:
        """See Surroundings."""
        memory, disk = _meminfo(), shutil.disk_usage(self._folder())
        return {
            "uptime": int(self._uptime()),
            "freeMemory": memory.get("MemAvailable"),
            "totalMemory": memory.get("MemTotal"),
            "cpuTemperature": _temperature(),
            "diskUsage": {"total": disk.total, "used": disk.used, "free": disk.free},
            "networkStatus": {
                "connected": True,
                "connectionErrors": self._connection_errors(),
                "interfaces": _interfaces(),
            },
        }


def _meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        name, _, rest = line.partition(":")
        number = rest.split()
        if number and number[0].isdigit():
            found[name] = int(number[0]) * 1024
    return found


def _temperature() -> float | None:
    """Of the warmest zone, in degrees Celsius."""
    found = []
    for zone in Path("/sys/class/thermal").glob("thermal_zone*/temp"):
        try:
            found.append(int(zone.read_text()) / 1000)
        except (OSError, ValueError):
            continue
    return round(max(found), 1) if found else None


def _interfaces() -> list[dict[str, str]]:
    """Network interfaces but the loopback, and whether they are up."""
    found = []
    for link in sorted(Path("/sys/class/net").glob("*"))[: _MOST_INTERFACES + 1]:
        try:
            state = (link / "operstate").read_text().strip()
        except OSError:
            continue
        if link.name != "lo":
            found.append({"name": link.name[:32], "state": state[:32]})
    return found[:_MOST_INTERFACES]
