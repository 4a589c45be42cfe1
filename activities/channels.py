"""The channels that people are told of alerts through, as the worker's notify file has them (docs/alerts.md).

```yaml
channels:
  - {name: ops, kind: webhook, url: "https://ops.example/alerts", secret: whsec_..., min_severity: warning}
  - {name: mail, kind: apprise, url: "mailtos://user:password@example.com", rules: {include: [overheating]}}
```

Addresses and secrets stay in this process: nothing here puts one into a log, an error, PostgreSQL or Temporal.
"""

import re
import stat
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import structlog
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from standardwebhooks.webhooks import Webhook

from models.alerting import AlertEvent, NotifyInput, Severity
from models.errors import InvalidInputError, Mistake, NotFoundError, SpecError

log = structlog.get_logger("notify")

MAX_BYTES = 256 * 1024
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_-]{0,63}")
_STRICT = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class RuleChoice(BaseModel):
    """Which rules: those included (none named: all), without those excluded."""

    model_config = _STRICT

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


class Channel(BaseModel):
    """One way to tell people."""

    model_config = _STRICT

    name: str
    kind: Literal["apprise", "webhook"]
    url: SecretStr
    secret: SecretStr | None = None
    min_severity: Severity = Severity.INFO
    rules: RuleChoice = RuleChoice()
    events: frozenset[AlertEvent] = frozenset({AlertEvent.OPENED, AlertEvent.RESOLVED})

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError("expected letters, digits, _ and -, at most 64")
        return value

    @model_validator(mode="after")
    def _usable(self) -> "Channel":
        if self.kind == "webhook":
            if urlsplit(self.url.get_secret_value()).scheme not in ("http", "https"):
                raise ValueError("url: expected http://... or https://... for a webhook")
            if self.secret is None or not _is_secret(self.secret.get_secret_value()):
                raise ValueError("secret: expected whsec_ and 24 to 64 bytes in base64, to sign webhooks with")
        elif self.secret is not None:
            raise ValueError("secret: expected none for apprise, whose url holds all it needs")
        return self

    def wants(self, told: NotifyInput) -> bool:
        """Whether this channel is told of it."""
        included = not self.rules.include or told.rule in self.rules.include
        return (
            included
            and told.rule not in self.rules.exclude
            and told.event in self.events
            and told.severity.rank >= self.min_severity.rank
        )

    @property
    def shown(self) -> str:
        """The address without what is secret in it: its scheme, and a webhook's host."""
        parts = urlsplit(self.url.get_secret_value())
        return f"{parts.scheme}://{parts.hostname}/..." if self.kind == "webhook" else f"{parts.scheme}://..."


class _File(BaseModel):
    model_config = _STRICT

    channels: tuple[Channel, ...] = Field(max_length=100)

    @model_validator(mode="after")
    def _named_once(self) -> "_File":
        names = [channel.name for channel in self.channels]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"expected every channel to have its own name, got {twice[0]} twice")
        return self


def _is_secret(text: str) -> bool:
    try:
        return text.startswith("whsec_") and 24 <= len(Webhook(text)._whsecret) <= 64
    except Exception:
        return False


def load_channels(path: Path) -> dict[str, Channel]:
    """The channels in a file, by name.

    Raises:
        SpecError: every mistake in it, none with the value at fault, which may be a secret.
        NotFoundError, InvalidInputError: there is no such file, or it cannot be read.
    """
    try:
        data, mode = path.read_bytes(), path.stat().st_mode
    except FileNotFoundError as error:
        raise NotFoundError(f"cannot read the channels in {path}: there is no such file") from error
    except OSError as error:
        raise InvalidInputError(f"cannot read the channels in {path}: {error.strerror}") from error
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        log.warning("others than its owner can read the secrets in the notify file", path=str(path))
    return {channel.name: channel for channel in _parsed(data, str(path)).channels}


def _parsed(data: bytes, source: str) -> _File:
    if len(data) > MAX_BYTES:
        raise SpecError(source, [Mistake("(document)", f"{len(data)} bytes, expected at most {MAX_BYTES}")])
    document: Any = None
    mistakes: list[Mistake] = []
    try:
        document = YAML(typ="safe", pure=True).load(data.decode())
    except (YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        mistakes.append(Mistake("(document)", f"not YAML ({type(error).__name__})", mark.line + 1 if mark else None))
    if mistakes:  # outside of the block: the error's own text shows what stands in the file
        raise SpecError(source, mistakes)
    try:
        return _File.model_validate(document)
    except ValidationError as error:
        for detail in error.errors(include_input=False, include_url=False, include_context=False):
            where = ".".join(str(part) for part in detail["loc"]) or "(document)"
            mistakes.append(Mistake(where, detail["msg"].removeprefix("Value error, ")))
    raise SpecError(source, mistakes)
