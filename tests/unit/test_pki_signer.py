"""Key stores: encrypted files that survive, and signers that are no files."""

import stat
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from models.errors import InvalidInputError, NotFoundError, VerificationError
from models.identity import AuthorityKind
from models.settings import Settings
from pki.authority import Authority, make_authority
from pki.issue import issue_claim, issue_device, issue_service
from pki.keys import spki_sha256
from pki.revocation import sign_crl, verify_crl
from pki.signer import FileKeyStore, key_store, make_passphrase, read_passphrase
from tests.pki_setup import PASSPHRASE, RemoteKey, RemoteKeyStore, an_authority, new_key, now


def test_a_key_is_encrypted_and_its_owners_alone(tmp_path: Path) -> None:
    store = FileKeyStore(tmp_path / "ca", PASSPHRASE)
    reference, key = store.create()
    path = tmp_path / "ca" / reference.removeprefix("file:")
    assert reference == f"file:{spki_sha256(key.public_key())}.pem"
    assert path.read_bytes().startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no temporary file stays"
    with pytest.raises(TypeError):
        load_pem_private_key(path.read_bytes(), None)
    assert store.open(reference).public_key() == key.public_key()


def test_a_wrong_passphrase_and_a_damaged_file_are_said(tmp_path: Path) -> None:
    reference, _ = FileKeyStore(tmp_path, PASSPHRASE).create()
    with pytest.raises(InvalidInputError, match="TIDEGATE_CA_PASSPHRASE_FILE"):
        FileKeyStore(tmp_path, b"not the passphrase").open(reference)
    path = tmp_path / reference.removeprefix("file:")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InvalidInputError, match="file is damaged"):
        FileKeyStore(tmp_path, PASSPHRASE).open(reference)


@pytest.mark.parametrize(
    "reference",
    [
        "file:../../etc/shadow",
        "file:/etc/shadow",
        "kms:1",
        "",
        "file:",
        f"file:{'a' * 64}.pem\n",
        f"file:x/{'a' * 64}.pem",
    ],
)
def test_a_reference_names_a_file_of_the_folder_and_no_other(reference: str, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="is not one of the folder"):
        FileKeyStore(tmp_path, PASSPHRASE).open(reference)


def test_a_key_that_is_gone_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="TIDEGATE_CA_DIR"):
        FileKeyStore(tmp_path, PASSPHRASE).open(f"file:{'a' * 64}.pem")


def test_the_passphrase_is_made_once_and_is_long(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "passphrase"
    make_passphrase(path)
    first = read_passphrase(path)
    make_passphrase(path)
    assert read_passphrase(path) == first
    assert len(first) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(list(path.parent.iterdir())) == 1


def test_a_short_passphrase_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "passphrase"
    path.write_bytes(b"secret\n")
    with pytest.raises(InvalidInputError, match="at least 16 bytes, got 6"):
        read_passphrase(path)


def test_without_settings_there_is_no_key_store_and_init_makes_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="TIDEGATE_CA_DIR"):
        key_store(Settings(state_dir=tmp_path))
    reference, _ = key_store(Settings(state_dir=tmp_path), make=True).create()
    found = Settings(state_dir=tmp_path, ca_dir=tmp_path / "ca", ca_passphrase_file=tmp_path / "ca.passphrase")
    assert key_store(found).open(reference)


def test_a_signer_that_is_no_file_signs_authorities_certificates_and_lists() -> None:
    """The private half of a RemoteKey cannot be had: whoever asks for it fails the test."""
    reference, key = RemoteKeyStore().create()
    assert reference.startswith("kms:")
    assert isinstance(key, RemoteKey)
    at = now()
    authority = Authority(make_authority(AuthorityKind.DEVICE, "remote", key, at, 3650), key)
    theirs = new_key().public_key()
    for certificate in (
        issue_device(authority, theirs, "motor-1", at, 90),
        issue_claim(authority, theirs, "batch-1", at, at + timedelta(days=9)),
        issue_service(authority, theirs, "engine.gateway", ["127.0.0.1"], at, 90, server=True, client=True),
    ):
        certificate.verify_directly_issued_by(authority.certificate)
    pem = sign_crl(authority, 1, [], at, timedelta(hours=1))
    assert verify_crl(pem, authority.certificate, at).number == 1
    assert key.signatures == 5


def test_an_authority_with_another_key_is_none() -> None:
    with pytest.raises(VerificationError, match="not this authority's"):
        Authority(an_authority().certificate, new_key())


def test_an_authority_signs_end_certificates_and_lists_and_no_further_authority() -> None:
    certificate = an_authority().certificate
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=0)
    assert usage.critical
    assert (usage.value.key_cert_sign, usage.value.crl_sign, usage.value.digital_signature) == (True, True, False)
    assert certificate.not_valid_before_utc <= now() - timedelta(hours=23)
