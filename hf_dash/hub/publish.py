"""Write to the Hub: push a round, promote a challenger.

Flow: a whole model folder on disk → the repository (created if needed) → one commit → the tag
``round-003``; a challenger waits on a branch or in a pull request → ``main`` and the tag.
Differs from ``HfApi.upload_folder``: newer clients may split that into several commits; here a
round is one, and what an earlier round left is removed. Every call can be repeated: what is there
already is not sent twice, so the same call finishes a push that was cut off anywhere.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
)
from huggingface_hub.hf_api import RepoFile
from safetensors import SafetensorError, safe_open

from hf_dash.history import LARGEST, History, RoundRecord, read_history
from hf_dash.hub.client import (
    MAIN,
    HubError,
    check_branch,
    check_repo_id,
    clean_token,
    client,
    files_at,
    reach,
)
from hf_dash.runs.round_files import (
    CARD,
    CONFIG,
    HISTORY,
    MODEL_FOLDER,
    WEIGHTS,
    check_files,
    report_of,
)
from hf_dash.utils.files import finish_replacing, one_writer, sha256_of
from hf_dash.utils.reports import REPORT_NAME

NEEDED = (CARD, CONFIG, WEIGHTS, HISTORY)


def check_folder(folder: Path) -> RoundRecord:
    """Return the newest record of a whole model folder; refuse any other.

    Raises:
        ValueError: a file is missing, a symbolic link, or not the one recorded; or the history
            names a place on this machine.
    """
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"folder {str(folder)!r} is not a finished round: it has no {missing[0]}")
    links = [folder / name for name in MODEL_FOLDER if (folder / name).is_symlink()]
    if links:
        raise ValueError(f"{links[0]} is a symbolic link: what it leads to is not a round's file")
    try:
        with safe_open(folder / WEIGHTS, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is not whole: {error}") from error
    history = read_history(folder / HISTORY)
    if not history.records:
        raise ValueError(f"{folder / HISTORY} has no record of a round")
    record = history.records[-1]
    check_files(folder, record, exported=True)
    shrink = report_of(folder, record)
    if (folder / REPORT_NAME).is_file():
        report = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
        if report != shrink:
            raise ValueError(f"{folder / REPORT_NAME} is not what {HISTORY} describes")
    _check_public(folder, history)
    return record


def _check_public(folder: Path, history: History) -> None:
    """Refuse a history, written by an older version, that names places on this machine."""
    told = [*history.settings.values(), *(record.parent for record in history.records)]
    texts = [t for one in told for t in (one if isinstance(one, list) else [one])]
    places = [text for text in texts if isinstance(text, str) and _is_absolute(text)]
    if places:
        raise ValueError(
            f"{folder / HISTORY} names {len(places)} places on this machine, which are nobody"
            " else's business: run the command again that wrote it"
        )


def _is_absolute(text: str) -> bool:
    return text.startswith(("/", "~")) or bool(PureWindowsPath(text).drive)


def round_tag(round_index: int) -> str:
    """Return the tag of a round, such as ``round-003``."""
    return f"round-{round_index:03d}"


def commit_message(record: RoundRecord) -> str:
    """Return the first line of a round's commit: its accuracy, start and parent."""
    parent = record.parent or ""
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


def read_pushed_history(repo_id: str, commit: str, token: str | None) -> list[RoundRecord]:
    """Return the records in the history of a commit, oldest first.

    Raises:
        HubError: the history is too large.
    """
    (file,) = client(token).get_paths_info(repo_id, HISTORY, revision=commit)
    if not isinstance(file, RepoFile) or file.size > LARGEST:
        raise HubError(f"{repo_id} has no {HISTORY} of at most {LARGEST:,} bytes at {commit}")
    path = hf_hub_download(repo_id, HISTORY, revision=commit, token=clean_token(token))
    return read_history(path).records


@dataclass(frozen=True)
class HubRound:
    """A round as it is found on the Hub.

    Args:
        repo_id: ``user/name``.
        commit: the exact one, 40 hexadecimal digits.
        revision: how else it is called: its tag, branch or pull request (``refs/pr/1``).
        record: what the history of this commit says of its newest round.

    Example:
        >>> import hf_dash
        >>> from hf_dash.history import RoundRecord
        >>> record = RoundRecord("dash", 0, 1, 10, 10, 0.5, {}, 1.0, True, 3, 30, 0.5, 2.0)
        >>> print(hf_dash.hub.HubRound("user/model", "0" * 40, "round-001", record))
        round 1: user/model at round-001 (0000000000000000000000000000000000000000)
    """

    repo_id: str
    commit: str
    revision: str
    record: RoundRecord

    def __str__(self) -> str:
        return f"round {self.record.round_index}: {self.repo_id} at {self.revision} ({self.commit})"


def push_round(
    folder: str | Path,
    hub_model_id: str,
    *,
    token: str | None = None,
    private: bool = True,
    hub_revision: str | None = None,
    create_pr: bool = False,
) -> HubRound:
    """Publish the round in a model folder: one commit, and on ``main`` the tag of the round.

    Exactly the files that hf_dash writes are pushed. Nothing is made on the Hub before the folder
    is known to be whole. Called again after a failure it finishes what is missing; where everything
    is there it changes nothing. Server errors, lost connections and 60 seconds without an answer
    are tried again, three times in all, and ten minutes plus a second for every 100 kB bound it.

    Args:
        folder: as :func:`~hf_dash.report.write_model_folder` left it; only read.
        hub_model_id: ``user/name``; made where it does not exist.
        token: access token; the one stored by ``hf auth login`` by default.
        private: whether a new repository is private.
        hub_revision: a branch for a challenger, made where it does not exist; nothing is tagged
            there, see :func:`promote_on_hub`.
        create_pr: open a pull request on ``main`` instead, unless one with these files is open.

    Raises:
        ValueError: the folder is not whole, a file in it is a symbolic link, another process is
            writing it, or an argument cannot be an id, branch or token.
        HubError: the Hub was not reached or refused, or holds this round with other files, or a
            later one.

    Example:
        >>> import hf_dash
        >>> hf_dash.push_round("runs/next_round", "user/model").revision  # doctest: +SKIP
        'round-002'
    """
    folder = Path(folder)
    check_repo_id("hub_model_id", hub_model_id)
    check_branch("hub_revision", hub_revision)
    if create_pr and hub_revision not in (None, MAIN):
        raise ValueError(f"create_pr goes to {MAIN!r}, but hub_revision is {hub_revision!r}")
    api = client(token)
    with _held(folder):
        record = check_folder(folder)

        def push() -> HubRound:
            repo_id = api.create_repo(hub_model_id, private=private, exist_ok=True).repo_id
            branch = hub_revision or MAIN
            if branch != MAIN and not branch.startswith("refs/pr/"):
                api.create_branch(repo_id, branch=branch, exist_ok=True)
            return _push(api, repo_id, folder, record, branch, create_pr)

        size = sum(path.stat().st_size for path in _files_of(folder).values())
        return reach(push, token, size=size)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Keep others from writing a folder while it is read, where anybody can write it."""
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        yield
        return
    with one_writer(folder):
        finish_replacing(folder)
        yield


def _push(
    api: HfApi, repo_id: str, folder: Path, record: RoundRecord, branch: str, create_pr: bool
) -> HubRound:
    tag, message = round_tag(record.round_index), commit_message(record)
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
    tagged = branch == MAIN and not create_pr
    if tagged and tag in tags:
        if _changes(folder, files_at(api, repo_id, tags[tag])[1]):
            raise HubError(
                f"{repo_id} holds {tag} already, with other files: give another repository, or"
                " hub_revision to put this one up as a challenger"
            )
        return HubRound(repo_id, tags[tag], tag, record)
    rounds = [int(name[6:]) for name in tags if re.fullmatch(r"round-\d+", name)]
    if tagged and max(rounds, default=0) > record.round_index:
        last = round_tag(max(rounds))
        raise HubError(f"{repo_id} holds {last} already, {tag} would take its place")
    head, present = files_at(api, repo_id, branch)
    changes, commit, revision = _changes(folder, present), head, branch
    if changes and create_pr:
        opened = _opened(api, repo_id, folder, message)
        if opened is not None:
            return HubRound(repo_id, *opened, record)
    if changes:
        done = api.create_commit(
            repo_id,
            changes,
            commit_message=message,
            revision=branch,
            parent_commit=head,
            create_pr=create_pr,
        )
        commit, revision = done.oid, done.pr_revision or branch
    if tagged:
        api.create_tag(repo_id, tag=tag, tag_message=message, revision=commit)
        revision = tag
    return HubRound(repo_id, commit, revision, record)


def _opened(api: HfApi, repo_id: str, folder: Path, title: str) -> tuple[str, str] | None:
    """Return commit and name of an open pull request with these files, as of a lost answer."""
    kind: dict[str, Any] = {"discussion_type": "pull_request", "discussion_status": "open"}
    for discussion in api.get_repo_discussions(repo_id, **kind):
        name = f"refs/pr/{discussion.num}"
        if discussion.title == title:
            commit, present = files_at(api, repo_id, name)
            if not _changes(folder, present):
                return commit, name
    return None


def promote_on_hub(
    hub_model_id: str,
    revision: str,
    *,
    reason: str = "",
    weights_sha256: str | None = None,
    token: str | None = None,
) -> HubRound:
    """Give ``main`` the files of a challenger, in one commit, and the round's tag with them.

    The files are copied on the Hub, by ``CommitOperationCopy``: nothing is uploaded, and ``main``
    holds what was compared, bit by bit. The client can merge pull requests but no branches, and a
    merge conflicts as soon as ``main`` has moved, because weights cannot be merged. A pull request
    that is promoted is closed. A rollback to an earlier round works the same way, by its tag, which
    stays where it is.

    Args:
        hub_model_id: ``user/name``.
        revision: branch, pull request (``refs/pr/1``), tag or commit of the challenger.
        reason: of the promotion; goes into the commit.
        weights_sha256: of the weights that were compared; others are refused.
        token: access token; the one stored by ``hf auth login`` by default.

    Raises:
        ValueError: ``hub_model_id`` cannot be an id.
        HubError: the Hub was not reached or refused, or holds other weights there.

    Example:
        >>> import hf_dash
        >>> hf_dash.hub.promote_on_hub("user/model", "challenger").revision  # doctest: +SKIP
        'main'
    """
    check_repo_id("hub_model_id", hub_model_id)
    api = client(token)

    def move() -> HubRound:
        commit, source = files_at(api, hub_model_id, revision)
        if weights_sha256 is not None and oid_of(source.get(WEIGHTS)) != weights_sha256:
            raise HubError(f"{hub_model_id} holds other weights at {revision} than were compared")
        record = read_pushed_history(hub_model_id, commit, token)[-1]
        head, present = files_at(api, hub_model_id, MAIN)
        changes: list[CommitOperationCopy | CommitOperationDelete] = [
            CommitOperationCopy(path, path, src_revision=commit)
            for path, file in source.items()
            if path in MODEL_FOLDER and oid_of(present.get(path)) != oid_of(file)
        ]
        gone = [path for path in present if path in MODEL_FOLDER and path not in source]
        changes += [CommitOperationDelete(path) for path in gone]
        if changes:
            title = commit_message(record).replace("Round", "Promote round", 1)
            head = api.create_commit(
                hub_model_id,
                changes,
                commit_message=title,
                commit_description=reason,
                parent_commit=head,
            ).oid
        _move_tag(
            api, hub_model_id, round_tag(record.round_index), head, oid_of(source.get(WEIGHTS))
        )
        if revision.startswith("refs/pr/"):
            number = int(revision.rpartition("/")[2])
            comment = f"Promoted by {head}."
            api.change_discussion_status(hub_model_id, number, "closed", comment=comment)
        return HubRound(hub_model_id, head, MAIN, record)

    return reach(move, token)


def _move_tag(api: HfApi, repo_id: str, tag: str, commit: str, weights: str | None) -> None:
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
    if tag in tags:
        if oid_of(files_at(api, repo_id, tags[tag])[1].get(WEIGHTS)) == weights:
            return
        api.delete_tag(repo_id, tag=tag)
    api.create_tag(repo_id, tag=tag, revision=commit)


def _files_of(folder: Path) -> dict[str, Path]:
    """Return a round's files in a folder, by name."""
    return {name: folder / name for name in sorted(MODEL_FOLDER) if (folder / name).is_file()}


def _changes(
    folder: Path, present: dict[str, RepoFile]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Return what makes a round's files on the Hub those of a folder; nothing if they are."""
    own = _files_of(folder)
    changes: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, path)
        for name, path in own.items()
        if name not in present or not is_same(path, present[name])
    ]
    gone = [path for path in present if path in MODEL_FOLDER and path not in own]
    return [*changes, *(CommitOperationDelete(path) for path in gone)]
