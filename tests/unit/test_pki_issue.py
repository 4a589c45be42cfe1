"""Certificates of devices, claims and services: names, usages, lives; and the PKCS#7 they are handed out in."""

from datetime import timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from models.errors import InvalidInputError, RefusedError
from models.identity import AuthorityKind
from pki.authority import Authority
from pki.issue import issue_claim, issue_device, issue_service
from pki.pkcs7 import certs_only, read_certs_only
from tests.pki_setup import an_authority, later, new_key, now

KEY = new_key().public_key()


@pytest.fixture(scope="module")
def authority() -> Authority:
    return an_authority()


def usages(certificate: x509.Certificate) -> list[x509.ObjectIdentifier]:
    return list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


@pytest.mark.parametrize(
    "device_id", ["", "#", "a/b", "+", "engine.gateway", "claim.x", "a b", "a\n", "mötor", "x" * 65, "a\x00b", "$SYS"]
)
def test_no_certificate_is_about_what_is_no_thing_name(device_id: str, authority: Authority) -> None:
    with pytest.raises(InvalidInputError, match="expected a device id"):
        issue_device(authority, KEY, device_id, now(), 90)


@pytest.mark.parametrize(("days", "lives"), [(90, 90), (89, 90), (30, 31), (1, 2)])
def test_a_device_certificate_lives_ninety_days_at_most_the_back_dated_day_included(
    days: int, lives: int, authority: Authority
) -> None:
    certificate = issue_device(authority, KEY, "motor-1", now(), days)
    assert certificate.not_valid_after_utc - certificate.not_valid_before_utc == timedelta(days=lives)


@pytest.mark.parametrize("days", [0, -1, 91, 3650])
def test_other_lives_are_refused(days: int, authority: Authority) -> None:
    with pytest.raises(InvalidInputError, match="expected 1 to 90"):
        issue_device(authority, KEY, "motor-1", now(), days)


def test_no_certificate_outlives_its_authority() -> None:
    old = an_authority(at=later(days=-3640), days=3650)
    certificate = issue_device(old, KEY, "motor-1", now(), 90)
    assert certificate.not_valid_after_utc == old.certificate.not_valid_after_utc
    with pytest.raises(RefusedError, match=r"starter\.py ca roll"):
        issue_device(an_authority(at=later(days=-20), days=10), KEY, "motor-1", now(), 90)


def test_serial_numbers_are_random(authority: Authority) -> None:
    numbers = {issue_device(authority, KEY, "motor-1", now(), 90).serial_number for _ in range(50)}
    assert len(numbers) == 50
    assert min(number.bit_length() for number in numbers) > 100


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP256K1()).public_key(),
        rsa.generate_private_key(65537, 1024).public_key(),
        "a string",
    ],
)
def test_the_template_looks_at_the_key_itself(key: Any, authority: Authority) -> None:
    with pytest.raises(InvalidInputError, match="not allowed"):
        issue_device(authority, key, "motor-1", now(), 90)


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
    ],
)
def test_an_authority_may_have_another_kind_of_key(key: Any) -> None:
    authority = an_authority(key=key)
    issue_device(authority, KEY, "motor-1", now(), 90).verify_directly_issued_by(authority.certificate)


def test_a_claim_certificate_bears_a_name_that_no_device_can_have() -> None:
    claims, ends = an_authority(AuthorityKind.CLAIM), later(days=400)
    certificate = issue_claim(claims, KEY, "line-7_2026", now(), ends)
    assert certificate.subject.rfc4514_string() == "CN=claim.line-7_2026"
    assert usages(certificate) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert certificate.not_valid_after_utc == ends
    assert issue_claim(claims, KEY, "b" * 58, now(), ends)
    for batch in ("b" * 59, "a.b", "a/b", "", "#"):
        with pytest.raises(InvalidInputError, match="batch's name"):
            issue_claim(claims, KEY, batch, now(), ends)
    for wrong in (later(days=-1), later(days=5000)):
        with pytest.raises(InvalidInputError, match="a time to come"):
            issue_claim(claims, KEY, "batch", now(), wrong)


def test_a_service_certificate_names_its_hosts_and_its_uses() -> None:
    services = an_authority(AuthorityKind.SERVICE)
    server = issue_service(
        services, KEY, "broker", ["127.0.0.1", "::1", "localhost"], now(), 365, server=True, client=False
    )
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]
    assert usages(server) == [ExtendedKeyUsageOID.SERVER_AUTH]
    client = issue_service(services, KEY, "engine.gateway", [], now(), 365, server=False, client=True)
    assert usages(client) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    with pytest.raises(x509.ExtensionNotFound):
        client.extensions.get_extension_for_class(x509.SubjectAlternativeName)


@pytest.mark.parametrize(
    ("name", "hosts", "server", "client"),
    [
        ("gateway", [], False, True),
        ("engine.#", [], False, True),
        ("engine.gateway", [], True, True),
        ("broker", [], True, False),
        ("broker", ["a b"], True, False),
        ("broker", ["http://x"], True, False),
        ("broker", ["localhost"], False, False),
        ("", ["localhost"], True, False),
        ("x" * 65, ["localhost"], True, False),
    ],
)
def test_a_service_certificate_without_sense_is_refused(
    name: str, hosts: list[str], server: bool, client: bool
) -> None:
    with pytest.raises(InvalidInputError):
        issue_service(an_authority(), KEY, name, hosts, now(), 90, server=server, client=client)


def test_certificates_are_handed_out_as_pkcs7_and_read_back(authority: Authority) -> None:
    certificates = [issue_device(authority, KEY, "motor-1", now(), 90), authority.certificate]
    assert set(read_certs_only(certs_only(certificates))) == set(certificates)
    with pytest.raises(InvalidInputError, match="PKCS#7"):
        read_certs_only(b"rubbish")
