"""`python -m tests.chaos.dying_worker`: the worker, and it dies by SIGKILL at the points of a plan, once at each.

The plan is a folder with one empty file for each death to die: `<workflow id, quoted>@<activity id>@<point>`. Points:
`before` (the former activity has been reported, this one has done nothing) and `after` (it has done all it does, and
nobody has been told). The file is removed first, so that the next worker gets past it.

Temporal finds out about a dead worker when an activity's time is over; that time is cut short here, so that a test of
many deaths does not consist of waiting.
"""

import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

from temporalio import activity
from temporalio.client import Client, Interceptor
from temporalio.worker import ActivityInboundInterceptor, ExecuteActivityInput
from temporalio.worker import Interceptor as WorkerInterceptor

from workflows import options

for _name in ("SHORT_TIMEOUT", "CHECK_TIMEOUT", "SIGN_TIMEOUT"):
    setattr(options, _name, timedelta(seconds=4))
options.RETAINED_TIMEOUT = timedelta(seconds=15)

import worker  # noqa: E402, because steps read their timeouts as they are imported

PLAN = "TIDEGATE_TEST_DEATHS"


def death(workflow_id: str, activity_id: str, point: str) -> str:
    """Name of the file that stands for a death."""
    return f"{quote(workflow_id, safe='')}@{activity_id}@{point}"


def _die_here(point: str) -> None:
    info = activity.info()
    planned = Path(os.environ[PLAN]) / death(info.workflow_id or "", info.activity_id, point)
    if planned.exists():
        planned.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


class _Dying(ActivityInboundInterceptor):
    async def execute_activity(self, input: ExecuteActivityInput) -> Any:
        _die_here("before")
        result = await super().execute_activity(input)
        _die_here("after")
        return result


class DyingInterceptor(Interceptor, WorkerInterceptor):
    """Wraps every activity of the workers that are made with its client."""

    def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:
        """See temporalio.worker.Interceptor."""
        return _Dying(next)


def main() -> None:
    """Become the worker."""
    connect = worker.connect

    async def connect_to_die(*arguments: Any, **more: Any) -> Client:
        config = (await connect(*arguments, **more)).config()
        config["interceptors"] = [*config["interceptors"], DyingInterceptor()]
        return Client(**config)

    worker.connect = connect_to_die
    worker.main()


if __name__ == "__main__":
    main()
