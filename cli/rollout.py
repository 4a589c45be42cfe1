"""`rollout start | watch | show | list | pause | resume | approve | promote | abort | adjust | device | devices | events`."""

import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from temporalio.exceptions import WorkflowAlreadyStartedError

from cli.causes import cause_parts
from cli.command import Session, command, whoami
from cli.diagnose import attached
from cli.explain import why_here, why_not_in
from cli.following import follow, tell_unplanned, temporal_if_there
from cli.given import duration_of
from cli.output import ExitStatus, as_dict, facts, table, when
from cli.screen import Snapshot, current_wave, event_text, object_of, screen, specification
from cli.spec import load_spec, parse_spec
from cli.steering import PLAN_PATIENCE_SECONDS, Stay, Timeout, already_running, refuse_ended, steer, why_not_running
from cli.watch import Handle, Watch
from models.errors import InvalidInputError, NotFoundError, RefusedError
from models.ids import rollout_workflow_id
from models.protocol import ExecutionState
from models.rollout import (
    AbortRolloutInput,
    AdjustRolloutInput,
    ApproveRolloutInput,
    PauseRolloutInput,
    PromoteRolloutInput,
    ResumeRolloutInput,
    RolloutResult,
    RolloutStatus,
    StartRolloutInput,
)
from models.spec import RolloutSpec
from store.diagnostics import DiagnosticStore
from store.registry import Registry
from store.rollouts import RolloutStore
from workflows.client import start_rollout
from workflows.rollout import RolloutWorkflow

app = typer.Typer(help="Rollouts: start, watch, steer.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The rollout's name.")]
Reason = Annotated[str, typer.Option(metavar="TEXT", help="Why; kept with the rollout's events.")]


@command(app, "start")
async def start(
    session: Session,
    spec: Annotated[Path, typer.Argument(metavar="SPEC.yaml", help="The specification; - reads standard input.")],
    wait: Annotated[bool, typer.Option("--wait", help="Watch it until it ends; the exit status says how.")] = False,
    timeout: Timeout = None,
    stay: Stay = None,
) -> ExitStatus:
    """Start a rollout from its specification.

    The name is the identity: while a rollout of this name exists, running or ended, another is refused.
    """
    asked = parse_spec(sys.stdin.buffer.read(), "standard input") if str(spec) == "-" else load_spec(spec)
    limit = duration_of("--timeout", timeout)
    async with session.database() as db:
        await refuse_ended("rollout", asked.name, RolloutStore(db).show(asked.name))
        client = await session.temporal()
        try:
            await start_rollout(client, StartRolloutInput(spec=asked, requested_by=whoami()))
        except WorkflowAlreadyStartedError as error:
            raise already_running("rollout", asked.name) from error
        watch = Watch(session, db, asked.name, client)
        planned = await watch.until_planned(PLAN_PATIENCE_SECONDS)
        if isinstance(planned, RolloutResult):
            return tell_unplanned("rollout", session.out, planned)
        _tell_started(session, asked, planned, wait)
        if not wait:
            await watch.close()
            return ExitStatus.SUCCEEDED
        return await follow(watch, limit, stay)


@command(app, "watch")
async def watch(session: Session, name: Name, timeout: Timeout = None, stay: Stay = None) -> ExitStatus:
    """Show a rollout live until it ends; the exit status says how it ended."""
    limit = duration_of("--timeout", timeout)
    async with session.database() as db:
        return await follow(Watch(session, db, name, await temporal_if_there(session)), limit, stay)


@command(app, "show")
async def show(
    session: Session,
    name: Name,
    one: Annotated[
        str | None, typer.Option("--device", metavar="DEVICE", help="Show one device of it, as 'rollout device' does.")
    ] = None,
) -> ExitStatus:
    """Show where a rollout stands now, why devices failed, and its specification.

    Exit status 0 unless it cannot be shown.
    """
    if one is not None:
        await _show_device(session, name, one)
        return ExitStatus.SUCCEEDED
    async with session.database() as db:
        looking = Watch(session, db, name, await temporal_if_there(session))
        found = await looking.until_planned(0)
        await looking.close()
    if isinstance(found, RolloutResult):
        session.out.result(found, f"rollout {name} {found.outcome}: {found.reason}")
    elif found is None:
        session.out.result({"name": name, "phase": "planning"}, f"rollout {name} is being planned")
    else:
        view = found.view
        async with session.database() as db:
            causes = await RolloutStore(db).causes(view.job_no)
        times = [("planned", view.created_at), ("started", view.started_at), ("finished", view.finished_at)]
        shown = facts([*specification(view.spec), ("requested by", view.requested_by), *times])
        told = [*cause_parts(causes), ""] if causes else []
        data = object_of(found) | {"causes": [as_dict(cause) for cause in causes]}
        session.out.result(data, [screen(found), "", *told, shown])
    return ExitStatus.SUCCEEDED


@command(app, "list")
async def list_rollouts(
    session: Session, limit: Annotated[int, typer.Option(min=1, help="Most rollouts to show.")] = 50
) -> None:
    """List rollouts, the newest first."""
    async with session.database() as db:
        found = await RolloutStore(db).list_rollouts(limit)
    rows = []
    for view in found:
        wave, counts = current_wave(view), view.counts
        failed = counts.failed + counts.timed_out + counts.rejected
        at = f"{wave.wave}/{len(view.waves)} {wave.name}" if wave else ""
        rows.append(
            (view.name, view.release, view.outcome or view.phase, at, view.devices, counts.succeeded, failed,
             view.in_flight, when(view.created_at), view.reason)
        )  # fmt: skip
    columns = ("rollout", "release", "state", "wave", "devices", "ok", "failed", "in flight", "planned", "reason")
    numbers = ("devices", "ok", "failed", "in flight")
    shown = [table("", columns, rows, right=numbers)] if rows else []
    session.out.result({"rollouts": [as_dict(view) for view in found]}, shown)
    if not found:
        session.out.say("no rollout; 'rollout start SPEC.yaml' begins one")


@command(app, "pause")
async def pause(session: Session, name: Name, reason: Reason = "") -> None:
    """Stop admission: devices in flight end, no other starts."""
    asked = PauseRolloutInput(actor=whoami(), reason=reason)
    await _steer(session, name, lambda handle: handle.execute_update(RolloutWorkflow.pause, asked))


@command(app, "resume")
async def resume(session: Session, name: Name, reason: Reason = "") -> None:
    """Go on after a pause."""
    asked = ResumeRolloutInput(actor=whoami(), reason=reason)
    await _steer(session, name, lambda handle: handle.execute_update(RolloutWorkflow.resume, asked))


@command(app, "approve")
async def approve(session: Session, name: Name, reason: Reason = "") -> None:
    """Agree to the wave that waits for approval."""
    asked = ApproveRolloutInput(actor=whoami(), reason=reason)
    await _steer(session, name, lambda handle: handle.execute_update(RolloutWorkflow.approve, asked))


@command(app, "promote")
async def promote(session: Session, name: Name, reason: Reason = "") -> None:
    """End a hold, or the rest of a soak, in favour of the release. Refused once the gate has tripped."""
    asked = PromoteRolloutInput(actor=whoami(), reason=reason)
    await _steer(session, name, lambda handle: handle.execute_update(RolloutWorkflow.promote, asked))


@command(app, "abort")
async def abort(session: Session, name: Name, reason: Reason = "") -> None:
    """End a rollout: nothing more starts, what is only queued is withdrawn; devices in flight end."""
    asked = AbortRolloutInput(actor=whoami(), reason=reason)
    await _steer(session, name, lambda handle: handle.execute_update(RolloutWorkflow.abort, asked))


@command(app, "adjust")
async def adjust(
    session: Session,
    name: Name,
    in_flight: Annotated[int | None, typer.Option(min=1, metavar="N", help="Devices updating at one moment.")] = None,
    per_minute: Annotated[
        str | None, typer.Option(metavar="N", help="Devices started in any 60 seconds; none takes the limit away.")
    ] = None,
) -> None:
    """Change how fast a rollout goes; what is not given stays."""
    asked = AdjustRolloutInput(
        actor=whoami(),
        in_flight=in_flight,
        per_minute=_per_minute(per_minute),
        unlimited_per_minute=per_minute == "none",
    )
    await _steer(session, name, lambda handle: handle.execute_update(RolloutWorkflow.adjust, asked))


@command(app, "device")
async def device(
    session: Session, name: Name, device_id: Annotated[str, typer.Argument(metavar="DEVICE", help="Device id.")]
) -> None:
    """Show where one device stands in a rollout, why, and what it said when it was asked about a failure."""
    await _show_device(session, name, device_id)


async def _show_device(session: Session, name: str, device_id: str) -> None:
    async with session.database() as db:
        store, now = RolloutStore(db), datetime.now(UTC)
        rollout = await store.show(name)
        known = await Registry(db).get(device_id)
        try:
            found = await store.execution(name, device_id)
        except NotFoundError as error:
            why = why_not_in(known, rollout, now)
            raise NotFoundError(f"device {device_id} is not part of rollout {name}: {why}") from error
        asked = await DiagnosticStore(db).of_execution(rollout.job_no, device_id)
    why = why_here(found, rollout, now)
    pairs: list[tuple[str, object]] = [("device", f"{device_id}, {known.device_type} at {known.site_id}")]
    pairs += [("state", f"{found.state} in wave {found.wave} ({found.wave_name})"), ("why", why)]
    names = ("execution_number", "step", "failure_class", "base_version", "by_delta", "queued_at", "started_at",
             "updated_at", "finished_at", "deadline_at", "status_details")  # fmt: skip
    pairs += [(field.replace("_", " "), getattr(found, field)) for field in names]
    pairs += attached(asked)
    if asked:
        pairs.append(("all of it", f"starter.py diagnose {device_id}"))
    data = {**as_dict(found), "why": why, "diagnostics": [as_dict(view) for view in asked]}
    session.out.result(data, facts(pairs))


@command(app, "devices")
async def devices(
    session: Session,
    name: Name,
    status: Annotated[
        ExecutionState | None, typer.Option(metavar="STATE", help=f"One of {', '.join(ExecutionState)}.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most devices to show.")] = 100,
) -> None:
    """List a rollout's devices in their order."""
    async with session.database() as db:
        store = RolloutStore(db)
        await store.show(name)
        found = await store.executions(name, status, limit)
    rows = [
        (
            e.device_id,
            f"{e.wave} {e.wave_name}",
            e.state,
            e.step,
            e.failure_class,
            e.base_version,
            e.updated_at,
            e.reason,
        )
        for e in found
    ]
    columns = ("device", "wave", "state", "step", "failure", "from", "updated", "reason")
    session.out.result({"devices": [as_dict(e) for e in found]}, [table("", columns, rows)] if rows else [])
    session.out.say(f"{len(found)} device{'' if len(found) == 1 else 's'}")


@command(app, "events")
async def events(
    session: Session,
    name: Name,
    limit: Annotated[int, typer.Option(min=1, help="The last so many.")] = 100,
) -> None:
    """Show what happened to a rollout, when, and by whom."""
    async with session.database() as db:
        store = RolloutStore(db)
        found = await store.events((await store.show(name)).job_no, limit)
    rows = [(when(e.at), e.wave, e.kind, e.actor, event_text(e)) for e in found]
    shown = table("", ("time", "wave", "kind", "by", "what"), rows, right=("wave",))
    session.out.result({"events": [as_dict(event) for event in found]}, shown)


# --- inside ----------------------------------------------------------------------------------------------------------


def _tell_started(session: Session, spec: RolloutSpec, planned: Snapshot | None, waits: bool) -> None:
    workflow_id = rollout_workflow_id(spec.name)
    link = session.ui_link(workflow_id)
    waves = planned.view.waves if planned else ()
    made: dict[str, Any] = {
        "name": spec.name,
        "workflow_id": workflow_id,
        "job_no": planned.view.job_no if planned else None,
        "devices": planned.view.devices if planned else None,
        "waves": [{"wave": w.wave, "name": w.name, "devices": w.target_count} for w in waves],
        "ui_url": link,
    }
    sizes = ", ".join(f"{wave.name} {wave.target_count}" for wave in waves)
    plan = (
        f"{planned.view.devices} devices in {len(waves)} wave{'' if len(waves) == 1 else 's'}: {sizes}"
        if planned
        else "being planned"
    )
    pairs = [("rollout", spec.name), ("release", spec.release), ("plan", plan), ("UI", link)]
    hint = ("watch", f"rollout watch {spec.name}")
    session.out.result(made, [facts(pairs), ""] if waits else facts([*pairs, hint]))
    if planned is None:
        session.out.say(
            f"no plan within {PLAN_PATIENCE_SECONDS:.0f} s; a large fleet takes longer, but is a worker running?"
        )


async def _steer(session: Session, name: str, send: Callable[[Handle], Awaitable[RolloutStatus]]) -> None:
    """Send an operator's request to the workflow and show what it answers."""
    client = await session.temporal()
    handle: Handle = client.get_workflow_handle_for(RolloutWorkflow.run, rollout_workflow_id(name))
    status = await steer(f"rollout {name}", send(handle), lambda: _not_running(session, name))
    pairs = [("rollout", name), ("phase", status.phase), ("wave", f"{status.wave} {status.wave_name}".strip())]
    pace = (
        f"{status.pace.in_flight} in flight, {status.pace.per_minute or 'no limit'} per minute" if status.pace else ""
    )
    session.out.result(
        status, facts([*pairs, ("waits for", status.waiting_for), ("reason", status.reason), ("pace", pace)])
    )


async def _not_running(session: Session, name: str) -> RefusedError | NotFoundError:
    async with session.database() as db:
        return await why_not_running("rollout", name, RolloutStore(db).show(name))


def _per_minute(text: str | None) -> int | None:
    if text is None or text == "none":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise InvalidInputError(f"--per-minute: expected a number of devices, at least 1, or none, got {text!r}")
    return int(text)
