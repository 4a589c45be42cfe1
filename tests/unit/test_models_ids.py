"""Names lead back to what they name."""

import pytest

from models.errors import InvalidInputError
from models.ids import rollout_of_workflow, rollout_workflow_id, wave_workflow_id


def test_a_workflow_id_leads_back_to_its_rollout() -> None:
    assert rollout_of_workflow(rollout_workflow_id("motor-1.3.0")) == "motor-1.3.0"
    assert rollout_of_workflow(wave_workflow_id("motor-1.3.0", 2)) == "motor-1.3.0"


def test_another_workflow_id_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="provision:7"):
        rollout_of_workflow("provision:7")
