"""Search attributes: what workflows are found by, from their first moment and as they go on."""

from temporalio import workflow
from temporalio.common import SearchAttributeKey, SearchAttributePair, SearchAttributeUpdate, TypedSearchAttributes

from workflows import options


def found_by(
    kind: str, *, device: str | None = None, release: str | None = None, phase: str | None = None
) -> TypedSearchAttributes:
    """What a workflow is found by when it starts; None: not by that."""
    values: tuple[tuple[SearchAttributeKey[str], str | None], ...] = (
        (options.KIND, kind),
        (options.DEVICE, device),
        (options.RELEASE, release),
        (options.PHASE, phase),
    )
    return TypedSearchAttributes([SearchAttributePair(key, value) for key, value in values if value is not None])


def show_phase(phase: str, outcome: str | None = None) -> None:
    """Inside a workflow: the phase it has come to, for whoever searches; with the outcome when it is over."""
    updates: list[SearchAttributeUpdate[str]] = [options.PHASE.value_set(phase)]
    if outcome is not None:
        updates.append(options.OUTCOME.value_set(outcome))
    workflow.upsert_search_attributes(updates)
