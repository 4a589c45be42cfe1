"""`starter.py up`: run the embedded stack in the foreground until Ctrl-C.

Prints a table of what runs and where once all of it answers, and a line for whatever happens after that. The logs of
the pieces are files in `<state>/logs/`.
"""

import asyncio
import signal
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cli.command import settings_of
from devstack.stack import EmbeddedStack
from devstack.supervisor import PieceEvent
from models.settings import Settings
from observe import logs


def up(
    state: Annotated[
        Path | None, typer.Option(help="Directory of the stack's state (TIDEGATE_STATE_DIR, or .tidegate).")
    ] = None,
    broker: Annotated[
        Literal["mosquitto", "nats"] | None,
        typer.Option(help="MQTT broker to run (mosquitto where it is installed, else nats)."),
    ] = None,
    worker: Annotated[bool, typer.Option(help="Start a worker.")] = True,
    gateway: Annotated[bool, typer.Option(help="Start a gateway.")] = True,
    enrolment: Annotated[bool, typer.Option(help="Start an enrolment server.")] = True,
    open_mqtt: Annotated[
        bool,
        typer.Option(
            "--open-mqtt", help="Also listen on loopback for MQTT clients without identity, as simulated fleets are."
        ),
    ] = False,
) -> None:
    """Run PostgreSQL, Temporal, an MQTT broker, the artifact server and Tidegate's processes until Ctrl-C.

    All state lives in one directory, and a second start resumes where the first stopped. A server whose address is set
    in the environment (TIDEGATE_DATABASE_URL, TIDEGATE_TEMPORAL_ADDRESS, TIDEGATE_MQTT_URL, TIDEGATE_ARTIFACT_URL) is
    not started.
    """
    settings = settings_of(state)
    logs.configure("stack", settings.model_copy(update={"log_level": "WARNING"}))
    console = Console()
    stack = EmbeddedStack(
        settings=settings,
        broker=broker,
        worker=worker,
        gateway=gateway,
        enrolment=enrolment,
        open_mqtt=open_mqtt,
        listener=lambda event: _print_event(console, event),
    )
    asyncio.run(_run(stack, console))


async def _run(stack: EmbeddedStack, console: Console) -> None:
    """Start, wait for Ctrl-C or SIGTERM, stop. A signal during the start takes the start back."""
    main = asyncio.current_task()
    assert main is not None
    over = asyncio.Event()
    ready = False

    def leave() -> None:
        over.set()
        if not ready:
            main.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, leave)
    console.print(f"Starting the stack in {escape(str(stack.settings.state_dir))} ...")
    try:
        async with stack:
            ready = True
            console.print(status_table(stack))
            console.print("Ctrl-C stops all of it; the next 'up' resumes.")
            await over.wait()
            console.print("Stopping ...")
    except asyncio.CancelledError:
        console.print("Stopped before everything answered.")
        raise typer.Exit(130) from None
    console.print("Stopped.")


def status_table(stack: EmbeddedStack) -> Table:
    """What runs, where, and what was given from outside."""
    table = Table(title="Tidegate", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("piece", "where", "process"):
        table.add_column(column, overflow="fold")
    for piece in stack.supervisor.pieces:
        process = stack.supervisor.process(piece.name)
        table.add_row(piece.title, escape(piece.address), str(process.pid) if process else "down")
    for title, address in given_pieces(stack.settings).items():
        table.add_row(title, escape(address), "not ours")
    table.add_row("Logs", escape(str(stack.state.path / "logs")))
    table.add_row("Addresses", escape(str(stack.state.endpoints_path)))
    return table


def given_pieces(settings: Settings) -> dict[str, str]:
    """The pieces whose address was set in the environment, without user and password."""
    given = {
        "PostgreSQL": settings.database_url,
        "Temporal": settings.temporal_address,
        "MQTT broker": settings.mqtt_url,
        "Artifacts": settings.artifact_url,
    }
    return {title: address.rpartition("@")[2] for title, address in given.items() if address}


def _print_event(console: Console, event: PieceEvent) -> None:
    console.print(f"  {escape(event.piece.title)}: {escape(event.text)}")
