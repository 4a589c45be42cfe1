"""`python -m tests.chaos.notifying_worker ADDRESS FILE`: a worker that tells people of alerts, to be killed by a test."""

import asyncio
import sys
from pathlib import Path

from activities.channels import load_channels
from activities.notifying import NotifyingActivities
from workers.queues import notify_worker
from workflows.client import connect


async def main(address: str, file: str) -> None:
    """Run until killed."""
    client = await connect(address, "default")
    await notify_worker(client, NotifyingActivities(load_channels(Path(file)))).run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
