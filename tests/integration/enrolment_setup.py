"""An enrolment server with all that stands behind it: PostgreSQL, Temporal, CAs, workers, and devices that come to it."""

import asyncio
import base64
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from temporalio.client import Client
from temporalio.service import RPCError
from temporalio.worker import Worker

from activities.authorities import AuthorityActivities, ensure_authorities
from activities.enrolment_hook import EnrolmentHook
from activities.provisioning import IssuingActivities, ProvisioningActivities
from activities.relay import OutboxRelay
from activities.signing import CertificateSigner
from enrolment.__main__ import Server
from enrolment.service import EnrolmentService
from enrolment.tls import PeerCertificateProtocol, server_context
from enrolment.trust import Trust
from enrolment.waiting import Changes
from models.identity import AuthorityKind, AuthorityView, ClaimBatchSpec, DeviceHappening
from pki.authority import Authority, certificate_id, pem_of, read_certificate
from pki.issue import issue_claim, issue_service
from pki.pkcs7 import read_certs_only
from pki.signer import FileKeyStore
from store.claims import ClaimStore
from store.engine import Database
from store.enrolments import EnrolmentStore
from store.peers import PeerStore
from store.provisioning import ProvisioningStore
from store.waits import happened
from workflows import options
from workflows.provisioning import ProvisioningWorkflow
from workflows.reissue import ReissueCertificateWorkflow
from workflows.sandbox import runner

PASSPHRASE = b"correct horse battery staple"
ENROLL, REENROLL = "/.well-known/est/simpleenroll", "/.well-known/est/simplereenroll"
CACERTS, CONFIRM = "/.well-known/est/cacerts", "/.well-known/tidegate/confirm"
PKCS10 = {"Content-Type": "application/pkcs10"}


@dataclass
class Pki:
    """The three CAs, and certificates of them."""

    folder: Path
    keys: FileKeyStore
    authorities: dict[AuthorityKind, AuthorityView]

    @classmethod
    async def make(cls, db: Database, folder: Path) -> "Pki":
        """New CAs in an empty database."""
        keys = FileKeyStore(folder / "ca", PASSPHRASE)
        return cls(folder, keys, await ensure_authorities(db, keys, datetime.now(UTC), "test"))

    def authority(self, kind: AuthorityKind) -> Authority:
        """A CA with its key."""
        view = self.authorities[kind]
        return Authority(read_certificate(view.certificate), self.keys.open(view.key_reference))

    def server(self) -> tuple[Path, Path]:
        """Certificate and key of a server on loopback."""
        key, now = new_key(), datetime.now(UTC)
        service = self.authority(AuthorityKind.SERVICE)
        made = issue_service(service, key.public_key(), "enrolment", ["127.0.0.1"], now, 30, server=True, client=False)
        return write_pair(self.folder, "server", pem_of(made), key)

    def ca_file(self) -> Path:
        """What devices check the server with."""
        path = self.folder / "service-ca.pem"
        path.write_text(self.authorities[AuthorityKind.SERVICE].certificate)
        return path

    async def batch(self, db: Database, name: str = "line-4", **given: Any) -> tuple[Path, Path]:
        """A batch; its claim certificate and key."""
        serials = given.pop("serials", [])
        expires = given.pop("expires_at", datetime.now(UTC) + timedelta(days=1))
        spec = ClaimBatchSpec.model_validate(
            {"name": name, "device_type": "motor", "site_id": "plant-1", "max_devices": 1000, "expires_at": expires}
            | given
        )
        key, now = new_key(), min(datetime.now(UTC), expires - timedelta(minutes=1))
        made = issue_claim(self.authority(AuthorityKind.CLAIM), key.public_key(), name, now, expires)
        await ClaimStore(db).create(spec, serials, pem_of(made), certificate_id(made), "alice")
        return write_pair(self.folder, f"claim-{name}", pem_of(made), key)


def new_key() -> EllipticCurvePrivateKey:
    """A device's key."""
    return generate_private_key(SECP256R1())


def write_pair(folder: Path, name: str, pem: str, key: Any) -> tuple[Path, Path]:
    """Certificate and key as files."""
    certificate, private = folder / f"{name}.pem", folder / f"{name}.key"
    certificate.write_text(pem)
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return certificate, private


def request_for(serial_number: str, key: Any) -> x509.CertificateSigningRequest:
    """A certificate request."""
    name = x509.Name([x509.NameAttribute(NameOID.SERIAL_NUMBER, serial_number)])
    return x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, SHA256())


def body_for(serial_number: str, key: Any) -> bytes:
    """The same as the body of an EST request."""
    return base64.b64encode(request_for(serial_number, key).public_bytes(Encoding.DER))


@dataclass
class Door:
    """The running server, and clients for it."""

    url: str
    ca: Path
    pki: Pki
    clients: list[httpx.AsyncClient] = field(default_factory=list)

    def client(self, pair: tuple[Path, Path] | None = None) -> httpx.AsyncClient:
        """A client with a certificate, or none."""
        context = ssl.create_default_context(cafile=str(self.ca))
        if pair is not None:
            context.load_cert_chain(*pair)
        made = httpx.AsyncClient(
            base_url=self.url, verify=context, timeout=30, trust_env=False, limits=httpx.Limits(max_connections=200)
        )
        self.clients.append(made)
        return made

    def own(self, name: str, answer: httpx.Response, key: Any) -> tuple[Path, Path]:
        """A device's certificate, as it came, and its key."""
        return write_pair(self.pki.folder, name, pem_of(certificate_of(answer)), key)


def certificate_of(answer: httpx.Response) -> x509.Certificate:
    """The certificate in an answer."""
    assert answer.status_code == 200, (answer.status_code, answer.text)
    assert answer.headers["content-type"] == "application/pkcs7-mime; smime-type=certs-only"
    (found,) = read_certs_only(base64.b64decode(answer.content))
    return found


@asynccontextmanager
async def serving(
    db: Database, client: Client, pki: Pki, *, wait_seconds: float = 10.0, **service: Any
) -> AsyncIterator[Door]:
    """The real HTTPS server, in this process."""
    context = server_context(*pki.server())
    trust, changes = Trust(db, context), Changes(db.url)
    await trust.refresh()
    made = EnrolmentService(EnrolmentStore(db), PeerStore(db), client, changes, trust, wait_seconds, **service)
    config = uvicorn.Config(
        made.application(),
        host="127.0.0.1",
        port=0,
        http=PeerCertificateProtocol,
        ws="none",
        lifespan="off",
        ssl_context_factory=lambda _config, _default: context,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    server = Server(config)
    tasks = [asyncio.create_task(each) for each in (server.serve(), changes.listen(), trust.keep())]
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    door = Door(f"https://127.0.0.1:{port}", pki.ca_file(), pki)
    try:
        yield door
    finally:
        for each in door.clients:
            await each.aclose()
        server.should_exit = True
        await tasks[0]
        for task in tasks[1:]:
            task.cancel()
        await asyncio.gather(*tasks[1:], return_exceptions=True)


@asynccontextmanager
async def working(
    db: Database, client: Client, pki: Pki, *, hook: str | None = None, listed: bool = True, cached: int = 100
) -> AsyncIterator[None]:
    """Workers with the activities of provisioning and the CA's key, and the relay of the outbox. `listed`: what runs
    in the end can be listed, and is ended."""
    store = ProvisioningStore(db)
    provisioning = ProvisioningActivities(store, EnrolmentHook(hook))
    authorities = AuthorityActivities(db, pki.keys)
    issuing = IssuingActivities(store, CertificateSigner(db, pki.keys))
    stop = asyncio.Event()
    relay = asyncio.create_task(OutboxRelay(db, client, options.DEVICE_EVENT).run(stop))
    light = Worker(
        client,
        task_queue=options.TASK_QUEUE,
        workflows=[ProvisioningWorkflow, ReissueCertificateWorkflow],
        activities=[
            provisioning.check_enrolment,
            provisioning.refuse_enrolment,
            provisioning.mark_configured,
            provisioning.activate_device,
            provisioning.undo_provisioning,
        ],
        workflow_runner=runner(),
        max_cached_workflows=cached,
    )
    ca = Worker(
        client,
        task_queue=options.CA_QUEUE,
        activities=[issuing.issue_certificate, issuing.reissue_certificate, authorities.publish_crls],
    )
    async with light, ca:
        yield
        if listed:
            await _end_what_runs(client)
    stop.set()
    with suppress(asyncio.CancelledError):
        await relay


async def _end_what_runs(client: Client) -> None:
    """Serial numbers come again in the next test, and would join what this one left."""
    query = 'ExecutionStatus = "Running"'
    for _ in range(50):
        running = [each async for each in client.list_workflows(query)]
        for each in running:
            with suppress(RPCError):
                await client.get_workflow_handle(each.id).terminate("the test is over")
        if not running:
            return
        await asyncio.sleep(0.05)


async def tell(db: Database, device_id: str, *happenings: DeviceHappening, **detail: Any) -> None:
    """What the gateway records when a device does something."""
    async with db.pool.connection() as connection:
        await happened(connection, [(device_id, each, detail) for each in happenings])


async def value(db: Database, statement: str, *arguments: Any) -> Any:
    """The first column of the first row."""
    async with db.pool.connection() as connection:
        row = await (await connection.execute(statement.encode(), arguments)).fetchone()
    return None if row is None else row[0]


async def column(db: Database, statement: str, *arguments: Any) -> list[Any]:
    """The first column of all rows."""
    async with db.pool.connection() as connection:
        return [row[0] for row in await (await connection.execute(statement.encode(), arguments)).fetchall()]
