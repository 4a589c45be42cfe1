"""A device's key pairs and certificates on its storage, changed so that a power cut never leaves it without one that works.

A key is made here, is written with mode 0600 and never leaves the device. What the record says counts; a file that no
record names is nothing. A rotation, in this order, each step durable before the next:

    prepare (a new key) -> keep (its certificate) -> [connected with it] -> promote (it is used first, the old one stays)
    -> [the server has heard of it] -> confirmed (the old one goes)

So between `promote` and the server's answer the device holds two certificates and can connect with at least one of them,
whatever the server makes of it: `confirmed` where it accepts the new one, `revert` where it refuses it. A wipe is told
to the record first and finished at the next start, if the power goes; a device that was wiped stays so.

What it is not: a client (enrolment.py asks for certificates), nor the process (rotation.py).
"""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from agent.errors import CredentialError
from agent.records import decode_record, encode_record
from agent.storage import Storage, replace_durably
from models.ids import THING_NAME

FOLDER = "identity"
CONFIGURATION_NAME = "config.json"
"""The configuration (configuration.py) belongs to one life of the device: it goes with the credentials."""
RECORD_NAME = f"{FOLDER}/credentials.json"
RECORD_KIND = "credentials"
RENEW_IN_LAST = 0.2
"""Share of a certificate's life: the server's sweep has had its chance, and 18 of 90 days are left to come through."""


class Standing(StrEnum):
    """NEW: never enrolled. WIPING: everything is to go, also after a power cut. WIPED: had credentials, has none."""

    NEW = "new"
    ENROLLED = "enrolled"
    WIPING = "wiping"
    WIPED = "wiped"


@dataclass(frozen=True, slots=True)
class CredentialRecord:
    """Which key pairs there are, by number. `next` is on its way, `current` is used first, `previous` is the one before.

    `cause`: what `current` was made for, `next_cause` the same of `next`: a command's id, so that a command that comes
    twice rotates once. `confirmed`: the server has heard of `current`. `doomed`: files that are still to be removed.
    """

    standing: Standing = Standing.NEW
    current: int | None = None
    cause: str = ""
    confirmed: bool = False
    previous: int | None = None
    next: int | None = None
    next_cause: str = ""
    next_ready: bool = False
    doomed: tuple[int, ...] = ()
    made: int = 0


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key, as files."""

    number: int
    certificate: Path
    private_key: Path


def _key_name(number: int) -> str:
    return f"{FOLDER}/{number}.key"


def _certificate_name(number: int) -> str:
    return f"{FOLDER}/{number}.pem"


class Credentials:
    """The credentials of one device. Every method that changes them may raise OSError; then the old or the new record
    holds, as after a power cut."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.record = self._load()
        if self.record.standing is Standing.WIPING:
            self.wipe()
        self._remove_doomed()

    @property
    def thing_name(self) -> str:
        """The name that the registry gave this device: its certificate's common name. Raises CredentialError."""
        if self.record.current is None:
            raise CredentialError(f"this device has no certificate: it is {self.record.standing}")
        return common_name(self._certificate(self.record.current))

    @property
    def certificate(self) -> x509.Certificate | None:
        """The certificate in use."""
        return None if self.record.current is None else self._certificate(self.record.current)

    def candidates(self) -> list[Pair]:
        """What a connection may be tried with, best first."""
        record = self.record
        numbers = [record.next if record.next_ready else None, record.current, record.previous]
        return [self.pair(number) for number in numbers if number is not None]

    def pair(self, number: int) -> Pair:
        """The files of a pair."""
        path = self._storage.path
        return Pair(number, path(_certificate_name(number)), path(_key_name(number)))

    def prepare(self, cause: str) -> ec.EllipticCurvePrivateKey:
        """The key of the next pair. The same one again for the same cause, so that a request can be repeated."""
        record = self.record
        if record.next is not None and record.next_cause == cause:
            return self._key(record.next)
        key, number = ec.generate_private_key(ec.SECP256R1()), record.made + 1
        self._storage.write_private(_key_name(number), _key_pem(key))
        self._storage.sync(_key_name(number))
        self._storage.sync_folder(FOLDER)
        doomed = () if record.next is None else (record.next,)
        self._store(replace(record, next=number, next_cause=cause, next_ready=False, made=number, doomed=doomed))
        return key

    def keep(self, certificates: Sequence[x509.Certificate]) -> None:
        """Keep the next pair's certificate: the first of these that is for its key. Raises CredentialError."""
        number = self.record.next
        if number is None:
            raise CredentialError("cannot keep a certificate: no key was made for it")
        wanted = public_bytes(self._key(number))
        found = next((one for one in certificates if public_bytes(one) == wanted), None)
        if found is None:
            raise CredentialError(f"none of {len(certificates)} certificates in the answer is for this device's key")
        name = common_name(found)
        if self.record.current is not None and name != self.thing_name:
            raise CredentialError(f"the new certificate is for {name!r:.80}, this device is {self.thing_name}")
        others = [one for one in certificates if one is not found and one.issuer != one.subject]
        pem = b"".join(one.public_bytes(Encoding.PEM) for one in (found, *others))
        replace_durably(self._storage, _certificate_name(number), pem)
        self._store(replace(self.record, next_ready=True))

    def promote(self) -> None:
        """Use the next pair first from now on; the one that was current stays beside it until `confirmed`."""
        record = self.record
        if record.next is None or not record.next_ready:
            return
        if record.current is None:
            self._forget_configuration()
        if record.previous is not None:
            raise CredentialError("cannot take up a new certificate: the last rotation is not over")
        self._store(
            CredentialRecord(
                standing=Standing.ENROLLED,
                current=record.next,
                cause=record.next_cause,
                previous=record.current,
                made=record.made,
            )
        )

    def confirmed(self) -> None:
        """The server knows the current pair: the previous one goes."""
        record = self.record
        doomed = () if record.previous is None else (record.previous,)
        self._store(replace(record, confirmed=True, previous=None, doomed=doomed))

    def revert(self) -> None:
        """The server refuses the current pair for good: back to the previous one, which it kept."""
        record = self.record
        if record.previous is None or record.current is None:
            return
        back = replace(record, current=record.previous, previous=None, cause="", confirmed=True)
        self._store(replace(back, doomed=(record.current,)))

    def drop_next(self) -> None:
        """Give up a pair that has never been used."""
        record = self.record
        if record.next is not None:
            self._store(replace(record, next=None, next_cause="", next_ready=False, doomed=(record.next,)))

    def begin_wipe(self) -> None:
        """Say durably that everything is to go. From here on no power cut brings the credentials back."""
        self._store(replace(self.record, standing=Standing.WIPING))

    def wipe(self) -> None:
        """Remove every key and certificate, and the configuration. Run again after a power cut, it removes what is left."""
        record = self.record
        for number in (record.current, record.previous, record.next, *record.doomed):
            if number is not None:
                self._remove(number)
        self._forget_configuration()
        self._store(CredentialRecord(standing=Standing.WIPED, made=record.made))

    def forgive_wipe(self) -> None:
        """Let a wiped device enrol once more, because a person wants it."""
        if self.record.standing is Standing.WIPED:
            self._store(replace(self.record, standing=Standing.NEW))

    def _store(self, record: CredentialRecord) -> None:
        replace_durably(self._storage, RECORD_NAME, encode_record(RECORD_KIND, asdict(record)))
        self.record = record
        with contextlib.suppress(OSError):  # it is done at the next start
            self._remove_doomed()

    def _remove_doomed(self) -> None:
        """What is removed has been out of use since the record before; a cut here is made good at the next start."""
        if self.record.doomed:
            for number in self.record.doomed:
                self._remove(number)
            self._store(replace(self.record, doomed=()))

    def _forget_configuration(self) -> None:
        self._storage.unlink(CONFIGURATION_NAME)
        self._storage.sync_folder("")

    def _remove(self, number: int) -> None:
        size = self._storage.size(_key_name(number))
        if size is not None:
            self._storage.write_private(_key_name(number), bytes(size))
            self._storage.sync(_key_name(number))
        self._storage.unlink(_key_name(number))
        self._storage.unlink(_certificate_name(number))
        self._storage.sync_folder(FOLDER)

    def _load(self) -> CredentialRecord:
        data = self._storage.read(RECORD_NAME)
        if data is None:
            return CredentialRecord()
        fields: dict[str, Any] = decode_record(data, RECORD_KIND)
        return CredentialRecord(
            **{**fields, "standing": Standing(fields["standing"]), "doomed": tuple(fields["doomed"])}
        )

    def _key(self, number: int) -> ec.EllipticCurvePrivateKey:
        key = load_pem_private_key(self._storage.read(_key_name(number)) or b"", None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key

    def _certificate(self, number: int) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self._storage.read(_certificate_name(number)) or b"")


def renewal_is_due(certificate: x509.Certificate, now: float) -> bool:
    """Whether so little of its life is left that the device comes for the next one without being told.

    Not once it has ended: then nobody gives another for it, and a clock that is years ahead must not make keys for ever.
    """
    begins, ends = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    return ends - (ends - begins) * RENEW_IN_LAST <= now < ends


def make_request(key: ec.EllipticCurvePrivateKey, serial_number: str) -> bytes:
    """A certificate request (PKCS#10, DER): the key, and the serial number it is for; the server decides the rest."""
    subject = x509.Name([x509.NameAttribute(NameOID.SERIAL_NUMBER, serial_number)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def public_bytes(owner: ec.EllipticCurvePrivateKey | x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    """The public key of a key, a certificate or a request, as bytes that can be compared."""
    return owner.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def common_name(certificate: x509.Certificate) -> str:
    """The thing name in a certificate. Raises CredentialError for one that is none."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    name = str(names[0].value) if len(names) == 1 else ""
    if not THING_NAME.fullmatch(name):
        raise CredentialError(f"the certificate's common name is {name!r:.80}, expected a thing name")
    return name


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
