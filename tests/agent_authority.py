"""A stand-in for the enrolment server, for the agent's tests: certificates of its own, in memory or behind real HTTPS.

`StandInAuthority` decides and remembers; `DirectServer` is what the agent asks, without a socket; `serving_est` puts the
same authority behind TLS with optional client certificates, as the real server has it.
"""

import base64
import contextlib
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, pkcs7
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agent.credentials import Pair, common_name, public_bytes
from agent.enrolment import CONFIRM, EST, Claim, EnrolmentPatience
from agent.errors import EnrolmentAwayError, EnrolmentRefusedError

DAY = timedelta(days=1)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


@dataclass
class TestCa:
    """A CA with its key."""

    __test__ = False

    name: str
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def __post_init__(self) -> None:
        self.certificate = self._sign(_name(self.name), self.key.public_key(), ca=True)

    def issue(self, public_key: Any, common_name: str, *, server: bool = False, days: float = 30) -> x509.Certificate:
        return self._sign(_name(common_name), public_key, ca=False, server=server, days=days)

    def files(self, folder: Path, common_name: str, *, server: bool = False) -> tuple[Path, Path]:
        """A certificate with its key, as files."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate, private = folder / f"{common_name}.pem", folder / f"{common_name}.key"
        certificate.write_bytes(self.issue(key.public_key(), common_name, server=server).public_bytes(Encoding.PEM))
        private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return certificate, private

    def file(self, folder: Path) -> Path:
        path = folder / f"{self.name}.ca.pem"
        path.write_bytes(self.certificate.public_bytes(Encoding.PEM))
        return path

    def _sign(
        self, subject: x509.Name, public_key: Any, *, ca: bool, server: bool = False, days: float = 30
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(_name(self.name))
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + days * DAY)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=0 if ca else None), critical=True)
        )
        if not ca:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        if server:
            names = [x509.IPAddress(ip_address("127.0.0.1")), x509.DNSName("localhost")]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.key, hashes.SHA256())


@dataclass
class StandInAuthority:
    """Gives out device certificates: one for each key. A confirmation revokes the device's older ones.

    `away`: so many requests are answered with 202, or not at all; `refuse`: the reason of a 403 to everything new;
    `forgets`: a confirmation is carried out and its answer is lost, so many times.
    """

    device: TestCa = field(default_factory=lambda: TestCa("test device CA"))
    claim: TestCa = field(default_factory=lambda: TestCa("test claim CA"))
    service: TestCa = field(default_factory=lambda: TestCa("test service CA"))
    by_key: dict[bytes, x509.Certificate] = field(default_factory=dict)
    valid: list[x509.Certificate] = field(default_factory=list)
    seen_to_work: list[x509.Certificate] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    away: int = 0
    refuse: str = ""
    forgets: int = 0
    days: float = 30
    vouched_for: list[x509.Certificate] = field(default_factory=list)
    other_certificate: x509.Certificate | None = None

    def certify(self, what: str, der: bytes, thing: str | None) -> x509.Certificate:
        self.requests.append(what)
        if self.away:
            self.away -= 1
            raise EnrolmentAwayError("202 it waits", 0.2)
        if self.refuse:
            raise EnrolmentRefusedError(what, 403, self.refuse)
        request = x509.load_der_x509_csr(der)
        assert request.is_signature_valid
        serial = str(request.subject.get_attributes_for_oid(NameOID.SERIAL_NUMBER)[0].value)
        if self.other_certificate is not None:
            return self.other_certificate
        key = request.public_key()
        found = self.by_key.get(public_bytes(request))
        if found is None:
            found = self.device.issue(key, thing or f"thing-{serial}", days=self.days)
            self.by_key[public_bytes(request)] = found
            self.valid.append(found)
        return found

    def check_valid(self, what: str, certificate: x509.Certificate) -> None:
        if certificate not in self.valid:
            raise EnrolmentRefusedError(what, 403, "the certificate is revoked")

    def confirm(self, certificate: x509.Certificate) -> None:
        self.requests.append("confirm")
        self.check_valid("confirm", certificate)
        self.seen_to_work.append(certificate)
        self.valid = [one for one in self.valid if one == certificate or common_name(one) != common_name(certificate)]
        if self.forgets:
            self.forgets -= 1
            raise EnrolmentAwayError("the answer is lost")


class DirectServer:
    """The authority without a socket. Certificates are read from the device's storage, keys are taken as proved."""

    def __init__(self, authority: StandInAuthority, read: Any) -> None:
        self.authority = authority
        self.patience = EnrolmentPatience(retry_seconds=0.0)
        self._read = read

    async def enroll(self, claim: Claim, request: bytes) -> list[x509.Certificate]:
        return [self.authority.certify("simpleenroll", request, None)]

    async def reenroll(self, pair: Pair, request: bytes) -> list[x509.Certificate]:
        certificate = self._certificate(pair)
        self.authority.check_valid("simplereenroll", certificate)
        return [self.authority.certify("simplereenroll", request, common_name(certificate))]

    async def confirm(self, pair: Pair) -> None:
        self.authority.confirm(self._certificate(pair))

    async def authorities(self) -> list[x509.Certificate]:
        return [self.authority.service.certificate]

    def _certificate(self, pair: Pair) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self._read(str(pair.certificate)))


@contextlib.contextmanager
def serving_est(authority: StandInAuthority, folder: Path, port: int = 0) -> Iterator[str]:
    """The authority behind TLS 1.2+, client certificates optional and checked against claim and device CA; its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            bundle = [authority.service.certificate, authority.device.certificate, *authority.vouched_for]
            self._answer(200, _certs_only(bundle))

        def do_POST(self) -> None:
            der = self.connection.getpeercert(True)  # type: ignore[attr-defined]
            body = base64.b64decode(self.rfile.read(int(self.headers.get("content-length", 0))))
            if der is None:
                return self._answer(401, b"a client certificate is needed")
            peer = x509.load_der_x509_certificate(der)
            try:
                self._answer(*self._decide(peer, body))
            except EnrolmentAwayError as error:
                self._answer(202, str(error).encode(), {"Retry-After": "1"})
            except EnrolmentRefusedError as error:
                self._answer(error.status, error.reason.encode())

        def _decide(self, peer: x509.Certificate, body: bytes) -> tuple[int, bytes]:
            ours = peer.issuer == authority.device.certificate.subject
            if self.path == f"{EST}/simpleenroll" and not ours:
                return 200, _certs_only([authority.certify("simpleenroll", body, None)])
            if self.path == f"{EST}/simplereenroll" and ours:
                authority.check_valid("simplereenroll", peer)
                return 200, _certs_only([authority.certify("simplereenroll", body, common_name(peer))])
            if self.path == CONFIRM and ours:
                authority.confirm(peer)
                return 204, b""
            return 403, b"not with this certificate"

        def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            if status != 204:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Quiet."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.service.files(folder, "enrolment", server=True))
    context.verify_mode = ssl.CERT_OPTIONAL
    for ca in (authority.claim, authority.device):
        context.load_verify_locations(ca.file(folder))

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def get_request(self) -> Any:
            connection, address = super().get_request()
            connection.settimeout(10)
            return context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False), address

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A handshake that is refused is what some tests want."""

    server = Server(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"https://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def _certs_only(certificates: list[x509.Certificate]) -> bytes:
    return base64.encodebytes(pkcs7.serialize_certificates(certificates, Encoding.DER))
