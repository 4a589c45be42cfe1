"""`diagnose DEVICE [TYPE]`: ask a device how it is, or show what it has answered before.

What a device answers is shown as text and nothing else: escapes, markup and control characters of it are written out
(cli/output.py), and a field that is missing or of the wrong kind is left out.
"""

import asyncio
import secrets
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text
from temporalio.client import WorkflowFailureError

from cli.command import Session, whoami
from cli.given import duration_of
from cli.output import ExitStatus, as_dict, facts, printable, size, table, when
from domain.diagnosis import number, percent, span, summary
from models.diagnostics import (
    MAX_DELAY_SECONDS,
    MAX_LINES,
    AskDeviceInput,
    AskDeviceResult,
    AskOutcome,
    DiagnosticState,
    DiagnosticView,
)
from models.errors import InvalidInputError, RefusedError
from models.protocol import DiagnosticType
from store.diagnostics import DiagnosticStore
from workflows.lifecycle_client import start_diagnosis

WORKER_SECONDS = 60.0
"""Beyond the device's own time: how long a worker may take to do its part."""

_STATUS = {
    AskOutcome.ANSWERED: ExitStatus.SUCCEEDED,
    AskOutcome.REBOOTED: ExitStatus.SUCCEEDED,
    AskOutcome.TIMED_OUT: ExitStatus.WAITING,
    AskOutcome.NOT_REBOOTED: ExitStatus.WAITING,
    AskOutcome.REFUSED: ExitStatus.REFUSED,
    AskOutcome.FAILED: ExitStatus.ERROR,
}


async def diagnose(
    session: Session,
    device_id: Annotated[str, typer.Argument(metavar="DEVICE", help="Device id.")],
    what: Annotated[
        DiagnosticType | None,
        typer.Argument(metavar="TYPE", help=f"One of {', '.join(DiagnosticType)}; without it, past answers are shown."),
    ] = None,
    lines: Annotated[
        int | None, typer.Option(min=1, max=MAX_LINES, metavar="N", help="log-tail: the last so many lines (50).")
    ] = None,
    delay: Annotated[
        str | None, typer.Option(metavar="DURATION", help="reboot: that long after the answer (10s).")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="reboot: wait until the device is back.")] = False,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why, for the record.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="Without TYPE: most questions to show.")] = 20,
) -> ExitStatus:
    """Ask a device how it is and show its answer; without TYPE, show what it was asked before.

    A device has 30 seconds to answer. A reboot is an order signed for this device alone, valid once and for minutes.
    """
    if what is None:
        return await _show_past(session, device_id, limit)
    asked = _question(device_id, what, lines, delay, wait, reason)
    async with session.database() as db:
        await DiagnosticStore(db).of_device(device_id, 1)  # is there such a device?
    handle = await start_diagnosis(await session.temporal(), asked)
    session.say_process(handle.id)
    patience = asked.limit.total_seconds() + WORKER_SECONDS
    if asked.wait_for_boot:
        patience += asked.boot_limit.total_seconds() + (asked.delay_seconds or 0)
    try:
        result = await asyncio.wait_for(handle.result(), patience)
    except TimeoutError:
        session.out.say(f"no worker has dealt with it within {patience:.0f} s; 'diagnose {device_id}' shows what comes")
        return ExitStatus.WAITING
    except WorkflowFailureError as error:
        raise RefusedError(f"{handle.id} ended without a result: {error.cause}") from error
    return await _show_result(session, result)


def _question(
    device_id: str, what: DiagnosticType, lines: int | None, delay: str | None, wait: bool, reason: str
) -> AskDeviceInput:
    """Raises InvalidInputError for an option that is another type's."""
    if lines is not None and what is not DiagnosticType.LOG_TAIL:
        raise InvalidInputError(f"--lines: expected with log-tail alone, got it with {what}")
    if (delay is not None or wait) and what is not DiagnosticType.REBOOT:
        raise InvalidInputError(f"--delay and --wait: expected with reboot alone, got one with {what}")
    return AskDeviceInput(
        device_id=device_id,
        request_id=secrets.token_hex(16),
        type=what,
        lines=lines,
        delay_seconds=_delay(delay),
        actor=whoami(),
        reason=reason,
        wait_for_boot=wait,
    )


def _delay(text: str | None) -> int | None:
    if text is None:
        return None
    seconds = duration_of("--delay", text).total_seconds()
    if not 0 <= seconds <= MAX_DELAY_SECONDS:
        raise InvalidInputError(f"--delay: expected at most {MAX_DELAY_SECONDS} s, got {text}")
    return int(seconds)


async def _show_result(session: Session, result: AskDeviceResult) -> ExitStatus:
    if result.outcome is AskOutcome.REFUSED:
        raise RefusedError(result.text)
    async with session.database() as db:
        view = await DiagnosticStore(db).get(result.request_id)
    shown: list[RenderableType] = list(answer_shown(view))
    if result.outcome in (AskOutcome.REBOOTED, AskOutcome.NOT_REBOOTED):
        shown = [result.text]
    session.out.result({**as_dict(view), "outcome": result.outcome, "text": result.text, **_boot(result)}, shown)
    return _STATUS[result.outcome]


def _boot(result: AskDeviceResult) -> dict[str, float]:
    return {} if result.boot_seconds is None else {"boot_seconds": result.boot_seconds}


async def _show_past(session: Session, device_id: str, limit: int) -> ExitStatus:
    async with session.database() as db:
        found = await DiagnosticStore(db).of_device(device_id, limit)
    rows = [
        (when(v.created_at), v.type, v.state, _took(v), v.requested_by, v.error or summary(v.type, v.answer or {}))
        for v in found
    ]
    columns = ("asked", "type", "state", "took", "by", "what it said")
    shown: list[RenderableType] = [table("", columns, rows, right=("took",))] if rows else []
    latest = next((view for view in found if view.type is not DiagnosticType.PING and view.answer), None)
    if latest is not None:
        shown += [Text(f"{latest.type} of {when(latest.answered_at)}:"), *answer_shown(latest)]
    session.out.result({"diagnostics": [as_dict(view) for view in found]}, shown)
    if not found:
        session.out.say(f"{device_id} was never asked; 'diagnose {device_id} system-info' does")
    return ExitStatus.SUCCEEDED


def _took(view: DiagnosticView) -> str:
    return f"{(view.answered_at - view.created_at).total_seconds():.1f} s" if view.answered_at else ""


# --- answers, as a person reads them ---------------------------------------------------------------------------------


def answer_shown(view: DiagnosticView) -> list[RenderableType]:
    """What a device has answered."""
    if view.error is not None or view.answer is None:
        return [f"{view.device_id}: {view.state}: {view.error or 'no answer yet'}"]
    match view.type:
        case DiagnosticType.SYSTEM_INFO:
            return [facts([("device", view.device_id), *system_facts(view.answer)])]
        case DiagnosticType.LOG_TAIL:
            return log_lines(view.answer)
        case DiagnosticType.PING:
            took = view.answered_at - view.created_at if view.answered_at else timedelta(0)
            return [f"{view.device_id} answered within {took.total_seconds():.2f} s"]
        case DiagnosticType.CONFIG_DUMP:
            return [_config(view.answer)]
        case DiagnosticType.REBOOT:
            delay = span(view.answer.get("delaySeconds"))
            return [f"{view.device_id} reboots{f' {delay} after it answered' if delay else ''}"]
    return [facts(view.answer.items())]


def system_facts(answer: Mapping[str, Any]) -> list[tuple[str, object]]:
    """`system-info`, with units; what is not of the expected kind is left out, what nobody expects stands at the end."""
    disk, network = answer.get("diskUsage"), answer.get("networkStatus")
    disk, network = disk if isinstance(disk, Mapping) else {}, network if isinstance(network, Mapping) else {}
    degrees = number(answer.get("cpuTemperature"))
    known = {"uptime", "freeMemory", "totalMemory", "cpuTemperature", "diskUsage", "networkStatus"}
    pairs: list[tuple[str, object]] = [
        ("uptime", span(answer.get("uptime"))),
        ("memory", _share("free", answer.get("freeMemory"), answer.get("totalMemory"))),
        ("CPU", f"{degrees:.1f} °C" if degrees is not None else None),
        ("disk", _share("used", disk.get("used"), disk.get("total"))),
        ("network", _network(network)),
    ]
    return pairs + [(str(key)[:60], value) for key, value in answer.items() if key not in known][:20]


def _share(word: str, part: Any, whole: Any) -> str | None:
    some, all_of_it = number(part), number(whole)
    if some is None:
        return None
    shared = percent(part, whole)
    if shared is None or all_of_it is None:
        return f"{size(int(some))} {word}"
    return f"{size(int(some))} of {size(int(all_of_it))} {word} ({shared:.0f}%)"


def _network(network: Mapping[str, Any]) -> str | None:
    found = network.get("interfaces")
    interfaces = [each for each in found if isinstance(each, Mapping)] if isinstance(found, list) else []
    parts = [f"{each.get('name')} {each.get('state')}" for each in interfaces[:16]]
    if (errors := number(network.get("connectionErrors"))) is not None:
        parts.append(f"{errors:.0f} connection errors since it booted")
    return ", ".join(parts) or None


def log_lines(answer: Mapping[str, Any]) -> list[RenderableType]:
    """`log-tail`, a line of output for each line, whatever it holds."""
    logs = answer.get("logs")
    if not isinstance(logs, list):
        return ["the answer has no log lines"]
    shown: list[RenderableType] = [Text(printable(str(line))) for line in logs]
    if answer.get("truncated") is True:
        shown.append(Text("(older lines did not fit the answer)", style="dim"))
    return shown or ["its log is empty"]


def _config(answer: Mapping[str, Any]) -> RenderableType:
    config, version = answer.get("config"), answer.get("configVersion")
    rows = sorted(flat(config).items()) if isinstance(config, Mapping) else []
    return facts([("version", version), *rows])


def flat(value: Mapping[str, Any], prefix: str = "", depth: int = 0) -> dict[str, object]:
    """Nested objects as dotted names.

    >>> flat({"led": {"on": True}, "interval": 5})
    {'led.on': True, 'interval': 5}
    """
    found: dict[str, object] = {}
    for key, inner in value.items():
        name = f"{prefix}{key}"
        if isinstance(inner, Mapping) and inner and depth < 10:
            found |= flat(inner, f"{name}.", depth + 1)
        else:
            found[name] = inner
    return found


def attached(views: list[DiagnosticView]) -> list[tuple[str, object]]:
    """What a device said when its update had failed, a line for each question."""
    found: list[tuple[str, object]] = []
    for view in views:
        said = summary(view.type, view.answer or {}) or view.error
        if view.state is DiagnosticState.REQUESTED:
            said = "asked, no answer yet"
        found.append((f"its {view.type}", said or view.state))
    return found
