"""`python -m tests.chaos.dying_worker`: the worker, and it dies by SIGKILL at the points of a plan, once at each.

The plan is a folder with one empty file for each death to die: `<workflow id, quoted>@<activity>@<point>`, where the
activity is its type and how many of that type the workflow has had, as in `publish_crls-1` (`Ordinals`). Points:
`before` (the former activity has been reported, this one has done nothing) and `after` (it has done all it does, and
nobody has been told). The file is removed first, so that the next worker gets past it.

Temporal finds out about a dead worker when an activity's time is over; that time is cut short here, so that a test of
many deaths does not consist of waiting.
"""

import os
import signal
from dataclasses import dataclass
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


def death(workflow_id: str, which: str, point: str) -> str:
    """Name of the file that stands for a death."""
    return f"{quote(workflow_id, safe='')}@{which}@{point}"


@dataclass
class Ordinals:
    """Which of its type an activity is within its workflow, whatever attempt and whichever worker: files remember."""

    folder: Path

    def name(self, workflow_id: str, kind: str, activity_id: str) -> str:
        """`<type>-<ordinal from 1>`."""
        seen = self.folder / f"{quote(workflow_id, safe='')}@{kind}"
        seen.mkdir(parents=True, exist_ok=True)
        (seen / activity_id).touch()
        return f"{kind}-{sum(int(path.name) <= int(activity_id) for path in seen.iterdir())}"


def _die_here(point: str) -> None:
    info = activity.info()
    plan, workflow_id = Path(os.environ[PLAN]), info.workflow_id or ""
    which = Ordinals(plan.with_name(plan.name + "-seen")).name(workflow_id, info.activity_type, info.activity_id)
    planned = plan / death(workflow_id, which, point)
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
