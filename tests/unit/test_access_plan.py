"""What a broker is brought to, from a snapshot and the files in force: the pure part of the access keeper."""

from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

from access.mosquitto import DEVICE_ACL, DEVICE_CAS, DEVICE_CRLS, ENGINE_ACL
from access.plan import HALF_LIFE, UNUSABLE, AccessPlan, plan_access
from models.errors import RefusedError
from models.identity import AuthorityKind
from pki.authority import Authority, make_authority, pem_of
from pki.revocation import Revoked, sign_crl
from store.brokers import AccessSnapshot, RevokedCertificate, TrustedAuthority

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
WEEK = timedelta(days=7)


def authority(name: str = "one") -> Authority:
    key = generate_private_key(SECP256R1())
    return Authority(make_authority(AuthorityKind.DEVICE, name, key, NOW - timedelta(days=30)), key)


ONE, TWO = authority("one"), authority("two")


def crl(signer: Authority, number: int, *serials: str, at: datetime = NOW) -> str:
    return sign_crl(signer, number, [Revoked(serial, at) for serial in serials], at, WEEK).decode()


def trusted(signer: Authority, pem: str | None) -> TrustedAuthority:
    name = "one" if signer is ONE else "two"
    return TrustedAuthority(signer.authority_id, name, pem_of(signer.certificate), pem)


def snapshot(
    *authorities: TrustedAuthority, denied: set[str] | None = None, revoked: tuple[tuple[str, str], ...] = ()
) -> AccessSnapshot:
    certificates = tuple(
        RevokedCertificate(f"id-{serial}", device, ONE.authority_id, serial) for device, serial in revoked
    )
    return AccessSnapshot(7, frozenset(denied or ()), certificates, authorities)


def after(wanted: AccessSnapshot, before: AccessPlan | None = None, now: datetime = NOW) -> AccessPlan:
    return plan_access(wanted, before.files if before else {}, "broker", now)


FRESH = after(snapshot(trusted(ONE, crl(ONE, 5, "aa"))))


def test_the_same_snapshot_gives_the_same_files_and_throws_nobody_out() -> None:
    again = after(snapshot(trusted(ONE, FRESH.files[DEVICE_CRLS])), FRESH)
    assert again.files == FRESH.files and again.kicks == frozenset() and again.canary == FRESH.canary


@pytest.mark.parametrize("change", ["denied", "list", "ca"])
def test_whatever_changes_changes_the_canary(change: str) -> None:
    match change:
        case "denied":
            changed = after(snapshot(trusted(ONE, FRESH.files[DEVICE_CRLS]), denied={"motor-1"}), FRESH)
        case "list":
            changed = after(snapshot(trusted(ONE, crl(ONE, 6))), FRESH)
        case _:
            changed = after(snapshot(trusted(ONE, FRESH.files[DEVICE_CRLS]), trusted(TWO, crl(TWO, 1))), FRESH)
    assert changed.canary != FRESH.canary and changed.canary in changed.files[ENGINE_ACL]


def test_who_is_denied_just_now_is_thrown_out_once() -> None:
    wanted = snapshot(trusted(ONE, FRESH.files[DEVICE_CRLS]), denied={"motor-1"})
    denied = after(wanted, FRESH)
    assert denied.kicks == {"motor-1"} and "user motor-1" in denied.files[DEVICE_ACL]
    assert after(wanted, denied).kicks == frozenset()


def test_who_has_a_certificate_that_the_new_list_refuses_is_thrown_out_and_until_then_it_is_unlisted() -> None:
    revoked = (("motor-1", "bb"), ("motor-2", "aa"))
    waiting = after(snapshot(trusted(ONE, FRESH.files[DEVICE_CRLS]), revoked=revoked), FRESH)
    assert waiting.unlisted == 1 and waiting.kicks == frozenset()
    listed = after(snapshot(trusted(ONE, crl(ONE, 6, "aa", "bb")), revoked=revoked), waiting)
    assert listed.unlisted == 0 and listed.kicks == {"motor-1"}, "motor-2's was on the list before"


def test_an_older_list_does_not_replace_a_newer_one() -> None:
    rolled_back = after(snapshot(trusted(ONE, crl(ONE, 4))), FRESH)
    assert rolled_back.files[DEVICE_CRLS] == FRESH.files[DEVICE_CRLS]
    assert [problem.rule for problem in rolled_back.problems] == [UNUSABLE]
    assert "4 of one is older than 5" in rolled_back.problems[0].text


@pytest.mark.parametrize(
    ("pem", "why"),
    [
        (None, "there is none"),
        ("garbage", "expected one whole list"),
        (crl(TWO, 9), "it is one of"),
        (crl(ONE, 9, at=NOW - 2 * WEEK), "it has ended"),
        (crl(ONE, 9, at=NOW + timedelta(minutes=8)), "check the clock"),
        (crl(ONE, 9) + crl(ONE, 10), "expected one whole list"),
    ],
)
def test_an_unusable_list_leaves_the_installed_one_in_force(pem: str | None, why: str) -> None:
    kept = after(snapshot(trusted(ONE, pem)), FRESH)
    assert kept.files == FRESH.files
    assert [problem.rule for problem in kept.problems] == [UNUSABLE]
    assert why in kept.problems[0].text and "the one before stays in force" in kept.problems[0].text


def test_a_ca_without_a_usable_list_is_left_out_and_the_others_go_on() -> None:
    both = after(snapshot(trusted(ONE, FRESH.files[DEVICE_CRLS]), trusted(TWO, None)), FRESH)
    assert both.files[DEVICE_CAS] == FRESH.files[DEVICE_CAS]
    assert "its devices cannot connect" in both.problems[0].text


def test_a_name_that_no_certificate_can_bear_keeps_nobody_from_being_denied() -> None:
    plan = after(snapshot(trusted(ONE, FRESH.files[DEVICE_CRLS]), denied={"motor-1", "a\ntopic readwrite #"}), FRESH)
    assert plan.denied == plan.kicks == {"motor-1"} and "readwrite" not in plan.files[DEVICE_ACL]


def test_where_every_list_is_over_the_files_stay_and_denials_go_on() -> None:
    later = NOW + 2 * WEEK
    over = after(snapshot(trusted(ONE, FRESH.files[DEVICE_CRLS]), denied={"motor-1"}), FRESH, later)
    assert over.files[DEVICE_CRLS] == FRESH.files[DEVICE_CRLS]
    assert "user motor-1" in over.files[DEVICE_ACL] and over.crl_next_update is None


def test_without_any_list_nothing_is_written_at_all() -> None:
    with pytest.raises(RefusedError, match="no device CA has a usable revocation list"):
        after(snapshot(trusted(ONE, None)))
    with pytest.raises(RefusedError, match="ca init"):
        after(snapshot())


@pytest.mark.parametrize(("days", "alarms"), [(3, 0), (4, 1)])
def test_the_alarm_comes_at_half_of_a_lists_life(days: int, alarms: int) -> None:
    plan = after(snapshot(trusted(ONE, FRESH.files[DEVICE_CRLS])), FRESH, NOW + timedelta(days=days))
    assert [problem.rule for problem in plan.problems] == [HALF_LIFE] * alarms


def test_a_revoked_certificate_of_a_ca_that_is_not_trusted_keeps_no_revision_back() -> None:
    plan = after(snapshot(trusted(TWO, crl(TWO, 1)), revoked=(("motor-1", "bb"),)))
    assert plan.unlisted == 0
