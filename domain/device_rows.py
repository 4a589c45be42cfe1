"""Devices out of a file's lines: CSV or JSON lines, every row checked, every mistake with its line.

Pure: bytes in, records and mistakes out, one at a time, so that a file of any length is read in little memory. What the
registry holds already is not this module's matter.

A CSV has a header of a device's field names. Tags are columns `tags.<key>`, or one column `tags` of `k=v;k=v` or a JSON
object. An empty cell is as if it were not there. JSON lines hold one device each, under the same names.

>>> lines = [b"device_id,device_type,serial_number,site_id,tags.line\\n", b"motor-1,motor,S1,berlin,3\\n"]
>>> [row] = read_rows(lines, Format.CSV)
>>> row.line, row.record.tags, sorted(row.given)[:2]
(2, {'line': '3'}, ['device_id', 'device_type'])
"""

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pydantic import TypeAdapter, ValidationError

from domain.mistakes import faults_of, nearest, path_of, shown
from domain.strict_json import parse_object
from models.device import KEPT_BY_TIDEGATE, DeviceRecord
from models.errors import InvalidInputError, Mistake

MAX_LINE_BYTES = 256 * 1024
"""No line of an import file is longer; a longer one is refused without being held."""

_FIELDS = tuple(name for name in DeviceRecord.model_fields if name not in KEPT_BY_TIDEGATE)
_REQUIRED = tuple(name for name, info in DeviceRecord.model_fields.items() if info.is_required())
_JSON_COLUMNS = frozenset({"config", "desired_config"})
_RECORD = TypeAdapter(DeviceRecord)
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class Format(StrEnum):
    """What an import file is written in."""

    CSV = "csv"
    JSON_LINES = "jsonl"


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """A device of the file: `given` names the fields that the file says something about."""

    line: int
    record: DeviceRecord
    given: frozenset[str]


def read_rows(lines: Iterable[bytes], form: Format) -> Iterator[DeviceRow | Mistake]:
    """The devices of a file, and the mistakes in it, in the order of its lines.

    A device_id or serial number that an earlier line has is a mistake.

    Args:
        lines: lines with their ends, each of at most MAX_LINE_BYTES + 1 bytes (a longer one is a mistake).
        form: how the lines are written.

    Raises:
        InvalidInputError: the file as a whole cannot be read: no header, unknown or missing columns, not UTF-8.
    """
    text = _Text(lines)
    rows = _csv_rows(text) if form is Format.CSV else _json_rows(text)
    return _without_duplicates(rows)


def format_of(name: str, head: bytes) -> Format:
    """By the file's ending, else by what its first byte looks like."""
    ending = name.lower().rpartition(".")[2]
    if ending == "csv":
        return Format.CSV
    if ending in ("jsonl", "ndjson", "json"):
        return Format.JSON_LINES
    return Format.JSON_LINES if head.removeprefix(_BOM).lstrip()[:1] in (b"{", b"[") else Format.CSV


@dataclass
class _Text:
    """The lines decoded. A line that cannot be is remembered in `bad`, and read as if it were empty."""

    lines: Iterable[bytes]
    bad: dict[int, str] = field(default_factory=dict)
    number: int = 0

    def __iter__(self) -> Iterator[str]:
        for raw in self.lines:
            self.number += 1
            yield self._decoded(raw)

    def _decoded(self, raw: bytes) -> str:
        if self.number == 1:
            if raw.startswith(_UTF16):
                raise InvalidInputError("the file is UTF-16; save it as UTF-8 and import it again")
            raw = raw.removeprefix(_BOM)
        if len(raw) > MAX_LINE_BYTES:
            self.bad[self.number] = f"the line is longer than {MAX_LINE_BYTES} bytes"
        elif b"\0" in raw:
            self.bad[self.number] = "the line contains a zero byte"
        else:
            try:
                return raw.decode()
            except UnicodeDecodeError as error:
                found = raw[error.start : error.start + 1].hex()
                self.bad[self.number] = f"not UTF-8: byte 0x{found} at position {error.start + 1}"
        return "\n"

    def take_bad(self, first: int, last: int) -> Iterator[Mistake]:
        """The bad lines from `first` to `last`; each is told once."""
        for number in [n for n in self.bad if first <= n <= last]:
            yield Mistake("(line)", self.bad.pop(number), number)


def _without_duplicates(rows: Iterable[DeviceRow | Mistake]) -> Iterator[DeviceRow | Mistake]:
    seen: dict[str, dict[str, int]] = {"device_id": {}, "serial_number": {}}
    for row in rows:
        if isinstance(row, Mistake):
            yield row
            continue
        unique = True
        for name, lines in seen.items():
            value = getattr(row.record, name)
            first = lines.setdefault(value, row.line)
            if first != row.line:
                unique = False
                yield Mistake(name, f"{shown(value)} stands in line {first} already", row.line)
        if unique:
            yield row


# --- CSV -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Header:
    """Where each cell of a row belongs."""

    fields: tuple[str, ...]
    tag_keys: tuple[str | None, ...]
    has_tags: bool


def _csv_rows(text: _Text) -> Iterator[DeviceRow | Mistake]:
    lines = iter(text)
    first = next(lines, None)
    if text.bad:
        raise InvalidInputError(f"the header cannot be read: {text.bad[1]}")
    if first is None or not first.strip():
        raise InvalidInputError(f"no header: expected a first line with column names, at least {', '.join(_REQUIRED)}")
    delimiter = _delimiter_of(first)
    header = _header_of(next(csv.reader([first], delimiter=delimiter), []))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        before = text.number
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield Mistake("(line)", _csv_fault(error), before + 1)
            continue
        bad = list(text.take_bad(before + 1, text.number)) if text.bad else []
        yield from bad
        if cells is None:
            return
        if cells and not bad:
            yield from _csv_row(header, cells, before + 1)


def _csv_fault(error: csv.Error) -> str:
    if "field larger" in str(error) or "unexpected end" in str(error):
        return "a quoted cell does not end (or is longer than 131072 characters); is a closing quote missing?"
    return f"not CSV: {error}"


def _delimiter_of(header: str) -> str:
    """The separator under which the header names most fields; spreadsheets write `;` in half of the world."""
    return max(",;\t", key=lambda each: sum(cell.strip(' "\r\n') in _FIELDS for cell in header.split(each)))


def _header_of(cells: list[str]) -> _Header:
    names = [cell.strip() for cell in cells]
    tag_keys = tuple(name[5:] if name.startswith("tags.") else None for name in names)
    wrong = [f"column {shown(name)} stands twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    for name, key in zip(names, tag_keys, strict=True):
        if (key is None and name not in _FIELDS) or key == "":
            meant = nearest(name, _FIELDS)
            wrong.append(f"unknown column {shown(name)}" + (f", did you mean '{meant}'?" if meant else ""))
    missing = [name for name in _REQUIRED if name not in names]
    if missing:
        wrong.append(f"column {' and '.join(missing)} is missing")
    if wrong:
        raise InvalidInputError(
            "the header is wrong: " + "; ".join(wrong) + f". Columns are {', '.join(_FIELDS)}, and tags.<key> for a tag"
        )
    return _Header(
        tuple(names), tag_keys, any(name == "tags" or key for name, key in zip(names, tag_keys, strict=True))
    )


def _csv_row(header: _Header, cells: list[str], line: int) -> Iterator[DeviceRow | Mistake]:
    if len(cells) != len(header.fields):
        yield Mistake("(line)", f"expected {len(header.fields)} cells as in the header, got {len(cells)}", line)
        return
    raw: dict[str, Any] = {}
    tags: dict[str, str] = {}
    try:
        for name, key, cell in zip(header.fields, header.tag_keys, cells, strict=True):
            if not cell:
                continue
            if key is not None:
                _add_tag(tags, key, cell)
            elif name == "tags":
                for inner, value in _tags_of(cell):
                    _add_tag(tags, inner, value)
            else:
                raw[name] = _json_cell(name, cell) if name in _JSON_COLUMNS else cell
    except _CellError as error:
        yield Mistake(error.column, error.message, line)
        return
    if header.has_tags:
        raw["tags"] = tags
    yield from _checked(raw, line)


class _CellError(Exception):
    """A cell that cannot be read; never leaves this module."""

    def __init__(self, column: str, message: str) -> None:
        self.column, self.message = column, message


def _add_tag(tags: dict[str, str], key: str, value: Any) -> None:
    if key in tags:
        raise _CellError(f"tags.{key}", f"given twice: {shown(tags[key])} and {shown(value)}")
    tags[key] = value


def _tags_of(cell: str) -> Iterator[tuple[str, Any]]:
    if cell.lstrip().startswith("{"):
        yield from _json_cell("tags", cell).items()
        return
    for pair in filter(None, cell.split(";")):
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise _CellError("tags", f"expected k=v;k=v or a JSON object, got {shown(cell)}")
        yield key.strip(), value.strip()


def _json_cell(column: str, cell: str) -> dict[str, Any]:
    try:
        return parse_object(cell)
    except ValueError as error:
        raise _CellError(column, str(error)) from None


# --- JSON lines ------------------------------------------------------------------------------------------------------


def _json_rows(text: _Text) -> Iterator[DeviceRow | Mistake]:
    for line in text:
        number = text.number
        if text.bad:
            yield from text.take_bad(number, number)
        if line.isspace():
            continue
        if number == 1 and line.lstrip().startswith("["):
            raise InvalidInputError(
                "expected JSON lines, one object a line; got a JSON array (jq -c '.[]' takes it apart)"
            )
        try:
            raw = parse_object(line)
        except ValueError as error:
            yield Mistake("(line)", str(error), number)
        else:
            yield from _checked(raw, number)


# --- both ------------------------------------------------------------------------------------------------------------


def _checked(raw: dict[str, Any], line: int) -> Iterator[DeviceRow | Mistake]:
    try:
        record = _RECORD.validate_python(raw)
    except ValidationError as error:
        for fault in faults_of(error, DeviceRecord):
            yield Mistake(path_of(fault.where), fault.message, line)
        return
    yield DeviceRow(line, record, frozenset(record.model_fields_set))
