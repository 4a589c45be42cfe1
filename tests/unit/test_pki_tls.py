"""What OpenSSL, as brokers have it, makes of our certificates and lists: handshakes in memory, with lists checked.

`judge` plays the broker: a TLS server that wants client certificates of the CAs it is given and checks them against the
lists it is given, as Mosquitto does with `cafile`, `crlfile` and `require_certificate`.
"""

import ssl
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from models.identity import AuthorityKind, RevocationReason
from pki.authority import Authority, make_authority, pem_of, read_certificate, serial_hex
from pki.issue import issue_claim, issue_device, issue_service
from pki.revocation import Revoked, sign_crl
from tests.pki_setup import an_authority, later, new_key, now

WEEK = timedelta(days=7)


class Party:
    """A key with a certificate, as files."""

    def __init__(
        self, folder: Path, name: str, pem: str, key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
    ) -> None:
        self.pem = pem
        self.certificate, self.key = folder / f"{name}.pem", folder / f"{name}.key"
        self.certificate.write_text(pem)
        self.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


class Site:
    """Three CAs, a server, and devices."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.devices, self.claims, self.services = (an_authority(kind) for kind in AuthorityKind)
        key = new_key()
        made = issue_service(
            self.services, key.public_key(), "broker", ["localhost"], now(), 90, server=True, client=False
        )
        self.server = Party(folder, "server", pem_of(made), key)

    def device(self, name: str, authority: Authority | None = None, at: datetime | None = None) -> Party:
        key = new_key()
        made = issue_device(authority or self.devices, key.public_key(), name, at or now(), 90)
        return Party(self.folder, name, pem_of(made), key)

    def judge(self, client: Party, authorities: Sequence[Authority], lists: Sequence[bytes]) -> str:
        """`accepted as <CN>`, or OpenSSL's words of refusal."""
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(self.server.certificate, self.server.key)
        server.verify_mode = ssl.CERT_REQUIRED
        server.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
        trusted = self.folder / "trusted.pem"
        trusted.write_bytes(b"".join([*(pem_of(a.certificate).encode() for a in authorities), *lists]))
        server.load_verify_locations(trusted)
        device = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        device.load_cert_chain(client.certificate, client.key)
        device.load_verify_locations(cadata=pem_of(self.services.certificate))
        return _handshake(server, device)


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> str:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = server.wrap_bio(to_server, to_client, server_side=True)
    theirs = client.wrap_bio(to_client, to_server, server_hostname="localhost")
    for end in (theirs, ours) * 5:
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLCertVerificationError as error:
            return error.verify_message if end is ours else f"the device refused: {error.verify_message}"
        if end is ours:
            subject = dict(pair for part in (ours.getpeercert() or {})["subject"] for pair in part)  # type: ignore[misc]
            return f"accepted as {subject['commonName']}"
    return "no end"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_a_device_is_accepted_under_the_name_we_gave_it(site: Site) -> None:
    empty = sign_crl(site.devices, 1, [], now(), WEEK)
    assert site.judge(site.device("motor-1"), [site.devices], [empty]) == "accepted as motor-1"


def test_a_revoked_device_is_refused_and_its_neighbour_is_not(site: Site) -> None:
    revoked, neighbour = site.device("motor-1"), site.device("motor-2")
    crl = sign_crl(site.devices, 2, [_revoked(revoked)], now(), WEEK)
    assert site.judge(revoked, [site.devices], [crl]) == "certificate revoked"
    assert site.judge(neighbour, [site.devices], [crl]) == "accepted as motor-2"


def test_with_an_older_list_the_revoked_device_is_accepted(site: Site) -> None:
    """The mutant: it is the list that refuses it."""
    revoked = site.device("motor-1")
    assert site.judge(revoked, [site.devices], [sign_crl(site.devices, 1, [], now(), WEEK)]) == "accepted as motor-1"


def test_a_claim_certificate_and_an_engines_do_not_get_through_the_devices_door(site: Site) -> None:
    key = new_key()
    claim = issue_claim(site.claims, key.public_key(), "line-7", now(), later(days=9))
    engine = issue_service(site.services, key.public_key(), "engine.gateway", [], now(), 90, server=False, client=True)
    crl = sign_crl(site.devices, 1, [], now(), WEEK)
    for name, certificate in (("claim", claim), ("engine", engine)):
        party = Party(site.folder, name, pem_of(certificate), key)
        refusal = site.judge(party, [site.devices], [crl])
        assert "issuer certificate" in refusal or "self-signed certificate" in refusal
        lists = [sign_crl(authority, 1, [], now(), WEEK) for authority in (site.claims, site.services)]
        mutant = site.judge(party, [site.devices, site.claims, site.services], [crl, *lists])
        assert mutant.startswith("accepted as"), "with one CA for all, any certificate opens any door"


def test_a_device_certificate_is_no_servers(site: Site) -> None:
    device = site.device("localhost")
    site.server = device
    site.services = site.devices
    crl = sign_crl(site.devices, 1, [], now(), WEEK)
    assert site.judge(site.device("motor-1"), [site.devices], [crl]).startswith("the device refused: ")


def test_during_a_roll_over_devices_of_both_authorities_are_accepted_and_both_lists_count(site: Site) -> None:
    successor = an_authority()
    old, new, lost = site.device("old"), site.device("new", successor), site.device("lost", successor)
    both = [site.devices, successor]
    lists = [sign_crl(site.devices, 3, [], now(), WEEK), sign_crl(successor, 1, [_revoked(lost)], now(), WEEK)]
    assert site.judge(old, both, lists) == "accepted as old"
    assert site.judge(new, both, lists) == "accepted as new"
    assert site.judge(lost, both, lists) == "certificate revoked"
    assert site.judge(old, both, lists[::-1]) == "accepted as old"
    assert "unable to get" in site.judge(old, [successor], lists[1:]), "after the old one's retirement"


def test_an_authority_without_a_list_has_all_its_devices_refused(site: Site) -> None:
    """Why a device CA is never made known without its first list."""
    successor = an_authority()
    lists = [sign_crl(site.devices, 3, [], now(), WEEK)]
    assert site.judge(site.device("new", successor), [site.devices, successor], lists) == (
        "unable to get certificate CRL"
    )


def test_a_list_that_has_ended_has_all_devices_refused(site: Site) -> None:
    """Why there is an alarm at half of its life, and why a list is renewed at a quarter."""
    over = sign_crl(site.devices, 3, [], later(days=-8), WEEK)
    assert site.judge(site.device("motor-1"), [site.devices], [over]) == "CRL has expired"


def test_a_list_by_another_key_has_all_devices_refused(site: Site) -> None:
    """Why a list is verified before it is installed."""
    name, key = site.devices.certificate.subject.rfc4514_string().removeprefix("CN="), new_key()
    impostor = Authority(make_authority(AuthorityKind.DEVICE, name, key, now(), 9), key)
    forged = sign_crl(impostor, 9, [], now(), WEEK)
    assert site.judge(site.device("motor-1"), [site.devices], [forged]) == "unable to get certificate CRL"


def test_clocks_that_are_hours_behind_accept_what_was_issued_just_now(site: Site) -> None:
    """Played the other way round: a certificate made in 23 hours' time is good now."""
    crl = sign_crl(site.devices, 1, [], now(), WEEK)
    assert site.judge(site.device("early", at=later(hours=23)), [site.devices], [crl]) == "accepted as early"
    assert site.judge(site.device("too-early", at=later(hours=25)), [site.devices], [crl]) == (
        "certificate is not yet valid"
    )


def _revoked(party: Party) -> Revoked:
    return Revoked(serial_hex(read_certificate(party.pem)), now(), RevocationReason.KEY_COMPROMISE)
