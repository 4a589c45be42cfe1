"""One reading of JSON (THREATS 13): what parsers read differently, or PostgreSQL refuses, is refused here."""

import json
import re
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from firmware.errors import StatementError
from firmware.manifest import decode_order, decode_release, encode_order, encode_release
from firmware.strict import MAX_DEPTH, MAX_INTEGER, parse_strict
from tests.unit.firmware_samples import ORDER, RELEASE, mutant

LIMIT = 100_000

ORDER_TEXT = encode_order(ORDER)
ORDER_FIELDS: dict[str, Any] = json.loads(ORDER_TEXT)
RELEASE_TEXT = encode_release(RELEASE)

NO_JSON = [
    b"",
    b" ",
    b"{",
    b"}",
    b"[",
    b'{"a":1',
    b'{"a":1}}',
    b'{"a":1}{"b":2}',
    b'{"a":1,}',
    b"[1,]",
    b"{a:1}",
    b"{'a':1}",
    b'{"a":01}',
    b'{"a":+1}',
    b'{"a":.5}',
    b'{"a":1.}',
    b'{"a":0x10}',
    b'{"a":1}//',
    b'{"a":1}/* */',
    b'{"a":"\x00"}',
    b'{"a":"\x1f"}',
    b'{"a":"\n"}',
    b'{"a":"\\x41"}',
    b'{"a":"\\u12"}',
    b'{"a":True}',
    b'{"a":undefined}',
    b'{"a":1}\x00',
    b'\x00{"a":1}',
]
MANY_READINGS = [
    b'{"a":1,"a":2}',
    b'{"a":1,"a":1}',
    b'{"a":1,"\\u0061":2}',
    b'{"b":{"a":1,"a":2}}',
    b'[{"a":null,"a":1}]',
    b'{"":1,"":2}',
    b'{"a":NaN}',
    b'{"a":Infinity}',
    b'{"a":-Infinity}',
    b"NaN",
    b'{"a":1e999}',
    b'{"a":-1e999}',
    b'{"a":"\\u0000"}',
    b'{"\\u0000":1}',
    b'[["x\\u0000y"]]',
    b'{"a":"\\ud800"}',
    b'{"a":"\\udfff"}',
    b'{"\\udc00\\ud800":1}',
    b'{"a":' + str(MAX_INTEGER + 1).encode() + b"}",
    b'{"a":-' + str(MAX_INTEGER + 1).encode() + b"}",
    b'{"a":18446744073709551616}',
    b'{"a":' + b"9" * 5000 + b"}",
    b'{"a":0.' + b"1" * 5000 + b"}",
    b"[" * 7 + b"]" * 7,
    b'{"a":' * 7 + b"1" + b"}" * 7,
    b"[" * 50_000 + b"]" * 50_000,
    b'{"a":' * 15_000 + b"1" + b"}" * 15_000,
    b"[" * 90_000,
    b'\xef\xbb\xbf{"a":1}',
    '{"a":1}'.encode("utf-16"),
    '{"a":1}'.encode("utf-16-le"),
    '{"a":1}'.encode("utf-32"),
    b'{"a":"\xff"}',
    b'{"a":"\xc0\x80"}',
    b'{"a":"\xed\xa0\x80"}',
    b'{"a":"\xf4\x90\x80\x80"}',
    b'{"a":"\x80"}',
]
TEMPLATES = [text for text in NO_JSON + MANY_READINGS if re.fullmatch(rb'\{"a":.{1,90}\}', text, re.DOTALL)]


def hostile_statements() -> list[bytes]:
    """Each hostile value in the place of each value of an order, and each key of an order twice."""
    corpus = []
    for name, value in ORDER_FIELDS.items():
        here = b'"%s":%s' % (name.encode(), json.dumps(value).encode())
        assert ORDER_TEXT.count(here) == 1
        corpus += [ORDER_TEXT.replace(here, b'"%s":%s' % (name.encode(), text[5:-1])) for text in TEMPLATES]
        corpus.append(ORDER_TEXT.replace(here, here + b"," + here))
        corpus.append(ORDER_TEXT.replace(here, b'"%s":null,%s' % (name.encode(), here)))
        corpus.append(ORDER_TEXT.replace(here, b'"\\u%04x%s":7,%s' % (ord(name[0]), name[1:].encode(), here)))
    return corpus


@pytest.mark.parametrize("text", NO_JSON + MANY_READINGS, ids=lambda text: text[:24].decode("latin-1"))
def test_hostile_json_is_refused(text: bytes) -> None:
    with pytest.raises(StatementError, match="cannot read JSON"):
        parse_strict(text, max_bytes=LIMIT)


def test_hostile_json_in_the_place_of_any_field_of_an_order_is_refused() -> None:
    corpus = hostile_statements()
    assert len(corpus) >= 200
    for text in corpus:
        with pytest.raises(StatementError):
            decode_order(text)


def test_the_ordinary_parser_would_have_taken_half_of_it() -> None:
    def lax(text: bytes) -> bool:
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return False
        return True

    assert sum(map(lax, MANY_READINGS)) > len(MANY_READINGS) / 2
    assert sum(map(lax, hostile_statements())) > 100


@pytest.mark.parametrize(
    ("defence", "instead", "attack"),
    [
        ("object_pairs_hook=_object, ", "", b'{"a":1,"a":2}'),
        (", parse_constant=_constant", "", b'{"a":NaN}'),
        ("parse_int=_integer, ", "", b'{"a":18446744073709551616}'),
        ("parse_float=_float, ", "", b'{"a":1e999}'),
        ('if b"\\\\" in data:', "if False:", b'{"a":"\\u0000"}'),
        ("_check_depth(data, max_depth)\n    try", "try", b"[" * 7 + b"]" * 7),
        ("if len(data) > max_bytes:", "if False:", b" " * LIMIT + b"{}"),
    ],
)
def test_without_its_defence_each_attack_is_taken(defence: str, instead: str, attack: bytes) -> None:
    with pytest.raises(StatementError):
        parse_strict(attack, max_bytes=LIMIT)
    mutant("firmware.strict", (defence, instead)).parse_strict(attack, max_bytes=LIMIT)


def test_what_is_within_every_bound_is_read() -> None:
    deep = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert parse_strict(deep, max_bytes=len(deep)) is not None
    assert parse_strict(b'{"a":"[[[[[[[[[[\\"{{{{"}', max_bytes=100) == {"a": '[[[[[[[[[["{{{{'}
    assert parse_strict(b'{"a":%d,"b":-%d}' % (MAX_INTEGER, MAX_INTEGER), max_bytes=100)["a"] == MAX_INTEGER
    assert parse_strict(b'{"a":"\\ud83d\\ude00\\u00e9"}', max_bytes=100) == {"a": "😀é"}


json_texts = st.recursive(
    st.sampled_from(
        ["null", "true", "1", "-0", "1.5", "1e400", "9007199254740993", '"\\u0000"', '"\\ud800"', '"a"', "NaN"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]")
        | st.lists(st.tuples(st.sampled_from(['"a"', '"b"', '"\\u0061"', '"\\\\a"']), inner), max_size=3).map(
            lambda pairs: "{" + ",".join(f"{key}:{value}" for key, value in pairs) + "}"
        )
    ),
    max_leaves=12,
)


@given(json_texts | st.text(alphabet='{}[]",:\\u0123456789abdNaeE.+- ', max_size=40))
@example("-0")
@settings(max_examples=400, deadline=None)
def test_what_is_taken_means_the_same_to_another_parser_and_can_be_stored(text: str) -> None:
    try:
        value = parse_strict(text.encode(), max_bytes=LIMIT)
    except StatementError:
        return
    assert orjson.loads(text) == value
    assert "\x00" not in json.dumps(value, ensure_ascii=False)
    assert parse_strict(orjson.dumps(value), max_bytes=LIMIT) == value


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_bytes_of_any_kind_are_read_or_refused_and_nothing_else_happens(data: bytes) -> None:
    for decode in (decode_order, decode_release):
        with pytest.raises(StatementError):
            decode(data)


def test_a_statement_survives_writing_and_reading() -> None:
    assert decode_order(ORDER_TEXT) == ORDER
    assert decode_release(RELEASE_TEXT) == RELEASE
