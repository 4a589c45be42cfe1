"""From the body of a diagnostic response to what the device says. Pure.

What a device may say is bounded here, because it is kept and shown: depth, number of values, length of texts. Keys are
kept as they come; they are shown escaped (cli/output.py) and never interpreted.
"""

from dataclasses import dataclass
from typing import Any

from firmware.command import REQUEST_ID

MAX_DEPTH = 8
MAX_VALUES = 5000
MAX_KEY_CHARS = 128
MAX_TEXT_CHARS = 4096
MAX_ERROR_CHARS = 500


@dataclass(frozen=True, slots=True)
class DiagnosticResponse:
    """What a device answers: the fields of its answer, or the error for which it has none."""

    request_id: str
    answer: dict[str, Any] | None = None
    error: str | None = None
    refused_order: bool = False
    """The device says that an order to reboot did not hold, whoever has sent it: `wrongTokens`."""


def parse_diagnostic(body: dict[str, Any]) -> DiagnosticResponse:
    """Judge a response. Raises ValueError."""
    request_id, error = body.get("requestId"), body.get("error")
    if not isinstance(request_id, str) or not REQUEST_ID.fullmatch(request_id):
        raise ValueError(f"requestId: expected 32 hexadecimal digits, got {request_id!r:.80}")
    if error is not None:
        if not isinstance(error, str) or not 0 < len(error) <= MAX_ERROR_CHARS:
            raise ValueError(f"error: expected text of at most {MAX_ERROR_CHARS} characters")
        wrong = body.get("wrongTokens")
        refused = isinstance(wrong, int) and not isinstance(wrong, bool) and wrong > 0
        return DiagnosticResponse(request_id, error=error, refused_order=refused)
    answer = {key: value for key, value in body.items() if key not in ("requestId", "clientToken", "error")}
    if not answer:
        raise ValueError("expected the fields of an answer, or error; got neither")
    _bounded(answer)
    return DiagnosticResponse(request_id, answer)


def _bounded(answer: dict[str, Any]) -> None:
    """Raises ValueError for what is too deep, too long or too many. Without recursion: depth is the sender's to choose."""
    values = 0
    stack: list[tuple[int, str, Any]] = [(0, "", answer)]
    while stack:
        depth, name, value = stack.pop()
        values += 1
        if values > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values")
        if depth > MAX_DEPTH:
            raise ValueError(f"{name:.60}: nested deeper than {MAX_DEPTH} levels")
        if isinstance(value, str) and len(value) > MAX_TEXT_CHARS:
            raise ValueError(f"{name:.60}: {len(value)} characters, at most {MAX_TEXT_CHARS} are accepted")
        if isinstance(value, dict):
            if (longest := max(map(len, value), default=0)) > MAX_KEY_CHARS:
                raise ValueError(f"{name:.60}: a key of {longest} characters, at most {MAX_KEY_CHARS} are accepted")
            stack += [(depth + 1, key, inner) for key, inner in value.items()]
        elif isinstance(value, list):
            stack += [(depth + 1, name, inner) for inner in value]
