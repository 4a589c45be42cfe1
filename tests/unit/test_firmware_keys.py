"""Keys: how they are kept, named and told apart."""

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from firmware.keys import (
    TrustedKeys,
    generate_private_key,
    key_id,
    load_private_key,
    load_public_key,
    save_private_key,
    save_public_key,
)
from models.errors import ConflictError, InvalidInputError, NotFoundError


def test_a_saved_key_is_loaded_as_it_was(tmp_path: Path) -> None:
    key = generate_private_key()
    save_private_key(tmp_path / "release.pem", key)
    save_public_key(tmp_path / "release.pub", key.public_key())
    assert load_private_key(tmp_path / "release.pem").private_bytes_raw() == key.private_bytes_raw()
    assert key_id(load_public_key(tmp_path / "release.pub")) == key_id(key.public_key())


def test_only_its_owner_reads_a_private_key_file(tmp_path: Path) -> None:
    save_private_key(tmp_path / "release.pem", generate_private_key())
    assert stat.S_IMODE((tmp_path / "release.pem").stat().st_mode) == 0o600


def test_a_key_file_is_never_overwritten(tmp_path: Path) -> None:
    path, first, second = tmp_path / "key", generate_private_key(), generate_private_key()
    save_private_key(path, first)
    with pytest.raises(ConflictError, match="the file exists"):
        save_private_key(path, second)
    with pytest.raises(ConflictError, match="the file exists"):
        save_public_key(path, second.public_key())
    assert load_private_key(path).private_bytes_raw() == first.private_bytes_raw()


def test_a_key_that_is_not_there_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="make one with keygen"):
        load_private_key(tmp_path / "none.pem")


def test_what_is_not_an_ed25519_pem_is_refused_as_a_private_key(tmp_path: Path) -> None:
    key, path = generate_private_key(), tmp_path / "key"
    encrypted = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    other = X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for content in (b"", b"not a key", encrypted, other):
        path.write_bytes(content)
        with pytest.raises(InvalidInputError, match=r"cannot (read|use) the private key"):
            load_private_key(path)


def test_a_private_key_is_not_taken_for_a_public_one(tmp_path: Path) -> None:
    save_private_key(tmp_path / "key", generate_private_key())
    with pytest.raises(InvalidInputError, match="expected a public PEM"):
        load_public_key(tmp_path / "key")


def test_one_key_cannot_hold_both_roles() -> None:
    key = generate_private_key().public_key()
    with pytest.raises(InvalidInputError, match="make a second key"):
        TrustedKeys.of(release=[key], order=[generate_private_key().public_key(), key])


def test_a_key_given_twice_is_one_key() -> None:
    key = generate_private_key().public_key()
    assert len(TrustedKeys.of(release=[key, key], order=[]).release) == 1
