"""`alert channel list | test`: whom alerts are told to. The channels are a file of the worker's (docs/alerts.md)."""

from datetime import UTC, datetime
from typing import Annotated

import typer
from temporalio.client import WorkflowFailureError

from activities.channels import load_channels
from cli.command import Session, command, whoami
from cli.output import table
from domain.notifications import trial_of
from models.errors import InvalidInputError, UnavailableError
from store.notifications import new_digest
from workflows.notification_client import start_notification

app = typer.Typer(help="Channels that alerts are told to.", no_args_is_help=True)


@command(app, "list")
async def list_channels(session: Session) -> None:
    """List the channels of the notify file (TIDEGATE_NOTIFY_FILE), without what is secret in them."""
    path = session.settings.notify_file
    if path is None:
        raise InvalidInputError("no channels: set TIDEGATE_NOTIFY_FILE to the file that the worker reads")
    channels = load_channels(path).values()
    rows = [
        (
            c.name,
            c.kind,
            c.shown,
            c.min_severity,
            ", ".join(c.rules.include) or "all",
            ", ".join(c.rules.exclude),
            ", ".join(sorted(c.events)),
        )
        for c in channels
    ]
    columns = ("channel", "kind", "where", "from", "rules", "but not", "events")
    data = [dict(zip(columns, row, strict=True)) for row in rows]
    session.out.result({"channels": data}, [table("", columns, rows)] if rows else [])
    session.out.say(f"{len(rows)} channel{'' if len(rows) == 1 else 's'}")


@command(app, "test")
async def test_channel(
    session: Session, name: Annotated[str, typer.Argument(metavar="NAME", help="The channel's name.")]
) -> None:
    """Send a test through a channel, as an alert would go: by a workflow, from a worker. Waits a minute at most."""
    client = await session.temporal()
    told = trial_of(new_digest(), name, whoami(), datetime.now(UTC))
    handle = await start_notification(client, told)
    session.say_process(handle.id)
    try:
        result = await handle.result()
    except WorkflowFailureError as error:
        raise UnavailableError(f"the test of channel {name} did not end: {error.cause}") from error
    trouble = result.reason or next((each.reason for each in result.deliveries if not each.delivered), "")
    if trouble:
        raise UnavailableError(f"the test of channel {name} did not arrive: {trouble}")
    session.out.result(result, f"{name} has taken the test")
