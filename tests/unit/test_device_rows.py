"""Reading import files: hostile bytes get a clear message with a line, good rows around them are still checked."""

import json
import tracemalloc
from collections.abc import Iterator

import pytest

from domain.device_rows import MAX_LINE_BYTES, DeviceRow, Format, format_of, read_rows
from models.errors import InvalidInputError, Mistake

HEADER = b"device_id,device_type,serial_number,site_id\n"


def read(data: bytes, form: Format = Format.CSV) -> tuple[list[DeviceRow], list[Mistake]]:
    """Rows and mistakes of a file's bytes."""
    found = list(read_rows(data.splitlines(keepends=True), form))
    return [r for r in found if isinstance(r, DeviceRow)], [m for m in found if isinstance(m, Mistake)]


def json_line(**changes: object) -> bytes:
    """A good device as a JSON line, with changes."""
    device = {"device_id": "m1", "device_type": "motor", "serial_number": "S1", "site_id": "berlin", **changes}
    return json.dumps(device).encode() + b"\n"


@pytest.mark.parametrize(
    "data",
    [
        HEADER + b"m1,motor,S1,berlin\n",
        b"\xef\xbb\xbf" + HEADER + b"m1,motor,S1,berlin\n",
        HEADER.replace(b"\n", b"\r\n") + b"m1,motor,S1,berlin\r\n",
        HEADER + b"\n\nm1,motor,S1,berlin",
        HEADER.replace(b",", b";") + b"m1;motor;S1;berlin\n",
        HEADER.replace(b",", b"\t") + b"m1\tmotor\tS1\tberlin\n",
        b'"device_id","device_type", serial_number ,site_id\nm1,"motor",S1,berlin\n',
    ],
    ids=["plain", "byte order mark", "CRLF", "blank lines, no last newline", "semicolons", "tabs", "quoted header"],
)
def test_a_csv_is_read_as_spreadsheets_write_it(data: bytes) -> None:
    rows, mistakes = read(data)
    assert not mistakes
    assert [(r.record.device_id, r.record.device_type, r.record.serial_number, r.record.site_id) for r in rows] == [
        ("m1", "motor", "S1", "berlin")
    ]


@pytest.mark.parametrize(
    ("header", "cells"),
    [
        (b"tags.environment,tags.line", b"production,3"),
        (b"tags", b"environment=production;line=3"),
        (b"tags", b'"{""environment"": ""production"", ""line"": ""3""}"'),
        (b"tags,tags.line", b"environment=production,3"),
    ],
)
def test_tags_are_read_in_every_documented_form(header: bytes, cells: bytes) -> None:
    rows, mistakes = read(HEADER[:-1] + b"," + header + b"\nm1,motor,S1,berlin," + cells + b"\n")
    assert not mistakes
    assert rows[0].record.tags == {"environment": "production", "line": "3"}


def test_an_empty_cell_says_nothing_about_its_field() -> None:
    rows, _ = read(HEADER[:-1] + b",zone,firmware_version\nm1,motor,S1,berlin,,1.2.3\n")
    assert "zone" not in rows[0].given
    assert "firmware_version" in rows[0].given


def test_a_quoted_cell_may_span_lines_and_later_mistakes_keep_their_line() -> None:
    data = HEADER[:-1] + b',manufacturer\nm1,motor,S1,berlin,"a\nb"\nm 2,motor,S2,berlin,\n'
    rows, mistakes = read(data)
    assert rows[0].record.manufacturer == "a\nb"
    assert [(m.line, m.path) for m in mistakes] == [(4, "device_id")]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no header"),
        (b"\n\n", "no header"),
        (b"device_id,device_type\n", "column serial_number and site_id is missing"),
        (b"device_id,device_type,serial_number,site_id,zon\n", "unknown column 'zon', did you mean 'zone'?"),
        (b"device_id,device_id,device_type,serial_number,site_id\n", "column 'device_id' stands twice"),
        (HEADER[:-1] + b",tags.\n", "unknown column 'tags.'"),
        (b"\xff\xfed\x00e\x00v\x00", "UTF-16"),
        (b"device_id\xff,x\n", "not UTF-8: byte 0xff at position 10"),
        (b"<html><body>login</body></html>\n", "unknown column"),
        (b"PK\x03\x04\x00\x00spreadsheet\n", "the line contains a zero byte"),
    ],
)
def test_a_file_that_is_no_device_list_is_refused_as_a_whole(data: bytes, message: str) -> None:
    with pytest.raises(InvalidInputError) as refused:
        read(data)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("row", "path", "message"),
    [
        (b"m1,motor,S1\n", "(line)", "expected 4 cells as in the header, got 3"),
        (b"m1,motor,S1,berlin,x\n", "(line)", "expected 4 cells as in the header, got 5"),
        (b"m 1,motor,S1,berlin\n", "device_id", "got 'm 1'"),
        (b"m/1,motor,S1,berlin\n", "device_id", "got 'm/1'"),
        (b"../../m,motor,S1,berlin\n", "device_id", "got '../../m'"),
        (b"m1,,S1,berlin\n", "device_type", "is missing"),
        (b"m1,motor,S1," + b"x" * 101 + b"\n", "site_id", "at most 100 characters"),
        (b"m1,motor,S1,ber\xfflin\n", "(line)", "not UTF-8: byte 0xff at position 16"),
        (b"m1,motor,S1,ber\x00lin\n", "(line)", "zero byte"),
        (b"m1,motor,S1," + b"x" * MAX_LINE_BYTES + b"\n", "(line)", "longer than 262144 bytes"),
        (b'm1,motor,"S1"x,berlin\n', "(line)", "not CSV"),
    ],
)
def test_a_bad_row_is_told_with_its_line_and_the_rows_around_it_are_read(row: bytes, path: str, message: str) -> None:
    rows, mistakes = read(HEADER + b"a,motor,SA,berlin\n" + row + b"z,motor,SZ,berlin\n")
    assert [r.record.device_id for r in rows] == ["a", "z"]
    assert [(m.line, m.path) for m in mistakes] == [(3, path)]
    assert message in mistakes[0].message


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        ("status", "actif", "'active'"),
        ("config_version", "1.5", "integer"),
        ("config_version", "99999999999", "less than or equal to 2147483647"),
        ("uptime", "-1", "greater than or equal to 0"),
        ("retired_at", "yesterday", "datetime"),
        ("config", "[1]", "expected a JSON object, got [1]"),
        ("config", '"{""a"": NaN}"', "NaN is not a JSON number"),
        ("config", '"{""a"": 1, ""a"": 2}"', "key 'a' stands twice"),
        ("config", '"{""a"": ""\\u0000""}"', "U+0000"),
        ("config", '"{""a"": ""\\ud800""}"', "surrogate"),
        ("config", "{" * 50, "nested deeper than 20 levels"),
        ("tags", "environment", "expected k=v;k=v"),
        ("tags", "a=1;a=2", "given twice: '1' and '2'"),
        ("tags", '"{""a"": 1}"', "expected text, got 1; put it in quotes"),
    ],
)
def test_a_cell_of_the_wrong_kind_names_its_column(column: str, cell: str, message: str) -> None:
    _, mistakes = read(HEADER[:-1] + f",{column}\nm1,motor,S1,berlin,{cell}\n".encode())
    assert len(mistakes) == 1
    assert mistakes[0].line == 2
    assert mistakes[0].path.startswith(column)
    assert message in mistakes[0].message


def test_a_quote_that_never_ends_is_a_mistake_and_not_a_device() -> None:
    rows, mistakes = read(HEADER + b'm1,motor,"S1,berlin\nm2,motor,S2,berlin\n')
    assert rows == []
    assert [(m.line, "closing quote" in m.message) for m in mistakes] == [(2, True)]


def test_every_mistake_of_a_row_is_told() -> None:
    _, mistakes = read(HEADER[:-1] + b",status\nm 1,motor,,berlin,on\n")
    assert {m.path for m in mistakes} == {"device_id", "serial_number", "status"}


def test_an_id_or_a_serial_number_that_comes_twice_names_the_first_line() -> None:
    rows, mistakes = read(HEADER + b"m1,motor,S1,berlin\nm1,motor,S2,berlin\nm3,motor,S1,berlin\n")
    assert len(rows) == 1
    assert [(m.line, m.path, m.message) for m in mistakes] == [
        (3, "device_id", "'m1' stands in line 2 already"),
        (4, "serial_number", "'S1' stands in line 2 already"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{not json}\n", "not JSON"),
        (b'{"device_id": "m1"\n', "not JSON"),
        (b'"m1"\n', "expected a JSON object, got 'm1'"),
        (b'{"a":' * 10_000 + b"\n", "nested deeper than 20 levels"),
        (json_line(uptime=2**70), "does not fit 64 bits"),
        (json_line(config={"a": float("inf")}), "Infinity is not a JSON number"),
        (json_line(config={"a": "\0"}), "U+0000"),
        (json_line(tags={"\0": "a"}), "U+0000"),
        (json_line(serial_number=17), "expected text, got 17; put it in quotes"),
        (json_line(firmwareVersion="1"), "did you mean 'firmware_version'?"),
        (b'{"device_id":"a","device_id":"b"}\n', "key 'device_id' stands twice"),
        (b'{"config": 1e999}\n', "too large"),
    ],
)
def test_a_bad_json_line_is_told_and_the_next_one_is_read(line: bytes, message: str) -> None:
    rows, mistakes = read(line + json_line(device_id="z", serial_number="Z"), Format.JSON_LINES)
    assert [r.record.device_id for r in rows] == ["z"]
    assert mistakes[0].line == 1
    assert any(message in m.message for m in mistakes)


def test_a_json_array_is_told_how_to_become_lines() -> None:
    with pytest.raises(InvalidInputError, match="one object a line"):
        read(b"[" + json_line() + b"]", Format.JSON_LINES)


def test_control_characters_of_a_file_do_not_reach_a_message() -> None:
    _, mistakes = read(HEADER + b"\x1b[2Jm1,motor,S1,berlin\n")
    assert "\x1b" not in str(mistakes[0])


@pytest.mark.parametrize(
    ("name", "head", "form"),
    [
        ("fleet.csv", b"{", Format.CSV),
        ("fleet.JSONL", b"device_id", Format.JSON_LINES),
        ("-", b"\xef\xbb\xbf {", Format.JSON_LINES),
        ("-", b"device_id,", Format.CSV),
    ],
)
def test_the_format_is_the_ending_or_the_look_of_the_first_byte(name: str, head: bytes, form: Format) -> None:
    assert format_of(name, head) is form


def test_reading_a_long_file_holds_no_more_than_its_ids() -> None:
    def lines() -> Iterator[bytes]:
        for i in range(20_000):
            yield json_line(device_id=f"m{i}", serial_number=f"S{i}", config={"text": "x" * 1000})

    tracemalloc.start()
    count = sum(isinstance(row, DeviceRow) for row in read_rows(lines(), Format.JSON_LINES))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 12 * 1024 * 1024  # the file has 20 MiB
