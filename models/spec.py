"""A rollout's specification as an operator writes it, with its defaults.

```yaml
name: motor-1.3.0
release: motor-controller@1.3.0
target: {type: motor, tags: {environment: production}}
waves:
  - {name: canary, size: 5%, soak: 4h}
  - {name: fleet, size: 100%}
```

Sizes are cumulative: `25%` means that a quarter of the whole fleet has been reached when the wave is over. A size given
as a count means that many devices reached so far.
"""

from datetime import timedelta
from enum import StrEnum
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, field_validator, model_validator

from models.device import DeviceFilter
from models.ids import ROLLOUT_NAME, parse_release_ref
from models.quantities import Duration, Share, format_share, parse_share


class Approval(StrEnum):
    """Where a person has to agree before the rollout goes on."""

    NONE = "none"
    START = "start"
    EVERY_WAVE = "every-wave"


def _parse_size(value: Any) -> Fraction | int:
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ValueError(f"expected at least 1 device, got {value}")
        return value
    if isinstance(value, str) and value.strip().isdecimal():
        return _parse_size(int(value))
    try:
        share = parse_share(value)
    except ValueError:
        raise ValueError(f"expected a percentage as in 5% or a number of devices, got {value!r}") from None
    if share == 0:
        raise ValueError("expected more than 0%")
    return share


WaveSize = Annotated[
    Fraction | int,
    BeforeValidator(_parse_size),
    PlainSerializer(lambda size: size if isinstance(size, int) else format_share(size), return_type=str | int),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WaveSpec(_Strict):
    """One wave: `size` is cumulative over the fleet, `soak` is how long it is watched after it has answered."""

    name: str = Field(min_length=1, max_length=64)
    size: WaveSize
    soak: Duration = timedelta(0)


class GateSpec(_Strict):
    """The sequential failure gate: failure rates and error probabilities (docs/design.md, "The gate")."""

    healthy: Share = Fraction(2, 100)
    limit: Share = Fraction(10, 100)
    false_halt: Share = Fraction(1, 1000)
    missed_halt: Share = Fraction(1, 100)

    @model_validator(mode="after")
    def _ordered(self) -> "GateSpec":
        if not 0 < self.healthy < self.limit < 1:
            raise ValueError(
                "expected 0% < healthy < limit < 100%, "
                f"got healthy {format_share(self.healthy)} and limit {format_share(self.limit)}"
            )
        if not (0 < self.false_halt < Fraction(1, 2) and 0 < self.missed_halt < Fraction(1, 2)):
            raise ValueError("expected false_halt and missed_halt between 0% and 50%, both excluded")
        return self


class DeadlineSpec(_Strict):
    """How long a device may take for each step before it counts as timed out."""

    accept: Duration = timedelta(hours=24)
    download: Duration = timedelta(hours=2)
    install: Duration = timedelta(minutes=30)
    confirm: Duration = timedelta(minutes=15)

    @field_validator("*")
    @classmethod
    def _positive(cls, value: timedelta) -> timedelta:
        if value <= timedelta(0):
            raise ValueError("expected more than 0s")
        return value


class PaceSpec(_Strict):
    """How fast: devices updating at one moment, and devices started in any 60 seconds (None: no limit)."""

    in_flight: int = Field(default=500, ge=1)
    per_minute: int | None = Field(default=1000, ge=1)


class RolloutSpec(_Strict):
    """A whole specification. Every key but name, release and waves has a default."""

    name: str
    release: str
    target: DeviceFilter = DeviceFilter()
    waves: tuple[WaveSpec, ...] = Field(min_length=1, max_length=50)
    gate: GateSpec = GateSpec()
    completion: Share = Fraction(95, 100)
    deadlines: DeadlineSpec = DeadlineSpec()
    pace: PaceSpec = PaceSpec()
    approval: Approval = Approval.NONE

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not ROLLOUT_NAME.fullmatch(value):
            raise ValueError(f"expected letters, digits, dots and dashes, at most 64, got {value!r}")
        return value

    @field_validator("release")
    @classmethod
    def _release(cls, value: str) -> str:
        try:
            parse_release_ref(value)
        except Exception as error:
            raise ValueError(str(error)) from None
        return value

    @field_validator("waves")
    @classmethod
    def _waves(cls, waves: tuple[WaveSpec, ...]) -> tuple[WaveSpec, ...]:
        names = [wave.name for wave in waves]
        if len(set(names)) != len(names):
            raise ValueError(f"expected every wave to have its own name, got {', '.join(names)}")
        for kind in (int, Fraction):
            sizes = [wave.size for wave in waves if isinstance(wave.size, kind)]
            if sizes != sorted(set(sizes)):
                raise ValueError("expected sizes that grow from wave to wave: a size is the share reached so far")
        if any(isinstance(wave.size, Fraction) and wave.size == 1 for wave in waves[:-1]):
            raise ValueError("expected 100% only in the last wave")
        return waves
