"""What is said about artifacts: deltas that exist, and the building of one. All frozen, with defaults for growth."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from models.ids import SHA256

Sha256 = Annotated[str, StringConstraints(pattern=f"^{SHA256.pattern}$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class DeltaRef(_Frozen):
    """A delta in the artifact store, for devices that run the image `base_sha256`."""

    base_sha256: Sha256
    sha256: Sha256
    size_bytes: int = Field(ge=1)
    codec: str = "bsdiff4"


class DeltaRecord(_Frozen):
    """A row of the table `deltas`: the delta, or the reason why there is none. Exactly one of the two is set."""

    delta: DeltaRef | None = None
    failure: str | None = None


class BuildDeltaInput(_Frozen):
    """Build the delta that turns one image into another; (base, target, codec) is the idempotency key."""

    base_sha256: Sha256
    target_sha256: Sha256
    codec: str = "bsdiff4"


class BuildDeltaResult(_Frozen):
    """The delta, or the reason why there is none. `reused`: it was there before this run."""

    delta: DeltaRef | None = None
    failure: str | None = None
    reused: bool = False
