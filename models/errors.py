"""Every error Tidegate raises on purpose, in one tree.

```
TidegateError
├── InvalidInputError          what a person or a program gave us is wrong
│   ├── SpecError              a rollout's specification; carries every mistake with its line
│   └── ImportRowError         a row of an import file
├── NotFoundError              no such device, release, rollout
├── ConflictError              it exists already, with other content; or another rollout holds the devices
├── RefusedError               the request is well-formed and the state of things does not allow it
├── VerificationError          signature, hash, size, hardware, version or counter did not hold (firmware/)
├── StillWaitingError          the time given for a person or a device is over
└── UnavailableError           a server we depend on did not answer
```

The message says what was being done, what was expected, what came instead, and what to do next.
"""

from dataclasses import dataclass


class TidegateError(Exception):
    """Root of the tree."""


class InvalidInputError(TidegateError):
    """Input that can never succeed as it is."""


@dataclass(frozen=True)
class Mistake:
    """One mistake in a specification: `line` counts from 1, None where the source has no lines."""

    path: str
    message: str
    line: int | None = None

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line else ""
        return f"{where}{self.path}: {self.message}"


class SpecError(InvalidInputError):
    """A specification with one or more mistakes, all of them listed."""

    def __init__(self, source: str, mistakes: list[Mistake]) -> None:
        self.source = source
        self.mistakes = mistakes
        noun = "mistake" if len(mistakes) == 1 else "mistakes"
        super().__init__(f"{source}: {len(mistakes)} {noun}\n" + "\n".join(f"  {m}" for m in mistakes))


class ImportRowError(InvalidInputError):
    """Rows of an import file that cannot be taken; nothing was imported. `count` mistakes, the first of them listed."""

    def __init__(self, source: str, mistakes: list[Mistake], count: int) -> None:
        self.source = source
        self.mistakes = mistakes
        self.count = count
        noun = "mistake" if count == 1 else "mistakes"
        lines = [f"cannot import {source}: {count} {noun}; nothing was imported", *(f"  {m}" for m in mistakes)]
        if count > len(mistakes):
            lines.append(f"  ... and {count - len(mistakes)} more")
        super().__init__("\n".join(lines))


class NotFoundError(TidegateError):
    """What was named does not exist."""


class ConflictError(TidegateError):
    """It exists already, and differs from what was asked for."""


class RefusedError(TidegateError):
    """Well-formed, but the state of things does not allow it."""


class StillWaitingError(TidegateError):
    """Nothing is wrong; it waits for a person or a device, and the time given for it is over."""


class VerificationError(TidegateError):
    """A signature, hash, size, hardware, version, counter or date did not hold."""


class UnavailableError(TidegateError):
    """A server that is needed did not answer."""
