"""Faults are shares of a fleet, and the same ones in every run."""

from collections import Counter
from fractions import Fraction

import pytest

from agent.faults import Fate, FaultPlan, FaultRule, share
from models.errors import InvalidInputError

DEVICES = [f"motor-{number}" for number in range(4000)]


def test_a_rule_meets_its_shares_of_a_large_fleet() -> None:
    plan = FaultPlan(3, (FaultRule.parse("crash=20%,silent=0.1"),))
    fates = Counter(plan.fate(device, "1.3.0") for device in DEVICES)
    assert fates[Fate.CRASH] == pytest.approx(800, abs=120)
    assert fates[Fate.SILENT] == pytest.approx(400, abs=90)
    assert fates[Fate.FAIL] == fates[Fate.NO_CONFIRM] == 0


def test_the_same_seed_gives_the_same_fates_and_another_seed_others() -> None:
    rules = (FaultRule.parse("crash=50%"),)
    first, again, other = ([FaultPlan(s, rules).fate(d, "1") for d in DEVICES] for s in (1, 1, 2))
    assert first == again != other


def test_fates_with_two_versions_are_independent() -> None:
    plan = FaultPlan(1, (FaultRule.parse("crash=50%"),))
    both = sum(plan.fate(d, "1") is Fate.CRASH and plan.fate(d, "2") is Fate.CRASH for d in DEVICES)
    assert both == pytest.approx(1000, abs=130)


def test_a_rule_for_a_version_is_no_rule_for_others() -> None:
    plan = FaultPlan(1, (FaultRule.parse("version=1.3.0-rc1,crash=70%,no-confirm=30%"), FaultRule.parse("fail=1%")))
    assert {plan.fate(d, "1.3.0-rc1") for d in DEVICES} == {Fate.CRASH, Fate.NO_CONFIRM}
    assert {plan.fate(d, "1.3.0") for d in DEVICES} == {Fate.HEALTHY, Fate.FAIL}


def test_slow_and_late_devices_are_shares_too() -> None:
    plan = FaultPlan(1, slow=Fraction(1, 4), late=Fraction(1, 10))
    assert sum(map(plan.is_slow, DEVICES)) == pytest.approx(1000, abs=130)
    assert sum(map(plan.is_late, DEVICES)) == pytest.approx(400, abs=90)


@pytest.mark.parametrize("text", ["crash", "crash=", "crash=101%", "crash=-1%", "sulk=1%", "crash=60%,fail=60%", "x"])
def test_a_wrong_rule_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError):
        FaultRule.parse(text)


def test_shares_are_exact() -> None:
    assert share("2%") == share("0.02") == Fraction(1, 50)
