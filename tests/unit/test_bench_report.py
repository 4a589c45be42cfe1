"""Figures against targets, and what a piece costs: a miss is said with by how much, and nothing that ran goes uncounted."""

import asyncio
import io
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from bench import heartbeats_report as heartbeats
from bench.report import COUNTED, complete, cores_busy, show
from bench.sampling import Sampler, cpu_seconds, memory_bytes

BURN = "import time\nend = time.process_time() + {}\nwhile time.process_time() < end: pass\n"


def figures(**changes: Any) -> dict[str, Any]:
    """What a run that met every target would give."""
    pieces = dict.fromkeys(("gateway", "worker", "postgresql", "temporal", "broker", "simulator"), 0.3)
    return {
        "devices": 10_000,
        "broker": "mosquitto",
        "outcome": "succeeded",
        "seconds": 15.0,
        "devices_per_second": 666.0,
        "cpu_seconds_per_1000": pieces,
        "peak_memory_mib": pieces,
        "history_events": 85,
        "database_bytes_per_device": 1200.0,
        "gate_to_next_wave_seconds": 0.2,
        "admitted_after_crossing": 0,
        "counted_minus_true": 0,
        "devices_disagreeing": 0,
        "others_share_of_machine": 0.0,
        "timeline_seconds": {"canary": 1.0},
    } | changes


def shown(run: dict[str, Any]) -> str:
    out = io.StringIO()
    show(Console(file=out, width=120), [run])
    return out.getvalue()


def test_figures_that_meet_every_target_miss_nothing() -> None:
    run = complete(figures())
    assert run["missed"] == {}
    assert "every target that applies at this size is met" in shown(run)


@pytest.mark.parametrize(
    ("changes", "name", "how"),
    [
        ({"devices_per_second": 400.0}, "devices_per_second", "by 100 devices/s (0.80 x)"),
        ({"history_events": 300}, "history_events", "by 150 events (2.00 x)"),
        ({"gate_to_next_wave_seconds": 0.75}, "gate_to_next_wave_seconds", "by 0.25 s (1.50 x)"),
        ({"gate_to_next_wave_seconds": None}, "gate_to_next_wave_seconds", "not measured"),
        ({"admitted_after_crossing": 2}, "admitted_after_crossing", "by 2"),
        ({"admitted_after_crossing": None}, "admitted_after_crossing", "not measured"),
        ({"counted_minus_true": 1}, "counted_minus_true", "by 1"),
    ],
)
def test_a_missed_target_is_said_with_by_how_much(changes: dict[str, Any], name: str, how: str) -> None:
    run = complete(figures(**changes))
    assert run["missed"] == {name: how}
    assert f"missed {name} {how}" in shown(run)


def test_the_cpu_target_counts_what_tidegate_and_its_stores_use_and_not_broker_and_devices() -> None:
    pieces = dict.fromkeys(COUNTED, 0.5) | {"broker": 50.0, "simulator": 50.0}
    assert complete(figures(cpu_seconds_per_1000=pieces))["missed"] == {
        "cpu_seconds_per_1000_counted": "by 0.5 CPU s (1.33 x)"
    }


def test_targets_of_speed_are_for_the_large_rollout_alone() -> None:
    assert complete(figures(devices=500, devices_per_second=100.0))["missed"] == {}
    assert "counted_minus_true" in complete(figures(devices=500, counted_minus_true=1))["missed"]


def test_where_the_machine_went_adds_up_to_all_of_it() -> None:
    run = complete(figures(others_share_of_machine=0.25)) | {"cores": 4}
    busy = cores_busy(run)
    assert sum(busy.values()) == pytest.approx(4)
    assert busy["gateway"] == pytest.approx(0.3 * 0.666)
    assert busy["others"] == 1.0


def test_a_busy_neighbour_is_named() -> None:
    assert "other programs used 70 %" in shown(complete(figures(others_share_of_machine=0.7)))


def test_the_cpu_of_a_child_that_has_ended_is_counted() -> None:
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURN.format(0.3)!r}])\nprint('done', flush=True)\ninput()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout and parent.stdin
    parent.stdout.readline()
    assert cpu_seconds([parent.pid]) > 0.29
    assert memory_bytes([parent.pid]) > 1024 * 1024
    parent.communicate(b"\n")
    assert cpu_seconds([parent.pid]) == 0
    assert memory_bytes([parent.pid]) == 0


async def test_a_sample_measures_what_happens_between_its_begin_and_its_end() -> None:
    code = BURN.format(0.2) + "input()"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdin=subprocess.PIPE)
    async with Sampler(lambda: {"burner": [process.pid]}) as sampler:
        while cpu_seconds([process.pid]) < 0.15:  # counted in hundredths, by another clock than the one it burns by
            await asyncio.sleep(0.01)
    assert 0.1 < sampler.cpu["burner"] < 0.6
    assert sampler.peak_mib["burner"] > 1
    assert sampler.seconds > 0.1
    await process.communicate(b"\n")


def beats(**changes: Any) -> dict[str, Any]:
    """What a run of heartbeats that met both targets would give."""
    latency = {"p50": 100.0, "p95": 200.0, "p99": None}
    found = {
        "durable_per_second": 9_000.0,
        "raw_broker_per_second": 60_000.0,
        "postgresql_alone_per_second": 50_000.0,
        "one_by_one_per_second": 800.0,
        "durable_by_one_by_one": 11.25,
        "cpu_seconds_per_1000": dict.fromkeys(heartbeats.PROCESSES, 0.01),
        "batches": {"count": 50.0, "mean_messages": 1800.0, "mean_milliseconds": 60.0, "tried_again": 0.0},
        "latency_ms": latency,
        "latency_at_half_ms": latency,
        "published": 90_000,
        "acknowledged_by_broker": 90_000,
        "in_history": 90_000,
        "lost": 0,
        "twice": 0,
        "devices": 2_000,
        "lead": 8_000,
        "cores": 2,
        "broker": "mosquitto",
        "others_share_of_machine": 0.0,
    } | changes
    return found | {"missed": heartbeats.missed(found)}


def shown_beats(run: dict[str, Any]) -> str:
    out = io.StringIO()
    heartbeats.show(Console(file=out, width=160), run)
    return out.getvalue()


def test_heartbeats_that_meet_both_targets_miss_nothing_and_are_right() -> None:
    assert beats()["missed"] == {} and heartbeats.is_right(beats())
    assert "both targets are met" in shown_beats(beats()) and "WRONG" not in shown_beats(beats())


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({"durable_per_second": 6_000.0}, "missed durable_per_second by 2e+03 heartbeats/s (0.75 x)"),
        ({"durable_by_one_by_one": 9.0}, "missed durable_by_one_by_one by 1 x (0.90 x)"),
        ({"durable_by_one_by_one": None}, "missed durable_by_one_by_one not measured"),
        ({"others_share_of_machine": 0.4}, "other programs used 40 % of this machine"),
    ],
)
def test_a_target_of_heartbeats_that_is_missed_is_said_and_is_no_failure(changes: dict[str, Any], how: str) -> None:
    assert how in shown_beats(beats(**changes))
    assert heartbeats.is_right(beats(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"in_history": 89_999, "lost": 1},
        {"in_history": 90_001, "twice": 1},
        {"in_history": 90_000, "lost": 1, "twice": 1},
        {"acknowledged_by_broker": 89_999},
    ],
)
def test_heartbeats_that_are_lost_or_kept_twice_are_a_failure(changes: dict[str, Any]) -> None:
    assert not heartbeats.is_right(beats(**changes))
    assert "WRONG" in shown_beats(beats(**changes))
