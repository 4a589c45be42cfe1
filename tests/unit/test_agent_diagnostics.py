"""What a device answers: complete, bounded, without secrets, and never with an exception."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.configuration import Configuration
from agent.diagnoser import REMEMBERED, Diagnoser
from agent.diagnostics import MASK, MAX_ANSWER_BYTES, Diagnostics, LinuxSurroundings, fitted, masked
from agent.logbook import MAX_LINE_CHARS, MAX_LINES, LogBook
from gateway.diagnostic_requests import parse_diagnostic

REQUEST = "a" * 32


class Surroundings:
    def __init__(self, found: Any = None) -> None:
        self.found, self.asked = found, 0

    def system_info(self) -> dict[str, Any]:
        self.asked += 1
        if isinstance(self.found, Exception):
            raise self.found
        return self.found or {"uptime": self.asked}


def diagnostics(found: Any = None, log: LogBook | None = None, config: dict[str, Any] | None = None) -> Diagnostics:
    return Diagnostics(Surroundings(found), log or LogBook(), lambda: Configuration(3, config or {}), lambda: 1.5)


def test_each_type_has_the_fields_of_the_requirements(tmp_path: Any) -> None:
    real = LinuxSurroundings(lambda: tmp_path, lambda: 12.7, lambda: 2)
    found = Diagnostics(real, LogBook(), Configuration).answer("system-info", {})
    assert set(found) == {"uptime", "freeMemory", "totalMemory", "cpuTemperature", "diskUsage", "networkStatus"}
    assert (found["uptime"], found["networkStatus"]["connectionErrors"]) == (12, 2)
    assert diagnostics().answer("ping", {}) == {"pong": True, "timestamp": 1500}
    assert diagnostics(config={"a": 1}).answer("config-dump", {}) == {"config": {"a": 1}, "configVersion": 3}
    assert diagnostics().answer("log-tail", {}) == {"logs": []}
    assert diagnostics().answer("format-disk", {}) == {"error": "unknown request type: format-disk"}
    assert "order" in diagnostics().answer("reboot", {"confirmationToken": "x"})["error"]


@pytest.mark.parametrize("lines", [0, -1, 1001, True, "50", 1.5, None, [1]])
def test_a_number_of_lines_that_is_none_is_an_error(lines: object) -> None:
    assert "lines: expected" in diagnostics().answer("log-tail", {"lines": lines})["error"]


def test_what_cannot_be_read_is_an_answer_too() -> None:
    assert "cannot answer system-info: no disk" in diagnostics(OSError("no disk")).answer("system-info", {})["error"]
    assert "bytes" in diagnostics({"x": "y" * 40_000}).answer("system-info", {})["error"]
    assert "error" in diagnostics({"x": object()}).answer("system-info", {})


def test_a_long_log_is_cut_from_its_old_end_and_says_so() -> None:
    log = LogBook(lambda: 0)
    for number in range(2 * MAX_LINES):
        log.note(f"{number} " + "é" * 1000)
    found = diagnostics(log=log).answer("log-tail", {"lines": MAX_LINES})
    assert found["truncated"] is True and 10 < len(found["logs"]) < MAX_LINES
    assert found["logs"][-1].split()[1] == str(2 * MAX_LINES - 1)
    assert len(orjson.dumps(found)) <= MAX_ANSWER_BYTES
    assert parse_diagnostic({"requestId": REQUEST, **found}).answer == found
    assert all(len(line) <= MAX_LINE_CHARS for line in log.tail(MAX_LINES))
    assert len(log.tail(10 * MAX_LINES)) == MAX_LINES


@given(st.lists(st.text(max_size=60), max_size=40), st.integers(28, 2000))
def test_fitted_lines_fit_and_are_the_last_ones(lines: list[str], most: int) -> None:
    lines = [line.encode("utf-8", "replace").decode() for line in lines]
    found = fitted(lines, most)
    assert len(orjson.dumps(found)) <= most
    assert found["logs"] == lines[len(lines) - len(found["logs"]) :]
    assert found.get("truncated", False) == (len(found["logs"]) < len(lines))


def test_a_line_stays_one_line() -> None:
    log = LogBook(lambda: 0)
    log.note("one\nforged line\r\x1b[2J")
    assert log.tail(5) == ["1970-01-01T00:00:00Z one forged line \x1b[2J"]


@pytest.mark.parametrize(
    "key", ["password", "wifiPassword", "Secret", "authToken", "apiKey", "api_key", "privateKey", "psk", "pin", "key"]
)
def test_secrets_are_masked_at_any_depth(key: str) -> None:
    found = masked({"a": [{"b": {key: {"value": "hidden"}}}]})
    assert found == {"a": [{"b": {key: MASK}}]}


@pytest.mark.parametrize("key", ["monkey", "interval", "keyboard", "heartbeatSeconds", "pinned"])
def test_other_keys_are_not(key: str) -> None:
    assert masked({key: 5}) == {key: 5}


class Client:
    thing, log = "motor-7", LogBook()


class Guard:
    due_in = None

    def __init__(self) -> None:
        self.asked = 0

    def answer(self, request_id: str, parameters: Any) -> dict[str, Any]:
        self.asked += 1
        return {"scheduled": True}


def test_a_question_that_comes_again_has_the_same_answer_and_memory_is_bounded() -> None:
    diagnoser = Diagnoser(Client(), diagnostics(), Guard())  # type: ignore[arg-type]
    first = diagnoser.answer({"requestId": REQUEST, "type": "system-info"})
    assert first == {"requestId": REQUEST, "uptime": 1}
    assert diagnoser.answer({"requestId": REQUEST, "type": "system-info"}) == first
    for number in range(5 * REMEMBERED):
        diagnoser.answer({"requestId": f"{number:032x}", "type": "ping"})
    assert len(diagnoser._answered) == REMEMBERED


@pytest.mark.parametrize("asked", [{}, {"requestId": 5}, {"requestId": "x"}, {"type": "ping"}])
def test_a_question_without_a_request_id_is_not_answered(asked: dict[str, Any]) -> None:
    assert Diagnoser(Client(), diagnostics(), Guard()).answer(asked) is None  # type: ignore[arg-type]


def test_an_order_to_reboot_is_looked_at_each_time() -> None:
    guard = Guard()
    diagnoser = Diagnoser(Client(), diagnostics(), guard)  # type: ignore[arg-type]
    for _ in range(2):
        diagnoser.answer({"requestId": REQUEST, "type": "reboot"})
    assert guard.asked == 2
