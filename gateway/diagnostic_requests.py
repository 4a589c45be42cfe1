"""From the body of a diagnostic response to what the device says. Pure."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class DiagnosticResponse:
    """What a device answers."""


def parse_diagnostic(body: dict[str, Any]) -> DiagnosticResponse:
    """Judge a response. Raises ValueError."""
    raise ValueError("not there yet")
