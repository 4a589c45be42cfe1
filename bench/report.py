"""What the figures are held against, and how they are shown. A target that is missed is said with by how much."""

import os
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

COUNTED = ("gateway", "worker", "postgresql", "temporal")
"""Whose CPU the target counts: what Tidegate and its stores need, without the broker and the devices."""


@dataclass(frozen=True)
class Target:
    """A figure's bound. `most`: the value may not exceed it; else it may not fall below."""

    name: str
    bound: float
    unit: str
    most: bool = True
    label: str = ""

    def missed_by(self, value: float | None) -> str | None:
        """By how much, or None when it is met. A figure that could not be measured is missed."""
        if value is None:
            return "not measured"
        if (value <= self.bound) if self.most else (value >= self.bound):
            return None
        return (
            f"by {abs(value - self.bound):.3g} {self.unit} ({value / self.bound:.2f} x)"
            if self.bound
            else f"by {value:g}"
        )


TARGETS = (
    Target("devices_per_second", 500, "devices/s", most=False),
    Target("cpu_seconds_per_1000_counted", 1.5, "CPU s", label="cpu_seconds_per_1000 *"),
    Target("history_events", 150, "events"),
    Target("gate_to_next_wave_seconds", 0.5, "s"),
    Target("admitted_after_crossing", 0, "devices"),
    Target("counted_minus_true", 0, "executions"),
)
BUSY_NEIGHBOUR = 0.1
"""From this share of the machine on, programs that are not measured make the figures worse than they are."""
TARGETS_AT_DEVICES = 10_000
"""The first two targets are for a rollout of this size: a small one is mostly its fixed costs."""
_AT_SIZE = ("devices_per_second", "cpu_seconds_per_1000_counted")


def complete(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures, with the CPU that the target counts, the machine, and what is missed."""
    counted = sum(figures["cpu_seconds_per_1000"][name] for name in COUNTED)
    figures = figures | {"cpu_seconds_per_1000_counted": counted, "cores": os.cpu_count()}
    return figures | {"missed": missed(figures)}


def missed(figures: dict[str, Any]) -> dict[str, str]:
    """The targets that these figures do not reach, and by how much."""
    found = {}
    for target in TARGETS:
        if target.name in _AT_SIZE and figures["devices"] < TARGETS_AT_DEVICES:
            continue
        if (how := target.missed_by(figures[target.name])) is not None:
            found[target.name] = how
    return found


def show(console: Console, runs: list[dict[str, Any]]) -> None:
    """One column per run, then what is missed and where the time went."""
    table = Table(title=f"Rollouts on {runs[0]['cores']} cores, broker {runs[0]['broker']}", title_justify="left")
    table.add_column("devices")
    for figures in runs:
        table.add_column(f"{figures['devices']:,}", justify="right")
    table.add_column("target", justify="right")

    def add(label: str, values: list[Any], target: str = "") -> None:
        table.add_row(label, *map(_shown, values), target)

    for name in ("outcome", "seconds"):
        add(name, [figures[name] for figures in runs])
    for target in TARGETS:
        bound = f"{'<=' if target.most else '>='} {target.bound:g}"
        add(target.label or target.name, [figures[target.name] for figures in runs], bound)
    for name in ("database_bytes_per_device", "devices_disagreeing"):
        add(name, [figures[name] for figures in runs])
    for group in ("cpu_seconds_per_1000", "peak_memory_mib"):
        table.add_section()
        table.add_row(group)
        for piece in runs[0][group]:
            add(f"  {piece}", [figures[group][piece] for figures in runs])
    console.print(table)
    console.print(f"* {', '.join(COUNTED)} together", highlight=False)
    for figures in runs:
        _show_time(console, figures)


def _show_time(console: Console, figures: dict[str, Any]) -> None:
    """Where the time and the machine went, and what is missed."""
    lines = [f"{figures['devices']:,} devices"]
    lines.append("  seconds: " + ", ".join(f"{name} {_shown(s)}" for name, s in figures["timeline_seconds"].items()))
    lines.append("  cores busy: " + ", ".join(f"{name} {share:.2f}" for name, share in cores_busy(figures).items()))
    lines += [f"  missed {name} {how}" for name, how in figures["missed"].items()]
    if figures["others_share_of_machine"] > BUSY_NEIGHBOUR:
        share = f"{100 * figures['others_share_of_machine']:.0f} %"
        lines.append(f"  other programs used {share} of this machine meanwhile: measure again on a quiet one")
    if not figures["missed"]:
        lines.append("  every target that applies at this size is met")
    for line in lines:
        console.print(escape(line), highlight=False, style="red" if line.startswith("  missed") else None)


def cores_busy(figures: dict[str, Any]) -> dict[str, float]:
    """Average number of cores that each piece kept busy, the largest first, then what others used and what was idle."""
    rate = figures["devices_per_second"] / 1000
    found = {name: seconds * rate for name, seconds in figures["cpu_seconds_per_1000"].items()}
    ordered = dict(sorted(found.items(), key=lambda item: -item[1]))
    others = figures["others_share_of_machine"] * figures["cores"]
    return ordered | {"others": others, "idle": max(0.0, figures["cores"] - sum(found.values()) - others)}


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "not measured" if value is None else str(value)
