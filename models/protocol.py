"""The device contract: topics, states, error codes, failure classes and steps.

Shadows and jobs follow AWS IoT's reserved topics (docs/protocol.md); heartbeats are `devices/<id>/heartbeat`. This module is shared
by the server and the agent, imports nothing of either, and holds no behaviour beyond building and taking apart topics.
"""

from dataclasses import dataclass
from enum import StrEnum

from models.ids import JOB_ID, SHADOW_NAME, THING_NAME

THINGS = "$aws/things"
NEXT_JOB = "$next"
"""Stands for the head of a device's queue in `jobs/$next/get`."""

MAX_REQUEST_BYTES = 32 * 1024
"""No device request is larger; a larger one is quarantined unread."""
MAX_STATUS_DETAILS = 10
MAX_STATUS_VALUE_CHARS = 1024
MAX_CLIENT_TOKEN_BYTES = 64
MAX_NOTIFIED_JOBS = 15
MAX_DOCUMENT_BYTES = 12 * 1024
"""Of what a fleet job adds to its document. The signed order carries it a second time, in base64, so the whole stays
under AWS IoT's 32 KiB."""
MAX_DOCUMENT_DEPTH = 8
"""Deepest nesting of that."""


class ExecutionState(StrEnum):
    """States of an execution, in AWS IoT Jobs' names; PENDING is ours: planned, its wave not open yet."""

    PENDING = "PENDING"
    QUEUED = "QUEUED"
    IN_PROGRESS = "IN_PROGRESS"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    TIMED_OUT = "TIMED_OUT"
    REJECTED = "REJECTED"
    REMOVED = "REMOVED"
    CANCELED = "CANCELED"


TERMINAL_STATES = frozenset(ExecutionState) - {
    ExecutionState.PENDING,
    ExecutionState.QUEUED,
    ExecutionState.IN_PROGRESS,
}


class Step(StrEnum):
    """What a device does while IN_PROGRESS, in order: `statusDetails.step`."""

    ACCEPTED = "accepted"
    DOWNLOADING = "downloading"
    DOWNLOADED = "downloaded"
    INSTALLING = "installing"
    REBOOTING = "rebooting"
    CONFIRMING = "confirming"


class FailureClass(StrEnum):
    """Why an update failed: `statusDetails.failure`. SILENT is given by the server alone, to a missed deadline."""

    NETWORK = "network"
    VERIFY = "verify"
    FLASH = "flash"
    INCOMPATIBLE = "incompatible"
    POWER = "power"
    ROLLED_BACK = "rolled-back"
    REJECTED_BY_USER = "rejected-by-user"
    INTERNAL = "internal"
    SILENT = "silent"


class ErrorCode(StrEnum):
    """Codes of a rejected jobs request."""

    INVALID_TOPIC = "InvalidTopic"
    INVALID_JSON = "InvalidJson"
    INVALID_REQUEST = "InvalidRequest"
    INVALID_STATE_TRANSITION = "InvalidStateTransition"
    RESOURCE_NOT_FOUND = "ResourceNotFound"
    VERSION_MISMATCH = "VersionMismatch"
    INTERNAL_ERROR = "InternalError"
    REQUEST_THROTTLED = "RequestThrottled"
    TERMINAL_STATE_REACHED = "TerminalStateReached"


class Verb(StrEnum):
    """What a device asks for."""

    GET_PENDING = "get-pending"
    START_NEXT = "start-next"
    DESCRIBE = "describe"
    UPDATE = "update"
    HEARTBEAT = "heartbeat"
    CONFIG_GET = "config-get"
    CONFIG_UPDATE = "config-update"
    COMMAND_GET = "command-get"
    COMMAND_RESPONSE = "command-response"
    SHADOW_GET = "shadow-get"
    SHADOW_UPDATE = "shadow-update"
    SHADOW_DELETE = "shadow-delete"
    DIAGNOSTIC_RESPONSE = "diagnostic-response"
    PULSE = "pulse"
    """The engine's own: that it hears what the broker is given."""


CONFIG_SHADOW = "config"
"""The named shadow that carries a device's configuration: `$aws/things/<thing>/shadow/name/config`."""


PULSE_TOPIC = "devices/@gateway/heartbeat"
"""What the gateway says to itself through the broker: on a topic that the filter of heartbeats matches, so that no broker
lets it overtake them. No device may (access/mosquitto.py), and none has this name."""


class JobOperation(StrEnum):
    """What a job has devices do: `operation` of its document."""

    FIRMWARE_UPDATE = "firmware-update"
    CONFIG_SYNC = "config-sync"
    RESTART = "restart"
    DIAGNOSTIC = "diagnostic"
    CUSTOM = "custom"


class DiagnosticType(StrEnum):
    """What a device can be asked."""

    SYSTEM_INFO = "system-info"
    LOG_TAIL = "log-tail"
    CONFIG_DUMP = "config-dump"
    PING = "ping"
    REBOOT = "reboot"


class Operation(StrEnum):
    """What a command tells a device to do with its identity."""

    ROTATE_CERTIFICATE = "rotate-certificate"
    WIPE_CREDENTIALS = "wipe-credentials"


class CommandStatus(StrEnum):
    """What a device answers to a command."""

    ACCEPTED = "accepted"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


REQUEST_FILTERS = (
    f"{THINGS}/+/jobs/get",
    f"{THINGS}/+/jobs/start-next",
    f"{THINGS}/+/jobs/+/get",
    f"{THINGS}/+/jobs/+/update",
    "devices/+/heartbeat",
    f"{THINGS}/+/shadow/get",
    f"{THINGS}/+/shadow/update",
    f"{THINGS}/+/shadow/delete",
    f"{THINGS}/+/shadow/name/+/get",
    f"{THINGS}/+/shadow/name/+/update",
    f"{THINGS}/+/shadow/name/+/delete",
    "devices/+/commands/get",
    "devices/+/commands/response",
    "devices/+/diagnostics/response",
)
"""What devices say to the gateway, and it to itself. None of them matches a topic the gateway itself publishes to."""


@dataclass(frozen=True, slots=True)
class RequestTopic:
    """A device's request, as its topic tells it. `job_id` is None except for DESCRIBE and UPDATE.

    `shadow`: which shadow is meant, the classic one being the empty name. `thing` is empty for PULSE.
    """

    verb: Verb
    thing: str
    job_id: str | None = None
    shadow: str = ""


def parse_request_topic(topic: str) -> RequestTopic | None:
    """Take a request topic apart, with exact arity; None for a topic that is not one."""
    match topic.split("/"):
        case ["$aws", "things", thing, "jobs", "get"]:
            parsed = RequestTopic(Verb.GET_PENDING, thing)
        case ["$aws", "things", thing, "jobs", "start-next"]:
            parsed = RequestTopic(Verb.START_NEXT, thing)
        case ["$aws", "things", thing, "jobs", job_id, "get"]:
            parsed = RequestTopic(Verb.DESCRIBE, thing, job_id)
        case ["$aws", "things", thing, "jobs", job_id, "update"]:
            parsed = RequestTopic(Verb.UPDATE, thing, job_id)
        case ["devices", "@gateway", "heartbeat"]:
            return RequestTopic(Verb.PULSE, "")
        case ["devices", thing, "heartbeat"]:
            parsed = RequestTopic(Verb.HEARTBEAT, thing)
        case ["$aws", "things", thing, "shadow", "name", "config", "get"]:
            parsed = RequestTopic(Verb.CONFIG_GET, thing, shadow=CONFIG_SHADOW)
        case ["$aws", "things", thing, "shadow", "name", "config", "update"]:
            parsed = RequestTopic(Verb.CONFIG_UPDATE, thing, shadow=CONFIG_SHADOW)
        case ["$aws", "things", thing, "shadow", "name", shadow, "get" | "update" | "delete" as asked] if shadow:
            parsed = RequestTopic(_SHADOW_VERBS[asked], thing, shadow=shadow)
        case ["$aws", "things", thing, "shadow", "get" | "update" | "delete" as asked]:
            parsed = RequestTopic(_SHADOW_VERBS[asked], thing)
        case ["devices", thing, "diagnostics", "response"]:
            parsed = RequestTopic(Verb.DIAGNOSTIC_RESPONSE, thing)
        case ["devices", thing, "commands", "get"]:
            parsed = RequestTopic(Verb.COMMAND_GET, thing)
        case ["devices", thing, "commands", "response"]:
            parsed = RequestTopic(Verb.COMMAND_RESPONSE, thing)
        case _:
            return None
    if not THING_NAME.fullmatch(parsed.thing):
        return None
    if parsed.shadow and not SHADOW_NAME.fullmatch(parsed.shadow):
        return None
    if parsed.job_id is not None and parsed.job_id != NEXT_JOB and not JOB_ID.fullmatch(parsed.job_id):
        return None
    if parsed.verb is Verb.UPDATE and parsed.job_id == NEXT_JOB:
        return None
    return parsed


_SHADOW_VERBS = {"get": Verb.SHADOW_GET, "update": Verb.SHADOW_UPDATE, "delete": Verb.SHADOW_DELETE}


def shadow_topic(thing: str, shadow: str, *parts: str) -> str:
    """The topic of a shadow, for requests, answers, deltas and documents alike; the classic one has the empty name.

    >>> shadow_topic("motor-7", "", "update", "delta"), shadow_topic("motor-7", "door", "get")
    ('$aws/things/motor-7/shadow/update/delta', '$aws/things/motor-7/shadow/name/door/get')
    """
    return "/".join((THINGS, thing, "shadow", *(("name", shadow) if shadow else ()), *parts))


def diagnostics_topic(thing: str, part: str) -> str:
    """`devices/<thing>/diagnostics/<part>`: request to the device, response from it."""
    return f"devices/{thing}/diagnostics/{part}"


def jobs_topic(thing: str, *parts: str) -> str:
    """`$aws/things/<thing>/jobs[/part...]`, for requests, answers and notifications alike.

    >>> jobs_topic("motor-7", "start-next", "accepted")
    '$aws/things/motor-7/jobs/start-next/accepted'
    """
    return "/".join((THINGS, thing, "jobs", *parts))


def heartbeat_topic(thing: str) -> str:
    """`devices/<thing>/heartbeat`."""
    return f"devices/{thing}/heartbeat"


def config_topic(thing: str, *parts: str) -> str:
    """`$aws/things/<thing>/shadow/name/config/part...`, for requests, answers and deltas alike.

    >>> config_topic("motor-7", "get", "accepted")
    '$aws/things/motor-7/shadow/name/config/get/accepted'
    """
    return "/".join((THINGS, thing, "shadow/name", CONFIG_SHADOW, *parts))


def command_topic(thing: str, part: str) -> str:
    """`devices/<thing>/commands/<part>`: get and response from the device, notify and request to it."""
    return f"devices/{thing}/commands/{part}"
