"""DSSE envelopes: nothing comes out that trusted keys have not signed exactly so (THREATS 1 to 4)."""

import base64
import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey

from firmware.envelope import MAX_PAYLOAD_BYTES, MAX_SIGNATURES, EnvelopeSigner, open_envelope, sign_envelope
from firmware.errors import EnvelopeError, FirmwareError, SignatureError
from firmware.keys import generate_private_key, key_id, trusted_key
from firmware.manifest import ORDER_PAYLOAD_TYPE, RELEASE_PAYLOAD_TYPE, encode_order
from models.protocol import FailureClass
from tests.unit.firmware_samples import ORDER, ORDER_KEY, RELEASE_KEY, STRANGER_KEY, mutant

PAYLOAD = encode_order(ORDER)
ENVELOPE = sign_envelope(PAYLOAD, ORDER_PAYLOAD_TYPE, ORDER_KEY)
KEYS = [trusted_key(ORDER_KEY.public_key())]
TYPES = (ORDER_PAYLOAD_TYPE, RELEASE_PAYLOAD_TYPE, "application/vnd.tidegate.diagnostics.v1+json", "", "text/plain")


def under_two_names(*names: str) -> list[SSlibKey]:
    """The order key as a careless configuration could list it: once per name."""
    return [SSlibKey.from_crypto(ORDER_KEY.public_key(), keyid=name) for name in names]


def test_what_was_signed_comes_out() -> None:
    assert open_envelope(ENVELOPE, ORDER_PAYLOAD_TYPE, KEYS) == PAYLOAD


def test_opening_leaves_the_callers_envelope_as_it_was() -> None:
    before = copy.deepcopy(ENVELOPE)
    open_envelope(ENVELOPE, ORDER_PAYLOAD_TYPE, KEYS)
    open_envelope(ENVELOPE, ORDER_PAYLOAD_TYPE, KEYS)
    assert before == ENVELOPE


def test_our_envelopes_are_what_securesystemslib_makes_and_accepts() -> None:
    theirs = Envelope.from_dict(copy.deepcopy(ENVELOPE))
    assert theirs.verify(KEYS, 1).keys() == {key_id(ORDER_KEY.public_key())}
    assert theirs.to_dict() == ENVELOPE


# --- 1: forged or altered ---------------------------------------------------------------------------------------------


def accepted_after_a_flip(open_: Any) -> list[bytes]:
    """Every payload that comes out after one flipped bit of the envelope's JSON text, for every bit of it."""
    text, accepted = json.dumps(ENVELOPE).encode(), []
    for position in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[position // 8] ^= 1 << position % 8
        try:
            accepted.append(open_(json.loads(flipped), ORDER_PAYLOAD_TYPE, KEYS))
        except (FirmwareError, ValueError):
            continue
    return accepted


def test_no_flipped_bit_of_an_envelope_changes_what_comes_out() -> None:
    assert all(payload == PAYLOAD for payload in accepted_after_a_flip(open_envelope))


def test_without_the_signature_check_a_flipped_bit_gets_through() -> None:
    blind = mutant(
        "firmware.envelope",
        ("except UnverifiedSignatureError:\n            continue", "except Exception:\n            pass"),
    )
    assert any(payload != PAYLOAD for payload in accepted_after_a_flip(blind.open_envelope))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from([*TYPES, *ENVELOPE["signatures"]]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["keyid", "sig", "payload"]), inner),
    max_leaves=6,
)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_no_edit_of_the_json_changes_what_comes_out(data: st.DataObject) -> None:
    edited: Any = copy.deepcopy(ENVELOPE)
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.sampled_from(["payload", "payloadType", "signatures", "keyid", "sig", "extra", "twice"]))
        if where in ("keyid", "sig") and isinstance(edited["signatures"], list) and edited["signatures"]:
            if isinstance(edited["signatures"][0], dict):
                edited["signatures"][0][where] = data.draw(json_values)
        elif where == "twice" and isinstance(edited["signatures"], list):
            edited["signatures"] = edited["signatures"] * 2
        elif where == "payload":
            edited["payload"] = data.draw(
                json_values | st.binary(max_size=60).map(lambda b: base64.b64encode(b).decode())
            )
        else:
            edited[where] = data.draw(json_values)
    try:
        assert open_envelope(edited, ORDER_PAYLOAD_TYPE, KEYS) == PAYLOAD
    except FirmwareError as error:
        assert error.failure_class is FailureClass.VERIFY


def test_a_payload_over_the_cap_is_refused_before_any_cryptography() -> None:
    with pytest.raises(EnvelopeError, match="at most"):
        sign_envelope(b"x" * (MAX_PAYLOAD_BYTES + 1), ORDER_PAYLOAD_TYPE, ORDER_KEY)
    oversized = {**ENVELOPE, "payload": base64.b64encode(b"x" * (MAX_PAYLOAD_BYTES + 4)).decode()}
    with pytest.raises(EnvelopeError, match="at most"):
        open_envelope(oversized, ORDER_PAYLOAD_TYPE, KEYS)


def test_signatures_are_bounded_in_number_and_length() -> None:
    entry = ENVELOPE["signatures"][0]
    many = [{**entry, "keyid": f"{number}"} for number in range(MAX_SIGNATURES + 1)]
    for signatures in (many, [], [{**entry, "sig": "A" * 1_000_000}], [{**entry, "keyid": "k" * 1_000_000}]):
        with pytest.raises(EnvelopeError):
            open_envelope({**ENVELOPE, "signatures": signatures}, ORDER_PAYLOAD_TYPE, KEYS)


@pytest.mark.parametrize("broken", [None, [], "x", 7, {}, {"payload": "e30="}, {**ENVELOPE, "signatures": [7]}])
def test_what_is_no_envelope_is_refused(broken: Any) -> None:
    with pytest.raises(EnvelopeError):
        open_envelope(broken, ORDER_PAYLOAD_TYPE, KEYS)


# --- 2: wrong key -----------------------------------------------------------------------------------------------------


def test_only_the_roles_own_key_opens_each_payload_type() -> None:
    signers = {"release": RELEASE_KEY, "order": ORDER_KEY, "stranger": STRANGER_KEY}
    trusted = {"release": RELEASE_KEY, "order": ORDER_KEY}
    for signer, key in signers.items():
        for role, trusted_private in trusted.items():
            for payload_type in TYPES:
                envelope = sign_envelope(PAYLOAD, payload_type, key)
                role_keys = [trusted_key(trusted_private.public_key())]
                if signer == role:
                    assert open_envelope(envelope, payload_type, role_keys) == PAYLOAD
                    continue
                with pytest.raises(SignatureError):
                    open_envelope(envelope, payload_type, role_keys)


def test_a_stranger_that_claims_a_trusted_key_id_is_refused() -> None:
    forged = sign_envelope(PAYLOAD, ORDER_PAYLOAD_TYPE, STRANGER_KEY)
    forged["signatures"][0]["keyid"] = key_id(ORDER_KEY.public_key())
    with pytest.raises(SignatureError):
        open_envelope(forged, ORDER_PAYLOAD_TYPE, KEYS)


def test_a_role_without_keys_trusts_nobody() -> None:
    with pytest.raises(SignatureError, match="0 of 0 trusted keys"):
        open_envelope(ENVELOPE, ORDER_PAYLOAD_TYPE, [])


# --- 3: threshold cheats ----------------------------------------------------------------------------------------------


def signed_by(*keys: Any) -> dict[str, Any]:
    """One payload with a signature of each key."""
    envelopes = [sign_envelope(PAYLOAD, ORDER_PAYLOAD_TYPE, key) for key in keys]
    return {**envelopes[0], "signatures": [entry for envelope in envelopes for entry in envelope["signatures"]]}


def test_a_threshold_is_met_by_that_many_keys_and_not_by_one_fewer() -> None:
    private = [generate_private_key() for _ in range(3)]
    keys = [trusted_key(key.public_key()) for key in private]
    for signers in range(1, 4):
        envelope = signed_by(*private[:signers])
        assert open_envelope(envelope, ORDER_PAYLOAD_TYPE, keys, threshold=signers) == PAYLOAD
        with pytest.raises(SignatureError, match=f"signed by {signers} of 3"):
            open_envelope(envelope, ORDER_PAYLOAD_TYPE, keys, threshold=signers + 1)


def test_a_strangers_signature_beside_a_good_one_counts_nothing_and_spoils_nothing() -> None:
    envelope = signed_by(STRANGER_KEY, ORDER_KEY)
    keys = [*KEYS, trusted_key(RELEASE_KEY.public_key())]
    assert open_envelope(envelope, ORDER_PAYLOAD_TYPE, keys) == PAYLOAD
    with pytest.raises(SignatureError, match="signed by 1 of 2"):
        open_envelope(envelope, ORDER_PAYLOAD_TYPE, keys, threshold=2)


def test_the_same_signature_twice_does_not_meet_a_threshold_of_two() -> None:
    keys = [*KEYS, trusted_key(RELEASE_KEY.public_key())]
    with pytest.raises(EnvelopeError, match="Multiple signatures"):
        open_envelope(signed_by(ORDER_KEY, ORDER_KEY), ORDER_PAYLOAD_TYPE, keys, threshold=2)


def one_key_under_two_names() -> dict[str, Any]:
    envelope = signed_by(ORDER_KEY, ORDER_KEY)
    for entry, name in zip(envelope["signatures"], ("first", "second"), strict=True):
        entry["keyid"] = name
    return envelope


def test_one_key_under_two_names_does_not_meet_a_threshold_of_two() -> None:
    with pytest.raises(SignatureError, match="signed by 1 of 2"):
        open_envelope(one_key_under_two_names(), ORDER_PAYLOAD_TYPE, under_two_names("first", "second"), threshold=2)


def test_counted_by_key_id_one_key_under_two_names_would_meet_it() -> None:
    keys = under_two_names("first", "second")
    by_id = mutant(
        "firmware.envelope", ('signed_by.add(bytes.fromhex(key.keyval["public"]))', "signed_by.add(key.keyid)")
    )
    assert by_id.open_envelope(one_key_under_two_names(), ORDER_PAYLOAD_TYPE, keys, threshold=2) == PAYLOAD
    library = Envelope.from_dict(one_key_under_two_names())
    assert len(library.verify(keys, 2)) == 2, "securesystemslib counts key ids: the reason why we count ourselves"


@pytest.mark.parametrize("threshold", [0, -1])
def test_a_threshold_below_one_opens_nothing(threshold: int) -> None:
    unsigned = {**ENVELOPE, "signatures": [{"keyid": "nobody", "sig": ""}]}
    for envelope in (ENVELOPE, unsigned):
        with pytest.raises(SignatureError):
            open_envelope(envelope, ORDER_PAYLOAD_TYPE, KEYS, threshold=threshold)


def test_without_that_rule_a_threshold_of_zero_would_open_everything() -> None:
    unsigned = {**ENVELOPE, "signatures": [{"keyid": "nobody", "sig": ""}]}
    lax = mutant("firmware.envelope", ("if threshold < 1 or len(signed_by)", "if len(signed_by)"))
    assert lax.open_envelope(unsigned, ORDER_PAYLOAD_TYPE, KEYS, threshold=0) == PAYLOAD


# --- 4: payload type confusion ----------------------------------------------------------------------------------------


def relabelled(envelope: dict[str, Any], payload_type: str) -> dict[str, Any]:
    return {**envelope, "payloadType": payload_type}


def test_each_payload_type_opens_as_itself_alone() -> None:
    for made in TYPES:
        envelope = sign_envelope(PAYLOAD, made, ORDER_KEY)
        for read in TYPES:
            if made == read:
                assert open_envelope(envelope, read, KEYS) == PAYLOAD
                continue
            with pytest.raises(EnvelopeError):
                open_envelope(envelope, read, KEYS)
            with pytest.raises(SignatureError):
                open_envelope(relabelled(envelope, read), read, KEYS)


CHECK_OF_TYPE = ('if envelope.get("payloadType") != payload_type:', "if False:")
EXPECTED_TYPE_IS_SIGNED = (
    '"payload": payload, "payloadType": payload_type,',
    '"payload": payload, "payloadType": envelope["payloadType"],',
)


def test_two_layers_keep_the_types_apart_and_without_both_a_diagnostics_order_opens() -> None:
    diagnostics = sign_envelope(PAYLOAD, TYPES[2], ORDER_KEY)
    with pytest.raises(SignatureError):
        mutant("firmware.envelope", CHECK_OF_TYPE).open_envelope(diagnostics, ORDER_PAYLOAD_TYPE, KEYS)
    with pytest.raises(EnvelopeError):
        mutant("firmware.envelope", EXPECTED_TYPE_IS_SIGNED).open_envelope(diagnostics, ORDER_PAYLOAD_TYPE, KEYS)
    neither = mutant("firmware.envelope", CHECK_OF_TYPE, EXPECTED_TYPE_IS_SIGNED)
    assert neither.open_envelope(diagnostics, ORDER_PAYLOAD_TYPE, KEYS) == PAYLOAD


def test_without_the_type_in_the_signed_bytes_a_relabelled_envelope_would_open() -> None:
    naked = mutant("firmware.envelope", ("pae = envelope.pae()", "pae = envelope.payload"))
    envelope = sign_envelope(PAYLOAD, TYPES[2], ORDER_KEY)
    signature = base64.b64encode(ORDER_KEY.sign(PAYLOAD)).decode()
    envelope["signatures"][0]["sig"] = signature
    assert naked.open_envelope(relabelled(envelope, ORDER_PAYLOAD_TYPE), ORDER_PAYLOAD_TYPE, KEYS) == PAYLOAD
    with pytest.raises(SignatureError):
        open_envelope(relabelled(envelope, ORDER_PAYLOAD_TYPE), ORDER_PAYLOAD_TYPE, KEYS)


def test_a_prepared_signer_signs_each_payload_for_itself() -> None:
    signer = EnvelopeSigner(ORDER_KEY, ORDER_PAYLOAD_TYPE)
    envelopes = {payload: signer.sign(payload) for payload in (b"one", b"two", b"")}
    assert all(open_envelope(made, ORDER_PAYLOAD_TYPE, KEYS) == payload for payload, made in envelopes.items())
