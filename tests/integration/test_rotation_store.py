"""Rotation's transactions on a real PostgreSQL: what is asked, what is revoked, who is due."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from models.errors import NotFoundError, RefusedError
from models.identity import RevocationReason
from models.lifecycle import (
    AskForRotationInput,
    CertificatesSeen,
    EndRotationInput,
    RotateFleetInput,
    RotationSeen,
)
from store import rotation
from store.access import revoke
from store.engine import Database
from store.rotation import RotationStore
from tests.integration.life_setup import (
    LIFE,
    add_authority,
    add_certificate,
    alerts,
    answer,
    audit_of,
    confirm,
    one,
    rows,
    waits,
)
from tests.integration.rollout_setup import add_devices

DEVICE, FLOW = "motor-1", "rotate:motor-1"
DAY = timedelta(days=1)


@pytest.fixture
async def store(db: Database) -> RotationStore:
    await add_authority(db)
    await add_devices(db, 1)
    return RotationStore(db)


def asking(old: tuple[str, ...], **given: Any) -> AskForRotationInput:
    until = datetime.now(UTC) + timedelta(days=7)
    return AskForRotationInput(device_id=DEVICE, workflow_id=FLOW, old=old, actor="alice", until=until, **given)


def ending(old: tuple[str, ...], reason: str = "it is over") -> EndRotationInput:
    return EndRotationInput(device_id=DEVICE, workflow_id=FLOW, old=old, actor="alice", reason=reason)


async def valid(db: Database) -> list[str]:
    found = await rows(db, "SELECT certificate_id FROM certificates WHERE state = 'valid' ORDER BY generation")
    return [row["certificate_id"] for row in found]


async def bar_device(db: Database) -> None:
    async with db.pool.connection() as connection:
        await connection.execute("UPDATE devices SET barred_at = now(), barred_reason = 'cloned'")


# --- where it begins -------------------------------------------------------------------------------------------------


async def test_one_certificate_is_the_old_one(store: RotationStore, db: Database) -> None:
    first = await add_certificate(db, DEVICE, confirmed=False)
    assert await store.look(DEVICE, ask=True) == CertificatesSeen(old=(first,))


async def test_a_certificate_that_was_issued_and_not_seen_is_taken_up(store: RotationStore, db: Database) -> None:
    first = await add_certificate(db, DEVICE)
    second = await add_certificate(db, DEVICE, 2, confirmed=False)
    for ask in (True, False):
        assert await store.look(DEVICE, ask=ask) == CertificatesSeen(old=(first,), new=(second,))


async def test_a_device_that_has_come_and_been_seen_is_settled_unless_it_is_to_be_asked_again(
    store: RotationStore, db: Database
) -> None:
    first, second = await add_certificate(db, DEVICE), await add_certificate(db, DEVICE, 2)
    assert await store.look(DEVICE, ask=False) == CertificatesSeen(old=(first,), settled=second)
    assert await store.look(DEVICE, ask=True) == CertificatesSeen(old=(second, first))


@pytest.mark.parametrize("ask", [True, False])
async def test_a_device_without_a_valid_certificate_has_nothing_to_rotate(
    store: RotationStore, db: Database, ask: bool
) -> None:
    await add_certificate(db, DEVICE, age=LIFE + DAY)
    with pytest.raises(RefusedError, match=r"it has none that is valid.*has to enrol again"):
        await store.look(DEVICE, ask=ask)


async def test_unknown_retired_and_barred_devices_are_refused(store: RotationStore, db: Database) -> None:
    await add_certificate(db, DEVICE)
    with pytest.raises(NotFoundError, match="no device with the id 'nobody'"):
        await store.look("nobody", ask=True)
    await bar_device(db)
    with pytest.raises(RefusedError, match=r"nothing that it says is used since .* \(cloned\)"):
        await store.look(DEVICE, ask=True)
    async with db.pool.connection() as connection:
        await connection.execute("UPDATE devices SET barred_at = NULL, status = 'retired'")
    with pytest.raises(RefusedError, match=r"cannot rotate the certificate of motor-1: it is retired"):
        await store.ask(asking(("x",)))


async def test_a_device_that_is_barred_while_it_is_asked_is_waited_for_no_longer(
    store: RotationStore, db: Database
) -> None:
    first = await add_certificate(db, DEVICE)
    await store.ask(asking((first,)))
    await bar_device(db)
    with pytest.raises(RefusedError):
        await store.ask(asking((first,)))
    assert await waits(db) == []


async def test_a_device_that_is_retired_just_as_it_is_asked_is_left_with_no_command(
    store: RotationStore, db: Database
) -> None:
    first = await add_certificate(db, DEVICE)
    async with db.pool.connection() as connection:
        await connection.execute("UPDATE devices SET status = 'retired'")
        asked = asyncio.create_task(store.ask(asking((first,))))
        await asyncio.sleep(0.3)
    with pytest.raises(RefusedError, match="it is retired"):
        await asked
    assert await rows(db, "SELECT FROM device_commands") == []
    assert await waits(db) == []


# --- asking ----------------------------------------------------------------------------------------------------------


async def test_asking_opens_one_command_and_waits_however_often_it_is_repeated(
    store: RotationStore, db: Database
) -> None:
    first = await add_certificate(db, DEVICE)
    for _ in range(3):
        assert await store.ask(asking((first,))) == RotationSeen()
    command = await one(db, "SELECT operation, state, requested_by FROM device_commands")
    assert command == {"operation": "rotate-certificate", "state": "pending", "requested_by": "alice"}
    assert await waits(db) == [(FLOW, "certificate-confirmed"), (FLOW, "certificate-issued")]


async def test_a_device_that_came_by_itself_gets_no_command(store: RotationStore, db: Database) -> None:
    first = await add_certificate(db, DEVICE)
    await store.ask(asking((first,), ask=False))
    assert await rows(db, "SELECT * FROM device_commands") == []


async def test_what_the_device_does_is_told_to_the_workflow_and_seen(store: RotationStore, db: Database) -> None:
    first = await add_certificate(db, DEVICE)
    await store.ask(asking((first,)))
    second = await add_certificate(db, DEVICE, 2, confirmed=False, tell=True)
    assert await store.ask(asking((first,))) == RotationSeen(issued=second)
    await confirm(db, DEVICE, second)
    assert await store.ask(asking((first,))) == RotationSeen(issued=second, confirmed=second)
    told = await rows(db, "SELECT workflow_id, event->>'happening' AS what FROM workflow_outbox ORDER BY outbox_no")
    assert [row["what"] for row in told] == ["certificate-issued", "certificate-confirmed"]
    assert {row["workflow_id"] for row in told} == {FLOW}


# --- how it ends -----------------------------------------------------------------------------------------------------


async def test_a_confirmed_certificate_supersedes_every_other(store: RotationStore, db: Database) -> None:
    first = await add_certificate(db, DEVICE)
    await store.ask(asking((first,)))
    await add_certificate(db, DEVICE, 2, confirmed=False)
    third = await add_certificate(db, DEVICE, 3)
    before = (await one(db, "SELECT revision FROM access_state"))["revision"]
    for _ in range(2):
        ended = await store.settle(ending((first,)))
        assert (ended.kept, ended.confirmed, ended.revoked) == (third, True, (first, f"{DEVICE}/2"))
    assert await valid(db) == [third]
    revoked = await rows(db, "SELECT DISTINCT revocation_reason AS r FROM certificates WHERE state = 'revoked'")
    assert revoked == [{"r": RevocationReason.SUPERSEDED.value}]
    assert (await one(db, "SELECT revision FROM access_state"))["revision"] > before
    assert (await one(db, "SELECT barred_at FROM devices"))["barred_at"] is None
    assert await waits(db) == []
    assert (await one(db, "SELECT state FROM device_commands"))["state"] == "canceled"
    assert (await one(db, "SELECT certificate_id FROM device_credentials"))["certificate_id"] == third
    assert (await audit_of(db, DEVICE)).count("certificate.rotated") == 1


async def test_nothing_is_revoked_for_a_certificate_that_was_not_seen(store: RotationStore, db: Database) -> None:
    first, second = await add_certificate(db, DEVICE), await add_certificate(db, DEVICE, 2, confirmed=False)
    ended = await store.settle(ending((first,)))
    assert (ended.confirmed, ended.issued, ended.revoked) == (False, True, ())
    assert await valid(db) == [first, second]


async def test_without_waiting_for_the_new_certificate_to_be_seen_a_device_that_has_only_the_old_one_is_lost(
    store: RotationStore, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await add_certificate(db, DEVICE), await add_certificate(db, DEVICE, 2, confirmed=False)
    monkeypatch.setattr(rotation, "_VALID", rotation._VALID.replace("confirmed_at IS NOT NULL", "TRUE"))
    await store.settle(ending((first,)))
    assert await valid(db) == [second]


async def test_the_new_certificate_is_revoked_when_the_overlap_is_over_and_people_are_told(
    store: RotationStore, db: Database
) -> None:
    first, second = await add_certificate(db, DEVICE), await add_certificate(db, DEVICE, 2, confirmed=False)
    await store.ask(asking((first,)))
    for _ in range(2):
        ended = await store.revert(ending((first,), "not seen within 1d"))
        assert (ended.kept, ended.confirmed, ended.revoked) == (first, False, (second,))
    assert await valid(db) == [first]
    assert (await one(db, "SELECT barred_at FROM devices"))["barred_at"] is None
    assert await alerts(db) == {"rotation-reverted": DEVICE}
    assert await waits(db) == []


async def test_a_confirmation_in_the_last_moment_wins_against_reverting(store: RotationStore, db: Database) -> None:
    first, second = await add_certificate(db, DEVICE), await add_certificate(db, DEVICE, 2)
    ended = await store.revert(ending((first,)))
    assert (ended.confirmed, ended.kept, ended.revoked) == (True, second, (first,))
    assert await valid(db) == [second]


async def test_the_new_certificate_stays_where_the_old_one_has_ended_or_the_device_would_have_none(
    store: RotationStore, db: Database
) -> None:
    first = await add_certificate(db, DEVICE, age=LIFE + DAY)
    second = await add_certificate(db, DEVICE, 2, confirmed=False)
    ended = await store.revert(ending((first,), "not seen"))
    assert (ended.kept, ended.revoked) == (second, ())
    assert second in await valid(db)
    assert (await one(db, "SELECT barred_at FROM devices"))["barred_at"] is None
    assert await alerts(db) == {"rotation-reverted": DEVICE}


async def test_the_new_certificate_stays_where_the_old_one_is_about_to_end(store: RotationStore, db: Database) -> None:
    """A device that was switched off while it rotated comes back with one that is valid."""
    first = await add_certificate(db, DEVICE, age=LIFE - 5 * DAY)
    second = await add_certificate(db, DEVICE, 2, confirmed=False)
    for _ in range(2):
        ended = await store.revert(ending((first,), "not seen"))
        assert (ended.kept, ended.confirmed, ended.revoked) == (second, False, ())
    assert await valid(db) == [first, second]
    assert await alerts(db) == {"rotation-reverted": DEVICE}


async def test_giving_up_leaves_the_certificate_and_alerts_only_near_its_end(
    store: RotationStore, db: Database
) -> None:
    first = await add_certificate(db, DEVICE, age=30 * DAY)
    await store.ask(asking((first,)))
    ended = await store.give_up(ending((first,), "it did not come"))
    assert (ended.kept, ended.revoked, ended.issued) == (first, (), False)
    assert await alerts(db) == {}
    assert await waits(db) == []
    assert (await one(db, "SELECT state FROM device_commands"))["state"] == "expired"
    async with db.pool.connection() as connection:
        await connection.execute("UPDATE certificates SET not_after = now() + interval '5 days'")
    await store.give_up(ending((first,), "it did not come"))
    assert await alerts(db) == {"certificate-ending": DEVICE}
    text = (await one(db, "SELECT text FROM alerts"))["text"]
    assert "14 % of its life is left, and it did not come" in text
    second = await add_certificate(db, DEVICE, 2)
    await store.settle(ending((first,)))
    assert await valid(db) == [second]
    assert await alerts(db) == {}


async def test_a_certificate_that_comes_in_the_last_moment_is_not_given_up(store: RotationStore, db: Database) -> None:
    first = await add_certificate(db, DEVICE)
    await add_certificate(db, DEVICE, 2, confirmed=False)
    ended = await store.give_up(ending((first,)))
    assert (ended.issued, ended.kept) == (True, None)


# --- the fleet -------------------------------------------------------------------------------------------------------


async def due(store: RotationStore, **given: Any) -> dict[str, str]:
    asked = RotateFleetInput(**given)
    found = {each.device_id: each.reason for each in await store.due(asked, 100)}
    assert await store.count_due(asked) == len(found)
    return found


async def test_a_certificate_is_due_when_less_than_forty_percent_of_its_life_is_left(
    store: RotationStore, db: Database
) -> None:
    await add_devices(db, 4, "pump")
    await add_certificate(db, DEVICE, age=53 * DAY)
    await add_certificate(db, "pump-1", age=55 * DAY)
    await add_certificate(db, "pump-2", age=89 * DAY)
    await add_certificate(db, "pump-3", age=91 * DAY)
    found = await store.due(RotateFleetInput(), 100)
    assert [each.device_id for each in found] == ["pump-2", "pump-1"], "those that end first come first"
    assert found[0].reason == "less than 40 % of its life is left"


async def test_certificates_of_a_former_ca_are_due_whatever_their_age(store: RotationStore, db: Database) -> None:
    await add_authority(db, "ca-0", "trusted")
    await add_devices(db, 1, "pump")
    await add_certificate(db, DEVICE, age=2 * DAY)
    await add_certificate(db, "pump-1", age=2 * DAY, authority="ca-0")
    assert await due(store) == {"pump-1": "its CA ca-0 is trusted"}


async def test_only_the_newest_certificate_counts_and_all_can_be_asked_for_by_site(
    store: RotationStore, db: Database
) -> None:
    await add_devices(db, 1, "pump")
    await add_certificate(db, DEVICE, age=80 * DAY)
    await add_certificate(db, DEVICE, 2, age=2 * DAY)
    await add_certificate(db, "pump-1", age=2 * DAY)
    async with db.pool.connection() as connection:
        await connection.execute("UPDATE devices SET site_id = 'oslo' WHERE device_id = 'pump-1'")
    assert await due(store, overlap=30 * DAY) == {}
    assert set(await due(store, everything=True, overlap=30 * DAY)) == {DEVICE, "pump-1"}
    assert set(await due(store, everything=True, sites=("oslo",))) == {"pump-1"}


async def test_a_device_that_was_asked_or_renewed_lately_is_left_alone(store: RotationStore, db: Database) -> None:
    first = await add_certificate(db, DEVICE, age=80 * DAY)
    assert set(await due(store)) == {DEVICE}
    await store.ask(asking((first,)))
    assert await due(store) == {}
    assert set(await due(store, left_alone=timedelta(0))) == {DEVICE}
    async with db.pool.connection() as connection:
        await connection.execute("UPDATE device_commands SET created_at = now() - interval '25 hours'")
    assert set(await due(store)) == {DEVICE}
    await add_certificate(db, DEVICE, 2)
    assert await due(store, everything=True) == {}


async def test_two_certificates_that_nobody_watches_over_are_found_when_their_overlap_is_over(
    store: RotationStore, db: Database
) -> None:
    await add_certificate(db, DEVICE, age=30 * DAY)
    await add_certificate(db, DEVICE, 2, age=DAY / 2, confirmed=False)
    assert await due(store) == {}
    [found] = await store.due(RotateFleetInput(overlap=DAY / 4), 10)
    assert (found.device_id, found.ask) == (DEVICE, False)
    assert found.reason == "two certificates are valid for longer than they may overlap"


async def test_certificates_that_live_for_a_day_are_renewed_in_time(store: RotationStore, db: Database) -> None:
    await add_certificate(db, DEVICE, life=DAY, age=timedelta(hours=15))
    assert set(await due(store)) == {DEVICE}


@pytest.mark.parametrize(
    "change",
    ["status = 'retired'", "status = 'provisioning'", "barred_at = now()"],
)
async def test_devices_that_cannot_renew_are_not_asked(store: RotationStore, db: Database, change: str) -> None:
    await add_certificate(db, DEVICE, age=80 * DAY)
    async with db.pool.connection() as connection:
        await connection.execute(f"UPDATE devices SET {change}".encode())
    assert await due(store, everything=True) == {}


async def test_pages_go_on_behind_the_last_device(store: RotationStore, db: Database) -> None:
    await add_devices(db, 9, "pump")
    for n in range(1, 10):
        await add_certificate(db, f"pump-{n}", age=(89 - n % 3) * DAY)
    seen, after = [], None
    while page := await store.due(RotateFleetInput(), 4, after):
        seen += [each.device_id for each in page]
        after = page[-1]
    assert len(seen) == len(set(seen)) == 9


async def test_the_figures_say_where_the_fleet_stands(store: RotationStore, db: Database) -> None:
    await add_authority(db, "ca-0", "trusted")
    await add_devices(db, 5, "pump")
    first = await add_certificate(db, DEVICE, age=50 * DAY)
    await add_certificate(db, "pump-1", age=85 * DAY)
    await add_certificate(db, "pump-2", authority="ca-0")
    await add_certificate(db, "pump-3", age=91 * DAY)
    await add_certificate(db, "pump-4")
    await add_certificate(db, "pump-4", 2, confirmed=False)
    await store.ask(asking((first,)))
    figures = await store.figures()
    assert (figures.valid, figures.due, figures.of_former_authorities) == (4, 2, 1)
    assert (figures.ending, figures.expired, figures.unconfirmed, figures.asked) == (1, 1, 1, 1)
    assert figures.next_end is not None


async def test_a_revocation_by_a_person_meanwhile_stands(store: RotationStore, db: Database) -> None:
    first, second = await add_certificate(db, DEVICE), await add_certificate(db, DEVICE, 2)
    async with db.pool.connection() as connection:
        await revoke(connection, DEVICE, RevocationReason.KEY_COMPROMISE, "bob", "stolen", only=[second])
    ended = await store.settle(ending((first,)))
    assert not ended.confirmed
    assert await valid(db) == [first]
    assert await answer(db, DEVICE) is None
