"""That files stay as they are while they are read again and again.

Flow: size, time of change and place on the disk of a file when it is opened → the same once a round
is trained, or an error.
Differs from the fingerprint of a round: nothing is read, so it can be asked after every round.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

Stamps: TypeAlias = Mapping[Path, tuple[int, int, int]]


def stamps_of(paths: Iterable[Path]) -> Stamps:
    """Return the stamps of files that will be read more than once."""
    return {path: _stamp(os.stat(path)) for path in paths}


def joint_stamps(parts: Iterable[Stamps]) -> Stamps:
    """Return the stamps of several sets of files."""
    return {path: stamp for part in parts for path, stamp in part.items()}


def check_unchanged(stamps: Stamps) -> None:
    """Check that files are still those that were opened.

    Raises:
        ValueError: one is gone, or was written or replaced meanwhile; the message names it.
    """
    for path, stamp in stamps.items():
        try:
            same = _stamp(os.stat(path)) == stamp
        except OSError:
            same = False
        if not same:
            raise ValueError(
                f"{path} was replaced while it was trained on, so nobody knows which images were"
                " used: nothing of the round is kept; give each arrival a file of its own"
            )


def _stamp(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_size, found.st_mtime_ns, found.st_ino
