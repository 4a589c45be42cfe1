"""The enrolment hook: an operator's own service that is asked before a certificate is issued. Fails closed.

Asked with `POST {"serial": ..., "batch": ..., "spki_sha256": ...}`. Only status 200 with a JSON object whose `allow` is
`true`, within five seconds from the first byte sent to the last one read, is a yes; whatever else comes, or does not, is
a no. Its `reason`, where it gives one, is told to the device.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

import httpx
import orjson

HOOK_SECONDS = 5.0
MAX_ANSWER_BYTES = 64 * 1024


@dataclass(frozen=True)
class EnrolmentHook:
    """`url`: None where no hook is set, and everybody is allowed."""

    url: str | None
    seconds: float = HOOK_SECONDS

    async def refusal(self, serial_number: str, batch: str, spki_sha256: str) -> str:
        """Why this device may not enrol; empty when it may."""
        if self.url is None:
            return ""
        question = {"serial": serial_number, "batch": batch, "spki_sha256": spki_sha256}
        try:
            async with asyncio.timeout(self.seconds):
                status, body = await _ask(self.url, question)
        except TimeoutError:
            return f"the enrolment hook did not answer within {self.seconds:g} s"
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return f"the enrolment hook cannot be asked ({type(error).__name__})"
        return _judged(status, body)


async def _ask(url: str, question: dict[str, str]) -> tuple[int, bytes]:
    async with httpx.AsyncClient(timeout=None, follow_redirects=False, trust_env=False) as http:
        async with http.stream("POST", url, json=question) as answer:
            body = b""
            async for part in answer.aiter_bytes():
                body += part
                if len(body) > MAX_ANSWER_BYTES:
                    return answer.status_code, b""
            return answer.status_code, body


def _judged(status: int, body: bytes) -> str:
    """Why the answer is a no; empty when it is a yes."""
    if status != httpx.codes.OK:
        return f"the enrolment hook answered with status {status}, expected 200"
    try:
        said: Any = orjson.loads(body)
    except orjson.JSONDecodeError:
        return "the enrolment hook's answer is no JSON"
    if not isinstance(said, dict):
        return "the enrolment hook's answer is no JSON object"
    if said.get("allow") is True:
        return ""
    reason = said.get("reason")
    return f"the enrolment hook refused: {reason[:200]}" if isinstance(reason, str) and reason else (
        "the enrolment hook refused"
    )  # fmt: skip
