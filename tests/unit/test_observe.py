"""Logs and metrics: what a device sent cannot forge a line, and a process says when it is ready."""

import io
import json
import logging
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import pytest

from observe import logs, metrics


@dataclass
class _Settings:
    log_format: Literal["console", "json"] = "console"
    log_level: str = "INFO"


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.mark.parametrize("hostile", ["a\nready broker=evil", "a\x1b[2J", "a\r", "a\x9b31m", "a\u2028b"])
def test_a_device_cannot_forge_a_line_or_move_the_cursor(hostile: str) -> None:
    out = io.StringIO()
    log = logs.configure("gateway", _Settings(), out)
    log.info("quarantined", thing=hostile)
    logging.getLogger("library").warning("said %s", hostile)
    text = out.getvalue()
    assert len(text.splitlines()) == 2
    assert not any((ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0 for c in text)


def test_without_the_escaping_the_same_device_forges_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "escape_control_characters", lambda text: text)
    out = io.StringIO()
    logs.configure("gateway", _Settings(), out)
    logging.getLogger("library").warning("said %s", "a\nready broker=evil")
    assert len(out.getvalue().splitlines()) == 2


def test_json_lines_carry_process_level_time_and_the_traceback_without_local_variables() -> None:
    out = io.StringIO()
    log = logs.configure("worker", _Settings("json"), out)
    secret = "private-" + "key"
    try:
        raise ValueError(f"length {len(secret)}")
    except ValueError:
        log.exception("failed", job=3)
    line = json.loads(out.getvalue())
    assert (line["process"], line["level"], line["event"], line["job"]) == ("worker", "error", "failed", 3)
    assert "ValueError: length 11" in line["exception"]
    assert secret not in out.getvalue()


def test_what_is_below_the_level_is_not_written() -> None:
    out = io.StringIO()
    log = logs.configure("worker", _Settings(log_level="WARNING"), out)
    log.info("no")
    logging.getLogger("library").info("no")
    log.warning("yes")
    assert [line.split("]")[1].split()[0] for line in out.getvalue().splitlines()] == ["yes"]


def test_a_process_serves_its_metrics_on_a_free_port_and_says_when_it_is_ready() -> None:
    port = metrics.serve("127.0.0.1", 0)

    def scrape() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            return str(answer.read(), "utf-8")

    assert 'tidegate_ready{process="test"}' not in scrape()
    metrics.mark_ready("test")
    assert 'tidegate_ready{process="test"} 1.0' in scrape()
    metrics.mark_ready("test", False)
    assert 'tidegate_ready{process="test"} 0.0' in scrape()
