"""What a test session leaves behind."""

import os
import shutil
import subprocess
import sys
import tempfile

import pytest
from helpers import REPOSITORY, TESTS

WRITING = """
import os, tempfile

def test_that_writes(tmp_path):
    for folder in (tempfile.mkdtemp(), os.environ["HF_HOME"], tmp_path):
        assert folder != (own := os.environ["TMPDIR"]) and str(folder).startswith(own)
        with open(f"{folder}/file", "w") as file:
            file.write("something")
"""


def run_session(folder, tests, temporary):
    """Run tests in a session of its own that has ``temporary`` as its temporary directory."""
    variables = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "1", tests],
        cwd=folder,
        env={**variables, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        check=False,
    )


def without_libraries(folder):
    """Make a folder of tests with this one's configuration, but nothing of what it imports."""
    folder.mkdir()
    shutil.copy(TESTS / "conftest.py", folder)
    (folder / "shared_fixtures.py").touch()
    (folder / "children.py").write_text("start_server = lambda: None")
    (folder / "test_writing.py").write_text(WRITING)
    return folder


@pytest.mark.parametrize("passes", [True, False])
def test_what_tests_write_goes_when_all_have_passed(tmp_path, passes):
    folder = without_libraries(tmp_path / "tests")
    if not passes:
        with (folder / "test_writing.py").open("a") as file:
            file.write("    raise ValueError('this one fails')")
    (tmp_path / "temporary").mkdir()
    done = run_session(folder, "test_writing.py", tmp_path / "temporary")
    assert done.returncode == (pytest.ExitCode.OK if passes else pytest.ExitCode.TESTS_FAILED)
    left = list((tmp_path / "temporary").iterdir())
    assert len(left) == (0 if passes else 1), done.stdout
    assert all(f"is kept in {kept}" in done.stdout for kept in left)


@pytest.mark.slow
def test_a_session_leaves_nothing_in_the_temporary_directory():
    temporary = tempfile.mkdtemp()  # shorter than tmp_path: sockets lie below it
    done = run_session(REPOSITORY, "tests/method/test_config.py", temporary)
    assert done.returncode == 0, done.stdout
    assert os.listdir(temporary) == []
