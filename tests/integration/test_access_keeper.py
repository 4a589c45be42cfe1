"""The access keeper on a real Mosquitto: revoked devices fall silent, are thrown out and stay out, whatever is killed.

Seconds that a test measures are printed; `pytest -s` shows them.
"""

import asyncio
import socket
import ssl
import time
from datetime import UTC, datetime, timedelta

import aiomqtt
import psutil
import pytest
from aiomqtt import ProtocolVersion

from access import keeper as keeping
from access.mosquitto import DEVICE_CAS, DEVICE_CRLS, GATEWAY, denied_in
from models.errors import UnavailableError
from models.identity import AuthorityKind
from models.protocol import jobs_topic
from pki.authority import Authority
from pki.revocation import sign_crl
from store.engine import Database
from tests.conftest import mosquitto_binary
from tests.integration.access_setup import VERSIONS, Credentials, Stage, ear, stage, without_start

pytestmark = pytest.mark.skipif(mosquitto_binary() is None, reason="Mosquitto is not installed")
BEAT = "devices/motor-1/heartbeat"
FILTERS = ["$aws/things/motor-1/#", "devices/motor-1/#"]


async def scalar(db: Database, statement: str) -> object:
    async with db.pool.connection() as connection:
        row = await (await connection.execute(statement.encode())).fetchone()
    return row[0] if row else None


async def alerts(db: Database) -> set[tuple[str, str]]:
    async with db.pool.connection() as connection:
        found = await connection.execute("SELECT rule, text FROM alerts WHERE state <> 'resolved'")
        return {(row[0], row[1]) for row in await found.fetchall()}


async def until(check: object, seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not await check():  # type: ignore[operator]
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("version", VERSIONS)
async def test_an_open_session_of_a_revoked_device_falls_silent_is_ended_and_cannot_come_back(
    db: Database, version: ProtocolVersion
) -> None:
    async with stage(db) as ground, ground.keeping():
        motor, other = await ground.device("motor-1"), await ground.device("motor-2")
        await ground.in_step()
        async with ground.gateway_ear() as engine, ear(ground.client(motor, version), FILTERS) as session:
            async with ear(ground.client(other), ["devices/motor-2/#"]) as bystander:
                await session.client.publish(BEAT, "before", qos=1)
                assert await engine.hears("before")
                revoked_at = time.monotonic()
                await ground.revoke("motor-1")
                last = await speak_until_silent(session.client, engine)
                await asyncio.wait_for(session.gone.wait(), 30)
                gone = time.monotonic() - revoked_at
                await ground.publish_crl(ground.authorities["device"])
                await ground.in_step()
                listed = time.monotonic() - revoked_at
                assert await ground.refused(motor)
                print(
                    f"\nMQTT {version.name}: last message heard {last - revoked_at:.2f} s after the revocation, "
                    f"connection gone after {gone:.2f} s, reconnection refused after {listed:.2f} s"
                )
                assert last - revoked_at < 5 and gone < 30
                await bystander.client.publish("devices/motor-2/heartbeat", "undisturbed", qos=1)
                assert await engine.hears("undisturbed") and not bystander.gone.is_set()


async def speak_until_silent(client: aiomqtt.Client, engine: object) -> float:
    """Publish every 20 ms until nothing of it arrives for a second, or the session is over; when the last one arrived."""
    heard: list = engine.heard  # type: ignore[attr-defined,type-arg]
    count, last = len(heard), time.monotonic()
    while time.monotonic() < last + 1:
        try:
            await client.publish(BEAT, "after", qos=0)
        except aiomqtt.MqttError:
            return last
        await asyncio.sleep(0.02)
        if len(heard) > count:
            count, last = len(heard), time.monotonic()
    return last


async def test_without_the_keeper_a_revoked_device_goes_on_speaking_and_comes_back(db: Database) -> None:
    async with stage(db) as ground:
        motor = await ground.device("motor-1")
        async with ground.gateway_ear() as engine, ear(ground.client(motor), FILTERS) as session:
            await ground.revoke("motor-1")
            await ground.publish_crl(ground.authorities["device"])
            await session.client.publish(BEAT, "still speaking", qos=1)
            assert await engine.hears("still speaking")
        assert not await ground.refused(motor)


async def test_without_the_list_a_revoked_device_comes_back_and_is_not_heard(db: Database) -> None:
    async with stage(db, without_start("crlfile")) as ground, ground.keeping():
        motor = await ground.device("motor-1")
        await ground.revoke("motor-1")
        await ground.publish_crl(ground.authorities["device"])
        await ground.in_step()
        async with ground.gateway_ear() as engine, ground.client(motor) as client:
            await client.publish(BEAT, "let in", qos=1)
            assert not await engine.hears("let in", 1), "the denial alone silences it"


async def test_without_the_denial_a_revoked_device_is_kept_out_by_the_list(db: Database) -> None:
    async with stage(db, without_start("acl_file")) as ground:
        motor = await ground.device("motor-1")
        async with ground.gateway_ear() as engine, ear(ground.client(motor), FILTERS) as session:
            await ground.revoke("motor-1")
            await ground.publish_crl(ground.authorities["device"])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(keeping, "take_over", never)
                await ground.keeper().bring_up_to_date()
            await session.client.publish(BEAT, "still speaking", qos=1)
            assert await engine.hears("still speaking"), "neither denied nor thrown out: the hole that the rest closes"
        assert await ground.refused(motor)


async def never(*_: object, **__: object) -> None:
    """Nobody is thrown out."""


async def test_a_will_of_a_revoked_device_is_not_published_when_it_is_thrown_out(db: Database) -> None:
    async with stage(db) as ground, ground.keeping():
        motor = await ground.device("motor-1")
        will = aiomqtt.Will(BEAT, "last will", qos=1)
        async with ground.gateway_ear() as engine, ear(ground.client(motor, will=will), FILTERS) as session:
            await ground.revoke("motor-1")
            await asyncio.wait_for(session.gone.wait(), 30)
            assert not await engine.hears("last will", 1)


async def test_a_tls_session_of_before_cannot_be_resumed_after_the_revocation(db: Database) -> None:
    async with stage(db) as ground, ground.keeping():
        motor = await ground.device("motor-1")
        context = motor.context(tls_1_2=True)
        assert resume(ground, context, saved := first(ground, context)), "before, it can: the test is worth something"
        await ground.revoke("motor-1")
        await ground.publish_crl(ground.authorities["device"])
        await ground.in_step()
        assert not resume(ground, context, saved)


def first(ground: Stage, context: ssl.SSLContext) -> ssl.SSLSession:
    with socket.create_connection(("127.0.0.1", ground.listeners.devices)) as raw:
        with context.wrap_socket(raw, server_hostname="127.0.0.1") as wrapped:
            assert wrapped.session
            return wrapped.session


def resume(ground: Stage, context: ssl.SSLContext, saved: ssl.SSLSession) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", ground.listeners.devices)) as raw:
            with context.wrap_socket(raw, server_hostname="127.0.0.1", session=saved) as wrapped:
                wrapped.sendall(bytes([0x10, 13, 0, 4]) + b"MQTT" + bytes([4, 2, 0, 60, 0, 1]) + b"x")
                return wrapped.recv(4)[:1] == b"\x20"
    except OSError:
        return False


async def test_who_has_a_new_certificate_is_thrown_out_once_and_comes_back_with_it_alone(db: Database) -> None:
    async with stage(db) as ground, ground.keeping():
        old, new = await ground.device("motor-1"), await ground.device("motor-1", generation=2)
        certificate = await scalar(db, "SELECT certificate_id FROM certificates WHERE generation = 1")
        async with ear(ground.client(old), FILTERS) as session:
            await ground.revoke("motor-1", only=str(certificate))
            await asyncio.sleep(1.5)
            applied = await scalar(db, "SELECT applied_revision FROM brokers")
            assert applied != await scalar(db, "SELECT revision FROM access_state"), "no list refuses it yet"
            assert "revocation list" in str(await scalar(db, "SELECT error FROM brokers"))
            await ground.publish_crl(ground.authorities["device"])
            await asyncio.wait_for(session.gone.wait(), 30)
        await ground.in_step()
        assert await ground.refused(old)
        async with ground.gateway_ear() as engine, ground.client(new) as client:
            await client.publish(BEAT, "renewed", qos=1)
            assert await engine.hears("renewed")


async def test_200_revocations_at_once_cost_few_reloads(db: Database) -> None:
    async with stage(db) as ground, ground.keeping() as keeper:
        for number in range(200):
            await ground.device(f"motor-{number}")
        await ground.in_step()
        before, began = keeper.reloads, time.monotonic()
        await asyncio.gather(*(ground.revoke(f"motor-{number}") for number in range(200)))
        await ground.publish_crl(ground.authorities["device"])
        await ground.in_step(60)
        print(f"\n200 revocations: {keeper.reloads - before} reloads, {time.monotonic() - began:.1f} s until in force")
        assert 1 <= keeper.reloads - before <= 6
        denied = denied_in((ground.access_folder / "devices.acl").read_text())
        assert len(denied) == 200


async def test_nothing_is_signalled_when_nothing_has_changed(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "POLL_SECONDS", 0.2)
    async with stage(db) as ground, ground.keeping() as keeper:
        await asyncio.sleep(2)
        assert keeper.reloads == 0, "the broker has read at its start what the keeper would have written"
        await ground.publish_crl(ground.authorities["device"])
        await until(lambda: _reloaded(keeper, 1))
        await asyncio.sleep(1)
        assert keeper.reloads == 1


async def _reloaded(keeper: object, times: int) -> bool:
    return bool(keeper.reloads == times)  # type: ignore[attr-defined]


@pytest.mark.parametrize("cut", ["before the files", "before the signal", "before anybody is thrown out"])
async def test_a_keeper_that_is_killed_half_way_does_the_rest_after_its_next_start(
    db: Database, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage(db) as ground:
        motor = await ground.device("motor-1")
        async with ground.gateway_ear() as engine, ear(ground.client(motor), FILTERS) as session:
            await ground.revoke("motor-1")
            await ground.publish_crl(ground.authorities["device"])

            class Killed(BaseException):
                pass

            def die(*_: object, **__: object) -> None:
                raise Killed

            keeper = ground.keeper()
            with monkeypatch.context() as patch:
                match cut:
                    case "before the files":
                        patch.setattr(keeper.folder, "write", die)
                    case "before the signal":
                        patch.setattr(keeping, "broker_process", die)
                    case _:
                        patch.setattr(keeping, "take_over", die)
                with pytest.raises((Killed, BaseExceptionGroup)):
                    await keeper.bring_up_to_date()
            assert not session.gone.is_set()
            async with ground.keeping():
                await asyncio.wait_for(session.gone.wait(), 30)
                await ground.in_step()
            assert await ground.refused(motor)
            assert not await engine.hears("anything", 0.1)


async def test_a_broker_that_was_away_enforces_what_happened_meanwhile_from_its_first_moment(db: Database) -> None:
    async with stage(db) as ground, ground.keeping():
        motor, other = await ground.device("motor-1"), await ground.device("motor-2")
        ground.stop_broker()
        await ground.revoke("motor-1")
        await ground.publish_crl(ground.authorities["device"])
        await until(lambda: _mentions(db, "cannot connect to the MQTT broker"))
        listed = await scalar(db, "SELECT pem FROM crls ORDER BY number DESC LIMIT 1")
        await until(lambda: _installed(ground, str(listed)))
        ground.start_broker()
        assert await ground.refused(motor) and not await ground.refused(other)
        await ground.in_step()
        assert await scalar(db, "SELECT error FROM brokers") is None


async def _installed(ground: Stage, pem: str) -> bool:
    return (ground.access_folder / DEVICE_CRLS).read_text() == pem


async def _mentions(db: Database, text: str) -> bool:
    return text in str(await scalar(db, "SELECT error FROM brokers"))


async def test_a_broker_that_stays_out_of_step_is_an_alert_and_no_other_process_is_signalled(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "BEHIND_SECONDS", 0.5)
    async with stage(db) as ground:
        await ground.device("motor-1")
        async with ground.keeping():
            await until(lambda: _applied(db))
            bystander = await asyncio.create_subprocess_exec("sleep", "600")
            (ground.pid_file).write_text(str(bystander.pid))
            await ground.revoke("motor-1")
            await until(lambda: _alerted(db, "broker-behind"))
            assert psutil.Process(bystander.pid).is_running() and bystander.returncode is None
            assert "which is 'sleep'" in str(await scalar(db, "SELECT error FROM brokers"))
            bystander.kill()
            await bystander.wait()
            assert ground.process is not None
            (ground.pid_file).write_text(str(ground.process.pid))
            await until(lambda: _not_alerted(db, "broker-behind"))


async def _applied(db: Database) -> bool:
    return await scalar(db, "SELECT applied_at FROM brokers") is not None


async def _alerted(db: Database, rule: str) -> bool:
    return rule in {found for found, _ in await alerts(db)}


async def _not_alerted(db: Database, rule: str) -> bool:
    return not await _alerted(db, rule)


async def test_a_list_near_its_end_is_an_alert_before_the_outage_and_a_new_one_ends_it(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "POLL_SECONDS", 0.2)
    async with stage(db) as ground, ground.keeping():
        motor, authority = await ground.device("motor-1"), ground.authorities["device"]
        await ground.publish_crl(authority, lifetime=timedelta(seconds=16))
        await until(lambda: _alerted(db, "crl-half-life"), 14)
        assert not await ground.refused(motor), "the alert comes while devices can still connect"
        text = next(text for rule, text in await alerts(db) if rule == "crl-half-life")
        assert "less than half its life left" in text and "starter.py ca crl" in text
        await asyncio.sleep(10)
        assert await ground.refused(motor), "and this is what it warns of"
        await ground.publish_crl(authority)
        await until(lambda: _not_alerted(db, "crl-half-life"))
        await until(lambda: _lets_in(ground, motor))
        assert not await alerts(db)


async def _lets_in(ground: Stage, who: Credentials) -> bool:
    return not await ground.refused(who)


def spoiled(authority: Authority, kind: str) -> str:
    """A list that must not be installed."""
    now = datetime.now(UTC)
    match kind:
        case "garbage":
            return "garbage"
        case "empty":
            return ""
        case "cut off":
            return sign_crl(authority, 9, [], now, timedelta(days=7)).decode()[:-60]
        case "over":
            return sign_crl(authority, 9, [], now - timedelta(days=9), timedelta(days=7)).decode()
        case "not begun":
            return sign_crl(authority, 9, [], now + timedelta(minutes=8), timedelta(days=7)).decode()
        case _:
            raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["garbage", "empty", "cut off", "over", "not begun"])
async def test_an_unusable_list_is_never_installed(db: Database, kind: str) -> None:
    async with stage(db) as ground, ground.keeping():
        motor, revoked = await ground.device("motor-1"), await ground.device("motor-2")
        authority = ground.authorities["device"]
        await ground.revoke("motor-2")
        await ground.publish_crl(authority)
        await ground.in_step()
        installed = (ground.access_folder / DEVICE_CRLS).read_text()
        await ground.save_crl(authority, spoiled(authority, kind), datetime.now(UTC), timedelta(days=7))
        await until(lambda: _alerted(db, "crl-unusable"))
        async with db.pool.connection() as connection:  # something else to bring the broker to
            await connection.execute("UPDATE access_state SET revision = revision + 1")
        await ground.device("motor-3")
        await ground.revoke("motor-3")
        await until(lambda: _denies(ground, "motor-3"))
        assert (ground.access_folder / DEVICE_CRLS).read_text() == installed
        assert await ground.refused(revoked) and not await ground.refused(motor)


async def _denies(ground: Stage, device: str) -> bool:
    return device in denied_in((ground.access_folder / "devices.acl").read_text())


@pytest.mark.parametrize(("kind", "locked_out", "let_in"), [("garbage", False, True), ("over", True, False)])
async def test_what_an_unusable_list_would_do_to_mosquitto(
    db: Database, kind: str, locked_out: bool, let_in: bool
) -> None:
    """The mutant: installed unchecked, garbage lets the revoked in, and a list that is over keeps everybody out."""
    async with stage(db) as ground:
        motor, revoked = await ground.device("motor-1"), await ground.device("motor-2")
        await ground.revoke("motor-2")
        await ground.publish_crl(ground.authorities["device"])
        await ground.keeper().bring_up_to_date()
        assert await ground.refused(revoked) and not await ground.refused(motor)
        (ground.access_folder / DEVICE_CRLS).write_text(spoiled(ground.authorities["device"], kind))
        assert ground.process is not None
        psutil.Process(ground.process.pid).send_signal(1)
        await asyncio.sleep(0.5)
        assert await ground.refused(motor) == locked_out
        assert await ground.refused(revoked) != let_in


async def test_a_ca_is_rolled_over_with_devices_on_both_sides_connected(db: Database) -> None:
    async with stage(db) as ground, ground.keeping():
        old = await ground.device("motor-old")
        async with ear(ground.client(old), ["$aws/things/motor-old/#"]) as session, ground.gateway_ear() as engine:
            successor = await ground.authority(AuthorityKind.DEVICE, "trusted")
            new = await ground.device("motor-new", successor)
            await until(lambda: _alerted(db, "crl-unusable"))
            assert await ground.refused(new), "a CA without a list is not trusted: its devices could not be revoked"
            assert not await ground.refused(await ground.device("motor-old-2"))
            await ground.publish_crl(successor)
            await until(lambda: _lets_in(ground, new))
            assert not await ground.refused(await ground.device("motor-old-3")), "the old one is trusted too"
            async with ground.client(new) as client:
                await client.publish("devices/motor-new/heartbeat", "of the new CA", qos=1)
                await session.client.publish("devices/motor-old/heartbeat", "of the old CA", qos=1)
                assert await engine.hears("of the new CA") and await engine.hears("of the old CA")
            assert not session.gone.is_set(), "rolling over ends nobody's session"

            await ground.revoke("motor-old")
            await ground.publish_crl(ground.authorities["device"])
            await asyncio.wait_for(session.gone.wait(), 30)
            await ground.in_step()
            assert await ground.refused(old) and not await ground.refused(new), "each CA has its own list"

        async with db.pool.connection() as connection:
            await connection.execute(
                "UPDATE authorities SET state = 'retired' WHERE authority_id = %s",
                (ground.authorities["device"].authority_id,),
            )
            await connection.execute("UPDATE access_state SET revision = revision + 1")
            await connection.execute("SELECT pg_notify('tidegate_access', '')")
        await ground.in_step()
        assert (ground.access_folder / DEVICE_CAS).read_text().count("BEGIN CERTIFICATE") == 1
        assert await ground.refused(await ground.device("motor-old-4")), "a retired CA opens nothing"
        assert not await ground.refused(new)


async def test_orders_to_a_denied_device_do_not_reach_its_open_session(db: Database) -> None:
    async with stage(db) as ground:
        motor = await ground.device("motor-1")
        async with ear(ground.client(motor), FILTERS) as session:
            async with ground.client(ground.credentials(GATEWAY), engine=True, client_id="engine@test") as engine:
                await engine.publish(jobs_topic("motor-1", "notify-next"), "before", qos=1)
                assert await session.hears("before")
                await ground.revoke("motor-1")
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(keeping, "take_over", never)
                    await ground.keeper().bring_up_to_date()
                await engine.publish(jobs_topic("motor-1", "notify-next"), "secret", qos=1)
                assert not await session.hears("secret", 1) and not session.gone.is_set()


async def test_a_broker_that_reads_other_files_is_found_out(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "SIGNAL_SECONDS", 1.0)
    async with stage(db) as ground:
        keeper = ground.keeper()
        (ground.folder / "elsewhere").mkdir()
        keeper.folder.path = ground.folder / "elsewhere"
        await ground.device("motor-1")
        await ground.revoke("motor-1")
        with pytest.raises(UnavailableError, match=r"has not read .*elsewhere within 1 s after SIGHUP"):
            await keeper.bring_up_to_date()
        assert await scalar(db, "SELECT count(*) FROM brokers") == 0
