"""Who the servers of a stack are: its certificate authorities, and a certificate for each service in `<state>/tls/`.

```
tls/ca.pem                     service CAs: what devices check broker and enrolment server with, and they each other
tls/broker.pem  .key           server certificates
tls/enrolment.pem  .key
tls/engine.gateway.pem  .key   client certificates for the engine's listener, one for each service
tls/engine.worker.pem   .key
tls/engine.access.pem   .key
```

Made on first use and again at any start that finds one near its end or not of the CA that issues now. The CAs' own keys
are in `<state>/ca/`, encrypted, unless the settings name another folder.
"""

import asyncio
import ipaddress
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from access.mosquitto import ACCESS, CLIENT_NAMES
from activities.authorities import AuthorityActivities, ensure_authorities
from devstack.state import StateDirectory, write_atomically
from models.identity import AuthorityKind, AuthorityView, PublishCrlsInput
from models.settings import Settings
from pki.authority import Authority, pem_of, read_certificate
from pki.issue import issue_service
from pki.signer import FileKeyStore, key_store
from store.authorities import AuthorityStore
from store.engine import Database

SERVICE_DAYS = 397
"""What browsers and their like accept at most of a server's certificate."""
RENEW_BEFORE = timedelta(days=30)
ACTOR = "starter.py up"
BROKER, ENROLMENT = "broker", "enrolment"
HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class ServiceFiles:
    """A certificate and its key."""

    certificate: Path
    private_key: Path


class StackIdentity:
    """The files above. `prepare` before anything else."""

    def __init__(self, state: StateDirectory, settings: Settings) -> None:
        self._folder = state.folder("tls")
        ca_dir, passphrase = settings.ca_dir or state.path / "ca", settings.ca_passphrase_file
        self.ca_dir = ca_dir
        self.ca_passphrase_file = passphrase or state.path / "ca.passphrase"
        self._settings = settings.model_copy(
            update={"ca_dir": self.ca_dir, "ca_passphrase_file": self.ca_passphrase_file}
        )
        host = settings.enrolment_host
        self._hosts = {BROKER: HOSTS, ENROLMENT: (*HOSTS, *([host] if _is_specific(host) else []))}

    @property
    def ca(self) -> Path:
        """What servers are checked with."""
        return self._folder / "ca.pem"

    def files(self, name: str) -> ServiceFiles:
        """Of a service, as `engine.gateway` or `broker`."""
        return ServiceFiles(self._folder / f"{name}.pem", self._folder / f"{name}.key")

    def client_context(self, name: str = ACCESS) -> ssl.SSLContext:
        """TLS as this service connects to the engine's listener."""
        context = ssl.create_default_context(cafile=str(self.ca))
        files = self.files(name)
        context.load_cert_chain(files.certificate, files.private_key)
        return context

    async def prepare(self, db: Database) -> None:
        """Make CAs where they are missing, refresh their revocation lists, issue what is missing or near its end.

        Raises NotFoundError where the registry knows CAs whose keys are not here.
        """
        keys = await asyncio.to_thread(key_store, self._settings, make=True)
        now = datetime.now(UTC)
        lifetime = timedelta(hours=self._settings.crl_hours)
        found = await ensure_authorities(db, keys, now, ACTOR, crl_lifetime=lifetime)
        # A stack that was down for longer than a list lives would start with a broker that lets nobody in.
        await AuthorityActivities(db, keys, lifetime).publish(PublishCrlsInput(actor=ACTOR))
        trusted = await AuthorityStore(db).trusted(AuthorityKind.SERVICE)
        await asyncio.to_thread(self._issue_all, keys, found[AuthorityKind.SERVICE], trusted, now)

    def _issue_all(
        self, keys: FileKeyStore, view: AuthorityView, trusted: Sequence[AuthorityView], now: datetime
    ) -> None:
        certificate = read_certificate(view.certificate)
        authority = Authority(certificate, keys.open(view.key_reference))
        write_atomically(self.ca, "".join(one.certificate.strip() + "\n" for one in trusted), 0o644)
        for name in CLIENT_NAMES:
            self._issue(authority, name, (), now)
        for name, hosts in self._hosts.items():
            self._issue(authority, name, hosts, now)

    def _issue(self, authority: Authority, name: str, hosts: Sequence[str], now: datetime) -> None:
        files = self.files(name)
        if _still_good(files, authority.certificate, hosts, now):
            return
        issue_files(authority, self._folder, name, hosts, now, SERVICE_DAYS)


def issue_files(
    authority: Authority, folder: Path, name: str, hosts: Sequence[str], now: datetime, days: int
) -> ServiceFiles:
    """A new key and certificate in `<folder>/<name>.pem` and `.key`: a server's where it has hosts, else a client's."""
    key = generate_private_key(SECP256R1())
    certificate = issue_service(
        authority, key.public_key(), name, hosts, now, days, server=bool(hosts), client=not hosts
    )
    files = ServiceFiles(folder / f"{name}.pem", folder / f"{name}.key")
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    write_atomically(files.private_key, pem)
    write_atomically(files.certificate, pem_of(certificate), 0o644)
    return files


def _still_good(files: ServiceFiles, issuer: x509.Certificate, hosts: Sequence[str], now: datetime) -> bool:
    """Whether the certificate is there, is its key's, comes from this CA, names the hosts, and has time left."""
    try:
        certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
        key = load_pem_private_key(files.private_key.read_bytes(), None)
        certificate.verify_directly_issued_by(issuer)
    except Exception:  # whatever is wrong with it, it is made again
        return False
    same_key = _spki(key.public_key()) == _spki(certificate.public_key())
    return same_key and certificate.not_valid_after_utc > now + RENEW_BEFORE and _names(certificate) >= set(hosts)


def _spki(key: object) -> bytes:
    data: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined]
    return data


def _names(certificate: x509.Certificate) -> set[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    addresses = names.get_values_for_type(x509.IPAddress)
    return {*names.get_values_for_type(x509.DNSName), *map(str, addresses)}


def _is_specific(host: str) -> bool:
    """Whether it is an address that somebody can connect to, not one that stands for all of them."""
    try:
        return not ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return True
