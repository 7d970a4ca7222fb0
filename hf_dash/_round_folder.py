"""What of a model folder is published as a round: which files, under which tag and message."""

import hashlib
from fnmatch import fnmatch
from pathlib import Path, PurePath

from huggingface_hub import hf_hub_download
from huggingface_hub.hf_api import RepoFile
from safetensors import SafetensorError, safe_open

from hf_dash._files import sha256_of
from hf_dash._hub_calls import clean_token
from hf_dash.checkpoints import LEDGER, WEIGHTS
from hf_dash.history import RoundRecord, read_history

# Checkpoints and logs of a Trainer may lie in the same folder; they are nobody else's business.
PUBLISHED = ["README.md", "*config.json", WEIGHTS, LEDGER, "dash_report.json", "*.png"]
NEEDED = ["README.md", "config.json", WEIGHTS, LEDGER]


def check_folder(folder: Path) -> RoundRecord:
    """Return the newest record of a whole model folder; refuse any other."""
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"folder {str(folder)!r} is no finished round: it has no {missing[0]}")
    try:
        with safe_open(folder / WEIGHTS, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is not whole: {error}") from error
    records = read_history(folder / LEDGER).records
    if not records:
        raise ValueError(f"{folder / LEDGER} has no record of a round")
    expected = records[-1].weights_sha256
    if expected is not None and sha256_of(folder / WEIGHTS) != expected:
        raise ValueError(f"{folder / WEIGHTS} is not what {LEDGER} tells of: its checksum differs")
    return records[-1]


def is_published(path: str) -> bool:
    """Tell whether a file of a folder, or at the root of a repository, belongs to a round."""
    return "/" not in path and any(fnmatch(path, pattern) for pattern in PUBLISHED)


def round_tag(round_index: int) -> str:
    """Return the tag of a round, such as ``round-003``."""
    return f"round-{round_index:03d}"


def commit_message(record: RoundRecord) -> str:
    """Return the first line of a round's commit: its accuracy, start and parent."""
    parent = record.parent or ""
    # Somebody's own folders are nobody else's business.
    name = parent if "@" in parent else PurePath(parent).name
    return (
        f"Round {record.round_index}: accuracy {record.accuracy:.4f},"
        f" {record.start} start{f' from {name}' if name else ''}"
    )


def is_same(path: Path, file: RepoFile) -> bool:
    """Tell whether a file on disk is the one on the Hub, without downloading it."""
    if path.stat().st_size != file.size:
        return False
    if file.lfs is not None:
        return sha256_of(path) == file.lfs.sha256
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == file.blob_id


def oid_of(file: RepoFile | None) -> str | None:
    """Return what tells a file's content: the checksum of a large one, else git's."""
    if file is None:
        return None
    return str(file.blob_id if file.lfs is None else file.lfs.sha256)


def read_ledger(repo_id: str, commit: str, token: str | None) -> list[RoundRecord]:
    """Return the records in the ledger of a commit, oldest first."""
    path = hf_hub_download(repo_id, LEDGER, revision=commit, token=clean_token(token))
    return read_history(path).records
