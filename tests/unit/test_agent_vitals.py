"""What the agent says of its machine: what is there, in a heartbeat's units, and nothing of what is not."""

import random
from pathlib import Path

from agent.vitals import measured, modelled

RNG = random.Random(1)
WIRELESS = """\
Inter-| sta-|   Quality        |   Discarded packets               | Missed | WE
 face | tus | link level noise |  nwid  crypt   frag  retry   misc | beacon | 22
 wlan0: 0000   58.  -52.  -256        0      0      0      0      0        0
"""


def test_a_machine_is_read_in_bytes_degrees_and_dbm(tmp_path: Path) -> None:
    (tmp_path / "proc/net").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 4096 kB\nMemFree: 7 kB\nMemAvailable:    1024 kB\n")
    (tmp_path / "proc/net/wireless").write_text(WIRELESS)
    for zone, text in (("thermal_zone0", "41500\n"), ("thermal_zone1", "63250\n"), ("thermal_zone2", "off\n")):
        (tmp_path / "sys/class/thermal" / zone).mkdir(parents=True)
        (tmp_path / "sys/class/thermal" / zone / "temp").write_text(text)
    assert measured(RNG, tmp_path) == {
        "freeMemory": 1024 * 1024,
        "cpuTemperature": 63.25,
        "networkSignalStrength": -52.0,
    }


def test_a_machine_that_tells_nothing_says_nothing(tmp_path: Path) -> None:
    assert measured(RNG, tmp_path) == {}


def test_this_machine_has_free_memory() -> None:
    assert measured(RNG)["freeMemory"] > 2**20


def test_a_modelled_device_has_all_that_a_heartbeat_has() -> None:
    assert modelled(RNG).keys() == {"freeMemory", "cpuTemperature", "networkSignalStrength"}
