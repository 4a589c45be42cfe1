"""Scenarios for the real server: what the time-skipping one does not do, or does otherwise.

Each takes a Stage and returns when its rollout has ended. Add one when a workflow learns something new, and record it;
never change what a recorded one does.
"""

from collections.abc import Awaitable, Callable

from models.rollout import ApproveRolloutInput, DriveMode, Phase, PromoteRolloutInput
from tests.workflow.conftest import Stage
from tests.workflow.scripted import Waits
from workflows.rollout import RolloutWorkflow

SOAKED = (
    {"name": "canary", "size": "5%", "soak": "2s"},
    {"name": "early", "size": "25%"},
    {"name": "fleet", "size": "100%"},
)
LONG_SOAK = ({**SOAKED[0], "soak": "4h"}, *SOAKED[1:])


async def soaked(stage: Stage) -> None:
    """The canary wave soaks to its end."""
    await stage.start(SOAKED)


async def soak_promoted(stage: Stage) -> None:
    """A person ends a soak of four hours."""
    await stage.start(LONG_SOAK)
    await stage.until(Phase.SOAKING)
    await stage.handle.execute_update(RolloutWorkflow.promote, PromoteRolloutInput(actor="alice"))


async def approved(stage: Stage) -> None:
    """Every wave waits for a person."""
    await stage.start(approval="every-wave")
    for wave in (0, 1, 2):
        await stage.until(Phase.WAITING_APPROVAL, wave=wave)
        await stage.handle.execute_update(RolloutWorkflow.approve, ApproveRolloutInput(actor="alice"))


async def cancelled(stage: Stage) -> None:
    """Cancelled from the UI while the first wave runs."""
    await first_wave(stage)
    await stage.handle.cancel()


async def failed(stage: Stage) -> None:
    """The wave's workflow is terminated by somebody."""
    await first_wave(stage)
    await stage.wave(1).terminate("by mistake")


async def full_image(stage: Stage) -> None:
    """Artifacts cannot be prepared."""
    stage.script.artifacts_error = "the image is not in the artifact store"
    await stage.start()


async def first_wave(stage: Stage) -> None:
    """A rollout whose first wave never answers."""
    stage.script.script(1, DriveMode.ANSWERING, Waits())
    await stage.start()
    await stage.until_asked("drive 1 answering")


REAL: dict[str, Callable[[Stage], Awaitable[None]]] = {
    "soaked": soaked,
    "soak-promoted": soak_promoted,
    "approved": approved,
    "cancelled": cancelled,
    "failed": failed,
    "full-image": full_image,
}
