"""Questions from `devices/<id>/diagnostics/request`, answered on `.../response`, each once.

A question that comes again (it is repeated until it is answered) is answered as before, from memory. `expiresAt` is for
devices whose clock is to be trusted: this one answers late rather than not at all, and the server lets it go.
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from agent.client import JobsClient
from agent.diagnostics import Diagnostics
from agent.errors import RequestError
from agent.reboot import RebootGuard
from firmware.command import REQUEST_ID
from models.protocol import DiagnosticType, diagnostics_topic

REMEMBERED = 20
"""Answers kept for questions that come again."""


class Diagnoser:
    """Answers one after the other. `run` returns when the device is to reboot."""

    def __init__(self, client: JobsClient, diagnostics: Diagnostics, guard: RebootGuard) -> None:
        self._client = client
        self._diagnostics = diagnostics
        self._guard = guard
        self._answered: OrderedDict[str, dict[str, Any]] = OrderedDict()

    async def run(self) -> None:
        """Until a reboot that was ordered is due."""
        while True:
            if self._guard.due_in is None:
                await self._try_to_respond(await self._client.questions.get())
                continue
            deadline = asyncio.get_running_loop().time() + self._guard.due_in
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    while True:
                        await self._try_to_respond(await self._client.questions.get())
            self._client.log.note("reboot, as ordered")
            return

    async def respond(self, asked: Mapping[str, Any]) -> None:
        """Publish the answer, where there is one. Raises UnansweredError."""
        answer = self.answer(asked)
        if answer is not None:
            await self._client.publish(diagnostics_topic(self._client.thing, "response"), answer)

    async def _try_to_respond(self, asked: Mapping[str, Any]) -> None:
        with contextlib.suppress(RequestError):
            await self.respond(asked)

    def answer(self, asked: Mapping[str, Any]) -> dict[str, Any] | None:
        """What to say; None: nothing."""
        request_id, what = asked.get("requestId"), asked.get("type")
        if not isinstance(request_id, str) or not REQUEST_ID.fullmatch(request_id):
            return None
        if (before := self._answered.get(request_id)) is not None:
            return before
        parameters = {key: value for key, value in asked.items() if key not in ("requestId", "type", "expiresAt")}
        if not isinstance(what, str):
            found: dict[str, Any] = {"error": "type: expected text"}
        elif what == DiagnosticType.REBOOT:
            found = self._guard.answer(request_id, parameters)
        else:
            found = self._diagnostics.answer(what, parameters)
        self._client.log.note(f"asked for {what!r:.40}: {found.get('error', 'answered')}")
        answer = {"requestId": request_id, **found}
        if what != DiagnosticType.REBOOT:  # what was refused may come again with the right order
            self._answered[request_id] = answer
            while len(self._answered) > REMEMBERED:
                self._answered.popitem(last=False)
        return answer
