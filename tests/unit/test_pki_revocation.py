"""Revocation lists: what is signed holds, and nothing that does not hold passes."""

import base64
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from models.errors import VerificationError
from models.identity import RevocationReason
from pki.authority import Authority, serial_hex
from pki.issue import issue_device
from pki.revocation import Revoked, sign_crl, verify_crl
from tests.pki_setup import an_authority, later, new_key, now

WEEK = timedelta(days=7)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return an_authority()


def test_a_list_names_what_was_revoked_when_and_why(authority: Authority) -> None:
    certificates = [issue_device(authority, new_key().public_key(), f"motor-{n}", now(), 90) for n in range(5)]
    revoked = [
        Revoked(serial_hex(certificate), now(), reason)
        for certificate, reason in zip(certificates, RevocationReason, strict=True)
    ]
    pem = sign_crl(authority, 7, revoked, now(), WEEK)
    facts = verify_crl(pem, authority.certificate, now())
    assert (facts.number, facts.next_update) == (7, now() + WEEK)
    assert facts.serials == {serial_hex(certificate) for certificate in certificates}
    crl = x509.load_pem_x509_crl(pem)
    for certificate, reason in zip(certificates, RevocationReason, strict=True):
        entry = crl.get_revoked_certificate_by_serial_number(certificate.serial_number)
        assert entry is not None
        if reason is RevocationReason.UNSPECIFIED:
            assert not list(entry.extensions)
        else:
            assert entry.extensions.get_extension_for_class(x509.CRLReason).value.reason.value == reason.value


def test_an_empty_list_is_a_list(authority: Authority) -> None:
    assert verify_crl(sign_crl(authority, 1, [], now(), WEEK), authority.certificate, now()).serials == frozenset()


def test_a_list_that_has_ended_is_refused(authority: Authority) -> None:
    pem = sign_crl(authority, 3, [], now(), timedelta(hours=1))
    assert verify_crl(pem, authority.certificate, later(minutes=59))
    with pytest.raises(VerificationError, match=r"list 3 of .* has ended"):
        verify_crl(pem, authority.certificate, later(minutes=61))


def test_a_clock_that_is_far_behind_is_said(authority: Authority) -> None:
    pem = sign_crl(authority, 3, [], now(), WEEK)
    assert verify_crl(pem, authority.certificate, later(minutes=-9))
    with pytest.raises(VerificationError, match="check the clock"):
        verify_crl(pem, authority.certificate, later(minutes=-12))


def test_the_half_life_is_in_the_middle(authority: Authority) -> None:
    facts = verify_crl(sign_crl(authority, 1, [], now(), WEEK), authority.certificate, now())
    assert abs(facts.half_life - (now() + WEEK / 2)) < timedelta(minutes=3)
    short = verify_crl(sign_crl(authority, 1, [], now(), timedelta(seconds=100)), authority.certificate, now())
    assert short.half_life > later(seconds=45), "back-dating does not eat a short list's life"


def test_a_list_of_another_authority_is_refused(authority: Authority) -> None:
    with pytest.raises(VerificationError, match="it is one of CN=Tidegate device CA"):
        verify_crl(sign_crl(an_authority(), 1, [], now(), WEEK), authority.certificate, now())


def test_a_list_by_another_key_in_the_authoritys_name_is_refused(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    forged = _crl(authority, new_key(), x509.CRLNumber(9))
    with pytest.raises(VerificationError, match="signature does not hold"):
        verify_crl(forged, authority.certificate, now())
    monkeypatch.setattr("pki.revocation._signed_by", lambda crl, authority: True)
    assert verify_crl(forged, authority.certificate, now()).serials == frozenset(), "the mutant: nobody is revoked"


def test_a_list_with_one_bit_changed_is_refused(authority: Authority) -> None:
    pem = sign_crl(authority, 1, [Revoked("abc123", now())], now(), WEEK)
    der = bytearray(x509.load_pem_x509_crl(pem).public_bytes(Encoding.DER))
    for at in range(0, len(der), 3):
        changed = bytes(der[:at]) + bytes([der[at] ^ 1]) + bytes(der[at + 1 :])
        text = b"-----BEGIN X509 CRL-----\n" + base64.encodebytes(changed) + b"-----END X509 CRL-----\n"
        with pytest.raises(VerificationError):
            verify_crl(text, authority.certificate, now())


def test_truncated_empty_doubled_and_foreign_files_are_refused(authority: Authority) -> None:
    pem = sign_crl(authority, 1, [Revoked("1", now())], now(), WEEK)
    wrong = [
        b"",
        b"\n",
        pem[:-1][:-5],
        pem[: len(pem) // 2],
        pem + pem,
        pem + b"more",
        b"more" + pem,
        pem.replace(b"X509 CRL", b"CERTIFICATE"),
        authority.certificate.public_bytes(Encoding.PEM),
        b"-----BEGIN X509 CRL-----\n-----END X509 CRL-----\n",
        x509.load_pem_x509_crl(pem).public_bytes(Encoding.DER),
    ]
    for data in wrong:
        with pytest.raises(VerificationError):
            verify_crl(data, authority.certificate, now())
    middle = pem.splitlines(keepends=True)
    with pytest.raises(VerificationError):
        verify_crl(b"".join(middle[:2] + middle[3:]), authority.certificate, now())


@pytest.mark.parametrize(
    "extra",
    [
        x509.DeltaCRLIndicator(1),
        x509.IssuingDistributionPoint(None, None, True, False, None, False, False),
    ],
)
def test_a_list_of_a_part_is_no_list(extra: x509.ExtensionType, authority: Authority) -> None:
    with pytest.raises(VerificationError, match="expected a full list"):
        verify_crl(_crl(authority, authority.key, x509.CRLNumber(1), extra), authority.certificate, now())


def test_a_list_without_a_number_is_refused(authority: Authority) -> None:
    with pytest.raises(VerificationError, match="with a number"):
        verify_crl(_crl(authority, authority.key), authority.certificate, now())


def test_a_hundred_thousand_entries_are_signed_and_read(authority: Authority) -> None:
    revoked = [Revoked(format(n << 100, "x"), now()) for n in range(1, 100_001)]
    pem = sign_crl(authority, 1, revoked, now(), WEEK)
    assert len(verify_crl(pem, authority.certificate, now()).serials) == 100_000


def _crl(authority: Authority, key: object, *extensions: x509.ExtensionType) -> bytes:
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(now())
        .next_update(later(days=7))
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=not isinstance(extension, x509.CRLNumber))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)  # type: ignore[arg-type]
