"""The text of Mosquitto's files: what may be in it, and what must not."""

from pathlib import Path

import pytest

from access.example import FOLDER, example
from access.mosquitto import (
    DEVICE_READS,
    DEVICE_WRITES,
    MosquittoFiles,
    MosquittoListeners,
    config,
    denied_in,
    device_acl,
    engine_acl,
)
from models.protocol import REQUEST_FILTERS


def listeners_of(text: str) -> list[list[str]]:
    return [part.splitlines() for part in text.split("\nlistener ")[1:]]


def made(open_port: int | None = None) -> str:
    files = MosquittoFiles(Path("/a"), Path("/c.pem"), Path("/c.key"), Path("/ca.pem"), Path("/pid"))
    return config(MosquittoListeners(1883, 1884, open_port), files, 1000)


def test_no_listener_is_without_identity_unless_it_was_asked_for() -> None:
    listeners = listeners_of(made())
    assert len(listeners) == 2
    for lines in listeners:
        needed = {"allow_anonymous false", "require_certificate true", "use_identity_as_username true"}
        assert needed <= set(lines)
        assert any(line.startswith("acl_file ") for line in lines) and any(line.startswith("cafile ") for line in lines)
    assert "crlfile /a/devices.crl" in listeners[0] and "use_username_as_clientid true" in listeners[0]
    assert "per_listener_settings true" in made(), "else the last listener's rules hold for all"


def test_the_open_listener_is_on_loopback_whatever_the_others_listen_on() -> None:
    files = MosquittoFiles(Path("/a"), Path("/c.pem"), Path("/c.key"), Path("/ca.pem"), Path("/pid"))
    text = config(MosquittoListeners(1883, 1884, 1885, host="0.0.0.0"), files, 1000)
    assert "listener 1885 127.0.0.1\nallow_anonymous true\n" in text
    assert "listener 1883 0.0.0.0\n" in text


def test_every_request_that_the_gateway_hears_may_be_written_and_none_of_them_read() -> None:
    for wanted in REQUEST_FILTERS:
        of_one = wanted.replace("things/+/", "things/%u/").replace("devices/+/", "devices/%u/")
        assert of_one in DEVICE_WRITES
    assert not set(DEVICE_READS) & set(DEVICE_WRITES)


def test_every_topic_of_a_device_is_tied_to_its_name() -> None:
    for topic in (*DEVICE_READS, *DEVICE_WRITES):
        assert topic.startswith(("$aws/things/%u/", "devices/%u/")) and "#" not in topic
        assert not topic.endswith("+")


def test_denials_are_read_back() -> None:
    names = {f"motor-{n}" for n in range(100)} | {"a:b_c"}
    assert denied_in(device_acl(names)) == names
    assert denied_in(device_acl([])) == set() == denied_in("")
    assert device_acl(["b", "a"]) == device_acl(["a", "b", "a"])
    assert "user a\ntopic deny #\ntopic deny $aws/#\n" in device_acl(["a"])


@pytest.mark.parametrize("name", ["", "a b", "a\ntopic readwrite #", "a/b", "#", "engine.gateway", "a" * 129])
def test_a_name_that_could_be_a_line_of_its_own_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a thing name"):
        device_acl([name])


def test_the_access_keeper_may_use_its_canary_alone() -> None:
    section = engine_acl("tidegate/access/one/0f").split("user engine.access\n")[1]
    assert section == "topic readwrite tidegate/access/one/0f\n"


def test_the_example_is_what_the_program_writes() -> None:
    written = {path.name: path.read_text() for path in FOLDER.iterdir()}
    assert written == example(), "run 'python -m access.example'"
