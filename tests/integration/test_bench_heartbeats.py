"""The benchmark of heartbeats itself, small: its figures are those that are asked for, and it is not fooled."""

import io
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
from rich.console import Console

import bench.heartbeats
import devstack.services
from bench.heartbeats import HeartbeatsConfig, run
from bench.heartbeats_report import PROCESSES, is_right, show

SMALL = HeartbeatsConfig(seconds=2.0, devices=60, publishers=3, lead=300)
LOSING = """
import gateway.service
from transport.connection import Connection
original, heard = gateway.service.Gateway.receive, 0
def forgetful(self, topic, payload, retained, duplicate, receipt):
    global heard
    heard += topic.startswith("devices/")
    if heard % 50 == 7 and topic.startswith("devices/"):
        self.connection.acknowledge([receipt])
    else:
        original(self, topic, payload, retained, duplicate, receipt)
gateway.service.Gateway.receive = forgetful
from gateway.__main__ import main
main()
"""


async def test_a_small_run_measures_all_four_and_every_heartbeat_is_kept_once(tmp_path: Path) -> None:
    figures = await run(SMALL)
    assert is_right(figures), figures
    assert figures["published"] == figures["in_history"] > 300
    for name in ("durable", "raw_broker", "postgresql_alone", "one_by_one"):
        assert figures[f"{name}_per_second"] > 1, name
    assert set(figures["cpu_seconds_per_1000"]) == set(figures["peak_memory_mib"]) == set(PROCESSES)
    assert all(seconds > 0 for seconds in figures["cpu_seconds_per_1000"].values())
    assert figures["batches"]["count"] >= 1 and figures["batches"]["mean_messages"] >= 1
    for latencies in (figures["latency_ms"], figures["latency_at_half_ms"]):
        assert 0 < latencies["p50"] <= latencies["p95"] <= latencies["p99"]
    assert set(figures["missed"]) <= {"durable_per_second", "durable_by_one_by_one"}
    orjson.dumps(figures)
    assert "WRONG" not in shown(figures)


def shown(figures: dict[str, Any]) -> str:
    out = io.StringIO()
    show(Console(file=out, width=160), figures)
    return out.getvalue()


async def test_a_gateway_that_loses_messages_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(devstack.services.COMMANDS, "gateway", (sys.executable, "-c", LOSING))
    monkeypatch.setattr(bench.heartbeats, "STALLED_SECONDS", 3.0)
    figures = await run(SMALL)
    assert not is_right(figures)
    assert figures["lost"] == figures["published"] - figures["in_history"] > 0
    assert figures["acknowledged_by_broker"] == figures["published"], "the broker had them all"
    assert f"{figures['lost']:,} lost" in shown(figures)
