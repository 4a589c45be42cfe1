"""Messages that no device should send, by the thousand and from a seed: each with whether it is to be quarantined.

What is quarantined is known by construction. Every way to be no JSON object that all readers read alike is refused for every
verb; values of the wrong type are refused for the verb that reads them; a topic that a subscription matches and that is no
request is refused unread. What is well formed and merely out of place (no such execution, no such shadow, an old
version) is answered and not kept.
"""

import random
from dataclasses import dataclass
from typing import Any

import orjson

from models.protocol import command_topic, config_topic, diagnostics_topic, heartbeat_topic, jobs_topic, shadow_topic

VERBS = (
    "jobs/get",
    "jobs/start-next",
    "jobs/{job}/get",
    "jobs/{job}/update",
    "heartbeat",
    "diagnostics/response",
    "commands/get",
    "commands/response",
    "config/get",
    "config/update",
    "shadow/get",
    "shadow/update",
    "shadow/delete",
    "named/get",
    "named/update",
    "named/delete",
)
DEEP = 100_000
LARGE = 128 * 1024

MALFORMED: dict[str, bytes] = {
    "invalid UTF-8": b'{"clientToken":"\xff\xfe"}',
    "invalid UTF-8 as a key": b'{"\xc3\x28":1}',
    "overlong UTF-8": b'{"a":"\xc0\xaf"}',
    "UTF-8 of a surrogate": b'{"a":"\xed\xa0\x80"}',
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "U+0000 in a value": b'{"a":"x\\u0000y"}',
    "U+0000 in a key": b'{"x\\u0000y":1}',
    "U+0000 deep inside": b'{"a":{"b":["c",{"d":"\\u0000"}]}}',
    "a raw U+0000": b'{"a":"\x00"}',
    "a raw control character": b'{"a":"\x1b"}',
    "NaN": b'{"a":NaN}',
    "Infinity": b'{"a":Infinity}',
    "-Infinity": b'{"a":[-Infinity]}',
    "a key twice": b'{"a":1,"a":2}',
    "a key twice, once escaped": b'{"a":1,"\\u0061":2}',
    "a key twice deep inside": b'{"a":{"b":{"c":1,"c":1}}}',
    "the token twice": b'{"clientToken":"t1","clientToken":"t2"}',
    "deep arrays": b'{"a":' + b"[" * DEEP,
    "deep arrays, closed": b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep objects": b'{"a":' * DEEP,
    "deeper than allowed": b'{"a":' * 30 + b"1" + b"}" * 30,
    "128 kB of text": b'{"a":"' + b"x" * LARGE + b'"}',
    "128 kB of blanks": b" " * LARGE + b"{}",
    "128 kB of small keys": b"{" + b",".join(b'"k%d":1' % i for i in range(15_000)) + b"}",
    "half a surrogate pair": b'{"a":"\\ud800"}',
    "half a pair as a key": b'{"\\udfff":1}',
    "a pair the wrong way round": b'{"a":"\\udc00\\ud800"}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "a number beyond all floats": b'{"a":1e400}',
    "a number of 10,000 digits": b'{"a":' + b"9" * 10_000 + b"}",
    "a number of 25 digits": b'{"a":1000000000000000000000000}',
    "an array": b"[]",
    "an array of objects": b'[{"state":{"reported":{"a":1}}}]',
    "null": b"null",
    "a text": b'"{}"',
    "a number": b"17",
    "true": b"true",
    "cut off": b'{"state":{"reported"',
    "two documents": b"{}{}",
    "a comma too many": b'{"a":1,}',
    "single quotes": b"{'a':1}",
    "a comment": b'{"a":1 /* one */}',
    "a blank": b" ",
    "a number as token": b'{"clientToken":7}',
    "a token of 65 bytes": b'{"clientToken":"' + b"x" * 65 + b'"}',
    "a token of 65 bytes in 33 characters": b'{"clientToken":"' + "\u00e4".encode() * 33 + b'"}',
    "an object as token": b'{"clientToken":{"a":1}}',
}
"""For every verb alike."""

WRONG: dict[str, list[Any]] = {
    "jobs/start-next": [{"statusDetails": 7}, {"statusDetails": {"a": 1}}, {"statusDetails": ["a"]}],
    "jobs/{job}/update": [
        {},
        {"status": 7},
        {"status": "CANCELED"},
        {"status": ["FAILED"]},
        {"status": "IN_PROGRESS", "expectedVersion": 1e99},
        {"status": "IN_PROGRESS", "expectedVersion": -1},
        {"status": "IN_PROGRESS", "expectedVersion": 2**31},
        {"status": "IN_PROGRESS", "expectedVersion": True},
        {"status": "IN_PROGRESS", "expectedVersion": "two"},
        {"status": "IN_PROGRESS", "executionNumber": [1]},
        {"status": "IN_PROGRESS", "statusDetails": {str(i): "v" for i in range(11)}},
        {"status": "IN_PROGRESS", "statusDetails": {"a": "x" * 1025}},
        {"status": "IN_PROGRESS", "statusDetails": {"k" * 129: "x"}},
    ],
    "heartbeat": [
        {"uptime": "long"},
        {"uptime": [1]},
        {"uptime": 2**60},
        {"freeMemory": True},
        {"cpuTemperature": {"celsius": 60}},
        {"timestamp": "now"},
        {"deviceId": "another"},
        {"deviceId": 7},
        {"firmwareVersion": 7},
        {"firmwareVersion": "x" * 51},
        {"firmwareSha256": "xyz"},
        {"bootId": "a b"},
        {"bootId": 7},
        {"errorCount": "1"},
        {"networkSignalStrength": None, "uptime": "1"},
    ],
    "commands/response": [
        {},
        {"requestId": "x", "status": "succeeded"},
        {"requestId": "0" * 32, "status": "perhaps"},
        {"requestId": "0" * 32, "status": 7},
        {"requestId": "0" * 32, "status": "failed", "reason": "x" * 501},
        {"requestId": ["0" * 32], "status": "failed"},
    ],
    "diagnostics/response": [{}, {"requestId": 7}, {"requestId": "x"}, {"requestId": []}],
    "config/update": [
        {},
        {"state": []},
        {"state": {"reported": 7}},
        {"state": {"reported": {"version": "1"}}},
        {"state": {"reported": {"version": -1}}},
        {"state": {"reported": {"version": 1, "config": []}}},
        {"state": {"reported": {"version": 1, "other": 1}}},
        {"state": {"reported": {"version": 1, "config": {"a": "x" * 20_000}}}},
    ],
    "shadow/update": [
        {},
        {"state": []},
        {"state": {}},
        {"state": {"other": {}}},
        {"state": {"desired": 7}},
        {"state": {"reported": ["a"]}},
        {"state": {"reported": {"a": [None]}}},
        {"state": {"reported": {"a": 1}}, "version": "1"},
        {"state": {"reported": {"a": 1}}, "version": -1},
        {"state": {"reported": {"a": 1}}, "version": 1.5},
    ],
    "shadow/delete": [{"version": "1"}, {"version": [1]}],
}
WRONG["named/update"] = WRONG["shadow/update"]

BUSINESS: list[tuple[str, Any]] = [
    ("jobs/{job}/update", {"status": "SUCCEEDED"}),
    ("jobs/{job}/update", {"status": "FAILED", "expectedVersion": 9}),
    ("jobs/no-such-job/update", {"status": "FAILED"}),
    ("jobs/no-such-job/get", {}),
    ("jobs/notify/get", {}),
    ("jobs/get/update", {"status": "FAILED"}),
    ("shadow/get", {}),
    ("shadow/delete", {}),
    ("named/get", {}),
    ("named/delete", {}),
    ("shadow/update", {"state": {"reported": {"a": 1}}, "version": 9}),
    ("named/update", {"state": {"desired": {"a": 1}}, "version": 9}),
]
"""Answered with a rejection (InvalidStateTransition, VersionMismatch, ResourceNotFound, 404, 409), and not kept."""

BAD_NAMES = ("", "a b", "a%2Fb", "a.b", "ä", "x" * 129, "$next", "motor-1\u200b", "*", "'; DROP TABLE devices; --")


@dataclass(frozen=True)
class Hostile:
    """A message, and whether it is kept."""

    what: str
    topic: str
    payload: bytes
    quarantined: bool


def topic_of(verb: str, thing: str, job: str) -> str:
    """`verb` is one of VERBS, with a job's id or `{job}` in it."""
    family, _, rest = verb.partition("/")
    match family:
        case "jobs":
            return jobs_topic(thing, *rest.format(job=job).split("/"))
        case "heartbeat":
            return heartbeat_topic(thing)
        case "commands":
            return command_topic(thing, rest)
        case "diagnostics":
            return diagnostics_topic(thing, rest)
        case "config":
            return config_topic(thing, rest)
        case "named":
            return shadow_topic(thing, "door", rest)
        case _:
            return shadow_topic(thing, "", rest)


def _topics(job: str) -> list[tuple[str, str]]:
    """Topics that a subscription of the gateway matches, and that are no request."""
    made = [(f"name {name!r:.20}", topic_of(verb, name, job)) for name in BAD_NAMES for verb in VERBS]
    made += [(f"job {name!r:.20}", jobs_topic("motor-1", name, "update")) for name in BAD_NAMES]
    made += [(f"job {name!r:.20}", jobs_topic("motor-1", name, "get")) for name in BAD_NAMES if name != "$next"]
    made += [
        (f"shadow {name!r:.20}", shadow_topic("motor-1", name, "get"))
        for name in (*BAD_NAMES, "x" * 65)
        if name not in ("", "$next")
    ]
    return made


def corpus(job: str, victims: list[str], number: int, seed: int = 4) -> list[Hostile]:
    """`number` of them: all kinds for all verbs, then damaged good messages until there are enough; in no order."""
    dice = random.Random(seed)
    made: list[Hostile] = []

    def add(what: str, verb: str, payload: bytes, quarantined: bool = True) -> None:
        topic = topic_of(verb, victims[len(made) % len(victims)], job)
        made.append(Hostile(f"{what} as {verb}", topic, payload, quarantined))

    for what, payload in MALFORMED.items():
        for verb in dice.sample(VERBS, 10):
            add(what, verb, payload)
    for verb, bodies in WRONG.items():
        for body in bodies:
            add(f"{body!r:.50}", verb, orjson.dumps(body))
    for verb, body in BUSINESS:
        for _ in range(3):
            add(f"{body!r:.50}", verb, orjson.dumps(body), False)
    made += [Hostile(what, topic, b"{}", True) for what, topic in dice.sample(_topics(job), 120)]
    good = orjson.dumps({"state": {"reported": {"a": [1, {"b": "c"}]}}, "clientToken": "t-1", "version": 1})
    while len(made) < number:
        at = dice.randrange(1, len(good))
        damaged = good[:at] if dice.random() < 0.5 else good[:at] + b"\xff" + good[at:]
        add(f"damaged at {at}", dice.choice(VERBS), damaged)
    dice.shuffle(made)
    return made[:number]
