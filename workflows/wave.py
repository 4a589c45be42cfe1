"""One wave: drive it until it has answered, watch it through its soak, judge it on fresh counts.

The same process serves rollouts and fleet jobs. It holds no count: the driving activity opens the wave, watches it in
PostgreSQL, and records the verdict, so that between the last answer of one wave and the opening of the next there are
only Temporal's own steps.
"""

from datetime import datetime, timedelta

from temporalio import workflow
from temporalio.workflow import ActivityHandle

from workflows.sandbox import decisions

with workflow.unsafe.imports_passed_through():
    from models.quantities import format_duration
    from models.rollout import (
        DriveMode,
        DriveWaveInput,
        DriveWaveResult,
        EndSoakInput,
        Phase,
        RunWaveInput,
        RunWaveResult,
        Verdict,
        WaveSoaking,
        WaveStatusReport,
    )
    from workflows import options, steps

with decisions():
    from workflows.details import wave_details


@workflow.defn
class WaveWorkflow:
    """See the module."""

    @workflow.init
    def __init__(self, asked: RunWaveInput) -> None:
        self._asked = asked
        self._soak = next((wave.soak for wave in asked.spec.waves if wave.name == asked.name), timedelta(0))
        self._phase = Phase.ROLLING
        self._reason = ""
        self._soak_until: datetime | None = None
        self._end_soak: EndSoakInput | None = None

    @workflow.run
    async def run(self, asked: RunWaveInput) -> RunWaveResult:
        """Drive, soak, judge."""
        self._show(Phase.ROLLING, "")
        driven = await self._drive(DriveMode.ANSWERING)
        if self._soak and driven.verdict.verdict is Verdict.PROMOTE:
            driven = await self._soak_through(driven) or await self._drive(DriveMode.JUDGING)
        self._show(Phase.DONE, driven.verdict.reason)
        await workflow.wait_condition(workflow.all_handlers_finished)
        return RunWaveResult(verdict=driven.verdict, progress=driven.progress)

    async def _soak_through(self, answered: DriveWaveResult) -> DriveWaveResult | None:
        """Wait the soak out; a result only when a breaker trips meanwhile."""
        self._soak_until = workflow.now() + self._soak
        self._show(Phase.SOAKING, answered.verdict.reason)
        await self._tell_parent(answered)
        watch = self._drive(DriveMode.SOAKING)
        try:
            await workflow.wait_condition(
                lambda: self._end_soak is not None or watch.done(),
                timeout=self._soak,
                timeout_summary=f"soak {format_duration(self._soak)}",
            )
        except TimeoutError:
            pass
        finally:
            self._soak_until = None
            steps.let_go(watch)
        return watch.result() if watch.done() and not watch.cancelled() else None

    async def _tell_parent(self, answered: DriveWaveResult) -> None:
        parent = workflow.info().parent
        if parent is not None and self._soak_until is not None:
            soaking = WaveSoaking(wave=self._asked.wave, until=self._soak_until, reason=answered.verdict.reason)
            await workflow.get_external_workflow_handle(parent.workflow_id).signal(options.WAVE_SOAKING, soaking)

    def _drive(self, mode: DriveMode) -> ActivityHandle[DriveWaveResult]:
        asked, by = self._asked, self._end_soak
        return steps.drive(
            DriveWaveInput(
                job_no=asked.job_no,
                wave=asked.wave,
                spec=asked.spec,
                is_last=asked.is_last,
                mode=mode,
                soaks=bool(self._soak),
                phase=Phase.SOAKING if mode is DriveMode.SOAKING else None,
                phase_reason=self._reason,
                promoted_by=by.actor if by else "",
                promote_reason=by.reason if by else "",
            ),
            asked.name,
        )

    def _show(self, phase: Phase, reason: str) -> None:
        self._phase, self._reason = phase, reason
        workflow.set_current_details(wave_details(self._asked, phase, reason, self._soak_until))

    @workflow.signal
    def end_soak(self, asked: EndSoakInput) -> None:
        """A person promotes: the rest of the soak is left out. Fresh counts are judged all the same."""
        self._end_soak = self._end_soak or asked

    @workflow.query
    def status(self) -> WaveStatusReport:
        """Where the wave stands, as far as the workflow knows."""
        asked = self._asked
        return WaveStatusReport(
            rollout=asked.rollout,
            wave=asked.wave,
            phase=self._phase,
            reason=self._reason,
            soak_until=self._soak_until,
        )
