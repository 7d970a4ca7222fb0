"""That files stay as they are while they are read again and again.

Flow: size, time of change and place on the disk of a file when it is opened → the same once a round
is trained, or an error.
Differs from the fingerprint of a round: nothing is read, so it can be asked after every round.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

# Size, time of change and place on the disk of each file; and, where that matters, the time of any
# change, of its rights or links as well.
Stamps: TypeAlias = Mapping[Path, tuple[int, ...]]


def stamps_of(paths: Iterable[Path]) -> Stamps:
    """Return the stamps of files that will be read more than once."""
    return content_stamps({path: stamp_of(path) for path in paths})


def content_stamps(stamps: Stamps) -> Stamps:
    """Return stamps that only change with the content of a file."""
    return {path: stamp[:3] for path, stamp in stamps.items()}


def joint_stamps(parts: Iterable[Stamps]) -> Stamps:
    """Return the stamps of several sets of files."""
    return {path: stamp for part in parts for path, stamp in part.items()}


def check_unchanged(stamps: Stamps, used: str = "trained on") -> None:
    """Check that files are still those that were opened.

    Args:
        stamps: of the files, as they were opened.
        used: what they are used for meanwhile, for the message.

    Raises:
        ValueError: one is gone, or was written or replaced meanwhile; the message names it.
    """
    for path, stamp in stamps.items():
        try:
            same = stamp_of(path)[: len(stamp)] == stamp
        except OSError:
            same = False
        if not same:
            raise ValueError(
                f"{path} was replaced while it was {used}, so nobody knows which images were"
                " used: nothing of the round is kept; give each arrival a file of its own"
            )


def stamp_of(path: Path) -> tuple[int, ...]:
    """Return the stamp of a file, with the time of any change."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ino, found.st_ctime_ns
