"""The failure gate: its numbers, its error probabilities, and that it never says yes to what it does not know."""

import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.gate import breaker_of, completion_count, halt_reason, judge_answered, judge_running, pass_probability
from domain.waves import cut_waves
from models.rollout import Verdict, WaveCounts
from models.spec import GateSpec

GATE = GateSpec()
COMPLETION = Fraction(95, 100)


def counts(succeeded: int, failed: int, queued: int = 0, neutral: int = 0) -> WaveCounts:
    return WaveCounts(
        queued=queued,
        succeeded=succeeded,
        failed=failed,
        timed_out=neutral,
        gate_succeeded=succeeded,
        gate_failed=failed,
    )


def test_the_boundary_is_the_line_of_the_sequential_probability_ratio_test() -> None:
    breaker = breaker_of(GATE)
    assert breaker.boundary(0) == pytest.approx(4.0704, abs=1e-4)
    assert breaker.boundary(1) - breaker.boundary(0) == pytest.approx(0.050253, abs=1e-6)


@pytest.mark.parametrize(("failed", "finished", "trips"), [(4, 4, False), (5, 5, True), (5, 18, True), (5, 19, False)])
def test_the_breaker_trips_on_the_boundary_and_not_before(failed: int, finished: int, trips: bool) -> None:
    assert breaker_of(GATE).trips(failed, finished) is trips


@given(st.integers(0, 5000), st.integers(0, 5000))
def test_integers_decide_as_the_formula_does(failed: int, succeeded: int) -> None:
    exact = failed * math.log(5) + succeeded * math.log(0.9 / 0.98) - math.log(0.99 / 0.001)
    if abs(exact) > 1e-4:  # nearer than that only rounding tells, and it is the same rounding everywhere
        assert breaker_of(GATE).trips(failed, failed + succeeded) is (exact > 0)


@given(st.integers(0, 2000), st.integers(0, 2000))
def test_one_more_failure_never_closes_the_breaker_and_one_more_success_never_trips_it(f: int, s: int) -> None:
    breaker = breaker_of(GATE)
    if breaker.trips(f, f + s):
        assert breaker.trips(f + 1, f + s + 1)
    else:
        assert not breaker.trips(f, f + s + 1)


def exposed(rate: float, rng: random.Random, devices: int) -> int | None:
    """Devices until the breaker trips, or None."""
    breaker, failed = breaker_of(GATE), 0
    for finished in range(1, devices + 1):
        failed += rng.random() < rate
        if breaker.trips(failed, finished):
            return finished
    return None


def test_error_probabilities_hold_over_four_thousand_simulated_rollouts() -> None:
    rng = random.Random(20)
    healthy = sum(exposed(0.02, rng, 500) is not None for _ in range(4000))
    assert healthy / 4000 <= 0.001 + 3 * math.sqrt(0.001 / 4000)
    dead = {exposed(1.0, rng, 500) for _ in range(10)}
    assert dead == {5}
    bad = sorted(exposed(0.3, rng, 2000) or 2001 for _ in range(4000))
    assert 13 <= bad[2000] <= 19
    missed = sum(exposed(0.1, rng, 2000) is None for _ in range(1000))
    assert missed / 1000 <= 0.01 + 3 * math.sqrt(0.01 / 1000)


def storm(rate: float, together: int, rng: random.Random, *, in_progress_counts: bool) -> bool:
    """Whether a rollout in which failures answer first halts: `together` start at once, each end starts another."""
    breaker, failed, finished, devices = breaker_of(GATE), 0, 0, 2000
    fails = [rng.random() < rate for _ in range(devices)]
    running, waiting = fails[:together], fails[together:]
    while running:
        running.sort()
        ended = running.pop()  # a failure, as long as there is one
        failed, finished = failed + ended, finished + 1
        if waiting:
            running.append(waiting.pop())
        if breaker.trips(failed, finished + (len(running) if in_progress_counts else 0)):
            return True
    return False


def test_failures_that_answer_first_do_not_halt_a_healthy_release() -> None:
    rng = random.Random(5)
    assert sum(storm(0.02, 300, rng, in_progress_counts=True) for _ in range(300)) <= 1
    assert all(storm(0.3, 300, rng, in_progress_counts=True) for _ in range(20))


def test_counting_only_finished_devices_would_halt_it_nearly_always() -> None:
    rng = random.Random(5)
    assert sum(storm(0.02, 300, rng, in_progress_counts=False) for _ in range(50)) > 30


def test_a_plain_threshold_in_its_place_would_halt_good_releases() -> None:
    rng, halted = random.Random(20), 0
    for _ in range(1000):
        failed = 0
        for finished in range(1, 501):
            failed += rng.random() < 0.02
            if finished >= 10 and failed > finished // 10:
                halted += 1
                break
    assert halted / 1000 > 0.05


def test_an_answered_wave_is_judged_in_integers_at_the_limit() -> None:
    assert judge_answered(counts(18, 2), GATE, COMPLETION).verdict is Verdict.PROMOTE
    verdict = judge_answered(counts(17, 2), GATE, COMPLETION)
    assert verdict.verdict is Verdict.HALT and "2 of 19 failed (10.5 %)" in verdict.reason


def test_the_reason_of_a_small_wave_says_how_little_it_proves() -> None:
    verdict = judge_answered(counts(3, 0), GATE, COMPLETION)
    assert verdict.reason == "promote: 3 of 3 succeeded; a 10% release passes a wave of 3 with probability 0.73"


def test_the_halt_reason_carries_rate_boundary_and_hypotheses() -> None:
    assert halt_reason(GATE, 7, 41) == (
        "halt: 7 of 41 exposed devices failed (17.1 %), boundary 6.1 at a healthy rate of 2% against 10%"
    )


@pytest.mark.parametrize(
    "unknown",
    [counts(0, 0), counts(0, 0, neutral=5), counts(18, 0, neutral=2), counts(94, 0, queued=6)],
    ids=["empty", "nobody started", "too few answers", "one short of completion"],
)
def test_everything_unknown_is_a_hold(unknown: WaveCounts) -> None:
    assert judge_answered(unknown, GATE, COMPLETION).verdict is Verdict.HOLD


def test_a_running_wave_continues_until_it_has_answered_and_the_last_one_until_nobody_is_left() -> None:
    running = counts(95, 0, queued=5)

    def verdict(outstanding: int, wait_for_all: bool) -> Verdict:
        return judge_running(running, GATE, COMPLETION, outstanding=outstanding, wait_for_all=wait_for_all).verdict

    assert verdict(5, False) is Verdict.PROMOTE
    assert verdict(5, True) is Verdict.CONTINUE
    assert verdict(0, True) is Verdict.PROMOTE
    fewer = judge_running(counts(94, 0, queued=6), GATE, COMPLETION, outstanding=6, wait_for_all=False)
    assert fewer.verdict is Verdict.CONTINUE and "94 of 100 answered" in fewer.reason


def test_a_crossed_boundary_halts_a_running_wave_at_once() -> None:
    verdict = judge_running(counts(0, 5, queued=95), GATE, COMPLETION, outstanding=95, wait_for_all=False)
    assert verdict.verdict is Verdict.HALT


@given(st.integers(1, 400))
def test_pass_probability_is_a_probability_and_small_waves_prove_less(answered: int) -> None:
    assert 0 < pass_probability(answered, GATE) <= 1
    assert pass_probability(answered, GATE) > 0.35  # nine devices, none may fail: 0.9 ** 9


@pytest.mark.parametrize(("total", "needed"), [(0, 1), (1, 1), (20, 19), (21, 20), (100, 95)])
def test_the_completion_share_is_rounded_up(total: int, needed: int) -> None:
    assert completion_count(total, COMPLETION) == needed


@given(st.integers(0, 10_000), st.lists(st.fractions(Fraction(1, 100), 1), max_size=6))
def test_waves_cut_every_device_once(total: int, shares: list[Fraction]) -> None:
    cut = cut_waves(total, [*sorted(shares), Fraction(1)])
    assert sum(cut) == total and min(cut) >= 0


def test_counts_are_capped_at_the_fleet() -> None:
    assert cut_waves(8, [10, Fraction(1)]) == [8, 0]
    assert cut_waves(60, [Fraction(5, 100), Fraction(25, 100), Fraction(1)]) == [3, 12, 45]


def test_devices_that_have_left_the_fleet_are_not_waited_for() -> None:
    answered = WaveCounts(succeeded=8, removed=2, gate_succeeded=8)
    assert judge_answered(answered, GateSpec(), Fraction(95, 100)).verdict is Verdict.PROMOTE
    missing = WaveCounts(succeeded=7, timed_out=1, removed=2, gate_succeeded=7)
    verdict = judge_answered(missing, GateSpec(), Fraction(95, 100))
    assert (verdict.verdict, verdict.reason.startswith("hold: 7 of 8 answered")) == (Verdict.HOLD, True)
    running = WaveCounts(succeeded=7, in_progress=1, removed=2, gate_succeeded=7)
    assert (
        judge_running(running, GateSpec(), Fraction(95, 100), outstanding=1, wait_for_all=False).verdict
        is Verdict.CONTINUE
    )


def test_a_wave_all_of_whose_devices_have_left_the_fleet_is_no_evidence() -> None:
    assert judge_answered(WaveCounts(removed=3), GateSpec(), Fraction(95, 100)).verdict is Verdict.HOLD
