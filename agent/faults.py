"""What goes wrong on which device: shares in, one fate per (seed, device, version) out, the same in every run.

A rule is a text: `crash=2%,fail=1%` for every version, `version=1.3.0-rc1,crash=70%,no-confirm=30%` for one. The first
rule whose version is the update's decides; without one, the first rule that names no version. For a fleet job that is no
firmware its job id stands in place of a version, and every attempt is drawn anew.

>>> plan = FaultPlan(7, (FaultRule.parse("version=1.3.0-rc1,crash=100%"), FaultRule.parse("fail=0%")))
>>> plan.fate("motor-1", "1.3.0-rc1"), plan.fate("motor-1", "1.3.0")
(<Fate.CRASH: 'crash'>, <Fate.HEALTHY: 'healthy'>)
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction

from models.errors import InvalidInputError


class Fate(StrEnum):
    """FAIL: the slot cannot be written. CRASH: the image crashes after every boot. NO_CONFIRM: it runs and cannot reach
    the gateway. SILENT: it is heard of no more."""

    HEALTHY = "healthy"
    FAIL = "fail"
    CRASH = "crash"
    NO_CONFIRM = "no-confirm"
    SILENT = "silent"


FAULTS = (Fate.FAIL, Fate.CRASH, Fate.NO_CONFIRM, Fate.SILENT)


def share(text: str) -> Fraction:
    """`2%` or `0.02`. Raises InvalidInputError."""
    try:
        value = Fraction(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except (ValueError, ZeroDivisionError) as error:
        raise InvalidInputError(f"not a share: {text!r}, expected one as in 2% or 0.02") from error
    if not 0 <= value <= 1:
        raise InvalidInputError(f"not a share: {text!r}, expected 0% to 100%")
    return value


def chance(*parts: object) -> float:
    """A number from 0 to 1 that depends on the parts alone."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7]) / 2**56


@dataclass(frozen=True, slots=True)
class FaultRule:
    """Shares of the devices that meet each fault with one version, or with any (`version` None)."""

    shares: Mapping[Fate, Fraction] = field(default_factory=dict)
    version: str | None = None

    @classmethod
    def parse(cls, text: str) -> "FaultRule":
        """Read `[version=V,]fault=share,...`. Raises InvalidInputError."""
        version, shares = None, {}
        for part in filter(None, text.split(",")):
            name, equals, value = part.strip().partition("=")
            if name == "version" and equals:
                version = value
            elif name in FAULTS and equals:
                shares[Fate(name)] = share(value)
            else:
                raise InvalidInputError(
                    f"not a fault: {part!r}, expected version=V or one of {', '.join(FAULTS)} with its share, as in crash=2%"
                )
        if sum(shares.values()) > 1:
            raise InvalidInputError(f"shares of {text!r} add up to more than 100 %")
        return cls(shares, version)


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """Everything that will go wrong in a fleet."""

    seed: int = 0
    rules: tuple[FaultRule, ...] = ()
    slow: Fraction = Fraction(0)
    late: Fraction = Fraction(0)

    def fate(self, device_id: str, version: str) -> Fate:
        """What this device meets with this version, or with this attempt of a fleet job (`<job id>:<attempt>`)."""
        rule = self._rule(version)
        if rule is None:
            return Fate.HEALTHY
        drawn, least = chance(self.seed, device_id, version), Fraction(0)
        for fault in FAULTS:
            least += rule.shares.get(fault, Fraction(0))
            if drawn < least:
                return fault
        return Fate.HEALTHY

    def is_slow(self, device_id: str) -> bool:
        """Whether the device has a slow link."""
        return chance(self.seed, device_id, "slow") < self.slow

    def is_late(self, device_id: str) -> bool:
        """Whether the device arrives late."""
        return chance(self.seed, device_id, "late") < self.late

    def _rule(self, version: str) -> FaultRule | None:
        what = version.partition(":")[0]  # no version has a colon: of `<job id>:<attempt>` the job
        named = next((rule for rule in self.rules if rule.version == what), None)
        return named or next((rule for rule in self.rules if rule.version is None), None)
