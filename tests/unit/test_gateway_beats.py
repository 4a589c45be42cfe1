"""Which heartbeats of a batch are recorded, and which of them presence is brought to."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.beats import MAX_ROUNDS, Beats
from gateway.requests import Heartbeat


def heartbeat(thing: str, time: float | None, boot: str | None = "a", uptime: int = 1) -> Heartbeat:
    return Heartbeat(thing, time, uptime, None, None, None, None, None, None, boot, None)


def taken(*said: Heartbeat) -> list[tuple[str, int, int, bool]]:
    beats = Beats()
    for beat in said:
        beats.add(beat)
    return [(beat.device_id, beat.beat_no, beat.round, beat.newest) for beat in beats.said]


def test_every_heartbeat_is_recorded_and_the_last_one_is_the_newest() -> None:
    said = [heartbeat("m", 1), heartbeat("n", 1), heartbeat("m", 2), heartbeat("m", None)]
    assert taken(*said) == [("m", 0, 0, False), ("n", 0, 0, True), ("m", 1, 0, False), ("m", 2, 0, True)]


def test_another_boot_is_another_round_and_there_are_only_so_many() -> None:
    said = [heartbeat("m", number, "ab"[number % 2]) for number in range(7)]
    rounds = [(number, round_no, newest) for _, number, round_no, newest in taken(*said)]
    first = [(number, number, True) for number in range(MAX_ROUNDS - 1)]
    assert rounds == [*first, *((number, MAX_ROUNDS - 1, number == 6) for number in range(MAX_ROUNDS - 1, 7))]


def test_what_is_in_the_batch_twice_was_said_once_and_does_not_become_the_newest() -> None:
    backlog = [heartbeat("m", 1), heartbeat("m", 2), heartbeat("m", 3)]
    again = [heartbeat("m", 1), heartbeat("m", 2), heartbeat("m", 3)]
    assert taken(*backlog, *again) == [("m", 0, 0, False), ("m", 1, 0, False), ("m", 2, 0, True)]
    assert len(taken(heartbeat("m", None), heartbeat("m", None))) == 2, "without a time one cannot tell"
    assert len(taken(heartbeat("m", 1), heartbeat("m", 1, uptime=2))) == 2, "a clock that stands still"
    assert len(taken(heartbeat("m", 1), heartbeat("n", 1))) == 2


def test_a_device_that_is_barred_has_said_nothing() -> None:
    beats = Beats()
    for beat in (heartbeat("m", 1), heartbeat("n", 1), heartbeat("m", 2)):
        beats.add(beat)
    left = beats.without(frozenset({"m"}))
    assert [beat.device_id for beat in left.said] == list(left.things) == ["n"]


def test_a_batch_that_failed_leaves_nothing_on_what_is_tried_again_one_by_one() -> None:
    said = [heartbeat("m", 1), heartbeat("m", 2, "b"), heartbeat("m", 3, "b")]
    assert taken(*said)[2] == ("m", 2, 1, True)
    assert [taken(beat) for beat in said] == [[("m", 0, 0, True)]] * 3


@given(st.lists(st.tuples(st.sampled_from("mno"), st.integers(0, 5), st.sampled_from(["a", "b", None]))))
def test_each_device_has_one_newest_in_each_round_and_numbers_without_a_gap(
    said: list[tuple[str, int, str | None]],
) -> None:
    found = taken(*(heartbeat(thing, time, boot) for thing, time, boot in said))
    assert len(found) == len(set(said))
    for thing in "mno":
        own = [(number, round_no, newest) for name, number, round_no, newest in found if name == thing]
        assert [number for number, _, _ in own] == list(range(len(own)))
        assert [round_no for _, round_no, newest in own if newest] == sorted({round_no for _, round_no, _ in own})
