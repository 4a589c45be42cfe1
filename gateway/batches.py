"""A batch of messages, read and sorted by who answers them. Nothing here waits, and nothing asks PostgreSQL."""

import collections
from collections.abc import Sequence
from dataclasses import dataclass, field

from prometheus_client import Counter

from gateway.beats import Beats
from gateway.pulse import Pulse
from gateway.requests import BadRequest, Request
from gateway.shadow import TOO_MANY
from gateway.shadow_requests import token_of
from models.protocol import ErrorCode, RequestTopic, Verb
from transport.connection import Receipt

MESSAGES = Counter("tidegate_gateway_messages_total", "Messages from devices, by verb.", ["verb"])
CONFIG_VERBS = frozenset({Verb.CONFIG_GET, Verb.CONFIG_UPDATE})
COMMAND_VERBS = frozenset({Verb.COMMAND_GET, Verb.COMMAND_RESPONSE})
SHADOW_VERBS = frozenset({Verb.SHADOW_GET, Verb.SHADOW_UPDATE, Verb.SHADOW_DELETE})


@dataclass(slots=True)
class Inbound:
    """A message, what it says, and what its acknowledgement takes."""

    topic: RequestTopic | None
    raw_topic: str
    payload: bytes
    said: Request | BadRequest
    receipt: Receipt
    counted: bool = False
    """A shadow request in flight."""
    throttled: bool = False
    """One too many."""


@dataclass(slots=True)
class Read:
    """A batch's messages, read and sorted; `things` are the devices that have said something."""

    things: set[str] = field(default_factory=set)
    jobs: list[Request] = field(default_factory=list)
    configs: list[Request] = field(default_factory=list)
    commands: list[Request] = field(default_factory=list)
    shadows: list[Request] = field(default_factory=list)
    diagnostics: list[Request] = field(default_factory=list)
    beats: Beats = field(default_factory=Beats)
    pulses: list[Pulse] = field(default_factory=list)
    bad: list[tuple[Inbound, BadRequest]] = field(default_factory=list)
    throttled: list[tuple[Inbound, BadRequest]] = field(default_factory=list)
    """What is rejected without having been looked at, and is not kept."""

    def add(self, request: Request) -> None:
        """Sort a request in."""
        verb, thing = request.topic.verb, request.topic.thing
        if request.pulse is not None:
            self.pulses.append(request.pulse)
            return
        self.things.add(thing)
        if request.heartbeat is not None:
            self.beats.add(request.heartbeat)
        elif verb in CONFIG_VERBS:
            self.configs.append(request)
        elif verb in COMMAND_VERBS:
            self.commands.append(request)
        elif verb in SHADOW_VERBS:
            self.shadows.append(request)
        elif verb is Verb.DIAGNOSTIC_RESPONSE:
            self.diagnostics.append(request)
        else:
            self.jobs.append(request)

    def without(self, barred: frozenset[str]) -> "Read":
        """What is left when these devices have said nothing."""

        def heard(requests: list[Request]) -> list[Request]:
            return [request for request in requests if request.topic.thing not in barred]

        return Read(
            things=self.things - barred,
            jobs=heard(self.jobs),
            configs=heard(self.configs),
            commands=heard(self.commands),
            shadows=heard(self.shadows),
            diagnostics=heard(self.diagnostics),
            beats=self.beats.without(barred),
            pulses=self.pulses,
            bad=[(inbound, bad) for inbound, bad in self.bad if not inbound.topic or inbound.topic.thing not in barred],
            throttled=[(i, bad) for i, bad in self.throttled if not i.topic or i.topic.thing not in barred],
        )


def read_batch(inbounds: Sequence[Inbound]) -> Read:
    """The messages of a batch, sorted."""
    verbs: collections.Counter[str] = collections.Counter()
    read = Read()
    for inbound in inbounds:
        if inbound.throttled:
            bad = BadRequest(ErrorCode.REQUEST_THROTTLED, TOO_MANY, token_of(inbound.payload), 429)
            read.throttled.append((inbound, bad))
        elif isinstance(inbound.said, Request):
            read.add(inbound.said)
            if inbound.said.heartbeat is not None:
                continue  # the many; counted at the end
        else:
            read.bad.append((inbound, inbound.said))
        verbs[inbound.topic.verb.value if inbound.topic else "unknown"] += 1
    verbs[Verb.HEARTBEAT.value] += len(inbounds) - verbs.total()
    for verb, number in verbs.items():
        MESSAGES.labels(verb).inc(number)
    return read
