"""Commands: a device asks whether there is one, gets it signed for it alone, and answers what became of it.

Asking hands out the oldest open command, as often as it is asked for, each time signed anew. There is no answer to an
answer, nor to what is no request: a device that is not sure asks again.
"""

from collections.abc import Sequence
from typing import Any

import orjson
from prometheus_client import Counter
from psycopg import AsyncConnection

from gateway.documents import Documents
from gateway.jobs import Outgoing
from gateway.requests import Request
from models.identity import DeviceHappening
from models.protocol import Verb, command_topic
from store.commands import CommandAnswer, answer_commands, pending_commands
from store.waits import happened

COMMANDS = Counter(
    "tidegate_gateway_commands_total",
    "Commands handed out, answers that ended one, and answers that changed nothing.",
    ["what"],
)


async def answer_about_commands(
    connection: AsyncConnection, requests: Sequence[Request], documents: Documents, now: float
) -> list[Outgoing]:
    """Record what devices answered, then hand out what those that ask may have."""
    answers = [
        CommandAnswer(request.topic.thing, response.request_id, response.status, response.reason)
        for request in requests
        if (response := request.response) is not None
    ]
    if answers:
        over = await answer_commands(connection, answers)
        await happened(
            connection,
            [
                (
                    answer.device_id,
                    DeviceHappening.COMMAND_ANSWERED,
                    {"request_id": answer.request_id, "status": answer.status.value, "reason": answer.reason},
                )
                for answer in over
            ],
        )
        final = sum(answer.is_final for answer in answers)
        COMMANDS.labels("ended").inc(len(over))
        COMMANDS.labels("ignored").inc(final - len(over))
    asking = [request for request in requests if request.topic.verb is Verb.COMMAND_GET]
    if not asking:
        return []
    pending = await pending_commands(connection, list({request.topic.thing for request in asking}))
    COMMANDS.labels("handed-out").inc(len(pending))
    outgoing: list[Outgoing] = []
    for request in asking:
        body: dict[str, Any] = {"timestamp": int(now)}
        if (command := pending.get(request.topic.thing)) is not None:
            body |= {
                "requestId": command.request_id,
                "operation": command.operation,
                "order": documents.sign_command(command, int(now)),
            }
        if request.token is not None:
            body["clientToken"] = request.token
        outgoing.append((command_topic(request.topic.thing, "request"), orjson.dumps(body)))
    return outgoing
