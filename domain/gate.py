"""The failure gate: a sequential test while a wave runs, a fixed test when it has answered and soaked.

The breaker is Wald's sequential probability ratio test (A. Wald, "Sequential Tests of Statistical Hypotheses", Annals of
Mathematical Statistics 16, 1945) of a healthy failure rate p0 against an unacceptable one p1. After f failures of n
exposed devices it halts when `f ln(p1/p0) + (n-f) ln((1-p1)/(1-p0)) >= ln((1-beta)/alpha)`. The three logarithms are kept as
integers in units of 1e-9, so that PostgreSQL, the gateway and the workflow compute the same decision from the same row.

n counts the devices that have answered and those that are updating. Failures are often quicker than successes: of 500
devices that start together, the ten that fail of a healthy 2 % may all answer before the first success, and a test over
finished ones alone would read "5 of 5". With devices in progress counted as not failed, the evidence is never more than
that of the same devices in the order in which they started, for which Wald's bound holds (docs/adr).

>>> breaker = breaker_of(GateSpec())
>>> breaker.trips(failed=5, exposed=5), breaker.trips(failed=5, exposed=500)
(True, False)
"""

import math
from dataclasses import dataclass
from fractions import Fraction

from models.quantities import format_share
from models.rollout import Verdict, WaveCounts, WaveVerdict
from models.spec import GateSpec

UNIT = 1_000_000_000
"""Fixed-point unit of the breaker's weights: nats times 1e9. At 10 million devices a sum stays under 2**63."""


@dataclass(frozen=True, slots=True)
class Breaker:
    """The halting boundary of one wave, in integers: trips when the weighted sum reaches the threshold."""

    failure_weight: int
    success_weight: int
    halt_threshold: int

    def evidence(self, failed: int, exposed: int) -> int:
        """Log-likelihood ratio of "as bad as the limit" against "healthy", times 1e9."""
        return failed * self.failure_weight + (exposed - failed) * self.success_weight

    def trips(self, failed: int, exposed: int) -> bool:
        """Whether these counts are on or beyond the boundary."""
        return self.evidence(failed, exposed) >= self.halt_threshold

    def boundary(self, exposed: int) -> float:
        """Failures at which a wave with `exposed` devices halts: a line in `exposed`. For people, not for deciding."""
        slope = self.failure_weight - self.success_weight
        if not slope:
            return math.inf
        return (self.halt_threshold - exposed * self.success_weight) / slope


NEVER = Breaker(failure_weight=0, success_weight=0, halt_threshold=1)
"""The boundary of a job without a gate: no evidence reaches it."""


def breaker_of(gate: GateSpec | None) -> Breaker:
    """The boundary that a gate's rates and error probabilities describe; without a gate one that nothing reaches."""
    if gate is None:
        return NEVER
    p0, p1 = float(gate.healthy), float(gate.limit)
    return Breaker(
        failure_weight=round(math.log(p1 / p0) * UNIT),
        success_weight=round(math.log((1 - p1) / (1 - p0)) * UNIT),
        halt_threshold=round(math.log((1 - float(gate.missed_halt)) / float(gate.false_halt)) * UNIT),
    )


def completion_count(total: int, completion: Fraction) -> int:
    """Answers that a wave of `total` needs: the share rounded up, at least one."""
    return max(1, math.ceil(total * completion))


def percent(part: int, whole: int) -> str:
    """`17.1 %`, for reasons."""
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def halt_reason(gate: GateSpec | None, failed: int, exposed: int) -> str:
    """Why the breaker halted, with its numbers."""
    if gate is None:
        return f"halt: {failed} of {exposed} exposed devices failed ({percent(failed, exposed)})"
    return (
        f"halt: {failed} of {exposed} exposed devices failed ({percent(failed, exposed)}), "
        f"boundary {breaker_of(gate).boundary(exposed):.1f} "
        f"at a healthy rate of {format_share(gate.healthy)} against {format_share(gate.limit)}"
    )


def judge_running(
    counts: WaveCounts, gate: GateSpec | None, completion: Fraction, *, outstanding: int, wait_for_all: bool
) -> WaveVerdict:
    """Whether a wave that runs may go on to its soak.

    Args:
        counts: the wave's counters.
        completion: share of the wave that must have answered; devices that have left the fleet are not waited for.
        outstanding: executions not yet terminal of those that are waited for (the wave's, or the whole rollout's).
        wait_for_all: the last wave waits until nothing is outstanding; an earlier one until it has answered.

    Returns:
        HALT when the breaker's boundary is reached, CONTINUE while answers are missing and can still come,
        otherwise what `judge_answered` says.
    """
    if breaker_of(gate).trips(counts.gate_failed, counts.exposed):
        return WaveVerdict(verdict=Verdict.HALT, reason=halt_reason(gate, counts.gate_failed, counts.exposed))
    needed = completion_count(counts.awaited, completion)
    settled = outstanding == 0 if wait_for_all else counts.outstanding == 0 or counts.answered >= needed
    if not settled:
        return WaveVerdict(
            verdict=Verdict.CONTINUE,
            reason=f"{counts.answered} of {counts.awaited} answered, {counts.gate_failed} failed, {needed} needed",
        )
    return judge_answered(counts, gate, completion)


def judge_answered(counts: WaveCounts, gate: GateSpec | None, completion: Fraction) -> WaveVerdict:
    """The verdict on a wave that has answered (and, when asked again after it, soaked).

    Without a gate nothing is held or halted: PROMOTE says how many have done it.

    PROMOTE needs the breaker closed, the completion rule met and a failure share of at most `gate.limit`, compared in
    integers. A higher share is HALT, too few answers HOLD.
    """
    failed, answered, total = counts.gate_failed, counts.answered, counts.awaited
    if gate is None:
        return WaveVerdict(
            verdict=Verdict.PROMOTE,
            reason=f"{counts.succeeded} of {total} succeeded, {counts.failed + counts.timed_out + counts.rejected} failed",
        )
    if breaker_of(gate).trips(failed, counts.exposed):
        return WaveVerdict(verdict=Verdict.HALT, reason=halt_reason(gate, failed, counts.exposed))
    if total == 0:
        return WaveVerdict(verdict=Verdict.HOLD, reason="hold: the wave has no devices, so there is no evidence")
    if answered and Fraction(failed, answered) > gate.limit:
        return WaveVerdict(
            verdict=Verdict.HALT,
            reason=f"halt: {failed} of {answered} failed ({percent(failed, answered)}), "
            f"more than the limit of {format_share(gate.limit)}",
        )
    needed = completion_count(total, completion)
    if answered < needed:
        return WaveVerdict(
            verdict=Verdict.HOLD,
            reason=f"hold: {answered} of {total} answered ({percent(answered, total)}), "
            f"{needed} needed for a completion of {format_share(completion)}",
        )
    return WaveVerdict(
        verdict=Verdict.PROMOTE,
        reason=f"promote: {answered - failed} of {answered} succeeded; a {format_share(gate.limit)} release "
        f"passes a wave of {answered} with probability {pass_probability(answered, gate):.2g}",
    )


def pass_probability(answered: int, gate: GateSpec) -> float:
    """Probability that a release failing at `gate.limit` passes a wave of `answered` devices without the final test
    halting it: P(failures <= limit * answered) of a binomial. The breaker can only lower it, so this is an upper bound.

    >>> round(pass_probability(3, GateSpec()), 2)
    0.73
    """
    rate = float(gate.limit)
    most = math.floor(gate.limit * answered)
    log_terms = (
        math.lgamma(answered + 1)
        - math.lgamma(k + 1)
        - math.lgamma(answered - k + 1)
        + k * math.log(rate)
        + (answered - k) * math.log1p(-rate)
        for k in range(most + 1)
    )
    return min(1.0, sum(math.exp(term) for term in log_terms))
