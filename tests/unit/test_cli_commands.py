"""Commands without a server: help, usage, keys, and clear words where nothing answers."""

import json
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from cli.main import app
from cli.output import EXIT_HELP
from firmware.keys import key_id, load_private_key, load_public_key
from tests.cli_runner import run

ROOT = Path(__file__).parent.parent.parent
SPEC = """\
name: motor-1.3.0
release: motor-controller@1.3.0
waves: [{name: fleet, size: 100%}]
"""


def commands() -> Iterator[tuple[str, ...]]:
    """Every command, as its words."""

    def walk(command: object, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        inner = getattr(command, "commands", None)
        yield words
        for name, each in (inner or {}).items():
            yield from walk(each, (*words, name))

    return walk(typer.main.get_command(app), ())


ALL = sorted(commands())
LEAVES = [words for words in ALL if words and not any(other[: len(words)] == words and other != words for other in ALL)]


@pytest.fixture
def nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory where no stack has ever run."""
    for name in ("TIDEGATE_DATABASE_URL", "TIDEGATE_TEMPORAL_ADDRESS", "TIDEGATE_ARTIFACT_STORE", "TIDEGATE_STATE_DIR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "nothing"


@pytest.fixture
def closed_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_commands_are_those_of_the_documentation() -> None:
    assert {" ".join(words) for words in LEAVES} == {
        "up", "demo", "migrate",
        "ca init", "ca show", "ca roll", "ca retire", "ca crl",
        "device import", "device list", "device show", "device enroll", "device health",
        "health", "device-type list", "device-type set",
        "device configure", "device configuration", "device rotate", "device certificates", "device revoke", "device unbar",
        "device decommission", "device release",
        "rotation start", "rotation status",
        "claim create", "claim list", "claim show", "claim disable", "claim allow",
        "enrolment list", "enrolment show", "enrolment approve", "enrolment reject", "enrolment resolve",
        "broker list", "broker setup",
        "shadow get", "shadow set", "shadow wait", "shadow delete", "shadow history", "shadow list",
        "device lookup", "diagnose", "audit", "alert list", "alert show", "alert acknowledge", "alert resolve",
        "alert rule list", "alert rule show", "alert rule set", "alert rule enable", "alert rule disable",
        "alert rule delete", "alert rule test", "alert channel list", "alert channel test",
        "release keygen", "release publish", "release list", "release show",
        "rollout start", "rollout watch", "rollout show", "rollout list", "rollout pause", "rollout resume",
        "rollout approve", "rollout promote", "rollout abort", "rollout adjust", "rollout device", "rollout devices",
        "rollout events",
        "job start", "job watch", "job show", "job list", "job pause", "job resume", "job cancel", "job retry",
        "job explain", "job devices", "job failures", "job events",
        "job schedule create", "job schedule list", "job schedule pause", "job schedule resume", "job schedule trigger",
        "job schedule delete",
    }  # fmt: skip


@pytest.mark.parametrize("words", ALL, ids=lambda words: " ".join(words) or "(none)")
def test_every_command_explains_itself(words: tuple[str, ...]) -> None:
    ran = run(*words, "--help")
    assert ran.status == 0
    assert "Usage:" in ran.out
    assert "--help" in ran.out


@pytest.mark.parametrize("words", [words for words in LEAVES if words not in (("up",), ("demo",))])
def test_every_command_tells_its_exit_statuses_and_takes_the_shared_options(words: tuple[str, ...]) -> None:
    out = " ".join(run(*words, "--help").out.split())
    assert " ".join(EXIT_HELP.split()) in out
    assert all(option in out for option in ("--json", "--state", "--debug"))


@pytest.mark.parametrize(
    "words",
    [
        ("rollout", "list", "--limit", "many"),
        ("rollout", "start"),
        ("device", "list", "--status", "happy"),
        ("release", "publish", "image.bin"),
        ("rollout", "adjust", "a", "--in-flight", "0"),
        ("nonsense",),
    ],
)
def test_wrong_usage_has_status_2(words: tuple[str, ...]) -> None:
    ran = run(*words)
    assert (ran.status, ran.out) == (2, "")
    assert "--help" in ran.err


# --- nobody answers --------------------------------------------------------------------------------------------------

NEEDS_DATABASE = [
    ("ca", "init"),
    ("ca", "show"),
    ("ca", "retire", "abc"),
    ("ca", "crl"),
    ("broker", "list"),
    ("device", "list"),
    ("device", "show", "m1"),
    ("device", "health", "m1"),
    ("device-type", "list"),
    ("health",),
    ("device", "lookup", "m1"),
    ("audit",),
    ("alert", "list"),
    ("alert", "show", "1"),
    ("alert", "resolve", "1"),
    ("alert", "rule", "list"),
    ("alert", "rule", "set", "hot", "cpuTemperature > 80"),
    ("alert", "rule", "test", "hot"),
    ("release", "list"),
    ("rollout", "list"),
    ("rollout", "watch", "a"),
    ("rollout", "devices", "a"),
    ("migrate",),
]


def test_without_a_stack_enrolling_names_the_enrolment_server_and_the_remedy(nothing: Path) -> None:
    ran = run("device", "enroll", "SN-1", "--claim", nothing, "--out", nothing, "--state", nothing)
    assert (ran.status, ran.out) == (1, "")
    assert "no address of the enrolment server" in ran.err
    assert "TIDEGATE_ENROLMENT_URL" in ran.err
    assert "starter.py up" in ran.err


@pytest.mark.parametrize("words", NEEDS_DATABASE)
def test_without_a_stack_the_address_the_setting_and_the_remedy_are_named(
    words: tuple[str, ...], nothing: Path
) -> None:
    ran = run(*words, "--state", nothing)
    assert (ran.status, ran.out) == (1, "")
    assert f"no address of PostgreSQL: {nothing}/endpoints.json does not exist" in ran.err
    assert "TIDEGATE_DATABASE_URL" in ran.err
    assert "starter.py up" in ran.err


def test_a_database_that_does_not_answer_is_named_without_its_password(nothing: Path, closed_port: int) -> None:
    url = f"postgresql://anna:secret@127.0.0.1:{closed_port}/tidegate"
    ran = run("device", "list", "--state", nothing, "--json", TIDEGATE_DATABASE_URL=url)
    assert ran.status == 1
    assert f"cannot connect to PostgreSQL at 127.0.0.1:{closed_port}/tidegate" in ran.err
    assert ran.json["error"]["kind"] == "UnavailableError"
    assert ran.json["exit_status"] == 1
    assert "secret" not in ran.err + ran.out


def test_a_temporal_that_does_not_answer_is_named(nothing: Path, closed_port: int) -> None:
    ran = run("rollout", "pause", "a", "--state", nothing, TIDEGATE_TEMPORAL_ADDRESS=f"127.0.0.1:{closed_port}")
    assert ran.status == 1
    assert f"cannot connect to Temporal at 127.0.0.1:{closed_port}" in ran.err
    assert "TIDEGATE_TEMPORAL_ADDRESS" in ran.err


def test_debug_shows_the_traceback_and_nothing_else_does(nothing: Path) -> None:
    plain = run("device", "list", "--state", nothing)
    debug = run("device", "list", "--state", nothing, "--debug", traceback=True)
    assert "Traceback" not in plain.err
    assert "Traceback" in debug.err
    assert plain.err.splitlines()[-1] == debug.err.splitlines()[-1]


@pytest.mark.parametrize("content", ["{", "[]", '{"mqtt_port": "no"}', "\0"])
def test_a_broken_endpoints_file_is_named(nothing: Path, content: str) -> None:
    nothing.mkdir()
    (nothing / "endpoints.json").write_text(content)
    ran = run("device", "list", "--state", nothing)
    assert ran.status == 2
    assert f"cannot read {nothing}/endpoints.json" in ran.err


def test_a_wrong_setting_is_named(nothing: Path) -> None:
    ran = run("device", "list", "--state", nothing, TIDEGATE_LOG_LEVEL="LOUD", TIDEGATE_WORKER_METRICS_PORT="x")
    assert ran.status == 2
    assert "TIDEGATE_LOG_LEVEL" in ran.err
    assert "TIDEGATE_WORKER_METRICS_PORT" in ran.err


def test_shared_options_may_stand_before_the_command(nothing: Path) -> None:
    ran = run("--json", "--state", nothing, "device", "list")
    assert str(nothing) in ran.json["error"]["message"]


# --- wrong input is told before any server is asked ------------------------------------------------------------------


def test_a_wrong_specification_gets_every_mistake_with_its_line(nothing: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(SPEC.replace("motor-controller@1.3.0", "motor-controller") + "gats: 1\napproval: yes\n")
    ran = run("rollout", "start", spec, "--state", nothing)
    assert ran.status == 2
    for line in ("line 2: release:", "line 4: gats: unknown key; did you mean 'gate'?", "line 5: approval:"):
        assert line in ran.err
    mistakes = run("rollout", "start", spec, "--state", nothing, "--json").json["error"]["mistakes"]
    assert [(mistake["line"], mistake["path"]) for mistake in mistakes] == [
        (2, "release"),
        (4, "gats"),
        (5, "approval"),
    ]


def test_a_specification_can_come_from_standard_input(nothing: Path) -> None:
    ran = run("rollout", "start", "-", "--state", nothing, stdin=b"name: 7\n")
    assert "standard input: 3 mistakes" in ran.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("device", "show"), "expected either a device id or --serial"),
        (("device", "list", "--tag", "environment"), "expected TAG=VALUE"),
        (("device", "list", "--tag", "a=1", "--tag", "a<2"), "given twice"),
        (("device", "list", "--id", "a/b"), "ids[0]"),
        (("device", "list", "--inactive", "soon"), "expected a duration as in 30m"),
        (("device", "import", "/nowhere.csv"), "there is no such file"),
        (("device", "import", "/"), "cannot import /"),
        (("rollout", "watch", "a", "--timeout", "5"), "expected a duration"),
        (("rollout", "adjust", "a", "--per-minute", "some"), "expected a number of devices, at least 1, or none"),
        (("rollout", "start", "/nowhere.yaml"), "there is no such file"),
        (("release", "publish", "a", "--product", "a b", "--hardware", "m", "--version", "1", "--key", "k"), "as in"),
        (("release", "publish", "a", "--product", "a", "--hardware", "m", "--version", "1", "--key", "/no"), "no such"),
    ],
)
def test_wrong_input_has_status_2_and_says_what_was_expected(
    words: tuple[str, ...], message: str, nothing: Path
) -> None:
    ran = run(*words, "--state", nothing)
    assert ran.status == 2, ran.err
    assert message in ran.err


# --- keys ------------------------------------------------------------------------------------------------------------


def test_keygen_writes_a_private_key_for_its_owner_alone(tmp_path: Path) -> None:
    ran = run("release", "keygen", "--out", tmp_path / "keys" / "release", "--json")
    private, public = tmp_path / "keys" / "release.key", tmp_path / "keys" / "release.pub"
    assert ran.status == 0
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert load_private_key(private).public_key() == load_public_key(public)
    assert ran.json == {
        "private_key": str(private),
        "public_key": str(public),
        "key_id": key_id(load_public_key(public)),
    }
    assert "PRIVATE" not in ran.out + ran.err


@pytest.mark.parametrize("taken", ["release.key", "release.pub"])
def test_keygen_never_replaces_half_of_a_pair(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).write_text("mine")
    ran = run("release", "keygen", "--out", tmp_path / "release")
    assert ran.status == 6
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(taken, "mine")]


# --- the process -----------------------------------------------------------------------------------------------------


def test_a_reader_that_goes_away_is_no_error_worth_a_traceback() -> None:
    command = f"{sys.executable} starter.py release keygen --help | head -1"
    ran = subprocess.run(command, cwd=ROOT, shell=True, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in ran.stderr


def test_starter_is_the_same_program_as_the_module() -> None:
    ran = subprocess.run(
        [sys.executable, str(ROOT / "starter.py"), "--json", "rollout", "start", "/nowhere.yaml"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 2
    assert json.loads(ran.stdout)["exit_status"] == 2
