"""The embedded stack's servers: up, down, resumed, replaced, killed; on loopback only, with either broker."""

import asyncio
import contextlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import psycopg
import pytest
from temporalio.client import Client

from devstack.broker import BrokerKind, mosquitto_binary, mqtt_answers
from devstack.identity import StackIdentity
from devstack.postgres import Postgres, make_passable
from devstack.stack import EmbeddedStack
from devstack.state import PORTS, StateDirectory
from devstack.supervisor import PieceEvent, Supervisor
from devstack.temporal import missing_search_attributes
from models.errors import InvalidInputError, RefusedError, UnavailableError
from models.settings import Endpoints, Settings

BROKERS: list[BrokerKind] = ["mosquitto", "nats"]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A state directory that a server's own account can reach."""
    opened = make_passable(tmp_path / "state")
    yield tmp_path / "state"
    for parent in opened:
        parent.chmod(parent.stat().st_mode & ~stat.S_IXOTH)


def engines(folder: Path, **options: object) -> EmbeddedStack:
    """The servers without worker and gateway."""
    return EmbeddedStack(
        folder, **{"settings": Settings(), "worker": False, "gateway": False, "enrolment": False} | options
    )  # type: ignore[arg-type]


def identity_of(stack: EmbeddedStack) -> StackIdentity:
    assert stack._identity is not None
    return stack._identity


def rows(url: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


def runs(pid: int) -> bool:
    """Whether a process works; a zombie that nobody has collected does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def skip_without(kind: BrokerKind) -> None:
    if kind == "mosquitto" and mosquitto_binary() is None:
        pytest.skip("Mosquitto is not installed")


@pytest.mark.parametrize("kind", BROKERS)
async def test_everything_answers_on_loopback_only_and_a_second_start_resumes(folder: Path, kind: BrokerKind) -> None:
    skip_without(kind)
    async with engines(folder, broker=kind) as stack:
        first = stack.endpoints
        assert Endpoints.model_validate(json.loads((folder / "endpoints.json").read_text())) == first
        assert first.database_url and first.temporal_address and first.mqtt_port
        assert rows(first.database_url, "SHOW server_version")[0][0].split(".")[0] == "18"  # type: ignore[attr-defined]
        assert rows(first.database_url, "SHOW fsync") == [("on",)]
        assert rows(first.database_url, "SELECT count(*) FROM devices") == [(0,)]
        client = await Client.connect(first.temporal_address)
        assert await missing_search_attributes(client) == []
        context = identity_of(stack).client_context()
        assert await mqtt_answers(urlsplit(str(first.engine_mqtt_url)).port or 0, context)
        assert first.open_mqtt_url is None
        listening = _listening(stack)
        keeper = {"access"} if kind == "mosquitto" else set()
        assert {"postgres", "temporal", "broker", "artifacts"} | keeper == set(listening)
        assert {address for addresses in listening.values() for address, _ in addresses} == {"127.0.0.1"}
        rows(first.database_url, "CREATE TABLE kept AS SELECT 42 AS answer")
        key = (folder / "keys" / "order.pem").read_bytes()
        pids = [pid for piece in stack.pids().values() for pid in piece]
    assert not (folder / "endpoints.json").exists()
    assert not any(map(runs, pids))

    async with engines(folder, broker=kind) as stack:
        assert stack.endpoints == first
        assert (folder / "keys" / "order.pem").read_bytes() == key
        assert rows(first.database_url, "SELECT answer FROM kept") == [(42,)]


def _listening(stack: EmbeddedStack) -> dict[str, set[tuple[str, int]]]:
    """Address and port of every listening TCP socket, by piece."""
    found: dict[str, set[tuple[str, int]]] = {}
    for name, pids in stack.pids().items():
        for pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):  # a session of PostgreSQL that has just ended
                for connection in psutil.Process(pid).net_connections("tcp"):
                    if connection.status == psutil.CONN_LISTEN:
                        found.setdefault(name, set()).add((connection.laddr.ip, connection.laddr.port))
    return found


async def test_a_killed_server_comes_back_on_its_port_and_a_crashed_one_by_itself(folder: Path) -> None:
    events: list[PieceEvent] = []
    async with engines(folder, listener=events.append) as stack:
        assert stack.endpoints.database_url
        before = stack.endpoints
        for name in ("postgres", "temporal", "broker", "artifacts"):
            old = stack.pids()[name]
            stack.kill(name)
            assert name not in stack.pids()
            assert not any(map(runs, old))
            await stack.start(name)
            assert not set(stack.pids()[name]) & set(old)
        assert stack.endpoints == before
        rows(stack.endpoints.database_url, "SELECT 1")

        events.clear()
        psutil.Process(stack.pids()["broker"][0]).kill()
        async with asyncio.timeout(10):
            while [event.kind for event in events] != ["ended", "started"]:
                await asyncio.sleep(0.02)
        assert events[0].text == "ended with signal 9; starting again in 0.5 s"
        context = identity_of(stack).client_context()
        assert await mqtt_answers(urlsplit(str(before.engine_mqtt_url)).port or 0, context)


async def test_a_server_whose_address_is_given_is_not_started(folder: Path, database_url: str, tmp_path: Path) -> None:
    given = Settings(
        database_url=database_url,
        mqtt_url="mqtt://broker.example:1884",
        artifact_url="https://cdn.example/firmware",
        artifact_store=(tmp_path / "elsewhere").as_uri(),
    )
    async with engines(folder, settings=given) as stack:
        assert set(stack.pids()) == {"temporal"}
        written = Endpoints.model_validate(json.loads((folder / "endpoints.json").read_text()))
        temporal = written.temporal_address
        assert written.model_dump() == {
            "mqtt_host": "broker.example",
            "mqtt_port": 1884,
            "ca": None,
            **dict.fromkeys(
                (
                    *("engine_mqtt_url", "open_mqtt_url", "enrolment_url", "ca_dir", "ca_passphrase_file"),
                    *("service_ca", "service_certificate", "service_private_key"),
                )
            ),
            "database_url": database_url,
            "temporal_address": temporal,
            "ui_url": written.ui_url,
            "artifact_url": "https://cdn.example/firmware",
            "artifact_store": (tmp_path / "elsewhere").as_uri(),
            "order_key": str(folder / "keys" / "order.pem"),
            "metrics": {},
        }
        assert stack.env()["TIDEGATE_MQTT_URL"] == "mqtt://broker.example:1884"

        other = given.model_copy(update={"temporal_address": temporal})
        async with engines(tmp_path / "other", settings=other) as second:
            assert second.pids() == {}
            assert second.endpoints.ui_url is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temporal_address": "127.0.0.1:9"}, "cannot connect to Temporal at 127.0.0.1:9"),
        ({"database_url": "postgresql://me:secret@127.0.0.1:9/db"}, "cannot connect to PostgreSQL at 127.0.0.1:9/db"),
    ],
)
async def test_a_given_server_that_does_not_answer_is_said_before_anything_starts(
    folder: Path, given: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("devstack.stack.GIVEN_SECONDS", 0.5)
    with pytest.raises(UnavailableError, match=message) as refusal:
        async with engines(folder, settings=Settings.model_validate(given)):
            pass
    assert "secret" not in str(refusal.value)
    assert not (folder / "logs").exists()


async def test_a_second_stack_on_the_same_folder_is_refused_naming_the_first(folder: Path, database_url: str) -> None:
    given = Settings(database_url=database_url, mqtt_url="mqtt://broker.example")
    async with engines(folder, settings=given) as stack:
        with pytest.raises(RefusedError, match=f"process {os.getpid()} runs one there"):
            async with engines(folder, settings=given):
                pass
        assert (folder / "endpoints.json").exists()
        assert stack.pids().keys() == {"temporal", "artifacts"}


async def test_a_server_that_cannot_start_says_why_and_takes_the_others_down(folder: Path, empty_database: str) -> None:
    given = Settings(database_url=empty_database)
    (StateDirectory(folder).folder("temporal") / "temporal.db").write_bytes(b"not a database" * 1000)
    stack = engines(folder, settings=given)
    with pytest.raises(UnavailableError, match=r"(?s)Temporal ended with .*temporal\.log:.*database"):
        async with stack:
            pass
    assert stack.pids() == {}
    assert not (folder / "endpoints.json").exists()
    shutil.rmtree(folder / "temporal")
    async with engines(folder, settings=given) as mended:
        assert "temporal" in mended.pids()


async def test_the_postmaster_lock_of_a_dead_server_is_taken_away_though_its_number_lives_on(folder: Path) -> None:
    state = StateDirectory(folder)
    supervisor = Supervisor(state)
    await supervisor.start(Postgres(state))
    await supervisor.stop_all()
    lock = folder / "postgres" / "data" / "postmaster.pid"
    lock.write_text(f"{os.getpid()}\n/elsewhere\n0\n5432\n\n127.0.0.1\n\nready\n")
    lock.chmod(0o644)
    await supervisor.start(Postgres(state))
    await supervisor.stop_all()


def test_a_cluster_of_another_version_is_refused(folder: Path) -> None:
    state = StateDirectory(folder)
    data = state.folder("postgres") / "data"
    data.mkdir()
    (data / "PG_VERSION").write_text("17\n")
    with pytest.raises(InvalidInputError, match="was made by version 17"):
        Postgres(state).prepare()


async def test_the_database_wants_its_password_and_secrets_are_for_their_owner_alone(folder: Path) -> None:
    async with engines(folder) as stack:
        assert stack.endpoints.database_url
        without = stack.endpoints.database_url.replace(stack.state.secret("postgres"), "guess")
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(without)
        secrets = ["endpoints.json", "secrets.json", "keys/order.pem", "ca.passphrase"]
        secrets += [str(path.relative_to(folder)) for path in (folder / "tls").glob("*.key")]
        secrets += [str(path.relative_to(folder)) for path in (folder / "ca").iterdir()]
        assert len(secrets) == 4 + 5 + 3
        for path in (folder / name for name in secrets):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        for name in ("keys", "temporal", "logs", "store", "tls", "ca"):
            assert stat.S_IMODE((folder / name).stat().st_mode) == 0o700
        assert (folder / "keys" / "order.pub").read_text().startswith("-----BEGIN PUBLIC KEY-----")


def test_a_store_that_the_artifact_server_cannot_serve_is_refused_before_anything_starts(folder: Path) -> None:
    from devstack.artifacts import ArtifactServer

    with pytest.raises(InvalidInputError, match="set TIDEGATE_ARTIFACT_URL"):
        ArtifactServer(StateDirectory(folder), "s3://bucket/firmware")


def test_a_remembered_port_is_used_again_unless_somebody_took_it(folder: Path) -> None:
    import socket

    state = StateDirectory(folder)
    port = state.port("mqtt")
    assert port in PORTS
    assert StateDirectory(folder).port("mqtt") == port
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        other = StateDirectory(folder).port("mqtt")
    assert other != port
    assert StateDirectory(folder).port("mqtt") == other
