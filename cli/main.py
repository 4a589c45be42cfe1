"""The command line of Tidegate: `starter.py`, and `tidegate` where the project is installed."""

import asyncio
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from cli import (
    alert,
    audit,
    broker,
    ca,
    claim,
    diagnose,
    enrolment,
    health,
    job,
    lifecycle,
    release,
    rollout,
    rotation,
    shadow,
)
from cli.command import DebugOption, JsonOption, Session, Shared, StateOption, command, guarded
from cli.output import EXIT_HELP, ExitStatus
from cli.up import up
from store.engine import migrate

app = typer.Typer(epilog=EXIT_HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def shared(
    context: typer.Context, state: StateOption = None, json: JsonOption = False, debug: DebugOption = False
) -> None:
    """Tidegate rolls firmware out to fleets of devices in gated waves.

    --state, --json and --debug stand before or after the command.
    """
    context.obj = Shared(state, json, debug)
    if state is not None:
        os.environ["TIDEGATE_STATE_DIR"] = str(state)  # for 'up', and for what it starts


app.command("up")(guarded(up))


@app.command("demo")
@guarded
def demo(
    devices: Annotated[int, typer.Option(min=4, metavar="N", help="Devices in the fleet.")] = 60,
    base: Annotated[
        Path | None, typer.Option(metavar="FILE", exists=True, dir_okay=False, help="Image the devices run before.")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", exists=True, dir_okay=False, help="Image they are to run.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Who fails, and when; the same seed is the same run.")] = 1,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the summary to this file.")] = None,
    state: Annotated[
        Path, typer.Option("--state", metavar="DIR", help="The demo's own directory; emptied at its start.")
    ] = Path(".tidegate/demo"),
    keep: Annotated[bool, typer.Option("--keep", help="Leave it all running at the end, until Ctrl-C.")] = False,
) -> None:
    """A fleet of device agents, a bad release that the gate halts, a good one that reaches all of it.

    Exit status 0 when all went as it should, 1 when not.
    """
    from rich.console import Console

    from cli.demo import DemoConfig, run_demo

    config = DemoConfig(devices=devices, base=base, image=image, seed=seed, state_dir=state, json_path=json, keep=keep)
    summary = asyncio.run(run_demo(config, Console()))
    if not summary["as_expected"]:
        raise typer.Exit(int(ExitStatus.ERROR))


@command(app, "migrate")
async def migrate_database(session: Session) -> None:
    """Bring the schema of the database to this version. 'up' does it by itself."""
    async with session.database() as db:
        await asyncio.to_thread(migrate, db.url)
    session.out.result({"migrated": True}, "the database has the schema of this version")


app.add_typer(ca.app, name="ca")
app.add_typer(lifecycle.app, name="device")
app.add_typer(health.app, name="device-type")
command(app, "health")(health.show_health)
app.add_typer(broker.app, name="broker")
app.add_typer(claim.app, name="claim")
app.add_typer(enrolment.app, name="enrolment")
app.add_typer(release.app, name="release")
app.add_typer(rollout.app, name="rollout")
app.add_typer(job.app, name="job")
app.add_typer(rotation.app, name="rotation")
app.add_typer(shadow.app, name="shadow")
app.add_typer(alert.app, name="alert")
command(app, "audit")(audit.show_audit)
command(app, "diagnose")(diagnose.diagnose)


def main() -> NoReturn:
    """Run a command and end the process with its exit status.

    Without the interpreter's own shutdown: threads of Temporal's client outlive the event loop and now and then crash
    it (temporalio/sdk-python issue 300: abort or segmentation fault in 3 of 40 runs), and the exit status with it.
    """
    status: int | str | None = 0
    try:
        app()
    except SystemExit as end:
        status = end.code
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status if isinstance(status, int) else ExitStatus.ERROR if status else ExitStatus.SUCCEEDED)
