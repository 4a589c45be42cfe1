"""The benchmark of lookups, small: real servers, right answers, and the figures that are asked for."""

import io

import pytest
from rich.console import Console

from bench.lookups import MISSES, LookupsConfig, conclusions, run, show
from tests.conftest import redis_binary

SMALL = LookupsConfig(devices=100, lookups=300, concurrency=8, rounds=1)


def shown(figures: dict[str, object]) -> str:
    out = io.StringIO()
    show(Console(file=out, width=160), figures)
    return out.getvalue()


@pytest.mark.skipif(redis_binary() is None, reason="redis-server is not installed")
async def test_lookups_are_measured_with_and_without_redis_and_every_answer_is_right() -> None:
    figures = await run(SMALL)
    passes = figures["passes"]
    assert figures["wrong_answers"] == 0
    assert {name: each["hit_ratio"] for name, each in passes.items() if "changes" not in name} == {
        "postgresql by id": 0.0,
        MISSES: 0.0,
        "redis by id": 1.0,
        "postgresql by serial": 0.0,
        "redis by serial": 1.0,
    }
    for each in passes.values():
        assert each["lookups_per_second"] > 1
        assert 0 < each["p50_ms"] <= each["p99_ms"]
        assert set(each["cpu_seconds_per_1000"]) == {"client", "postgresql", "redis", "relay"}
    assert set(figures["ratios"]) == {"by id", "by serial"}
    assert "kept in Redis" in shown(figures)


async def test_where_redis_is_not_installed_postgresql_alone_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    figures = await run(SMALL)
    assert set(figures["passes"]) == {"postgresql by id", "postgresql by serial"}
    assert figures["ratios"] == {}
    assert "redis-server is not installed" in shown(figures)


def test_what_redis_costs_is_said_as_plainly_as_what_it_gives() -> None:
    ratio = {
        "lookups_per_second": 0.8,
        "postgresql_cpu": 0.0,
        "all_cpu": 1.2,
        "hit_ratio_to_spare_client": None,
        "hit_ratio_to_spare_postgresql": 0.5,
    }
    figures = {"redis": True, "ratios": {"by id": ratio}, "wrong_answers": 3, "others_share_of_machine": 0.5}
    said = "\n".join(conclusions(figures))
    assert "0.80 x the lookups" in said
    assert "spares client nothing" in said
    assert "spares postgresql from 50 % hits on" in said
    assert "3 answers were WRONG" in said
    assert "other programs used 50 %" in said
