"""Tasks: exact when read, for one device, job and attempt, never twice, never late, and never one kind for another."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firmware.command import COMMAND_PAYLOAD_TYPE, Command, decode_command, encode_command
from firmware.envelope import open_envelope, sign_envelope
from firmware.errors import (
    EnvelopeError,
    ExpiredError,
    MisdirectedError,
    ReplayError,
    SignatureError,
    StatementError,
)
from firmware.manifest import (
    FIRMWARE_UPDATE,
    ORDER_PAYLOAD_TYPE,
    RELEASE_PAYLOAD_TYPE,
    decode_order,
    decode_release,
    encode_order,
    encode_release,
)
from firmware.task import (
    MAX_TASK_BYTES,
    TASK_OPERATIONS,
    TASK_PAYLOAD_TYPE,
    Task,
    decode_task,
    encode_task,
    task_signer,
    verify_task,
)
from models.documents import document_problem
from models.protocol import MAX_DOCUMENT_BYTES, MAX_REQUEST_BYTES, JobOperation
from tests.unit.firmware_samples import NOW, ORDER, ORDER_KEY, RELEASE, RELEASE_KEY, STRANGER_KEY, TRUSTED, mutant

JOB = "_restart-berlin"
PAYLOAD = {"say": ["hello", 2, 1.5, None, True], "to": {"whom": "all"}}
TASK = Task("motor-7", JOB, 2, "custom", PAYLOAD, NOW - 10, NOW + 900, "ab" * 16)


def signed(task: Task = TASK, key: Any = ORDER_KEY) -> dict[str, Any]:
    return sign_envelope(encode_task(task), TASK_PAYLOAD_TYPE, key, max_bytes=MAX_TASK_BYTES)


def verify(envelope: dict[str, Any], device: str = "motor-7", now: int = NOW, **more: Any) -> Any:
    how: dict[str, Any] = {"job_id": JOB, "attempt": 2, "finished": frozenset(), "by": verify_task} | more
    return how.pop("by")(envelope, TRUSTED, device, how.pop("finished"), now, **how)


@pytest.mark.parametrize("operation", sorted(TASK_OPERATIONS))
def test_a_task_for_this_device_is_accepted_and_moves_the_trusted_time(operation: JobOperation) -> None:
    verified = verify(signed(replace(TASK, operation=operation.value)), latest_known_time=NOW - 1000)
    assert verified.operation is operation and verified.task.payload == PAYLOAD
    assert verified.latest_known_time == TASK.issued_at


@pytest.mark.parametrize(
    ("envelope", "how", "error"),
    [
        (signed(key=STRANGER_KEY), {}, SignatureError),
        (signed(key=RELEASE_KEY), {}, SignatureError),
        (signed(), {"device": "motor-8"}, MisdirectedError),
        (signed(), {"job_id": "_restart-hamburg"}, MisdirectedError),
        (signed(), {"attempt": 3}, MisdirectedError),
        (signed(), {"attempt": 1}, MisdirectedError),
        (signed(replace(TASK, operation="self-destruct")), {}, MisdirectedError),
        (signed(replace(TASK, operation=FIRMWARE_UPDATE)), {}, MisdirectedError),
        (signed(), {"finished": frozenset({TASK.key})}, ReplayError),
        (signed(), {"finished": frozenset({f"{JOB}:3"})}, ReplayError),
        (signed(), {"finished": frozenset({TASK.nonce})}, ReplayError),
        (signed(), {"now": TASK.expires_at}, ExpiredError),
        (signed(), {"now": 0, "latest_known_time": TASK.expires_at}, ExpiredError),
        ({**signed(), "payload": signed(replace(TASK, payload={"say": []}))["payload"]}, {}, SignatureError),
        ({}, {}, EnvelopeError),
        ({"payload": "", "payloadType": TASK_PAYLOAD_TYPE, "signatures": []}, {}, EnvelopeError),
    ],
)
def test_every_rule_refuses_by_itself(envelope: dict[str, Any], how: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        verify(envelope, **how)


def test_the_end_of_an_earlier_attempt_or_another_job_refuses_nothing() -> None:
    verify(signed(), finished=frozenset({f"{JOB}:1", f"{JOB}x:9", "_other:5"}))


@pytest.mark.parametrize(
    ("rule", "how"),
    [
        ("if task.device_id != device_id:", {"device": "motor-8"}),
        ("if task.job_id != job_id:", {"job_id": "_restart-hamburg"}),
        ("if task.attempt != attempt:", {"attempt": 3}),
        ("if task.operation not in TASK_OPERATIONS:", {"operation": FIRMWARE_UPDATE}),
        (
            "if task.nonce in finished or task.attempt <= last_attempt(finished, job_id):",
            {"finished": frozenset({TASK.key})},
        ),
        ("if max(now, latest) >= task.expires_at:", {"now": TASK.expires_at}),
    ],
)
def test_without_any_one_rule_its_attack_succeeds(rule: str, how: dict[str, Any]) -> None:
    weak = mutant("firmware.task", (rule, "if False:"))
    how = dict(how)
    envelope = signed(replace(TASK, operation=how.pop("operation", "custom")))
    assert verify(envelope, **how, by=weak.verify_task).task.device_id == "motor-7"


@pytest.mark.parametrize(
    "change",
    [
        {"device_id": "a/b"},
        {"device_id": 7},
        {"job_id": ""},
        {"job_id": "a.b"},
        {"attempt": 0},
        {"attempt": True},
        {"operation": "Restart"},
        {"payload": []},
        {"payload": None},
        {"payload": {"x": float("nan")}},
        {"payload": {"x": 2**53}},
        {"payload": {"x": "\x00"}},
        {"payload": {"x": (1, 2)}},
        {"payload": {1: 2}},
        {"payload": {"x": [[[[[[[[[1]]]]]]]]]}},
        {"payload": {"x": "y" * MAX_TASK_BYTES}},
        {"issued_at": -1},
        {"expires_at": NOW - 10},
        {"expires_at": 1.5},
        {"nonce": "x"},
    ],
)
def test_a_task_that_is_not_exact_is_neither_written_nor_read(change: dict[str, Any]) -> None:
    with pytest.raises(StatementError):
        encode_task(replace(TASK, **change))


GOOD = encode_task(TASK)


@pytest.mark.parametrize(
    "payload",
    [
        b"{}",
        b"[]",
        b"",
        GOOD[:-1] + b',"more":1}',
        GOOD.replace(b'"payload":', b'"payload":{},"payload":'),
        GOOD.replace(b'"whom":"all"', b'"whom":"all","whom":"none"'),
        GOOD.replace(b'"all"', b"NaN"),
        GOOD.replace(b'"all"', b'"\\ud800"'),
        GOOD.replace(b'"all"', b"9007199254740992"),
        GOOD.replace(b'"all"', b"[[[[[[[[[0]]]]]]]]]"),
        GOOD.replace(b'"all"', b'"' + b"x" * MAX_TASK_BYTES + b'"'),
    ],
)
def test_bytes_that_two_parsers_could_read_differently_are_no_task(payload: bytes) -> None:
    with pytest.raises(StatementError):
        decode_task(payload)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abcxyz", max_size=5), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text("abcdefg", min_size=1, max_size=8), JSON, max_size=6))
def test_what_a_specification_accepts_can_be_signed_and_is_read_back_unchanged(document: dict[str, Any]) -> None:
    task = replace(TASK, payload=document)
    if document_problem(document) is None:
        assert decode_task(encode_task(task)) == task
    else:
        problem = str(document_problem(document))
        assert "deeper" in problem or "beyond 2**53" in problem


def test_the_largest_document_fits_a_job_document_of_32_kib_with_its_order() -> None:
    document = {"x": "y" * (MAX_DOCUMENT_BYTES - len(b'{"x":""}'))}
    assert document_problem(document) is None and document_problem({"x": document["x"] + "y"}) is not None
    longest = Task("d" * 128, "j" * 64, 1_000_000, "config-sync", document, NOW, 253_402_300_799, "a" * 64)
    envelope = task_signer(ORDER_KEY).sign(encode_task(longest))
    execution = {
        "execution": {"jobId": "j" * 64, "jobDocument": {"operation": "custom", **document, "order": envelope}}
    }
    assert len(orjson.dumps(execution)) < MAX_REQUEST_BYTES - 1024
    assert verify(envelope, "d" * 128, job_id="j" * 64, attempt=1_000_000).task == longest


def test_a_larger_envelope_than_any_task_is_refused_unread() -> None:
    envelope = signed()
    with pytest.raises(EnvelopeError, match="at most"):
        verify({**envelope, "payload": "A" * (2 * MAX_TASK_BYTES)})


COMMAND = Command("motor-7", "c0" * 16, "rotate-certificate", NOW - 10, NOW + 900, "ab" * 16)
OTHERS: dict[str, tuple[str, bytes, Callable[[bytes], Any]]] = {
    "release": (RELEASE_PAYLOAD_TYPE, encode_release(RELEASE), decode_release),
    "order": (ORDER_PAYLOAD_TYPE, encode_order(ORDER), decode_order),
    "command": (COMMAND_PAYLOAD_TYPE, encode_command(COMMAND), decode_command),
}
ALL_KEYS = (*TRUSTED.release, *TRUSTED.order)
"""Worse than any device: it trusts either key for everything, and still no kind may pass for another."""


@pytest.mark.parametrize("kind", OTHERS)
def test_no_order_command_or_release_can_be_presented_as_a_task(kind: str) -> None:
    payload_type, payload, _ = OTHERS[kind]
    envelope = sign_envelope(payload, payload_type, ORDER_KEY)
    with pytest.raises(EnvelopeError):
        verify(envelope)
    with pytest.raises(SignatureError):
        verify({**envelope, "payloadType": TASK_PAYLOAD_TYPE})
    with pytest.raises(StatementError):  # even signed by mistake under the type of a task
        verify(sign_envelope(payload, TASK_PAYLOAD_TYPE, ORDER_KEY))


@pytest.mark.parametrize("kind", OTHERS)
def test_no_task_can_be_presented_as_an_order_command_or_release(kind: str) -> None:
    payload_type, _, read = OTHERS[kind]
    with pytest.raises(EnvelopeError):
        open_envelope(signed(), payload_type, ALL_KEYS)
    with pytest.raises(SignatureError):
        open_envelope({**signed(), "payloadType": payload_type}, payload_type, ALL_KEYS)
    with pytest.raises(StatementError):
        read(open_envelope(sign_envelope(GOOD, payload_type, ORDER_KEY), payload_type, ALL_KEYS))


def test_without_the_type_in_what_is_signed_a_relabelled_task_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firmware.envelope.Envelope.pae", lambda self: bytes(self.payload))
    relabelled = {**sign_envelope(GOOD, COMMAND_PAYLOAD_TYPE, ORDER_KEY), "payloadType": TASK_PAYLOAD_TYPE}
    assert verify(relabelled).task == TASK
