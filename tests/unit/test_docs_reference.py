"""docs/reference.md says what the program says."""

import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parent.parent.parent / "docs"


def test_the_reference_is_what_settings_commands_and_metrics_say() -> None:
    command = [sys.executable, str(DOCS / "generate_reference.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
