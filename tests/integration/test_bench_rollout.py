"""The benchmark itself, small: it measures a real rollout, and its figures are the ones that are asked for."""

from bench.__main__ import is_right
from bench.report import complete
from bench.rollout import BenchConfig, run

PIECES = {"gateway", "worker", "postgresql", "temporal", "broker", "simulator"}


async def test_a_small_rollout_is_measured_and_everything_agrees() -> None:
    figures = complete(await run(BenchConfig(devices=80)))
    assert is_right(figures), figures
    assert figures["devices_per_second"] > 1
    assert set(figures["cpu_seconds_per_1000"]) == set(figures["peak_memory_mib"]) == PIECES
    assert all(seconds > 0 for seconds in figures["cpu_seconds_per_1000"].values())
    assert all(size > 1 for size in figures["peak_memory_mib"].values())
    assert figures["history_events"] <= 150
    assert figures["crossing"]["tripped"]
    assert figures["crossing"]["exposed"] < 250
    assert figures["missed"].keys() <= {"gate_to_next_wave_seconds"}
