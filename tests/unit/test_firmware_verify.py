"""May this device install this? Each rule, its edges, and what happens without it (THREATS 2, 4 to 7, 9 to 11, 20, 58)."""

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest

from firmware.envelope import sign_envelope
from firmware.errors import (
    DowngradeError,
    EnvelopeError,
    ExpiredError,
    FirmwareError,
    IncompatibleError,
    MisdirectedError,
    ReplayError,
    SignatureError,
    StatementError,
)
from firmware.keys import TrustedKeys, trusted_key
from firmware.manifest import ORDER_PAYLOAD_TYPE, attempt_key, encode_order, encode_release
from firmware.verify import DeviceFacts, VerifiedUpdate, verify_update
from models.protocol import FailureClass
from tests.unit.firmware_samples import (
    BASE_URL,
    FACTS,
    JOB,
    NEW_IMAGE,
    NOW,
    ORDER,
    ORDER_KEY,
    RELEASE,
    RELEASE_KEY,
    STRANGER_KEY,
    TRUSTED,
    delta_entry,
    digest,
    document,
    mutant,
)


def verified(
    whole: dict[str, Any], facts: DeviceFacts = FACTS, now: int = NOW, job_id: str = JOB, by: Any = verify_update
) -> VerifiedUpdate:
    """What the device makes of a document; `by` is a mutant where a test needs one."""
    update: VerifiedUpdate = by(whole, TRUSTED, facts, now, job_id=job_id)
    return update


def without(defence: str, instead: str = "if False:") -> Any:
    """verify_update without one of its rules."""
    return mutant("firmware.verify", (defence, instead)).verify_update


def test_an_update_that_keeps_every_rule_is_accepted() -> None:
    whole = document()
    before = copy.deepcopy(whole)
    update = verified(whole)
    assert whole == before, "the caller's document is not changed"
    assert update.release == RELEASE
    assert update.order == replace(ORDER, release_sha256=digest(encode_release(RELEASE)))
    assert (update.full.sha256, update.full.size_bytes) == (RELEASE.sha256, len(NEW_IMAGE))
    assert [offer.sha256 for offer in update.deltas] == ["d1" * 32]
    assert update.latest_known_time == ORDER.issued_at


@pytest.mark.parametrize("part", ["order", "release", "full"])
@pytest.mark.parametrize("value", [None, [], "x", 5])
def test_a_document_without_one_of_its_parts_is_refused(part: str, value: Any) -> None:
    with pytest.raises(StatementError, match=f"{part} is"):
        verified(document() | {part: value})


@pytest.mark.parametrize("whole", [None, [], "firmware-update", 7, {}])
def test_what_is_no_document_is_refused(whole: Any) -> None:
    with pytest.raises(StatementError):
        verified(whole)


# --- 2: two keys, two roles -------------------------------------------------------------------------------------------


def test_only_the_release_key_signs_releases_and_only_the_order_key_orders() -> None:
    keys = {"release": RELEASE_KEY, "order": ORDER_KEY, "stranger": STRANGER_KEY}
    for (release_by, release_key), (order_by, order_key) in itertools.product(keys.items(), repeat=2):
        whole = document(release_key=release_key, order_key=order_key)
        if (release_by, order_by) == ("release", "order"):
            assert verified(whole).release == RELEASE
            continue
        with pytest.raises(SignatureError):
            verified(whole)


def test_if_both_roles_trusted_both_keys_the_online_key_alone_would_install() -> None:
    both = tuple(trusted_key(key.public_key()) for key in (RELEASE_KEY, ORDER_KEY))
    whole = document(release_key=ORDER_KEY)
    assert verify_update(whole, TrustedKeys(both, both), FACTS, NOW, job_id=JOB).release == RELEASE


# --- 4: payload types -------------------------------------------------------------------------------------------------


def test_an_order_and_a_release_cannot_take_each_others_place() -> None:
    good = document()
    for whole in ({**good, "order": good["release"]}, {**good, "release": good["order"]}):
        with pytest.raises(EnvelopeError):
            verified(whole)


def test_an_order_of_another_type_is_no_firmware_order() -> None:
    order = encode_order(replace(ORDER, release_sha256=digest(encode_release(RELEASE))))
    for payload_type in ("application/vnd.tidegate.diagnostics.v1+json", "application/vnd.tidegate.order.v2+json"):
        envelope = sign_envelope(order, payload_type, ORDER_KEY)
        with pytest.raises(EnvelopeError):
            verified(document(order=None) | {"order": envelope})
        with pytest.raises(SignatureError):
            verified(document() | {"order": {**envelope, "payloadType": ORDER_PAYLOAD_TYPE}})


def test_an_order_for_another_operation_installs_nothing() -> None:
    release = digest(encode_release(RELEASE))
    other = document(order=replace(ORDER, release_sha256=release, operation="config-sync"))
    for whole in (other, document(operation="config-sync"), document(operation=None)):
        with pytest.raises(MisdirectedError, match="expected firmware-update"):
            verified(whole)
    lax = without('if order.operation != FIRMWARE_UPDATE or document.get("operation") != FIRMWARE_UPDATE:')
    assert verified(other, by=lax).order.operation == "config-sync"


# --- 5, 6: rollback and fix-forward -----------------------------------------------------------------------------------

COUNTERS = {"1.0.0": 3, "1.1.0": 3, "1.2.0": 5, "1.3.0": 5, "2.0.0": 9}


def installable(running: str, offered: str, by: Any = verify_update) -> bool:
    """Whether a device that has confirmed `running` takes `offered`."""
    release = replace(RELEASE, version=offered, security_counter=COUNTERS[offered])
    try:
        verified(document(release), replace(FACTS, security_floor=COUNTERS[running]), by=by)
    except DowngradeError:
        return False
    return True


def test_of_all_pairs_of_releases_those_with_a_lower_security_counter_are_refused() -> None:
    for running, offered in itertools.product(COUNTERS, repeat=2):
        assert installable(running, offered) == (COUNTERS[offered] >= COUNTERS[running]), (running, offered)


def test_without_the_floor_an_old_release_would_be_installed() -> None:
    lax = without("if release.security_counter < facts.security_floor:")
    assert all(installable(running, offered, lax) for running, offered in itertools.product(COUNTERS, repeat=2))


def test_a_lower_version_with_the_same_counter_is_a_fix_forward_and_allowed() -> None:
    assert installable("1.3.0", "1.2.0")
    assert not installable("1.2.0", "1.1.0")


# --- 7, 58: expiry and clocks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "accepted"), [(-1, True), (0, False), (1, False)])
def test_an_order_ends_in_the_second_it_says(offset: int, accepted: bool) -> None:
    if accepted:
        assert verified(document(), now=ORDER.expires_at + offset)
        return
    with pytest.raises(ExpiredError, match="refused the order: it was valid until"):
        verified(document(), now=ORDER.expires_at + offset)
    assert verified(document(), now=ORDER.expires_at + offset, by=without("if now >= order.expires_at:"))


@pytest.mark.parametrize(("offset", "accepted"), [(-1, True), (0, False), (1, False)])
def test_a_release_ends_in_the_second_it_says(offset: int, accepted: bool) -> None:
    release = replace(RELEASE, expires_at=NOW)
    if accepted:
        assert verified(document(release), now=NOW + offset)
        return
    with pytest.raises(ExpiredError, match="refused the release: it was valid until"):
        verified(document(release), now=NOW + offset)
    lax = without("if release.expires_at is not None and now >= release.expires_at:")
    assert verified(document(release), now=NOW + offset, by=lax)


def test_a_release_without_an_end_does_not_end() -> None:
    assert verified(document(replace(RELEASE, expires_at=None)), now=ORDER.expires_at - 1)


CLOCKS = {
    "1970": 0,
    "a day behind": NOW - 86_400,
    "right": NOW,
    "a day ahead": NOW + 86_400,
    "+10 y": NOW + 3650 * 86_400,
}


@pytest.mark.parametrize("clock", CLOCKS.values(), ids=CLOCKS.keys())
def test_no_clock_makes_a_device_accept_what_it_can_know_to_have_expired(clock: int) -> None:
    facts = replace(FACTS, latest_known_time=ORDER.expires_at)
    with pytest.raises(ExpiredError):
        verified(document(), facts, now=clock)


@pytest.mark.parametrize("clock", [0, NOW - 86_400])
def test_without_the_lower_bound_a_clock_that_is_behind_would_revive_an_expired_order(clock: int) -> None:
    facts = replace(FACTS, latest_known_time=ORDER.expires_at)
    lax = without("_check_times(order, release, max(now, latest))", "_check_times(order, release, now)")
    assert verified(document(), facts, now=clock, by=lax)


def test_a_clock_that_is_behind_does_not_keep_a_device_from_a_fresh_order() -> None:
    update = verified(document(), now=0)
    assert update.latest_known_time == ORDER.issued_at, "and it learns the time from what is signed"


def test_a_release_that_expired_before_its_order_was_signed_is_refused_whatever_the_clock_says() -> None:
    release = replace(RELEASE, expires_at=ORDER.issued_at)
    for clock in (0, NOW):
        with pytest.raises(ExpiredError):
            verified(document(release), now=clock)


def test_what_a_device_knows_of_the_time_never_goes_back() -> None:
    facts = replace(FACTS, latest_known_time=NOW + 10)
    assert verified(document(), facts, now=0).latest_known_time == NOW + 10


# --- 9: mix and match -------------------------------------------------------------------------------------------------

RELEASES = {
    version: replace(RELEASE, version=version, sha256=digest(version.encode()), size_bytes=1000 + index)
    for index, version in enumerate(("1.1.0", "1.2.0", "1.3.0"))
}


def mixes() -> list[tuple[dict[str, Any], bool]]:
    """Documents put together from the parts of three valid ones, and whether all parts belong together."""
    whole = {version: document(release) for version, release in RELEASES.items()}
    parts = ("order", "release", "full", "version")
    return [
        (
            document() | {part: whole[version][part] for part, version in zip(parts, mix, strict=True)},
            len(set(mix)) == 1,
        )
        for mix in itertools.product(RELEASES, repeat=len(parts))
    ]


def test_parts_of_different_releases_are_refused_in_every_mixture() -> None:
    for mixed, belongs_together in mixes():
        if belongs_together:
            assert verified(mixed).release.version == mixed["version"]
            continue
        with pytest.raises(MisdirectedError):
            verified(mixed)


TIES = {
    "order and release": ("if order.release_sha256 != digest:", {"order": document(RELEASES["1.1.0"])["order"]}),
    "version": ('if document.get("version", release.version) != release.version:', {"version": "1.1.0"}),
    "image": (
        'if entry.get("sha256") != release.sha256 or entry.get("size") != release.size_bytes:',
        {"full": document()["full"] | {"size": 1}},
    ),
}


@pytest.mark.parametrize(("defence", "part"), TIES.values(), ids=TIES.keys())
def test_without_any_of_its_three_ties_a_mixture_would_be_installed(defence: str, part: dict[str, Any]) -> None:
    with pytest.raises(MisdirectedError):
        verified(document() | part)
    assert verified(document() | part, by=without(defence))


def test_a_delta_for_another_base_is_not_offered() -> None:
    others = [delta_entry(base=digest(b"another image"), sha256="d2" * 32), delta_entry()]
    assert [offer.sha256 for offer in verified(document(deltas=others)).deltas] == ["d1" * 32]


# --- 10: wrong device, model, product ---------------------------------------------------------------------------------

HARDWARE = ("motor-v1", "motor-v2", "motor-v20", "MOTOR-V2", "pump-v1")


@pytest.mark.parametrize(("made_for", "device"), list(itertools.product(HARDWARE, repeat=2)))
def test_a_release_is_installed_on_exactly_the_hardware_it_names(made_for: str, device: str) -> None:
    whole = document(replace(RELEASE, hardware=(made_for,)))
    facts = replace(FACTS, hardware=device)
    if made_for == device:
        assert verified(whole, facts)
        return
    with pytest.raises(IncompatibleError, match=f"it is for {made_for}, this is {device}") as refusal:
        verified(whole, facts)
    assert refusal.value.failure_class is FailureClass.INCOMPATIBLE
    assert verified(whole, facts, by=without("if facts.hardware not in release.hardware:"))


def test_another_product_is_refused_once_the_device_has_one() -> None:
    whole = document(replace(RELEASE, product="pump-controller"))
    with pytest.raises(IncompatibleError, match="it is pump-controller, this device runs motor-controller"):
        verified(whole)
    assert verified(whole, replace(FACTS, product=None)).release.product == "pump-controller"
    assert verified(whole, by=without("if facts.product is not None and release.product != facts.product:"))


@pytest.mark.parametrize("device", ["motor-8", "motor-77", "MOTOR-7", ""])
def test_an_order_for_another_device_is_refused(device: str) -> None:
    facts = replace(FACTS, device_id=device)
    with pytest.raises(MisdirectedError, match="it is for device motor-7"):
        verified(document(), facts)
    assert verified(document(), facts, by=without("if order.device_id != facts.device_id:"))


def test_an_order_that_comes_with_another_job_is_refused() -> None:
    with pytest.raises(MisdirectedError, match="it came with job pump-1"):
        verified(document(), job_id="pump-1")
    assert verified(document(), job_id="pump-1", by=without("if order.job_id != job_id:"))


# --- 11: replay -------------------------------------------------------------------------------------------------------

ENDED = {
    "the same attempt": frozenset({attempt_key(JOB, 2)}),
    "a later attempt": frozenset({attempt_key(JOB, 1), attempt_key(JOB, 3)}),
    "the same nonce": frozenset({ORDER.nonce}),
    "a much later attempt": frozenset({attempt_key(JOB, 10)}),
}


@pytest.mark.parametrize("finished", ENDED.values(), ids=ENDED.keys())
def test_an_order_whose_attempt_has_ended_is_never_started_again(finished: frozenset[str]) -> None:
    facts = replace(FACTS, finished_orders=finished)
    with pytest.raises(ReplayError, match="attempt 2 of job motor-1_3_0"):
        verified(document(), facts)
    lax = without(
        "if order.nonce in facts.finished_orders or order.attempt <= last_attempt(facts.finished_orders, job_id):"
    )
    assert verified(document(), facts, by=lax)


def test_a_new_attempt_and_another_jobs_attempts_are_no_replay() -> None:
    others = {attempt_key(JOB, 1), attempt_key("motor-1_3_0_1", 9), attempt_key("motor-1_3", 9), "5f" * 16, f"{JOB}:x"}
    assert verified(document(), replace(FACTS, finished_orders=frozenset(others)))


# --- 20: addresses ----------------------------------------------------------------------------------------------------

SHA = RELEASE.sha256
BAD_URLS = [
    None,
    7,
    "",
    f"/artifacts/{SHA}",
    f"artifacts/{SHA}",
    f"file:///artifacts/{SHA}",
    f"ftp://host/artifacts/{SHA}",
    f"HTTP+UNIX://host/artifacts/{SHA}",
    f"//host/artifacts/{SHA}",
    f"http:///artifacts/{SHA}",
    f"http://user:secret@host/artifacts/{SHA}",
    f"http://host@evil/artifacts/{SHA}",
    f"http://host/../artifacts/{SHA}",
    f"http://host/a/../../artifacts/{SHA}",
    f"http://host/./artifacts/{SHA}",
    f"http://host/%2e%2e/artifacts/{SHA}",
    f"http://host/artifacts/../{SHA}",
    f"http://host/artifacts/%2e%2e/{SHA}",
    f"http://host//artifacts/{SHA}",
    f"http://host/artifacts//{SHA}",
    f"http://host/artifacts/{SHA}/",
    f"http://host/artifacts/{SHA}?x=1",
    f"http://host/artifacts/{SHA}#x",
    f"http://host/artifacts/{SHA}\n",
    f"http://host/artifacts/{SHA}\r\nHost: evil",
    f"http://host\\@evil/artifacts/{SHA}",
    f"http://host:99999999/artifacts/{SHA}",
    f"http://host:/artifacts/{SHA}",
    f"http://ho st/artifacts/{SHA}",
    f"http://hóst/artifacts/{SHA}",
    f"http://host/artifacts/{SHA.upper()}",
    f"http://host/artifacts/{SHA[:-1]}",
    f"http://host/artifacts/{'0' * 64}",
    "http://host/artifacts/../../etc/passwd",
    f"http://host/{'a' * 3000}/artifacts/{SHA}",
]


@pytest.mark.parametrize("url", BAD_URLS, ids=lambda url: str(url)[:40])
def test_an_address_that_is_not_plainly_that_of_the_image_is_refused(url: Any) -> None:
    whole = document()
    whole["full"]["url"] = url
    with pytest.raises(StatementError, match="is not the image's address"):
        verified(whole)


@pytest.mark.parametrize(
    "base",
    ["http://127.0.0.1:8080", "https://cdn.example/firmware", "http://[::1]:80", "http://a_b:1/x-1/y.z/~me", BASE_URL],
)
def test_addresses_of_every_ordinary_artifact_server_are_accepted(base: str) -> None:
    whole = document()
    whole["full"]["url"] = f"{base}/artifacts/{SHA}"
    assert verified(whole).full.url == whole["full"]["url"]


def test_without_that_rule_an_address_on_the_device_itself_would_be_taken() -> None:
    whole = document()
    whole["full"]["url"] = f"file:///artifacts/{SHA}"
    lax = without('if not _is_artifact_url(entry.get("url"), release.sha256):')
    assert verified(whole, by=lax).full.url.startswith("file:")


def test_a_compression_nobody_knows_is_refused() -> None:
    whole = document()
    whole["full"]["compression"] = "zstd"
    with pytest.raises(StatementError, match="unknown compression 'zstd'"):
        verified(whole)


# --- deltas: an offer that does not fit never stops an update ---------------------------------------------------------

BAD_OFFERS: list[Any] = [
    None,
    7,
    [],
    {},
    delta_entry(base="x"),
    delta_entry(sha256="D1" * 32),
    delta_entry(size=0),
    delta_entry(size=-1),
    delta_entry(size=len(NEW_IMAGE)),
    delta_entry(size=2**60),
    {**delta_entry(), "size": "400"},
    {**delta_entry(), "size": True},
    delta_entry(codec=None),
    delta_entry(url="file:///etc/passwd"),
    delta_entry(url=f"{BASE_URL}/artifacts/{'d2' * 32}"),
]


@pytest.mark.parametrize("offer", BAD_OFFERS, ids=lambda offer: str(offer)[:30])
def test_an_offer_that_does_not_fit_is_passed_over(offer: Any) -> None:
    update = verified(document(deltas=[offer, delta_entry(sha256="d9" * 32)]))
    assert [found.sha256 for found in update.deltas] == ["d9" * 32]


@pytest.mark.parametrize("deltas", [None, {}, "x", 7, [delta_entry()] * 65])
def test_a_list_of_offers_that_is_none_leaves_the_full_image(deltas: Any) -> None:
    assert verified(document(deltas=deltas)).deltas == ()


def test_the_smallest_delta_comes_first() -> None:
    offers = [delta_entry(sha256="d2" * 32, size=500), delta_entry(sha256="d3" * 32, size=20)]
    assert [offer.size_bytes for offer in verified(document(deltas=offers)).deltas] == [20, 500]


def test_an_order_that_names_its_deltas_lets_no_other_bytes_reach_the_decoder() -> None:
    order = replace(ORDER, release_sha256=digest(encode_release(RELEASE)), deltas=("d1" * 32,))
    whole = document(order=order, deltas=[delta_entry(), delta_entry(sha256="d2" * 32, size=10)])
    assert [offer.sha256 for offer in verified(whole).deltas] == ["d1" * 32]
    lax = without("and (order.deltas is None or offer.sha256 in order.deltas)", "")
    assert [offer.sha256 for offer in verified(whole, by=lax).deltas] == ["d2" * 32, "d1" * 32]
    assert verified(document(order=replace(order, deltas=()))).deltas == ()


def test_every_refusal_says_how_it_is_to_be_reported() -> None:
    for kind in FirmwareError.__subclasses__():
        expected = FailureClass.INCOMPATIBLE if kind is IncompatibleError else FailureClass.VERIFY
        assert kind.failure_class is expected
