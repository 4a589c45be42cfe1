"""The process that makes one delta, and nothing else.

`python -m activities.delta_process CODEC BASE TARGET PATCH BYTES SECONDS`, the three in the middle being files. It may be killed at any moment, and limits itself before it reads a byte: BYTES of address space, SECONDS of processor
time (bsdiff can take half an hour and gigabytes on long runs of equal bytes). Exit status 0: the verified delta is in
PATCH; 3: there is none, and standard output says why; by signal: a limit was reached.
"""

import resource
import sys
from pathlib import Path

REFUSED = 3


def main(codec: str, base: Path, target: Path, patch: Path, *, memory_bytes: int, seconds: int) -> int:
    """Make the delta under both limits; the exit status."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from firmware.delta import CODECS, make_delta  # after the limits, which are there for what it does
    from firmware.errors import DeltaError

    try:
        patch.write_bytes(make_delta(base.read_bytes(), target.read_bytes(), CODECS[codec]))
    except DeltaError as error:
        print(error)
        return REFUSED
    except MemoryError:
        print(f"needs more than {memory_bytes // 2**20} MiB of memory")
        return REFUSED
    return 0


if __name__ == "__main__":
    name, *files = sys.argv[1:5]
    base_file, target_file, patch_file = map(Path, files)
    sys.exit(main(name, base_file, target_file, patch_file, memory_bytes=int(sys.argv[5]), seconds=int(sys.argv[6])))
