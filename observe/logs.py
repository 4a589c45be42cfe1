"""Structured logs on standard error: one line per event, for people (`console`) or programs (`json`).

Libraries that log through the standard library (Temporal, uvicorn, MQTT clients) come out in the same form. Values that
devices sent may hold control characters; the console writes them escaped, so that no device can forge a line or move
the cursor (JSON escapes them by itself).

```python
log = logs.configure("gateway", Settings())
log.info("ready", broker="127.0.0.1:1883")
```
"""

import logging
import re
import sys
from typing import Literal, Protocol, TextIO, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_NOISY = ("httpx", "httpcore", "asyncio", "alembic", "gmqtt", "uvicorn.access")
"""Libraries that say at INFO what we say ourselves, or nothing of use; heard from WARNING on."""


class LogSettings(Protocol):
    """What is needed of `models.settings.Settings`."""

    @property
    def log_format(self) -> Literal["console", "json"]:
        """How lines look."""

    @property
    def log_level(self) -> str:
        """Least level that is written, as `INFO`."""


def configure(process: str, settings: LogSettings, stream: TextIO | None = None) -> FilteringBoundLogger:
    """Set up logging of this process, and return a logger. May be called again; the last call holds.

    Args:
        process: name in every line, as `gateway`.
        settings: format and level.
        stream: where lines go; standard error when None.
    """
    level = logging.getLevelNamesMapping()[settings.log_level]
    out = stream or sys.stderr
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _process_name(process),
    ]
    structlog.configure(
        processors=[
            *shared,
            structlog.processors.StackInfoRenderer(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_renderers(settings.log_format, colours=out.isatty()),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    return cast(FilteringBoundLogger, structlog.get_logger(process))


def escape_control_characters(text: str) -> str:
    r"""The text with control characters written out.

    >>> escape_control_characters("ok\nforged\x1b[2J")
    'ok\\x0aforged\\x1b[2J'
    """
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def _process_name(process: str) -> Processor:
    def add(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event.setdefault("process", process)
        return event

    return add


def _escape_values(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    for key, value in event.items():
        if not isinstance(value, str):
            continue
        if key in ("exception", "stack"):
            event[key] = "\n".join(map(escape_control_characters, value.split("\n")))
        else:
            event[key] = escape_control_characters(value)
    return event


def _renderers(log_format: str, *, colours: bool) -> list[Processor]:
    if log_format == "json":
        # Tracebacks as text: the structured form would write local variables, keys and passwords among them.
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    return [structlog.processors.format_exc_info, _escape_values, structlog.dev.ConsoleRenderer(colors=colours)]
