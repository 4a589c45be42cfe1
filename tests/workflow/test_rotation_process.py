"""A certificate's rotation on a time-skipping server with scripted activities."""

from collections import deque
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
import pytest_asyncio

from models.identity import DeviceHappening, RotateOutcome
from models.lifecycle import AskForRotationInput, CertificatesSeen, EndedRotation, EndRotationInput, RotationSeen
from tests.workflow.conftest import SkippingServers
from tests.workflow.life_stage import LifeStage, life_stage

ISSUED, CONFIRMED = DeviceHappening.CERTIFICATE_ISSUED, DeviceHappening.CERTIFICATE_CONFIRMED
NOTHING, NEW = RotationSeen(), RotationSeen(issued="new")
PROVED = RotationSeen(issued="new", confirmed="new")
LIMITS = {"renew_within": timedelta(days=7), "overlap": timedelta(hours=24)}


@pytest_asyncio.fixture
async def life(servers: SkippingServers) -> AsyncIterator[LifeStage]:
    async with life_stage(servers) as stage:
        yield stage


async def test_a_device_that_comes_and_connects_has_its_old_certificate_revoked_and_a_list_is_signed(
    life: LifeStage,
) -> None:
    life.script.rotation = deque([NOTHING, NEW, NEW, PROVED])
    await life.rotate(**LIMITS)
    await life.until_asked("ask_for_rotation")
    await life.tell(ISSUED, certificate_id="new")
    await life.until_asked("ask_for_rotation", 3)
    await life.tell(CONFIRMED, certificate_id="new")
    result = await life.result()
    assert (result.outcome, result.certificate_id, result.revoked) == (RotateOutcome.ROTATED, "new", ("old",))
    assert result.reason == "seen with its new certificate; 1 superseded one revoked"
    assert life.script.steps == [
        "look_at_certificates",
        *["ask_for_rotation"] * 4,
        "settle_rotation",
        "publish_crls",
    ]
    assert await life.took() < timedelta(minutes=1)


async def test_signals_that_say_nothing_new_only_cost_a_look(life: LifeStage) -> None:
    life.script.rotation = deque([NOTHING, NOTHING, NOTHING, NEW, NEW, NEW, PROVED])
    await life.rotate(**LIMITS)
    await life.until_asked("ask_for_rotation")
    for times, happening in enumerate((CONFIRMED, CONFIRMED, ISSUED), 2):
        await life.tell(happening, certificate_id="of long ago")
        await life.until_asked("ask_for_rotation", times)
    assert (await life.result()).outcome is RotateOutcome.ROTATED


async def test_signals_that_are_lost_are_made_up_for_by_reminders(life: LifeStage) -> None:
    life.script.rotation = deque([NOTHING, NOTHING, NEW, NEW, NEW, PROVED])
    await life.rotate(**LIMITS)
    assert (await life.result()).outcome is RotateOutcome.ROTATED
    assert await life.took() < timedelta(minutes=10)


async def test_a_device_that_never_comes_keeps_what_it_has(life: LifeStage) -> None:
    await life.rotate(**LIMITS)
    result = await life.result()
    assert (result.outcome, result.certificate_id, result.revoked) == (RotateOutcome.UNANSWERED, "old", ())
    assert life.script.steps[-1] == "give_up_rotation"
    assert timedelta(days=7) <= await life.took() < timedelta(days=7, minutes=1)
    assert len(life.script.only(AskForRotationInput)) < 45
    assert life.script.only(EndRotationInput)[0].reason == "the device has not fetched a new certificate within 7d"


async def test_a_device_that_comes_in_the_last_moment_goes_on_to_the_overlap(life: LifeStage) -> None:
    life.script.given_up = EndedRotation(issued=True)
    await life.rotate(**LIMITS)
    assert (await life.result()).outcome is RotateOutcome.REVERTED
    assert "give_up_rotation" in life.script.steps


async def test_a_new_certificate_that_is_not_seen_within_the_overlap_is_revoked_and_the_old_one_stays(
    life: LifeStage,
) -> None:
    life.script.rotation = deque([NEW])
    await life.rotate(**LIMITS)
    result = await life.result()
    assert (result.outcome, result.certificate_id, result.revoked) == (RotateOutcome.REVERTED, "old", ("new",))
    assert life.script.steps[-2:] == ["revert_rotation", "publish_crls"]
    assert timedelta(hours=24) <= await life.took() < timedelta(hours=24, minutes=1)
    assert life.script.only(EndRotationInput)[-1].reason == ("not seen to connect with its new certificate within 1d")


async def test_a_confirmation_in_the_last_moment_is_a_rotation(life: LifeStage) -> None:
    life.script.rotation = deque([NEW])
    life.script.reverted = life.script.settled
    await life.rotate(**LIMITS)
    assert (await life.result()).outcome is RotateOutcome.ROTATED
    assert life.script.steps.count("publish_crls") == 1


async def test_a_confirmation_that_postgresql_does_not_know_of_any_more_is_none(life: LifeStage) -> None:
    life.script.rotation = deque([NEW, PROVED])
    life.script.settled = EndedRotation(issued=True)
    await life.rotate(**LIMITS)
    assert (await life.result()).outcome is RotateOutcome.REVERTED


async def test_a_device_that_came_by_itself_is_not_asked(life: LifeStage) -> None:
    life.script.certificates = CertificatesSeen(old=("old",), new=("new",))
    life.script.rotation = deque([NEW, PROVED])
    await life.rotate(ask=False, **LIMITS)
    await life.until_asked("ask_for_rotation")
    await life.tell(CONFIRMED)
    assert (await life.result()).outcome is RotateOutcome.ROTATED
    assert not any(asked.ask for asked in life.script.only(AskForRotationInput))


async def test_a_device_that_came_and_connected_before_anybody_looked_is_settled_at_once(life: LifeStage) -> None:
    life.script.certificates = CertificatesSeen(old=("old",), settled="new")
    await life.rotate(ask=False, **LIMITS)
    assert (await life.result()).outcome is RotateOutcome.ROTATED
    assert life.script.steps == ["look_at_certificates", "settle_rotation", "publish_crls"]


async def test_a_device_that_may_not_be_rotated_is_a_result_that_says_why(life: LifeStage) -> None:
    life.script.refusal = "cannot rotate the certificate of motor-7: it is retired"
    await life.rotate()
    result = await life.result()
    assert (result.outcome, result.reason) == (RotateOutcome.REFUSED, life.script.refusal)


async def test_without_a_signer_the_rotation_ends_all_the_same(life: LifeStage) -> None:
    life.script.signs = False
    life.script.rotation = deque([NEW, PROVED])
    await life.rotate(**LIMITS)
    assert (await life.result()).outcome is RotateOutcome.ROTATED


@pytest.mark.parametrize(
    "step", ["look_at_certificates", "ask_for_rotation", "settle_rotation", "publish_crls", "revert_rotation"]
)
async def test_a_step_that_fails_is_tried_again(life: LifeStage, step: str) -> None:
    life.script.rotation = deque([NEW] if step == "revert_rotation" else [NEW, PROVED])
    life.script.fails.append(step)
    await life.rotate(**LIMITS)
    assert (await life.result()).outcome in (RotateOutcome.ROTATED, RotateOutcome.REVERTED)
    assert not life.script.fails


async def test_a_worker_that_remembers_nothing_replays_to_the_same_end(life: LifeStage) -> None:
    await life.remember_nothing()
    life.script.rotation = deque([NOTHING, NEW, PROVED])
    await life.rotate(**LIMITS)
    await life.until_asked("ask_for_rotation")
    await life.tell(ISSUED)
    assert (await life.result()).outcome is RotateOutcome.ROTATED
    assert life.script.steps.count("look_at_certificates") == 1
