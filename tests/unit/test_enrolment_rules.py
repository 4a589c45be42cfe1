"""Who may enrol: every rule, and what each is asked before."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from domain.enrolment import Admission, Batch, KnownDevice, Serial, device_id_for, judge_batch, judge_request
from models.ids import THING_NAME

NOW = datetime(2026, 11, 24, tzinfo=UTC)
BATCH = Batch("line-4", "motor", NOW + timedelta(days=1), max_devices=10, enrolled=3)
SERIAL = Serial("SN-1")
DEVICE = KnownDevice("motor-1", "motor", "provisioning", has_certificate=False)
RETIRED = replace(DEVICE, status="retired")
FAILED = replace(DEVICE, status="error")


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (BATCH, ""),
        (replace(BATCH, disabled=True), "batch line-4 is disabled"),
        (replace(BATCH, expires_at=NOW), "batch line-4 has expired on 2026-11-24 00:00Z"),
        (replace(BATCH, expires_at=NOW, disabled=True), "batch line-4 is disabled"),
    ],
)
def test_a_batch_lets_somebody_in_while_it_is_neither_disabled_nor_expired(batch: Batch, said: str) -> None:
    assert judge_batch(batch, NOW).startswith(said)
    assert bool(judge_batch(batch, NOW)) is bool(said)


@pytest.mark.parametrize(
    ("batch", "serial", "admission"),
    [
        (BATCH, SERIAL, Admission.ADMIT),
        (BATCH, replace(SERIAL, listed_in="line-4"), Admission.ADMIT),
        (BATCH, replace(SERIAL, listed_in="line-5"), Admission.REFUSE),
        (replace(BATCH, listed_only=True), SERIAL, Admission.REFUSE),
        (replace(BATCH, listed_only=True), replace(SERIAL, listed_in="line-4"), Admission.ADMIT),
        (replace(BATCH, enrolled=10), SERIAL, Admission.REFUSE),
        (replace(BATCH, enrolled=10), replace(SERIAL, has_place=True), Admission.ADMIT),
        (BATCH, replace(SERIAL, retired_at=NOW, released=True), Admission.REFUSE),
        (BATCH, replace(SERIAL, key_known=True), Admission.REFUSE),
        (BATCH, replace(SERIAL, refused_by="alice"), Admission.REFUSE),
        (BATCH, replace(SERIAL, enrolled_with_other_key=True), Admission.CONFLICT),
        (BATCH, replace(SERIAL, device=DEVICE), Admission.ADMIT),
        (BATCH, replace(SERIAL, device=replace(DEVICE, device_type="pump")), Admission.REFUSE),
        (BATCH, replace(SERIAL, device=replace(DEVICE, has_certificate=True)), Admission.CONFLICT),
        (BATCH, replace(SERIAL, device=replace(DEVICE, status="active")), Admission.CONFLICT),
        (BATCH, replace(SERIAL, device=replace(DEVICE, status="configured")), Admission.CONFLICT),
        (BATCH, replace(SERIAL, device=replace(DEVICE, status="inactive")), Admission.CONFLICT),
        (BATCH, replace(SERIAL, device=FAILED), Admission.CONFLICT),
        (BATCH, replace(SERIAL, device=FAILED, failed_before=True), Admission.ADMIT),
        (BATCH, replace(SERIAL, device=replace(FAILED, barred=True), failed_before=True), Admission.CONFLICT),
        (BATCH, replace(SERIAL, device=replace(DEVICE, barred=True)), Admission.CONFLICT),
        (BATCH, replace(SERIAL, device=replace(RETIRED, barred=True), released=True), Admission.ADMIT),
        (BATCH, replace(SERIAL, device=RETIRED), Admission.REFUSE),
        (BATCH, replace(SERIAL, device=RETIRED, released=True), Admission.ADMIT),
        (BATCH, replace(SERIAL, device=RETIRED, released=True, retired_at=NOW), Admission.REFUSE),
        (BATCH, replace(SERIAL, device=replace(RETIRED, has_certificate=True), released=True), Admission.CONFLICT),
    ],
)
def test_who_is_admitted_refused_or_left_to_a_person(batch: Batch, serial: Serial, admission: Admission) -> None:
    judged = judge_request(batch, serial)
    assert judged.admission is admission, judged
    assert bool(judged.reason) is (admission is not Admission.ADMIT)


def test_device_ids_are_thing_names_that_fit_into_a_certificate_and_differ_where_serial_numbers_do() -> None:
    serials = ["A.B", "A_B", "A:B", "A-B", "A" * 64, "A" * 63 + "B", "a.b"]
    made = {device_id_for(prefix, serial) for prefix in ("", "motor-", "p" * 60) for serial in serials}
    assert len(made) == 3 * len(serials)
    assert all(THING_NAME.fullmatch(each) and len(each) <= 64 for each in made)
    assert device_id_for("", "A-B") != device_id_for("", "A-B", taken=True)
