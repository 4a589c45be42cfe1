"""The device's credentials: made on the device, kept through power cuts at every operation (THREATS row 35), wiped for good.

Invariant: after a cut at any durable operation of a rotation the device can connect with one of its certificates, and
when all has settled it has exactly one, which is the one that the server has.
"""

import contextlib
import random
import stat
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

import agent.credentials
from agent.commands import MAX_ENDED, CommandState, CommandStore, EndedCommand
from agent.configuration import Configuration, ConfigurationStore
from agent.credentials import Credentials, Pair, Standing, make_request, public_bytes, renewal_is_due
from agent.enrolment import Claim, enrol
from agent.errors import CredentialError, EnrolmentAwayError, RecordError, RotationError
from agent.rotation import Rotation
from agent.storage import PosixStorage
from tests.agent_authority import DirectServer, StandInAuthority
from tests.agent_flash import Cut, Flash, PowerCut

SERIAL = "SN-000007"
THING = f"thing-{SERIAL}"
CLAIM = Claim(Path("claim.pem"), Path("claim.key"))
CAUSE = "a" * 32
MOST_BOOTS = 40


@dataclass
class World:
    """A device on a flash, its server, and the broker, which takes every certificate that is valid."""

    flash: Flash = field(default_factory=Flash)
    cuts: list[tuple[int, Cut]] = field(default_factory=list)
    authority: StandInAuthority = field(default_factory=StandInAuthority)
    broker_takes_new: bool = True

    def __post_init__(self) -> None:
        self.server = DirectServer(self.authority, self.flash.read)
        self.first: x509.Certificate | None = None

    async def enrolled(self) -> "World":
        await enrol(Credentials(self.flash), self.server, CLAIM, SERIAL)
        self.authority.seen_to_work = list(self.authority.valid)
        self.first = self.authority.valid[0]
        return self

    async def until_settled(self, cause: str = CAUSE) -> Credentials:
        """Boot after boot: the command is told again until it has been carried out."""
        for _ in range(MOST_BOOTS):
            try:
                credentials = Credentials(self.flash)
                rotation = Rotation(credentials, self.server, SERIAL, self.prove)
                await rotation.rotate(cause)
                return credentials
            except PowerCut:
                self.check_reachable()
                self.flash.power_on(*self.cuts.pop()) if self.cuts else self.flash.power_on()
            except EnrolmentAwayError:
                self.check_reachable()
        raise AssertionError("the rotation never ends")

    async def prove(self, pair: Pair) -> bool:
        return self.broker_takes(pair) and (self.broker_takes_new or self._read(pair) == self.first)

    def broker_takes(self, pair: Pair) -> bool:
        """The certificate is valid, and the key beside it is its own."""
        pem = self.flash.read(str(pair.private_key)) or b""
        try:
            key, certificate = load_pem_private_key(pem, None), self._read(pair)
        except ValueError:
            return False
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return certificate in self.authority.valid and public_bytes(key) == public_bytes(certificate)

    def check_reachable(self) -> None:
        """Row 35. What a device finds on its flash after the cut, before it does anything."""
        pairs = Credentials(Snapshot(self.flash)).candidates()
        assert any(self.broker_takes(pair) for pair in pairs), "row 35: no certificate of the device works"

    def check_settled(self, credentials: Credentials) -> None:
        record = credentials.record
        assert (record.next, record.previous, record.confirmed) == (None, None, True)
        (pair,) = credentials.candidates()
        assert self.authority.valid == [self._read(pair)], "server and device have different certificates"
        assert self.broker_takes(pair)

    def _read(self, pair: Pair) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.flash.read(str(pair.certificate)) or b"")


class Snapshot(Flash):
    """What lies on another flash now; looking at it changes nothing there."""

    def __init__(self, other: Flash) -> None:
        super().__init__()
        for name in list(other._names):
            self.write(name, other._names[name].now)
        self.power_on()


async def operations_of() -> int:
    world = await World().enrolled()
    world.flash.power_on()
    await world.until_settled()
    return len(world.flash.operations)


async def cut_rotation(cuts: list[tuple[int, Cut]], seed: int) -> None:
    world = await World(Flash(rng=random.Random(f"{cuts} {seed}")), cuts[1:][::-1]).enrolled()
    world.flash.power_on(*cuts[0])
    credentials = await world.until_settled()
    world.flash.power_on()
    world.check_settled(credentials)
    assert world.authority.valid != [world.first]
    before = world.authority.valid
    world.check_settled(await world.until_settled("b" * 32))  # the next rotation goes as well
    assert world.authority.valid != before


@pytest.mark.parametrize(("cut", "seeds"), [("none", 1), ("all", 1), ("torn", 10)])
async def test_a_power_cut_at_any_operation_of_a_rotation_leaves_a_certificate_that_works(cut: Cut, seeds: int) -> None:
    operations = await operations_of()
    assert operations > 20
    for at in range(1, operations + 1):
        for seed in range(seeds):
            await cut_rotation([(at, cut)], seed)


async def test_no_number_of_power_cuts_loses_a_device() -> None:
    most = await operations_of()
    for seed in range(100):
        rng = random.Random(seed)
        cuts: list[tuple[int, Cut]] = [(rng.randrange(1, most), rng.choice(("none", "all", "torn"))) for _ in range(5)]
        await cut_rotation(cuts, seed)


@pytest.mark.parametrize("cut", ["none", "all", "torn"])
async def test_a_power_cut_at_any_operation_where_the_answer_about_the_new_certificate_is_lost(cut: Cut) -> None:
    for at in range(1, await operations_of() + 1):
        world = await World(Flash(rng=random.Random(at))).enrolled()
        world.authority.forgets = 1
        world.flash.power_on(at, cut)
        world.check_settled(await world.until_settled())


async def test_without_the_sync_before_the_rename_a_power_cut_loses_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def rename_without_sync(storage: Flash, name: str, data: bytes) -> None:
        storage.write(name + ".new", data)
        storage.rename(name + ".new", name)
        storage.sync_folder(agent.credentials.FOLDER)

    monkeypatch.setattr(agent.credentials, "replace_durably", rename_without_sync)
    operations, lost = await operations_of(), 0
    for at in range(1, operations + 1):
        try:
            await cut_rotation([(at, "torn")], 1)
        except (AssertionError, RecordError, CredentialError):
            lost += 1
    assert lost > 0


async def test_a_certificate_that_the_broker_does_not_take_is_given_up() -> None:
    world = await World(broker_takes_new=False).enrolled()
    with pytest.raises(RotationError, match="the old one stays"):
        await world.until_settled()
    (pair,) = Credentials(world.flash).candidates()
    assert await world.prove(pair), "the device stays where the broker takes it"


async def test_without_the_proof_a_device_ends_with_a_certificate_that_the_broker_does_not_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = await World(broker_takes_new=False).enrolled()

    async def without(self: World, pair: Pair) -> bool:
        return True

    with monkeypatch.context() as patch:
        patch.setattr(World, "prove", without)
        await world.until_settled()
    assert not any([await world.prove(pair) for pair in Credentials(world.flash).candidates()])


async def given_up_by_the_server() -> World:
    """The device has taken up its new certificate; before it could say so, the server has revoked that one."""
    world = await World().enrolled()
    assert world.first is not None
    credentials = Credentials(world.flash)
    pair = credentials.candidates()[0]
    credentials.keep(await world.server.reenroll(pair, make_request(credentials.prepare(CAUSE), SERIAL)))
    credentials.promote()
    world.authority.valid = [world.first]
    return world


async def test_a_rotation_that_the_server_has_given_up_ends_with_the_old_certificate() -> None:
    world = await given_up_by_the_server()
    world.check_reachable()
    credentials = Credentials(world.flash)
    await Rotation(credentials, world.server, SERIAL, world.prove).settle()
    world.check_settled(credentials)


async def test_without_the_old_certificate_beside_the_new_one_that_device_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    promote = Credentials.promote

    def promote_and_drop(self: Credentials) -> None:
        promote(self)
        self.confirmed()

    monkeypatch.setattr(Credentials, "promote", promote_and_drop)
    world = await given_up_by_the_server()
    with pytest.raises(AssertionError, match="row 35"):
        world.check_reachable()


async def test_a_new_certificate_that_is_revoked_before_it_is_confirmed_is_reported_as_refused() -> None:
    world = await World().enrolled()

    async def prove_and_revoke(pair: Pair) -> bool:
        assert world.first is not None
        world.authority.valid = [world.first]
        return True

    credentials = Credentials(world.flash)
    with pytest.raises(RotationError, match="refused the new certificate"):
        await Rotation(credentials, world.server, SERIAL, prove_and_revoke).rotate(CAUSE)
    world.check_settled(credentials)


async def test_the_same_command_twice_rotates_once() -> None:
    world = await World().enrolled()
    await world.until_settled()
    after = world.authority.valid
    await world.until_settled()
    assert world.authority.valid == after


async def test_a_power_cut_at_any_operation_of_an_enrolment_ends_with_one_certificate() -> None:
    async def enrolment(flash: Flash) -> StandInAuthority:
        world = World(flash)
        for _ in range(MOST_BOOTS):
            try:
                assert await enrol(Credentials(flash), world.server, CLAIM, SERIAL) == THING
                break
            except PowerCut:
                continue
        world.check_reachable()
        return world.authority

    flash = Flash()
    await enrolment(flash)
    for at in range(1, len(flash.operations) + 1):
        for cut in ("none", "all", "torn"):
            authority = await enrolment(Flash(rng=random.Random(at), cut_at=at, cut=cut))
            assert 1 <= len(authority.valid) <= 2, "a cut before the record costs at most one key that nobody has"


async def test_a_certificate_for_another_key_or_another_device_is_not_kept() -> None:
    world = await World().enrolled()
    credentials = Credentials(world.flash)
    mine = credentials.prepare(CAUSE)
    stranger = world.authority.device.issue(ec.generate_private_key(ec.SECP256R1()).public_key(), THING)
    with pytest.raises(CredentialError, match="none of 1 certificates"):
        credentials.keep([stranger])
    other_name = world.authority.device.issue(mine.public_key(), "another-device")
    with pytest.raises(CredentialError, match="another-device"):
        credentials.keep([other_name])
    with pytest.raises(CredentialError, match=r"engine\.gateway"):
        credentials.keep([world.authority.device.issue(mine.public_key(), "engine.gateway")])
    assert not credentials.record.next_ready


@pytest.mark.parametrize("cut", ["none", "all", "torn"])
async def test_a_wipe_that_is_cut_is_finished_at_the_next_start_and_stays(cut: Cut) -> None:
    world = await World().enrolled()
    flash = world.flash
    flash.power_on()
    Credentials(flash).begin_wipe()
    begun = len(flash.operations)
    assert Credentials(flash).record.standing is Standing.WIPED
    for at in range(1, len(flash.operations) + 1):
        world = await World(Flash(rng=random.Random(at))).enrolled()
        world.flash.power_on(at, cut)
        with pytest.raises(PowerCut):
            Credentials(world.flash).begin_wipe()
            Credentials(world.flash)
        credentials = Credentials(world.flash)
        if at > begun:
            assert credentials.record.standing is Standing.WIPED
        if credentials.record.standing is Standing.WIPED:
            assert not [name for name in world.flash._names if name.endswith((".key", ".pem"))]
            with pytest.raises(CredentialError, match="wiped"):
                await enrol(credentials, world.server, CLAIM, SERIAL)
            credentials.forgive_wipe()
            assert await enrol(credentials, world.server, CLAIM, SERIAL) == THING


def test_a_renewal_is_due_in_the_last_fifth_of_a_certificates_life_and_not_after_it() -> None:
    authority = StandInAuthority()
    certificate = authority.device.issue(authority.device.key.public_key(), THING, days=99)  # 100 with the day before
    ends = certificate.not_valid_after_utc.timestamp()
    due = {days: renewal_is_due(certificate, ends - days * 86_400) for days in (101, 50, 21, 19, 0.1, -0.1, -4000)}
    assert due == {101: False, 50: False, 21: False, 19: True, 0.1: True, -0.1: False, -4000: False}


@pytest.mark.parametrize("cut", ["none", "all", "torn"])
def test_after_a_power_cut_the_device_runs_the_old_or_the_new_configuration(cut: Cut) -> None:
    old, new = Configuration(1, {"mode": "eco", "text": "x" * 600}), Configuration(2, {"mode": "boost"})
    for at in range(1, 6):
        flash = Flash(rng=random.Random(at))
        ConfigurationStore(flash).take(old)
        flash.power_on(at, cut)
        with contextlib.suppress(PowerCut):
            ConfigurationStore(flash).take(new)
        store = ConfigurationStore(flash)
        assert store.current in (old, new)
        store.take(new)
        assert ConfigurationStore(flash).current == new


@pytest.mark.parametrize("cut", ["none", "all", "torn"])
def test_after_a_power_cut_no_command_that_has_ended_is_forgotten(cut: Cut) -> None:
    first, second = EndedCommand("succeeded", "", 2000), EndedCommand("failed", "no", 3000)
    for at in range(1, 6):
        flash = Flash(rng=random.Random(at))
        CommandStore(flash).put(CommandState().with_ended("a" * 32, first, 1000))
        flash.power_on(at, cut)
        with contextlib.suppress(PowerCut):
            store = CommandStore(flash)
            store.put(store.state.with_ended("b" * 32, second, 1001))
        ended = CommandStore(flash).state.ended
        assert ended["a" * 32] == first and ended.get("b" * 32, second) == second


def test_commands_are_remembered_until_their_orders_expire_and_the_memory_is_bounded() -> None:
    state = CommandState()
    for number in range(MAX_ENDED + 20):
        state = state.with_ended(f"{number:032x}", EndedCommand("succeeded", "", 5000 + number), 1000)
    assert len(state.ended) == MAX_ENDED and f"{MAX_ENDED + 19:032x}" in state.ended
    state = state.with_ended("f" * 32, EndedCommand("failed", "", 9000), 8000)
    assert list(state.ended) == ["f" * 32] and state.latest_known_time == 8000


async def test_private_keys_are_for_their_owner_alone(tmp_path: Path) -> None:
    storage = PosixStorage(tmp_path)
    authority = StandInAuthority()
    server = DirectServer(authority, lambda path: Path(path).read_bytes())
    credentials = Credentials(storage)
    await enrol(credentials, server, CLAIM, SERIAL)
    (pair,) = credentials.candidates()
    assert stat.S_IMODE(pair.private_key.stat().st_mode) == 0o600
    assert stat.S_IMODE(pair.private_key.parent.stat().st_mode) == 0o700
    secret = pair.private_key.read_bytes()
    credentials.begin_wipe()
    credentials.wipe()
    assert not pair.private_key.exists()
    assert not found_in(tmp_path, secret)


def found_in(folder: Path, secret: bytes) -> bool:
    return any(secret in path.read_bytes() for path in folder.rglob("*") if path.is_file())
