"""What a test session leaves behind."""

import os
import subprocess
import sys

from helpers import REPOSITORY


def test_a_session_leaves_nothing_in_the_temporary_directory(tmp_path):
    variables = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "1", "tests/method/test_config.py"],
        cwd=REPOSITORY,
        env={**variables, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert list(tmp_path.iterdir()) == []
