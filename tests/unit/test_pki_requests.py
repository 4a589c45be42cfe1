"""Certificate requests as hostile input: each is refused with a clear reason, or ends as a certificate of our own making."""

import base64
import hashlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.errors import InvalidInputError
from pki.authority import Authority
from pki.issue import issue_device
from pki.request import MAX_REQUEST_BYTES, read_request
from tests.pki_setup import an_authority, new_key, now
from tests.unit.hostile_requests import (
    BITS,
    BMP,
    COMMON_NAME,
    PRINTABLE,
    SERIAL_NUMBER,
    TELETEX,
    attribute,
    der,
    extension_request,
    request,
    sample,
)

DEVICE_ID = "motor-7"
KEY = new_key()
SN = attribute(SERIAL_NUMBER, "SN-1", PRINTABLE)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return an_authority()


def made(
    names: list[tuple[x509.ObjectIdentifier, str]],
    *extensions: x509.ExtensionType,
    key: Any = KEY,
    critical: bool = True,
) -> bytes:
    """A request by the library, as DER."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(oid, text) for oid, text in names])
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=critical)
    hashed = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, hashed).public_bytes(Encoding.DER)


def pem(data: bytes, label: str = "CERTIFICATE REQUEST") -> bytes:
    """As PEM."""
    return f"-----BEGIN {label}-----\n{base64.encodebytes(data).decode()}-----END {label}-----\n".encode()


def cn(text: str | bytes, tag: int = 0x0C) -> bytes:
    """A request with this common name alone."""
    return request(attribute(COMMON_NAME, text, tag))


def flipped(data: bytes, at: int) -> bytes:
    """One bit is another."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def rsa_spki(modulus: int, exponent: int = 65537) -> bytes:
    """A public key of any size, without the work of finding one."""
    return (
        rsa.RSAPublicNumbers(exponent, modulus)
        .public_key()
        .public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    )


def small_order_spki(text: str) -> bytes:
    return der(0x30, bytes.fromhex("300506032b6570"), der(0x03, b"\x00", bytes.fromhex(text)))


GOOD = request(SN, key=KEY)
CA_TRUE = der(0x30, bytes.fromhex("0603551d13"), der(0x04, bytes.fromhex("30030101ff")))
KEY_CERT_SIGN = der(0x30, bytes.fromhex("0603551d0f"), der(0x04, bytes.fromhex("03020204")))
BAD_BASIC_CONSTRAINTS = der(0x30, bytes.fromhex("0603551d13"), der(0x04, b"rubbish"))
SAN_OTHER = der(0x30, bytes.fromhex("0603551d11"), der(0x04, bytes.fromhex("300a8208") + b"motor-99"))
ECDSA_UNKNOWN = bytes.fromhex("300a06082a8648ce3d04037f")
ON_CURVE = KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
NOT_ON_CURVE = ON_CURVE[:-1] + bytes([ON_CURVE[-1] ^ 1])

REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    # names that would mean something to a broker or to us
    "CN is #": (lambda: cn("#"), "'#' is not a serial number"),
    "CN is +": (lambda: cn("+"), "not a serial number"),
    "CN has a level": (lambda: cn("a/b"), "'a/b' is not a serial number"),
    "CN is $SYS": (lambda: cn("$SYS"), "not a serial number"),
    "CN is $share": (lambda: cn("$share/g/#"), "not a serial number"),
    "CN is %u": (lambda: cn("%u"), "not a serial number"),
    "CN is an engine's": (lambda: cn("engine.gateway"), "reserved"),
    "CN is an engine's in capitals": (lambda: cn("ENGINE.gateway"), "reserved"),
    "CN is a claim's": (lambda: cn("claim.batch-1"), "reserved"),
    "serialNumber is an engine's": (lambda: request(attribute(SERIAL_NUMBER, "engine.worker")), "reserved"),
    # characters
    "CN with NUL": (lambda: cn(b"SN-1\x00.evil"), r"SN-1\\x00.evil' is not a serial number"),
    "CN with newline": (lambda: cn("SN-1\n"), r"'SN-1\\n' is not"),
    "CN with newline and ACL": (lambda: cn("SN-1\ntopic readwrite #"), "not a serial number"),
    "CN with blank": (lambda: cn(" SN-1"), "not a serial number"),
    "CN in Cyrillic": (lambda: cn("SN-1а"), "not a serial number"),
    "CN in full width digits": (lambda: cn("SN-１"), "not a serial number"),
    "CN with right-to-left override": (lambda: cn("SN\u202e-1"), "not a serial number"),
    "CN that is not UTF-8": (lambda: cn(b"SN-\xff\xfe"), "refused"),
    "CN of surrogates as BMPString": (lambda: cn(b"\xd8\x00", BMP), "refused"),
    "CN as bits": (lambda: cn(b"\x00SN-1", BITS), "refused"),
    "CN in Latin-1 beside a serial number": (
        lambda: request(SN, attribute(COMMON_NAME, b"motor\xe9", TELETEX)),
        "subject is unreadable",
    ),
    "CN path": (lambda: cn("../../etc/passwd"), "not a serial number"),
    "CN SQL": (lambda: cn("x'; DROP TABLE devices;--"), "not a serial number"),
    "CN begins with a dash": (lambda: cn("-SN"), "not a serial number"),
    "CN of 65 characters": (lambda: cn("a" * 65), "not a serial number"),
    "serialNumber of 5,000 characters": (lambda: request(attribute(SERIAL_NUMBER, "9" * 5000)), "not a serial number"),
    # too few and too many
    "no subject": (lambda: request(), "found it 0 times"),
    "no CN": (lambda: request(attribute(bytes.fromhex("060355040a"), "Acme")), "found it 0 times"),
    "empty CN": (lambda: cn(""), "not a serial number|refused"),
    "two CNs": (lambda: request(attribute(COMMON_NAME, "SN-1"), attribute(COMMON_NAME, "SN-2")), "found it 2 times"),
    "two serialNumbers": (lambda: request(SN, attribute(SERIAL_NUMBER, "SN-2")), "found it 2 times"),
    "two CNs in one RDN": (
        lambda: request(der(0x31, *(der(0x30, COMMON_NAME, der(0x0C, text)) for text in (b"SN-1", b"SN-2")))),
        "found it 2 times|refused",
    ),
    # asking to be an authority
    "CA:TRUE": (lambda: request(SN, attributes=extension_request(CA_TRUE)), "certificate authority"),
    "CA:TRUE by the library": (
        lambda: made([(NameOID.SERIAL_NUMBER, "SN-1")], x509.BasicConstraints(ca=True, path_length=None)),
        "certificate authority",
    ),
    "keyCertSign": (lambda: request(SN, attributes=extension_request(KEY_CERT_SIGN)), "asks to sign certificates"),
    "CA:TRUE twice": (lambda: request(SN, attributes=extension_request(CA_TRUE, CA_TRUE)), "unreadable"),
    "unreadable BasicConstraints": (
        lambda: request(SN, attributes=extension_request(BAD_BASIC_CONSTRAINTS)),
        "extensions it asks for are unreadable",
    ),
    "CA:TRUE behind a first request for extensions": (
        lambda: request(SN, attributes=extension_request(SAN_OTHER) + extension_request(CA_TRUE)),
        "refused",
    ),
    # keys
    "RSA-512": (lambda: sample("rsa512"), "RSA of 512 bits"),
    "RSA-1024": (lambda: sample("rsa1024"), "RSA of 1024 bits"),
    "RSA-2047": (lambda: request(SN, spki=rsa_spki((1 << 2046) + 1)), "RSA of 2047 bits"),
    "RSA-8192": (lambda: request(SN, spki=rsa_spki((1 << 8191) + 1)), "RSA of 8192 bits"),
    "RSA with exponent 3": (lambda: sample("rsa_e3"), "exponent 3"),
    "DSA": (lambda: sample("dsa"), "not allowed: DSA"),
    "P-192": (lambda: sample("prime192v1"), "secp192r1"),
    "P-224": (lambda: sample("secp224r1"), "secp224r1"),
    "P-521": (lambda: sample("secp521r1"), "secp521r1"),
    "secp256k1": (lambda: sample("secp256k1"), "secp256k1"),
    "brainpool": (lambda: sample("brainpoolP256r1"), "brainpoolP256r1"),
    "Ed448": (lambda: sample("ed448"), "Ed448"),
    "a point that is not on the curve": (lambda: request(SN, spki=NOT_ON_CURVE), "key cannot be read"),
    "Ed25519, the neutral point": (lambda: request(SN, spki=small_order_spki("01" + "00" * 31)), "small order"),
    "Ed25519, the neutral point with its sign": (
        lambda: request(SN, spki=small_order_spki("01" + "00" * 30 + "80")),
        "small order",
    ),
    "Ed25519, a point of order 8": (
        lambda: request(SN, spki=small_order_spki("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85")),
        "small order",
    ),
    # signatures
    "MD5": (lambda: sample("md5"), "signed with md5"),
    "SHA-1": (lambda: sample("sha1"), "signed with sha1"),
    "SHA-1 with EC": (lambda: sample("ecsha1"), "signed with sha1"),
    "SHA-1 with PSS": (lambda: sample("pss_sha1"), "signed with sha1"),
    "unknown signature algorithm": (lambda: request(SN, algorithm=ECDSA_UNKNOWN), "refused"),
    "signature is another's": (
        lambda: request(SN, spki=new_key().public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)),
        "signature does not hold",
    ),
    "one bit of the signature": (lambda: request(SN, signature=lambda s: flipped(s, -1)), "signature"),
    "one bit of the subject": (lambda: GOOD.replace(b"SN-1", b"SN-2"), "signature does not hold"),
    "empty signature": (lambda: request(SN, signature=lambda _: b""), "signature"),
    "signature of zeros": (lambda: request(SN, signature=lambda _: bytes.fromhex("3006020100020100")), "signature"),
    # not a request
    "empty": (lambda: b"", "it is empty"),
    "blank": (lambda: b" \r\n\t", "it is empty"),
    "16 kB": (lambda: request(SN, attribute(COMMON_NAME, "x" * 16_000)), "16[0-9]{3} bytes, expected at most 8192"),
    "16 kB of base64": (lambda: base64.b64encode(GOOD * 60), "bytes, expected at most"),
    "truncated": (lambda: GOOD[:-10], "not PKCS#10"),
    "half": (lambda: GOOD[: len(GOOD) // 2], "not PKCS#10"),
    "trailing garbage": (lambda: GOOD + b"\x00", "not PKCS#10"),
    "two requests": (lambda: GOOD + GOOD, "not PKCS#10"),
    "not DER": (lambda: b"0" + b"\xff" * 100, "not PKCS#10"),
    "indefinite length": (lambda: b"\x30\x80" + GOOD[4:] + b"\x00\x00", "not PKCS#10"),
    "text": (lambda: b"please let me in", "not PKCS#10|neither DER nor PEM nor base64"),
    "JSON": (lambda: b'{"serial": "SN-1"}', "neither DER nor PEM nor base64"),
    "zeros": (lambda: bytes(64), "neither DER nor PEM nor base64"),
    "PEM junk": (lambda: b"-----BEGIN CERTIFICATE REQUEST-----\n!!!\n-----END CERTIFICATE REQUEST-----\n", "refused"),
    "PEM without end": (lambda: pem(GOOD).split(b"-----END")[0], "one PEM block"),
    "PEM of a certificate": (lambda: pem(GOOD, "CERTIFICATE"), "one PEM block"),
    "PEM twice": (lambda: pem(GOOD) * 2, "refused"),
    "PEM with a private key behind": (lambda: pem(GOOD) + pem(b"\x30\x00", "PRIVATE KEY"), "one PEM block"),
    "PEM with text before": (lambda: b"Subject: CN=#\n" + pem(GOOD), "one PEM block"),
    "a certificate": (
        lambda: an_authority().certificate.public_bytes(Encoding.DER),
        "not PKCS#10",
    ),
    # the form of a request
    "negative version": (lambda: request(SN, version=b"\xff"), "not PKCS#10|refused"),
    "version 2": (lambda: request(SN, version=b"\x02"), "not PKCS#10|refused"),
    "huge version": (lambda: request(SN, version=b"\x7f" + bytes(200)), "not PKCS#10|refused"),
    "empty attribute": (lambda: request(SN, attributes=der(0x30, b"")), "refused"),
    "nested 2,000 deep": (lambda: b"\x30\x82\x1f\x00" + b"\x30\x80" * 2000, "not PKCS#10"),
}

ISSUED: dict[str, tuple[Callable[[], bytes], str]] = {
    "P-256": (lambda: made([(NameOID.SERIAL_NUMBER, "SN-1")]), "SN-1"),
    "P-384": (lambda: made([(NameOID.SERIAL_NUMBER, "SN-1")], key=ec.generate_private_key(ec.SECP384R1())), "SN-1"),
    "Ed25519": (lambda: made([(NameOID.SERIAL_NUMBER, "SN-1")], key=ed25519.Ed25519PrivateKey.generate()), "SN-1"),
    "RSA with PSS": (lambda: sample("pss"), "SN-1"),
    "P-256 with its parameters written out": (lambda: sample("explicit"), "SN-1"),
    "serial number as CN": (lambda: made([(NameOID.COMMON_NAME, "SN-1")]), "SN-1"),
    "another serial number": (lambda: made([(NameOID.SERIAL_NUMBER, "SN-99")]), "SN-99"),
    "CN # beside a serial number": (lambda: request(SN, attribute(COMMON_NAME, "#")), "SN-1"),
    "CN of another device beside it": (lambda: request(SN, attribute(COMMON_NAME, "motor-99")), "SN-1"),
    "CN engine.gateway beside it": (lambda: request(SN, attribute(COMMON_NAME, "engine.gateway")), "SN-1"),
    "three CNs beside it": (lambda: request(SN, *[attribute(COMMON_NAME, text) for text in "abc"]), "SN-1"),
    "CN of NULs beside it": (lambda: request(SN, attribute(COMMON_NAME, b"\x00\x00")), "SN-1"),
    "subject of 6 kB": (lambda: request(SN, attribute(COMMON_NAME, "x" * 6000)), "SN-1"),
    "SAN with other names": (
        lambda: made(
            [(NameOID.SERIAL_NUMBER, "SN-1")],
            x509.SubjectAlternativeName(
                [x509.DNSName("motor-99"), x509.UniformResourceIdentifier("urn:thing:motor-99")]
            ),
        ),
        "SN-1",
    ),
    "EKU serverAuth": (
        lambda: made([(NameOID.SERIAL_NUMBER, "SN-1")], x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])),
        "SN-1",
    ),
    "EKU anyExtendedKeyUsage": (
        lambda: made(
            [(NameOID.SERIAL_NUMBER, "SN-1")], x509.ExtendedKeyUsage([ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE])
        ),
        "SN-1",
    ),
    "CA:FALSE": (
        lambda: made([(NameOID.SERIAL_NUMBER, "SN-1")], x509.BasicConstraints(ca=False, path_length=None)),
        "SN-1",
    ),
    "unknown critical extension": (
        lambda: made(
            [(NameOID.SERIAL_NUMBER, "SN-1")],
            x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"),
        ),
        "SN-1",
    ),
    "challenge password": (
        lambda: request(SN, attributes=der(0x30, bytes.fromhex("06092a864886f70d010907"), der(0x31, der(0x0C, b"pw")))),
        "SN-1",
    ),
    "PEM": (lambda: pem(GOOD), "SN-1"),
    "PEM as NEW CERTIFICATE REQUEST": (lambda: pem(GOOD, "NEW CERTIFICATE REQUEST"), "SN-1"),
    "PEM with carriage returns": (lambda: pem(GOOD).replace(b"\n", b"\r\n"), "SN-1"),
    "base64 as EST sends it": (lambda: base64.encodebytes(GOOD), "SN-1"),
    "base64 in one line": (lambda: base64.b64encode(GOOD), "SN-1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_request_is_refused_with_a_clear_reason(name: str) -> None:
    build, reason = REFUSED[name]
    with pytest.raises(InvalidInputError, match=reason) as refused:
        read_request(build())
    text = str(refused.value)
    assert text.startswith("certificate request refused: ")
    assert text.isprintable(), "it is sent back, logged and shown"
    assert len(text) < 500


@pytest.mark.parametrize("name", ISSUED)
def test_what_a_request_says_beside_its_key_has_no_effect(name: str, authority: Authority) -> None:
    build, serial_number = ISSUED[name]
    data = build()
    asked = read_request(data)
    assert asked.serial_number == serial_number
    certificate = issue_device(authority, asked.public_key, DEVICE_ID, now(), 90)
    assert_is_ours(certificate, authority)
    spki = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert hashlib.sha256(spki).hexdigest() == asked.spki_sha256


def assert_is_ours(certificate: x509.Certificate, authority: Authority) -> None:
    """The template and nothing else."""
    certificate.verify_directly_issued_by(authority.certificate)
    assert certificate.subject.rfc4514_string() == f"CN={DEVICE_ID}"
    assert certificate.not_valid_after_utc - certificate.not_valid_before_utc <= timedelta(days=90)
    assert certificate.not_valid_before_utc <= now() - timedelta(hours=23)
    assert certificate.not_valid_after_utc > now() + timedelta(days=88)
    extensions = {extension.value.__class__: extension for extension in certificate.extensions}
    assert set(extensions) == {
        x509.BasicConstraints,
        x509.KeyUsage,
        x509.ExtendedKeyUsage,
        x509.SubjectKeyIdentifier,
        x509.AuthorityKeyIdentifier,
    }
    assert extensions[x509.BasicConstraints].value == x509.BasicConstraints(ca=False, path_length=None)
    assert extensions[x509.BasicConstraints].critical
    assert extensions[x509.KeyUsage].critical
    assert list(extensions[x509.ExtendedKeyUsage].value) == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_a_template_that_takes_the_subject_of_the_request_lets_the_attack_succeed(authority: Authority) -> None:
    """The mutant: what a server that copies subject and extensions would have issued."""
    asked = x509.load_der_x509_csr(ISSUED["CN # beside a serial number"][0]())
    copied = (
        x509.CertificateBuilder(asked.subject and authority.certificate.subject, asked.subject, asked.public_key())
        .serial_number(1)
        .not_valid_before(now())
        .not_valid_after(now() + timedelta(days=1))
        .sign(authority.key, hashes.SHA256())
    )
    assert copied.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "#"
    with pytest.raises(AssertionError):
        assert_is_ours(copied, authority)


def test_without_proof_of_possession_a_stolen_public_key_would_be_certified(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: with the check of the signature off, a request about somebody else's key passes."""
    data = REFUSED["signature is another's"][0]()
    monkeypatch.setattr("pki.request._check_signature", lambda request: None)
    assert read_request(data).serial_number == "SN-1"


def test_without_the_look_at_points_of_small_order_anybodys_signature_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: such a key is read, and a signature that nobody needs a private key for holds under it."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    monkeypatch.setattr("pki.keys._SMALL_ORDER", set())
    neutral = bytes([1]) + bytes(31)
    key = Ed25519PublicKey.from_public_bytes(neutral)
    key.verify(neutral + bytes(32), b"any message at all")
    algorithm = bytes.fromhex("300506032b6570")
    forged = request(
        SN, spki=small_order_spki(neutral.hex()), algorithm=algorithm, signature=lambda _: neutral + bytes(32)
    )
    assert read_request(forged).serial_number == "SN-1"


def test_a_compressed_point_is_the_same_key() -> None:
    point = KEY.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    named = bytes.fromhex("301306072a8648ce3d020106082a8648ce3d030107")
    compressed = request(SN, key=KEY, spki=der(0x30, named, der(0x03, b"\x00", point)))
    assert compressed != GOOD
    assert read_request(compressed).spki_sha256 == read_request(GOOD).spki_sha256


def test_a_key_of_a_forbidden_size_costs_no_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    def verified(_: object) -> None:
        raise AssertionError("the signature was looked at before the key")

    monkeypatch.setattr("pki.request._check_signature", verified)
    with pytest.raises(InvalidInputError, match="8192 bits"):
        read_request(REFUSED["RSA-8192"][0]())


def test_the_limit_of_size_is_exact() -> None:
    with pytest.raises(InvalidInputError, match="expected at most 8192"):
        read_request(b"A" * (MAX_REQUEST_BYTES + 1))
    with pytest.raises(InvalidInputError, match=f"expected at most {len(GOOD) - 1}"):
        read_request(GOOD, max_bytes=len(GOOD) - 1)
    assert read_request(GOOD, max_bytes=len(GOOD)).serial_number == "SN-1"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_request_with_changed_bytes_is_refused_or_is_the_same_request(data: st.DataObject) -> None:
    raw = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        asked = read_request(bytes(raw))
    except InvalidInputError:
        return
    # The number of unused bits behind the signature may be another where those bits are 0 anyway.
    assert asked.public_key == KEY.public_key()
    assert asked.serial_number == "SN-1"


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=600))
def test_no_bytes_whatever_end_in_anything_but_a_refusal(raw: bytes) -> None:
    with pytest.raises(InvalidInputError):
        read_request(raw)
    with pytest.raises(InvalidInputError):
        read_request(b"\x30" + raw)
