"""A real Mosquitto as the stack runs it, CAs and certificates, a registry, an access keeper, and clients that attack.

Attacks are judged at the victim: `Ear` is a client that notes what really reached it. A mutant is a stage whose
configuration was changed (`mutate`): the same attack has to succeed there.
"""

import asyncio
import os
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiomqtt
from aiomqtt import ProtocolVersion
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from access.folder import BrokerFolder
from access.keeper import AccessKeeper
from access.mosquitto import ACCESS, GATEWAY, WORKER, MosquittoFiles, MosquittoListeners, config
from access.plan import plan_access
from devstack.broker import mqtt_answers
from models.identity import AuthorityKind, RevocationReason
from models.settings import Settings
from pki.authority import Authority, authority_name, certificate_id, make_authority, pem_of, serial_hex, spki_sha256
from pki.issue import issue_claim, issue_device, issue_service
from pki.revocation import Revoked, sign_crl
from store.access import change_access, revoke
from store.brokers import BrokerStore
from store.engine import Database
from tests.conftest import free_port, mosquitto_binary, wait_for_port

VERSIONS = [ProtocolVersion.V311, ProtocolVersion.V5]
BROKER_ID = "mosquitto"


@dataclass(frozen=True)
class Credentials:
    """A certificate and key in files."""

    name: str
    certificate: Path
    private_key: Path
    ca: Path

    def context(self, *, tls_1_2: bool = False) -> ssl.SSLContext:
        made = ssl.create_default_context(cafile=str(self.ca))
        made.load_cert_chain(self.certificate, self.private_key)
        if tls_1_2:
            made.maximum_version = ssl.TLSVersion.TLSv1_2
        return made


@dataclass
class Stage:
    """All of it."""

    db: Database
    folder: Path
    listeners: MosquittoListeners
    mutate: Callable[[str], str]
    authorities: dict[str, Authority] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    # --- certificates ------------------------------------------------------------------------------------------------

    async def authority(self, kind: AuthorityKind, state: str = "active") -> Authority:
        key = generate_private_key(SECP256R1())
        certificate = make_authority(kind, authority_name(kind), key, datetime.now(UTC))
        made = Authority(certificate, key)
        async with self.db.pool.connection() as connection:
            await change_access(connection)
            await connection.execute(
                "INSERT INTO authorities (authority_id, kind, name, certificate, key_reference, state, not_before, "
                "not_after) VALUES (%s, %s, %s, %s, 'file:none', %s, %s, %s)",
                (
                    made.authority_id,
                    kind.value,
                    certificate.subject.rfc4514_string(),
                    pem_of(certificate),
                    state,
                    certificate.not_valid_before_utc,
                    certificate.not_valid_after_utc,
                ),
            )
        return made

    async def publish_crl(
        self, authority: Authority, *, now: datetime | None = None, lifetime: timedelta = timedelta(days=7)
    ) -> bytes:
        """What the worker's upkeep does."""
        async with self.db.pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT serial_hex, revoked_at FROM certificates WHERE authority_id = %s AND state = 'revoked'",
                (authority.authority_id,),
            )
            revoked = [Revoked(row[0], row[1]) for row in await cursor.fetchall()]
        number = self.numbers.get(authority.authority_id, 0) + 1
        pem = sign_crl(authority, number, revoked, now or datetime.now(UTC), lifetime)
        await self.save_crl(authority, pem.decode(), now or datetime.now(UTC), lifetime)
        return pem

    async def save_crl(self, authority: Authority, pem: str, now: datetime, lifetime: timedelta) -> None:
        """Into the registry, whatever it is."""
        number = self.numbers[authority.authority_id] = self.numbers.get(authority.authority_id, 0) + 1
        async with self.db.pool.connection() as connection:
            await connection.execute(
                "INSERT INTO crls (authority_id, number, pem, revoked, this_update, next_update) "
                "VALUES (%s, %s, %s, 0, %s, %s)",
                (authority.authority_id, number, pem, now, now + lifetime),
            )
            await connection.execute(
                "UPDATE authorities SET crl_number = %s WHERE authority_id = %s", (number, authority.authority_id)
            )
            await connection.execute("SELECT pg_notify('tidegate_access', '')")

    async def device(self, name: str, authority: Authority | None = None, generation: int = 1) -> Credentials:
        """A registered device with a certificate (a further generation: of a device that is there)."""
        authority = authority or self.authorities["device"]
        key = generate_private_key(SECP256R1())
        certificate = issue_device(authority, key.public_key(), name, datetime.now(UTC))
        async with self.db.pool.connection() as connection:
            await connection.execute(
                "INSERT INTO devices (device_id, device_type, serial_number, site_id, status) "
                "VALUES (%s, 'motor', %s, 'berlin', 'active') ON CONFLICT DO NOTHING",
                (name, f"SN-{name}"),
            )
            await connection.execute(
                "INSERT INTO certificates (certificate_id, device_id, authority_id, generation, serial_hex, spki_sha256, "
                "pem, not_before, not_after, state) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, 'valid')",
                (
                    certificate_id(certificate),
                    name,
                    authority.authority_id,
                    generation,
                    serial_hex(certificate),
                    spki_sha256(key.public_key()),
                    pem_of(certificate),
                    certificate.not_valid_before_utc,
                    certificate.not_valid_after_utc,
                ),
            )
        return self.save(f"{name}-{generation}", certificate, key)

    async def authority_of_a_stranger(self) -> Credentials:
        """A certificate with a device's name, from a CA that says it is ours."""
        key, ours = generate_private_key(SECP256R1()), self.authorities["device"].certificate
        name = ours.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value
        fake = Authority(make_authority(AuthorityKind.DEVICE, str(name), key, datetime.now(UTC)), key)
        own = generate_private_key(SECP256R1())
        return self.save("stranger-1", issue_device(fake, own.public_key(), "device", datetime.now(UTC)), own)

    def claim(self) -> Credentials:
        key, now = generate_private_key(SECP256R1()), datetime.now(UTC)
        made = issue_claim(self.authorities["claim"], key.public_key(), "batch", now, now + timedelta(days=1))
        return self.save("claim", made, key)

    def service(self, name: str, *hosts: str) -> Credentials:
        key, now = generate_private_key(SECP256R1()), datetime.now(UTC)
        made = issue_service(
            self.authorities["service"], key.public_key(), name, hosts, now, 90, server=bool(hosts), client=not hosts
        )
        return self.save(name, made, key)

    def save(self, name: str, certificate: x509.Certificate, key: object) -> Credentials:
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())  # type: ignore[attr-defined]
        (self.folder / f"{name}.key").write_bytes(pem)
        (self.folder / f"{name}.pem").write_text(pem_of(certificate))
        for ending in ("key", "pem"):
            (self.folder / f"{name}.{ending}").chmod(0o644)
        return Credentials(
            name.rsplit("-", 1)[0], self.folder / f"{name}.pem", self.folder / f"{name}.key", self.folder / "ca.pem"
        )

    async def revoke(self, device: str, *, only: str | None = None) -> None:
        async with self.db.pool.connection() as connection:
            ids = [only] if only else None
            await revoke(connection, device, RevocationReason.KEY_COMPROMISE, "test", "revoked by a test", only=ids)

    # --- the broker --------------------------------------------------------------------------------------------------

    async def prepare(self) -> None:
        """CAs with a first list, service certificates, the broker's files."""
        for kind in AuthorityKind:
            self.authorities[kind.value] = await self.authority(kind)
        (self.folder / "ca.pem").write_text(pem_of(self.authorities["service"].certificate))
        (self.folder / "ca.pem").chmod(0o644)
        self.service("broker", "127.0.0.1", "localhost")
        for name in (GATEWAY, WORKER, ACCESS):
            self.service(name)
        await self.publish_crl(self.authorities["device"])
        self.access_folder.mkdir()
        snapshot = await BrokerStore(self.db).snapshot()
        BrokerFolder(self.access_folder).write(plan_access(snapshot, {}, BROKER_ID, datetime.now(UTC)).files)

    @property
    def access_folder(self) -> Path:
        return self.folder / "access"

    @property
    def pid_file(self) -> Path:
        return self.folder / "mosquitto.pid"

    def start_broker(self) -> None:
        files = MosquittoFiles(
            folder=self.access_folder,
            certificate=self.folder / "broker.pem",
            private_key=self.folder / "broker.key",
            service_ca=self.folder / "ca.pem",
            pid_file=self.pid_file,
        )
        path = self.folder / "mosquitto.conf"
        path.write_text(self.mutate(config(self.listeners, files, 256 * 1024)))
        log = (self.folder / "mosquitto.log").open("ab")
        self.process = subprocess.Popen([str(mosquitto_binary()), "-c", str(path)], stdout=log, stderr=log)
        log.close()
        for port in (self.listeners.devices, self.listeners.engine):
            wait_for_port(port, self.process)

    def stop_broker(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None

    def credentials(self, name: str) -> Credentials:
        return Credentials(name, self.folder / f"{name}.pem", self.folder / f"{name}.key", self.folder / "ca.pem")

    def settings(self, service: str = ACCESS) -> Settings:
        files = self.credentials(service)
        return Settings(
            mqtt_url=f"mqtts://127.0.0.1:{self.listeners.engine}",
            mqtt_ca=files.ca,
            mqtt_certificate=files.certificate,
            mqtt_private_key=files.private_key,
            database_url=self.db.url,
        )

    def keeper(self) -> AccessKeeper:
        folder = BrokerFolder(self.access_folder)
        return AccessKeeper(BrokerStore(self.db), self.settings(), folder, self.pid_file, BROKER_ID)

    @asynccontextmanager
    async def keeping(self) -> AsyncIterator[AccessKeeper]:
        """A running keeper."""
        stop, keeper = asyncio.Event(), self.keeper()
        running = asyncio.create_task(keeper.keep(stop))
        try:
            yield keeper
        finally:
            stop.set()
            await asyncio.wait_for(running, 60)

    async def in_step(self, seconds: float = 20) -> None:
        """Until the broker enforces what is wanted now."""
        async with asyncio.timeout(seconds):
            while True:
                async with self.db.pool.connection() as connection:
                    row = await (
                        await connection.execute(
                            "SELECT (SELECT revision FROM access_state) = (SELECT applied_revision FROM brokers)"
                        )
                    ).fetchone()
                if row and row[0]:
                    return
                await asyncio.sleep(0.02)

    # --- clients -----------------------------------------------------------------------------------------------------

    def client(
        self,
        who: Credentials,
        version: ProtocolVersion = ProtocolVersion.V311,
        *,
        engine: bool = False,
        client_id: str | None = None,
        will: aiomqtt.Will | None = None,
    ) -> aiomqtt.Client:
        return aiomqtt.Client(
            "127.0.0.1",
            self.listeners.engine if engine else self.listeners.devices,
            identifier=client_id or who.name,
            protocol=version,
            tls_context=who.context(),
            timeout=5,
            will=will,
        )

    @asynccontextmanager
    async def gateway_ear(self) -> AsyncIterator["Ear"]:
        """What the engine hears."""
        client = self.client(self.credentials(GATEWAY), engine=True, client_id="engine@ear")
        async with ear(client, ["#", "$aws/#"]) as listening:
            yield listening

    async def refused(self, who: Credentials, *, engine: bool = False) -> bool:
        """Whether it cannot connect. In plain bytes, because a client library takes its time to see a refusal."""
        try:
            return not await mqtt_answers(self.listeners.engine if engine else self.listeners.devices, who.context())
        except OSError:
            return True


@dataclass
class Ear:
    """A subscriber and what has reached it."""

    client: aiomqtt.Client
    heard: list[tuple[str, bytes]] = field(default_factory=list)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def topics(self) -> list[str]:
        return [topic for topic, _ in self.heard]

    @property
    def texts(self) -> list[str]:
        return [payload.decode() for _, payload in self.heard]

    async def hears(self, text: str, seconds: float = 5) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while text not in self.texts:
                    await asyncio.sleep(0.01)
                return True
        return False


@asynccontextmanager
async def ear(client: aiomqtt.Client, filters: Iterable[str]) -> AsyncIterator[Ear]:
    async with client:
        listening = Ear(client)

        async def listen() -> None:
            try:
                async for message in client.messages:
                    listening.heard.append((str(message.topic), bytes(message.payload)))
            except aiomqtt.MqttError:
                listening.gone.set()

        task = asyncio.create_task(listen())
        for topic in filters:
            with suppress(aiomqtt.MqttError):
                await client.subscribe(topic, qos=1)
        try:
            yield listening
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


def open_folder() -> Path:
    """A folder that the broker's account can read and write in."""
    folder = Path(tempfile.mkdtemp(prefix="tidegate-access-"))
    folder.chmod(0o755)
    if os.geteuid() == 0:  # Mosquitto gives up root for its own account
        shutil.chown(folder, "mosquitto")
    return folder


@asynccontextmanager
async def stage(db: Database, mutate: Callable[[str], str] = lambda text: text) -> AsyncIterator[Stage]:
    """A running broker that enforces an empty registry."""
    folder = open_folder()
    made = Stage(db, folder, MosquittoListeners(free_port(), free_port()), mutate)
    try:
        await made.prepare()
        made.start_broker()
        yield made
    finally:
        made.stop_broker()
        shutil.rmtree(folder, ignore_errors=True)


def without_acl(text: str) -> str:
    """The mutant whose listeners have no ACL."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("acl_file"))


def without(line: str) -> Callable[[str], str]:
    """The mutant without a line of the configuration."""

    def mutate(text: str) -> str:
        assert f"{line}\n" in text
        return text.replace(f"{line}\n", "")

    return mutate


def without_start(start: str) -> Callable[[str], str]:
    """The mutant without the lines that begin so."""

    def mutate(text: str) -> str:
        lines = text.splitlines(keepends=True)
        kept = [line for line in lines if not line.startswith(start)]
        assert kept != lines
        return "".join(kept)

    return mutate
