"""What a test session needs before libraries are imported: a folder of its own, no network, no GPU.

All that tests and libraries write lies in one folder, in memory if there is room or else in the
temporary directory. It goes when all tests have passed and is named when they have not.
"""

import atexit
import gc
import os
import shutil
import signal
import socket
import tempfile
from pathlib import Path

import pytest
import xdist


def remove_folder() -> None:
    shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)


def folder_in_memory() -> str | None:
    """Return where files lie in memory, if there is room: nobody waits until they are on a disk."""
    there = Path("/dev/shm")
    roomy = "TMPDIR" not in os.environ and there.is_dir() and os.access(there, os.W_OK)
    return str(there) if roomy and shutil.disk_usage(there).free > 8e9 else None


if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit it
    own = tempfile.mkdtemp(prefix="hf_dash_tests_", dir=folder_in_memory())
    os.environ["TMPDIR"] = tempfile.tempdir = own
    atexit.register(remove_folder)
# The clients read the Hub's address at import: a port of this process's own, at which nobody
# listens until a test asks for ``hub``.
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    os.environ["HF_ENDPOINT"] = "http://{}:{}".format(*free.getsockname())
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hub_")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ACCELERATE_USE_CPU"] = "true"
# Two test processes share the machine; results must not hang on the number of threads anyway.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A shell that starts the tests in the background has them ignore Ctrl-C, which some of them press.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionstart(session: pytest.Session) -> None:
    # The process that only hands out the tests is spared the imports.
    if not xdist.is_xdist_controller(session):
        session.config.pluginmanager.import_plugin("shared_fixtures")
        import children

        children.start_server()


def pytest_collection_finish() -> None:
    gc.freeze()  # the imports are never garbage, but slow to walk through, and Accelerate collects


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: pytest.ExitCode
) -> None:
    if exitstatus == pytest.ExitCode.TESTS_FAILED:
        atexit.unregister(remove_folder)
        terminalreporter.write_line(f"What the tests wrote is kept in {os.environ['TMPDIR']}")
