"""How the machine is on which an agent runs: what Linux tells in /proc and /sys, without any library.

What a machine does not tell is left out: a heartbeat says what is known. Fleets of devices on one machine model theirs.
"""

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

Vitals = dict[str, float]
Read = Callable[[random.Random], Vitals]
"""What a device measures just now, by the names that a heartbeat has for it."""


def modelled(rng: random.Random) -> Vitals:
    """A small device in good health: 64 MiB free, 45 degrees, a fair signal."""
    return {
        "freeMemory": 64 * 2**20 + rng.randrange(2**20),
        "cpuTemperature": round(rng.gauss(45, 3), 1),
        "networkSignalStrength": round(rng.gauss(-60, 4)),
    }


def measured(_: random.Random, root: Path = Path("/")) -> Vitals:
    """What this machine says: free memory in bytes, the hottest zone in degrees, the wireless signal in dBm."""
    readings = {
        "freeMemory": _free_memory(root / "proc/meminfo"),
        "cpuTemperature": _temperature(root / "sys/class/thermal"),
        "networkSignalStrength": _signal(root / "proc/net/wireless"),
    }
    return {name: value for name, value in readings.items() if value is not None}


def _free_memory(file: Path) -> float | None:
    """`MemAvailable:  123456 kB`."""
    with suppress(OSError, ValueError, IndexError):
        for line in file.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _temperature(folder: Path) -> float | None:
    """Thousandths of a degree in `thermal_zone*/temp`; a zone that is off cannot be read."""
    found = []
    for zone in sorted(folder.glob("thermal_zone*/temp")):
        with suppress(OSError, ValueError):
            found.append(int(zone.read_text()) / 1000)
    return max(found, default=None)


def _signal(file: Path) -> float | None:
    """The column `level` of the first interface, behind two lines of headings."""
    with suppress(OSError, ValueError, IndexError):
        return float(file.read_text().splitlines()[2].split()[3].rstrip("."))
    return None
