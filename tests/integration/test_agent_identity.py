"""An agent process that enrols over HTTPS, is configured, rotates its certificate and is wiped, on a broker with TLS.

The enrolment server and the gateway are stand-ins with real sockets, real TLS and real signatures; the broker is
Mosquitto with the device ACL that Tidegate writes for it.
"""

import asyncio
import base64
import contextlib
import getpass
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiomqtt
import orjson
import pytest
import pytest_asyncio

from access.mosquitto import device_acl
from agent.client import Broker as Address
from agent.configuration import Configuration, ConfigurationStore
from agent.credentials import Credentials, Standing, common_name
from agent.device import Timing
from agent.enrolment import Claim, EnrolmentPatience, EnrolmentServer, enrol, enrol_for_good
from agent.errors import CredentialError, EnrolmentAwayError, EnrolmentError, EnrolmentRefusedError
from agent.fleet import FleetConfig, FleetDevice, FleetEnrolment, run_fleet
from agent.image import declared_image
from agent.storage import PosixStorage
from agent.trust import Trust
from firmware.keys import save_public_key
from tests.agent_authority import StandInAuthority, TestCa, serving_est
from tests.agent_standin import Publisher, StandInGateway, StandInJobs
from tests.conftest import free_port, mosquitto_binary, wait_for_port

SERIAL = "SN-000042"
THING = f"thing-{SERIAL}"
IMAGE = declared_image("1.2.0", body=b"\x5a" * 4000)
ROTATE, WIPE = "rotate-certificate", "wipe-credentials"
REQUEST = "a" * 32


async def until(reached: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    """The first true answer."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not (found := reached()):
        assert asyncio.get_running_loop().time() < deadline, f"waited {seconds} s for {what}"
        await asyncio.sleep(0.02)
    return found


# --- the EST client ---------------------------------------------------------------------------------------------------


class Shop:
    """An enrolment server, and the files that a device is made with."""

    def __init__(self, folder: Path, authority: StandInAuthority, url: str) -> None:
        self.folder, self.authority, self.url = folder, authority, url
        self.ca = authority.service.file(folder)
        self.claim = Claim(*authority.claim.files(folder, "claim.batch-1"))

    def server(self, **changes: Any) -> EnrolmentServer:
        patience = EnrolmentPatience(answer_seconds=5, retry_seconds=0.1, refused_seconds=0.2)
        return EnrolmentServer(self.url, Trust(changes.pop("ca", self.ca)), replace(patience, **changes))

    def credentials(self, name: str = "device") -> Credentials:
        (self.folder / name).mkdir(exist_ok=True)
        return Credentials(PosixStorage(self.folder / name))


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    authority = StandInAuthority()
    with serving_est(authority, tmp_path) as url:
        yield Shop(tmp_path, authority, url)


async def test_a_device_enrols_renews_and_confirms_over_https(shop: Shop) -> None:
    credentials, server = shop.credentials(), shop.server()
    assert await enrol(credentials, server, shop.claim, SERIAL) == THING
    assert common_name(shop.authority.valid[0]) == THING
    assert {one.subject for one in await server.authorities()} == {
        shop.authority.service.certificate.subject,
        shop.authority.device.certificate.subject,
    }
    (pair,) = credentials.candidates()
    await server.confirm(pair)
    assert shop.authority.seen_to_work == shop.authority.valid
    assert await enrol(credentials, server, shop.claim, SERIAL) == THING, "a device that has one asks no more"
    assert shop.authority.requests == ["simpleenroll", "confirm"]


async def test_a_device_asks_again_while_its_enrolment_waits_and_gets_one_certificate(shop: Shop) -> None:
    shop.authority.away = 1
    async with asyncio.timeout(20):
        assert await enrol(shop.credentials(), shop.server(), shop.claim, SERIAL) == THING
    assert shop.authority.requests == ["simpleenroll"] * 2 and len(shop.authority.valid) == 1


async def test_a_refusal_says_why_and_a_device_asks_again_later(shop: Shop) -> None:
    credentials, server = shop.credentials(), shop.server()
    shop.authority.refuse = "batch 'batch-1' is disabled"
    with pytest.raises(EnrolmentRefusedError, match="batch 'batch-1' is disabled"):
        await enrol(credentials, server, shop.claim, SERIAL)
    waiting = asyncio.create_task(enrol_for_good(credentials, server, shop.claim, SERIAL))
    await until(lambda: len(shop.authority.requests) > 2, "more requests")
    shop.authority.refuse = ""
    assert await waiting == THING


async def test_a_server_of_another_ca_is_told_nothing(shop: Shop) -> None:
    stranger = TestCa("stranger").file(shop.folder)
    with pytest.raises(EnrolmentAwayError, match="CERTIFICATE_VERIFY_FAILED"):
        await shop.server(ca=stranger).enroll(shop.claim, b"")
    assert shop.authority.requests == []


async def test_a_claim_of_another_ca_opens_nothing(shop: Shop) -> None:
    forged = Claim(*TestCa(shop.authority.claim.name).files(shop.folder, "claim.forged"))
    with pytest.raises(EnrolmentAwayError):
        await shop.server().enroll(forged, b"")
    assert shop.authority.requests == []


async def test_an_answer_for_another_key_is_not_taken(shop: Shop) -> None:
    shop.authority.other_certificate = shop.authority.device.issue(TestCa("x").key.public_key(), THING)
    credentials = shop.credentials()
    with pytest.raises(EnrolmentError, match="none of 1 certificates"):
        await enrol(credentials, shop.server(), shop.claim, SERIAL)
    assert credentials.record.standing is Standing.NEW


@pytest.mark.parametrize("body", [b"", b"@@", base64.b64encode(b"no pkcs7"), b"A" * 70_000])
async def test_an_answer_that_is_no_certificate_is_an_error_with_its_size(
    shop: Shop, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.agent_authority._certs_only", lambda certificates: body)
    with pytest.raises(EnrolmentError, match=r"cannot read|larger than"):
        await enrol(shop.credentials(), shop.server(), shop.claim, SERIAL)


async def test_files_that_cannot_be_used_are_named(shop: Shop) -> None:
    with pytest.raises(CredentialError, match=r"nowhere\.pem"):
        await shop.server().enroll(Claim(shop.folder / "nowhere.pem", shop.claim.private_key), b"")


# --- the process ------------------------------------------------------------------------------------------------------


def start_tls_broker(folder: Path, port: int, open_port: int, ca: Path, server: tuple[Path, Path]) -> Any:
    """Mosquitto: devices with a certificate of `ca` on `port`, the stand-in gateway on `open_port`."""
    (folder / "devices.acl").write_text(device_acl([]))
    (folder / "mosquitto.conf").write_text(
        f"per_listener_settings true\nlog_dest none\nmax_inflight_messages 0\nuser {getpass.getuser()}\n"
        f"listener {open_port} 127.0.0.1\nallow_anonymous true\n"
        f"listener {port} 127.0.0.1\ncafile {ca}\ncertfile {server[0]}\nkeyfile {server[1]}\nallow_anonymous false\n"
        "require_certificate true\nuse_identity_as_username true\nuse_username_as_clientid true\n"
        f"acl_file {folder / 'devices.acl'}\n"
    )
    command = [str(mosquitto_binary()), "-c", str(folder / "mosquitto.conf")]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class Rig(Shop):
    """Enrolment server, broker with TLS, gateway, and one agent process."""

    def __init__(self, folder: Path, authority: StandInAuthority, url: str, port: int, gateway: StandInGateway) -> None:
        super().__init__(folder, authority, url)
        self.port, self.gateway = port, gateway
        self.process: asyncio.subprocess.Process | None = None
        (folder / "base.bin").write_bytes(IMAGE)
        save_public_key(folder / "release.pem", gateway.jobs.publisher.release_private.public_key())
        save_public_key(folder / "order.pem", gateway.jobs.publisher.order_private.public_key())

    async def start(self, *more: str) -> None:
        arguments = {
            "--serial": SERIAL,
            "--type": "motor",
            "--state": self.folder / "device",
            "--base": self.folder / "base.bin",
            "--base-version": "1.2.0",
            "--release-key": self.folder / "release.pem",
            "--order-key": self.folder / "order.pem",
            "--mqtt": f"mqtts://127.0.0.1:{self.port}",
            "--ca": self.ca,
            "--enrolment-url": self.url,
            "--claim-cert": self.claim.certificate,
            "--claim-key": self.claim.private_key,
            "--retry": "0.1",
            "--refused": "0.3",
            "--answer-within": "1",
            "--heartbeat": "0.2",
        }
        flat = [str(part) for pair in arguments.items() for part in pair]
        with (self.folder / "agent.log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "agent", *flat, *more, stderr=log, env=os.environ
            )

    async def end(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        return await self.process.wait()

    async def online(self) -> None:
        """Until a heartbeat comes that was sent after now."""
        seen = len(self.gateway.heartbeats)
        await until(lambda: len(self.gateway.heartbeats) > seen + 1, "a heartbeat", 40)

    async def answered(self, request_id: str) -> dict[str, Any]:
        """The last word about a command."""
        answers = self.gateway.responses

        def last() -> dict[str, Any] | None:
            return next((a for a in answers if a["requestId"] == request_id and a["status"] != "accepted"), None)

        return dict(await until(last, "the answer to a command", 40))


@pytest_asyncio.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    if mosquitto_binary() is None:
        pytest.skip("Mosquitto is not installed")
    authority, port, open_port = StandInAuthority(), free_port(), free_port()
    ca = authority.device.file(tmp_path)
    process = start_tls_broker(tmp_path, port, open_port, ca, authority.service.files(tmp_path, "broker", server=True))
    wait_for_port(port, process)
    try:
        with serving_est(authority, tmp_path) as url:
            async with StandInGateway(StandInJobs(Publisher()), "127.0.0.1", open_port).running() as gateway:
                rig = Rig(tmp_path, authority, url, port, gateway)
                yield rig
                if rig.process is not None and rig.process.returncode is None:
                    await rig.end(signal.SIGKILL)
    finally:
        process.terminate()
        process.wait(10)


async def test_a_device_enrols_is_configured_and_becomes_visible(rig: Rig) -> None:
    rig.gateway.configs[THING] = {"version": 3, "config": {"heartbeatSeconds": 1, "mode": "eco"}}
    await rig.start()
    await rig.online()
    assert rig.gateway.heartbeats[0]["deviceId"] == THING
    await until(lambda: rig.gateway.reported.get(THING) == rig.gateway.configs[THING], "the configuration")
    await until(lambda: len(rig.authority.seen_to_work) == 1, "the confirmation")
    await rig.gateway.configure(THING, 4, {"mode": "boost"})
    await until(lambda: rig.gateway.reported.get(THING, {}).get("version") == 4, "the new configuration")
    boots = {beat["bootId"] for beat in rig.gateway.heartbeats}
    assert len(boots) == 1 and await rig.end() == 0
    rig.gateway.reported.clear()
    rig.gateway.configs[THING] = {"version": 2, "config": {"mode": "old"}}  # a registry from an old backup
    await rig.start()
    await until(lambda: rig.gateway.reported.get(THING), "a report")
    assert rig.gateway.reported[THING] == {"version": 4, "config": {"mode": "boost"}}
    await rig.online()
    assert len({beat["bootId"] for beat in rig.gateway.heartbeats}) == 2
    await rig.end()
    del rig.gateway.configs[THING]
    rig.gateway.reported[THING] = {"version": 4, "config": {"mode": "boost"}}
    said = rig.gateway.config_updates
    await rig.start()
    await until(lambda: rig.gateway.config_updates == said + 1, "a report after each start, news or not")
    assert rig.authority.requests.count("simpleenroll") == 1, "a device that has a certificate does not enrol again"


async def test_a_device_rotates_its_certificate_when_told_to_and_drops_the_old_one(rig: Rig) -> None:
    await rig.start()
    await rig.online()
    first = rig.authority.valid[0]
    await rig.gateway.command(THING, ROTATE, REQUEST)
    assert (await rig.answered(REQUEST))["status"] == "succeeded"
    assert len(rig.authority.valid) == 1 and rig.authority.valid[0] != first
    await rig.online()
    assert await rig.end() == 0
    credentials = rig.credentials()
    (pair,) = credentials.candidates()
    assert credentials.certificate == rig.authority.valid[0] and credentials.record.confirmed
    assert sorted(path.name for path in pair.certificate.parent.iterdir()) == [
        f"{pair.number}.key",
        f"{pair.number}.pem",
        "credentials.json",
    ]
    await rig.start()
    await rig.online()


async def test_a_device_comes_for_its_next_certificate_by_itself_when_little_of_its_life_is_left(rig: Rig) -> None:
    rig.authority.days = 0.1  # of 1.1 days, for it began a day ago
    await rig.start()
    await until(lambda: rig.authority.requests.count("simplereenroll") == 1, "the renewal")
    await until(lambda: len(rig.authority.valid) == 1 and len(rig.authority.seen_to_work) == 2, "its end")
    await rig.online()
    await asyncio.sleep(1)
    assert rig.authority.requests.count("simplereenroll") == 1, (
        "a certificate that is as short costs one try in an hour"
    )
    assert rig.gateway.responses == []


async def test_kill_9_in_the_middle_of_a_rotation_ends_in_a_rotated_device(rig: Rig) -> None:
    await rig.start()
    await rig.online()
    first = rig.authority.valid[0]
    rig.authority.forgets = 1_000  # the server carries confirmations out, and no answer arrives
    await rig.gateway.command(THING, ROTATE, REQUEST)
    await until(lambda: rig.authority.seen_to_work and rig.authority.seen_to_work[-1] != first, "the new certificate")
    await rig.end(signal.SIGKILL)
    rig.authority.forgets = 0
    await rig.start()
    assert (await rig.answered(REQUEST))["status"] == "succeeded"
    await rig.online()
    assert first not in rig.authority.valid and len(rig.authority.valid) == 1


async def test_a_new_certificate_that_the_broker_does_not_take_leaves_the_device_with_the_old_one(rig: Rig) -> None:
    await rig.start()
    await rig.online()
    await until(lambda: rig.authority.seen_to_work, "the confirmation")
    first = rig.authority.valid[0]
    rig.authority.device = replace(TestCa(rig.authority.device.name))  # the broker does not know this CA
    await rig.gateway.command(THING, ROTATE, REQUEST)
    answer = await rig.answered(REQUEST)
    assert answer["status"] == "failed" and "the old one stays" in answer["reason"]
    await rig.online()
    await rig.end()
    assert rig.credentials().certificate == first


async def test_a_wiped_device_stays_wiped_until_a_person_wants_it_back(rig: Rig) -> None:
    rig.gateway.configs[THING] = {"version": 7, "config": {"secret": "of the first life"}}
    await rig.start()
    await rig.online()
    await until(lambda: rig.gateway.reported.get(THING), "the configuration")
    await rig.gateway.command(THING, WIPE, REQUEST)
    assert (await rig.answered(REQUEST))["status"] == "succeeded"
    assert rig.process is not None and await rig.process.wait() == 4
    assert not [path for path in (rig.folder / "device" / "identity").iterdir() if path.suffix in (".key", ".pem")]
    assert not (rig.folder / "device" / "config.json").exists()
    rig.gateway.configs[THING] = {"version": 1, "config": {}}  # in its next life it begins anew
    asked = len(rig.authority.requests)
    await rig.start()
    assert await rig.process.wait() == 4, "started again, it stays wiped"
    assert len(rig.authority.requests) == asked
    await rig.start("--enrol-again")
    await rig.online()
    await until(lambda: rig.gateway.reported[THING]["version"] == 1, "the configuration of its next life")


async def test_commands_that_were_not_signed_for_this_device_are_not_carried_out(rig: Rig) -> None:
    await rig.start()
    await rig.online()
    await until(lambda: rig.authority.seen_to_work, "the confirmation")
    before = rig.credentials().record
    stranger = StandInGateway(StandInJobs(Publisher()), rig.gateway.host, rig.gateway.port)
    async with aiomqtt.Client(rig.gateway.host, rig.gateway.port) as client:
        stranger._client = client
        forged = await stranger.command(THING, WIPE, "b" * 32)
    for number, (fields, reason) in enumerate(
        (
            ({"device_id": "another"}, "for device another"),
            ({"request_id": "f" * 32}, "for request"),
            ({"issued_at": 1000, "expires_at": 2000}, "valid until 2000"),
            ({"operation": "dance"}, "to dance"),
        )
    ):
        request_id = f"{number:032x}"
        await rig.gateway.command(THING, WIPE, request_id, **fields)
        answer = await rig.answered(request_id)
        assert answer["status"] == "failed" and reason in answer["reason"]
    rig.gateway.open_commands[THING] = forged
    async with aiomqtt.Client(rig.gateway.host, rig.gateway.port) as client:
        await client.publish(f"devices/{THING}/commands/notify", b"{}")
        answer = await rig.answered("b" * 32)
    assert answer["status"] == "failed" and "sign" in answer["reason"]
    assert rig.credentials().record == before
    await rig.online()


async def test_a_command_that_comes_again_is_answered_and_not_carried_out_twice(rig: Rig) -> None:
    await rig.start()
    await rig.online()
    body = await rig.gateway.command(THING, ROTATE, REQUEST)
    await rig.answered(REQUEST)
    after = list(rig.authority.valid)
    rig.gateway.responses.clear()
    async with aiomqtt.Client(rig.gateway.host, rig.gateway.port) as client:
        rig.gateway.open_commands[THING] = body
        await client.publish(f"devices/{THING}/commands/notify", b"{}")
        assert (await rig.answered(REQUEST))["status"] == "succeeded"
    assert rig.authority.valid == after


@pytest.mark.parametrize("learns", [True, False])
async def test_a_device_follows_when_the_service_ca_is_rolled(
    rig: Rig, tmp_path: Path, learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """THREATS row 34, the device's part. A device that has not heard of the new CA in time stays outside: the mutant."""
    successor = TestCa("the next service CA")
    rig.authority.vouched_for = [successor.certificate] if learns else []
    await rig.start()
    await rig.online()
    trusted = tmp_path / "device" / "trusted.pem"
    await until(trusted.exists, "what the device has learned")
    device_ca = tmp_path / f"{rig.authority.device.name}.ca.pem"
    port, open_port = free_port(), free_port()
    process = start_tls_broker(tmp_path, port, open_port, device_ca, successor.files(tmp_path, "next", server=True))
    wait_for_port(port, process)
    try:
        await rig.end()
        rig.port = port
        async with StandInGateway(rig.gateway.jobs, "127.0.0.1", open_port).running() as rig.gateway:
            await rig.start()
            if learns:
                return await rig.online()
            await asyncio.sleep(3)
            assert rig.gateway.heartbeats == []
    finally:
        process.terminate()
        process.wait(10)


async def test_a_fleet_enrols_each_device_with_its_own_serial_number(rig: Rig, tmp_path: Path) -> None:
    devices = tuple(FleetDevice(f"unit-{n}", "motor", f"SN-{n}") for n in range(8))
    report = tmp_path / "enrolled.json"
    config = FleetConfig(
        devices=devices,
        keys=rig.gateway.jobs.publisher.keys,
        broker=Address("127.0.0.1", rig.port, tls=True, ca=rig.ca),
        base=tmp_path / "base.bin",
        state_dir=tmp_path / "fleet",
        timing=Timing(retry_seconds=0.2, heartbeat_seconds=0.5),
        enrolment=FleetEnrolment(rig.server(), rig.claim, report),
    )
    stop = asyncio.Event()
    task = asyncio.create_task(run_fleet(config, stop))
    names = {f"thing-SN-{n}" for n in range(8)}
    await until(lambda: {beat["deviceId"] for beat in rig.gateway.heartbeats} == names or task.done(), "all devices")
    await rig.gateway.command("thing-SN-3", WIPE, REQUEST)
    await rig.answered(REQUEST)
    await asyncio.sleep(0.5)
    stop.set()
    found = await task
    assert [device.device_id for device in found.devices if device.wiped] == ["unit-3"]
    assert orjson.loads(report.read_bytes())["enrolled"] == 8
    assert {common_name(one) for one in rig.authority.valid} == names


def test_a_configuration_that_is_torn_or_senseless_is_asked_for_again(tmp_path: Path) -> None:
    storage = PosixStorage(tmp_path)
    store = ConfigurationStore(storage)
    assert store.take(Configuration(2, {"heartbeatSeconds": 5})) and store.current.heartbeat_seconds == 5.0
    assert not store.take(Configuration(1, {"heartbeatSeconds": 9})), "an older one is an old message"
    assert ConfigurationStore(storage).current == store.current
    (tmp_path / "config.json").write_bytes(b"torn")
    assert ConfigurationStore(storage).current == Configuration()
    for senseless in (True, 0, -1, "5", 1e9, None):
        assert Configuration(1, {"heartbeatSeconds": senseless}).heartbeat_seconds is None
