"""From the body of a shadow request to what is asked, or to the reason why it is none. Pure."""

from dataclasses import dataclass
from typing import Any

from models.protocol import RequestTopic


@dataclass(frozen=True, slots=True)
class ShadowRequest:
    """What a device asks of a shadow."""


class ShadowError(ValueError):
    """Why a request is rejected, with the code that the rejection carries."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def parse_shadow(topic: RequestTopic, body: dict[str, Any]) -> ShadowRequest:
    """Judge the body of a request. Raises ShadowError."""
    raise ShadowError(500, "not there yet")
