"""Looks and rounds of health, played from a script."""

from temporalio import activity

from models.health import KeepHistoryInput, KeepHistoryResult, SweepOfflineInput, SweepOfflineResult

DEAF = "no device can be heard"


class ScriptedHealth:
    """Answers as it is told to; `trouble` comes first, an exception at each attempt."""

    def __init__(self, *trouble: Exception, listening: bool = True) -> None:
        self.trouble = list(trouble)
        self.listening = listening
        self.asked: list[str] = []

    @activity.defn
    async def sweep_offline(self, asked: SweepOfflineInput) -> SweepOfflineResult:
        self._ask("sweep")
        if not self.listening:
            return SweepOfflineResult(alerts=(DEAF,), reason=f"0 fell silent, 0 back; {DEAF}")
        return SweepOfflineResult(listening=True, offline=2, back=1, reason="2 fell silent, 1 back")

    @activity.defn
    async def keep_history(self, asked: KeepHistoryInput) -> KeepHistoryResult:
        self._ask("keep")
        return KeepHistoryResult(made=("heartbeats_20260301",), reason="made 1 partitions, dropped 0")

    def _ask(self, what: str) -> None:
        self.asked.append(what)
        if self.trouble:
            raise self.trouble.pop(0)
