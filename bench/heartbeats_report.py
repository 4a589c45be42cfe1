"""What durable heartbeats per second are held against, whether all of them were kept, and how the figures are shown."""

import re
import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.report import BUSY_NEIGHBOUR, Target

PROCESSES = ("gateway", "postgresql", "broker", "publisher")
TARGETS = (
    Target("durable_per_second", 8_000, "heartbeats/s", most=False),
    Target("durable_by_one_by_one", 10, "x", most=False),
)


def batches_between(before: str, after: str) -> dict[str, float]:
    """What the gateway's own metrics say of its batches between two readings."""

    def grown(name: str) -> float:
        found = [re.search(rf"^{name} (\S+)$", text, re.MULTILINE) for text in (before, after)]
        return sum(sign * float(match[1]) for sign, match in zip((-1, 1), found, strict=True) if match)

    count = grown("tidegate_gateway_batch_messages_count")
    return {
        "count": count,
        "mean_messages": grown("tidegate_gateway_batch_messages_sum") / count if count else 0.0,
        "mean_milliseconds": 1000 * grown("tidegate_gateway_batch_seconds_sum") / count if count else 0.0,
        "tried_again": grown("tidegate_gateway_batch_retries_total"),
    }


def percentiles(values: list[float]) -> dict[str, float | None]:
    """The middle and the slow end; None where there was too little to say."""
    if len(values) < 2:
        return dict.fromkeys(("p50", "p95", "p99"), None)
    cuts = statistics.quantiles(values, n=100)
    return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}


def missed(figures: dict[str, Any]) -> dict[str, str]:
    """The targets that these figures do not reach, and by how much."""
    found = {target.name: target.missed_by(figures[target.name]) for target in TARGETS}
    return {name: how for name, how in found.items() if how is not None}


def is_right(figures: dict[str, Any]) -> bool:
    """Whether every heartbeat that the broker took is in PostgreSQL, once."""
    return bool(
        figures["published"] == figures["acknowledged_by_broker"] == figures["in_history"]
        and figures["lost"] == figures["twice"] == 0
    )


def show(console: Console, figures: dict[str, Any]) -> None:
    """A figure in each line, and what is missed."""
    title = f"Heartbeats of {figures['devices']:,} devices, {figures['cores']} cores, broker {figures['broker']}"
    table = Table(title=title, title_justify="left")
    for name in ("", "per s", "target"):
        table.add_column(name, justify="right" if name else "left")
    bounds = {target.name: f">= {target.bound:,g}" for target in TARGETS}
    for name in (
        "durable_per_second",
        "raw_broker_per_second",
        "postgresql_alone_per_second",
        "one_by_one_per_second",
        "durable_by_one_by_one",
    ):
        value = figures[name]
        shown = "not measured" if value is None else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
        table.add_row(name, shown, bounds.get(name, ""))
    table.add_section()
    table.add_row("cpu_seconds_per_1000")
    for name in PROCESSES:
        table.add_row(f"  {name}", f"{figures['cpu_seconds_per_1000'][name]:.4f}")
    console.print(table)
    for line in _lines(figures):
        console.print(line, highlight=False, style="red" if line.startswith(("missed", "WRONG")) else None)


def _shown(latencies: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {'-' if value is None else f'{value:.0f}'}" for name, value in latencies.items())


def _lines(figures: dict[str, Any]) -> list[str]:
    batches = figures["batches"]
    lines = [
        f"{batches['count']:,.0f} batches of {batches['mean_messages']:,.0f} messages and "
        f"{batches['mean_milliseconds']:.0f} ms on average",
        f"ms from publish to commit, {figures['lead']:,} on the way: {_shown(figures['latency_ms'])}; "
        f"at half that rate: {_shown(figures['latency_at_half_ms'])}",
    ]
    if not is_right(figures):
        lines.append(
            f"WRONG: {figures['published']:,} published, {figures['acknowledged_by_broker']:,} acknowledged by the broker, "
            f"{figures['in_history']:,} in the history: {figures['lost']:,} lost, {figures['twice']:,} twice"
        )
    lines += [f"missed {name} {how}" for name, how in figures["missed"].items()]
    if not figures["missed"]:
        lines.append("both targets are met")
    if figures["others_share_of_machine"] > BUSY_NEIGHBOUR:
        share = f"{100 * figures['others_share_of_machine']:.0f} %"
        lines.append(f"other programs used {share} of this machine meanwhile: measure again on a quiet one")
    return lines
