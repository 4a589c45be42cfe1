"""What the fast reader takes is what the exact one takes: the same verdict and the same value for any JSON text."""

import json
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import gateway.requests
from domain.strict_json import MAX_DEPTH, parse_object, reads_alike
from gateway.requests import BadRequest, Heartbeat, Request, parse_request
from models.protocol import ErrorCode, parse_request_topic

BEAT = parse_request_topic("devices/motor-1/heartbeat")
UPDATE = parse_request_topic("$aws/things/motor-1/jobs/job/update")
START = parse_request_topic("$aws/things/motor-1/jobs/start-next")
assert BEAT is not None and UPDATE is not None and START is not None

KEYS = st.sampled_from(["a", "b", "uptime", "", "é", 'q"', "\\", "\0", "e19", "1" * 19]) | st.text(max_size=4)
NUMBERS = st.sampled_from(
    [
        *("0", "-0", "-0.0", "1e2", "1E2", "1e400", "1.50", "9007199254740993", "-9007199254740993"),
        *("9223372036854775807", "9223372036854775808", "-9223372036854775808", "-9223372036854775809"),
        *("18446744073709551615", "18446744073709551616", "1" * 30, "1" * 400, "1e19", "0.1", "NaN", "Infinity", "01"),
    ]
) | st.floats().map(repr)


def written(value: str) -> st.SearchStrategy[str]:
    """The ways to write a text in JSON, good and bad."""
    plain = '"' + value + '"'
    escaped = '"' + "".join(f"\\u{ord(char):04x}" for char in value if ord(char) < 0x10000) + '"'
    return st.sampled_from([json.dumps(value), json.dumps(value, ensure_ascii=False), plain, escaped])


TEXTS = st.text(max_size=6).flatmap(written) | st.sampled_from(['"\\ud800"', '"\\ud83d\\ude00"', '"\t"', '"\\x"'])
BLANKS = st.sampled_from(["", "", "", " ", "\n\t", "\x0c", "\u00a0"])


def objects(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pairs = st.lists(st.tuples(KEYS.flatmap(written), BLANKS, inner), max_size=4)
    return pairs.map(lambda found: "{" + ",".join(f"{key}:{blank}{value}" for key, blank, value in found) + "}")


def arrays(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(inner, max_size=4).map(lambda found: "[" + ", ".join(found) + "]")


VALUES = st.recursive(
    NUMBERS | TEXTS | st.sampled_from(["true", "false", "null", "nul"]), lambda i: objects(i) | arrays(i), max_leaves=12
)
DOCUMENTS = st.tuples(BLANKS, objects(VALUES), BLANKS).map("".join) | VALUES
DEEP = st.integers(1, MAX_DEPTH + 3).map(lambda depth: '{"a":' * depth + "1" + "}" * depth)


def exactly(text: str) -> Any:
    try:
        return parse_object(text)
    except ValueError:
        return None


def quickly(text: str) -> Any:
    """As gateway.requests does it."""
    payload = text.encode("utf-8", "surrogatepass")
    try:
        value = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(value, dict):
        return None
    return value if reads_alike(payload, value) else exactly(text)


def same(one: Any, other: Any) -> bool:
    """Equal, and of the same types: 1 is not 1.0 and not True."""
    return repr(one) == repr(other)


@given(DOCUMENTS | DEEP)
@example('{"a": 1, "a": 1}')
@example('{"a": "x", "b": {"c": "y", "c": "y"}}')
@example('{"a": 1, "\\u0061": 1}')
@example('{"a": 18446744073709551616}')
@example('{"a": 9223372036854775808}')
@example('{"":"","":""}')
def test_the_fast_reader_and_the_exact_one_agree_on_every_text(text: str) -> None:
    assert same(quickly(text), exactly(text))


@given(st.binary(max_size=40))
def test_no_bytes_raise_anything(payload: bytes) -> None:
    for topic in (BEAT, UPDATE, START):
        assert isinstance(parse_request(topic, payload), Request | BadRequest)


def test_the_usual_message_is_never_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(_text: str) -> None:
        raise AssertionError("the exact reader was asked")

    monkeypatch.setattr(gateway.requests, "parse_object", unexpected)
    body = {"deviceId": "motor-1", "timestamp": 1_790_000_000_000, "uptime": 42, "cpuTemperature": 61.0, "fan": 7}
    for payload in (orjson.dumps(body), json.dumps(body, indent=2).encode()):
        parsed = parse_request(BEAT, payload)
        assert isinstance(parsed, Request) and parsed.heartbeat is not None
        assert (parsed.heartbeat.uptime, parsed.heartbeat.extra) == (42, {"fan": 7})


TWICE = [
    (BEAT, b'{"uptime": 1, "uptime": 2}'),
    (BEAT, b'{"uptime": 1, "upt\\u0069me": 2}'),
    (BEAT, b'{"a": {"b": 1, "b": 1}}'),
    (UPDATE, b'{"status": "FAILED", "status": "SUCCEEDED"}'),
    (UPDATE, b'{"status": "FAILED", "statusDetails": {"step": "a", "step": "b"}}'),
    (START, b'{"clientToken": "x", "clientToken": "x"}'),
]
UNSTORABLE = [
    (BEAT, b'{"a\\u0000": 1}'),
    (BEAT, b'{"note": "a\\u0000"}'),
    (UPDATE, b'{"status": "FAILED", "statusDetails": {"a\\u0000": "b"}}'),
    (START, b'{"anything": ["a\\u0000"]}'),
]
DEPTHS = [(topic, b'{"a":' * depth + b"1" + b"}" * depth) for topic in (BEAT, UPDATE) for depth in (21, 1_100, 5_000)]
DEPTHS += [(BEAT, b'{"a":' + b"[" * 30_000), (BEAT, b"[" * 100_000)]


@pytest.mark.parametrize(("topic", "payload"), TWICE + UNSTORABLE + DEPTHS)
def test_what_is_ambiguous_unstorable_or_too_deep_is_refused(topic: Any, payload: bytes) -> None:
    parsed = parse_request(topic, payload)
    assert isinstance(parsed, BadRequest)
    assert parsed.code is (ErrorCode.INVALID_REQUEST if len(payload) > 32 * 1024 else ErrorCode.INVALID_JSON)


def test_a_refusal_carries_the_token_that_was_sent() -> None:
    parsed = parse_request(UPDATE, b'{"clientToken": "t", "status": "FAILED", "status": "FAILED"}')
    assert isinstance(parsed, BadRequest) and parsed.token == "t" and "status" in parsed.message


@pytest.mark.parametrize(("topic", "payload"), TWICE)
def test_without_the_look_at_the_quotation_marks_a_key_may_stand_twice(
    topic: Any, payload: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.requests, "reads_alike", lambda *_: True)
    assert isinstance(parse_request(topic, payload), Request)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"uptime": 1.5}, Heartbeat("motor-1", None, 1, *[None] * 8)),
        ({"uptime": None, "bootId": "b"}, Heartbeat("motor-1", *[None] * 8, "b", None)),
        ({"a": 1, "b": True, "c": "x", "d": None}, Heartbeat("motor-1", *[None] * 9, {"a": 1})),
        ({"timestamp": 1500, "freeMemory": 7, "errorCount": 0}, Heartbeat("motor-1", 1.5, None, 7, *[None] * 4, 0, None, None)),
    ],
)  # fmt: skip
def test_a_heartbeat_is_read_into_the_units_of_the_table(body: dict[str, Any], expected: Heartbeat) -> None:
    parsed = parse_request(BEAT, orjson.dumps(body))
    assert isinstance(parsed, Request) and parsed.heartbeat == expected


@pytest.mark.parametrize("value", [True, "1", [1], 2**53, -(2**53), 1e300])
@pytest.mark.parametrize("name", ["uptime", "cpuTemperature", "timestamp", "errorCount"])
def test_a_heartbeat_with_no_number_where_one_belongs_is_refused(name: str, value: Any) -> None:
    parsed = parse_request(BEAT, json.dumps({name: value}).encode())
    assert isinstance(parsed, BadRequest) and parsed.code is ErrorCode.INVALID_REQUEST and name in parsed.message
