"""Where a model comes from: its parent, on disk or on the Hub, and the rounds behind it.

Flow: a name and a revision → the exact commit → the history next to the model; a model on the Hub →
its parent → its parent's parent, each checked against what the next one says of it.
Every round names its parent as ``user/name@commit`` where it began on the Hub; a parent in a local
folder is the round before in the same repository, found by its tag.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import RepositoryNotFoundError

from hf_dash.history import RoundRecord, read_history
from hf_dash.hub.client import MAIN, check_repo_id, client, fetch_model, files_at, reach
from hf_dash.hub.publish import HubRound, oid_of, read_pushed_history, round_tag
from hf_dash.models import require_safetensors
from hf_dash.runs.round_files import HISTORY, WEIGHTS, check_files
from hf_dash.utils.files import PENDING, finish_replacing, one_writer, sha256_of

ON_THE_HUB = re.compile(r"(?P<repo_id>[^@]+)@(?P<commit>[0-9a-f]{40})")


@dataclass(frozen=True)
class Parent:
    """The model a round starts from, verified.

    Args:
        name: for the record: ``user/name@commit``, or the name of the folder.
        records: of the rounds behind it, oldest first; none where it has no history.
        folder: where its files lie: the folder itself, or a copy of those on the Hub.
        repo_id: on the Hub; None for a local folder.
        commit: the exact one on the Hub; None for a local folder.
        weights_sha256: of its weights; None where they are more than one file.

    Example:
        >>> from pathlib import Path
        >>> import hf_dash
        >>> hf_dash.hub.Parent("model", [], Path("runs/model")).base is None
        True
    """

    name: str
    records: list[RoundRecord]
    folder: Path
    repo_id: str | None = None
    commit: str | None = None
    weights_sha256: str | None = None

    @property
    def base(self) -> tuple[str, str] | None:
        """Its id and exact commit on the Hub; None for a local folder."""
        return None if self.repo_id is None or self.commit is None else (self.repo_id, self.commit)


def find_parent(
    name_or_path: str,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
) -> Parent:
    """Find the model to start from and the history next to it, and verify its files.

    Args:
        name_or_path: a folder, or the id of a repository.
        revision: branch, tag or commit on the Hub; resolved to the exact commit, so that all that
            is read is of one state.
        cache_dir: where files of the Hub are kept.
        token: for private repositories.

    Raises:
        ValueError: there is no such folder and it can be no id; its weights are not safetensors;
            its history is damaged; or a file is not the one that its newest record describes.
        HubError: the Hub was not reached, or has no such revision.

    Example:
        >>> import tempfile
        >>> import hf_dash
        >>> model = hf_dash.create_model("test_resnet", label_names=["a", "b"], image_size=32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     hf_dash.save_model(model, folder)
        ...     hf_dash.hub.find_parent(folder).records
        []
    """
    commit, folder = None, Path(name_or_path)
    if folder.is_dir():
        _finish_local(folder)
    else:
        check_repo_id("model_name_or_path", name_or_path)
        folder = fetch_model(name_or_path, revision=revision, cache_dir=cache_dir, token=token)
        commit = folder.name
    weights = require_safetensors(str(folder))
    records = read_history(folder / HISTORY).records if (folder / HISTORY).exists() else []
    checksum = None
    if records:
        check_files(folder, records[-1], exported=True)
        checksum = records[-1].weights_sha256
    if checksum is None and weights.name == WEIGHTS:
        checksum = sha256_of(weights)
    if commit is None:
        return Parent(folder.resolve().name, records, folder, weights_sha256=checksum)
    return Parent(
        f"{name_or_path}@{commit}", records, folder, name_or_path, commit, weights_sha256=checksum
    )


def _finish_local(folder: Path) -> None:
    """Finish an export that was killed while its files moved into place."""
    if (folder / PENDING).is_dir():
        with one_writer(folder):
            finish_replacing(folder)


def rebuild_chain(
    hub_model_id: str, *, revision: str = MAIN, token: str | None = None
) -> list[HubRound]:
    """Rebuild the chain of rounds behind a model from the Hub alone.

    No weights are downloaded: their checksums on the Hub are compared with the recorded ones.

    Args:
        hub_model_id: ``user/name``.
        revision: branch, tag or commit to begin at.
        token: for private repositories.

    Returns:
        The rounds, oldest first, each with its repository and exact commit.

    Raises:
        ValueError: ``hub_model_id`` cannot be an id; a round is missing, or two contradict each
            other.
        HubError: the Hub was not reached, or has no such revision.

    Example:
        >>> import hf_dash
        >>> [str(one) for one in hf_dash.hub.rebuild_chain("user/model")]  # doctest: +SKIP
        ['round 1: user/model at round-001 (…)', 'round 2: user/model at main (…)']
    """
    check_repo_id("hub_model_id", hub_model_id)
    chain: list[HubRound] = []
    following: list[RoundRecord] = []
    where: tuple[str, str] | None = (hub_model_id, revision)
    while where is not None:
        repo_id, name = where
        found = read_published(repo_id, name, token=token)
        records = found.records
        if not records:
            if chain and not following:
                break  # a model that was trained elsewhere
            raise ValueError(f"{repo_id} has no {HISTORY} at {name}: no round was published there")
        if records[-1].weights_sha256 not in (None, found.weights_sha256):
            raise ValueError(f"{repo_id} holds other weights at {name} than its {HISTORY} tells of")
        contradicted = following and records != following
        if contradicted or any(one.commit == found.commit for one in chain):
            raise ValueError(
                f"{repo_id} tells of other rounds at {name} than {chain[-1]}, which began there"
            )
        chain.append(HubRound(repo_id, found.commit, name, records[-1]))
        following, where = records[:-1], _before(chain[-1])
    return chain[::-1]


def _before(one: HubRound) -> tuple[str, str] | None:
    """Return repository and revision of the round before; None for the first."""
    match = ON_THE_HUB.fullmatch(one.record.parent or "")
    if match is not None:
        return match["repo_id"], match["commit"]
    if one.record.round_index == 1:
        return None
    return one.repo_id, round_tag(one.record.round_index - 1)


def full_repo_id(repo_id: str, *, token: str | None = None) -> str:
    """Return ``user/name`` for a ``name`` below the token's user.

    Raises:
        HubError: the Hub was not reached or refused.
    """
    if "/" in repo_id:
        return repo_id
    return f"{reach(lambda: client(token).whoami()['name'], token)}/{repo_id}"


@dataclass(frozen=True)
class Published:
    """What the Hub holds at one revision.

    Args:
        commit: the exact one, 40 hexadecimal digits.
        records: of the history there, oldest first; none where there is no history.
        weights_sha256: of the weights' file; None where there is none.
    """

    commit: str
    records: list[RoundRecord]
    weights_sha256: str | None


def read_published(repo_id: str, revision: str, *, token: str | None = None) -> Published:
    """Read what the Hub holds at a revision, without its weights.

    Raises:
        HubError: the Hub was not reached, or has no such revision; or the history is damaged.
    """

    def read() -> Published:
        commit, files = files_at(client(token), repo_id, revision)
        records = read_pushed_history(repo_id, commit, token) if HISTORY in files else []
        return Published(commit, records, oid_of(files.get(WEIGHTS)))

    return reach(read, token)


def published_tags(repo_id: str, *, token: str | None = None) -> dict[str, str]:
    """Return the commits of a repository's tags; none where there is no such repository.

    Raises:
        HubError: the Hub was not reached or refused.
    """

    def read() -> dict[str, str]:
        try:
            refs = client(token).list_repo_refs(repo_id)
        except RepositoryNotFoundError:
            return {}
        return {ref.name: ref.target_commit for ref in refs.tags}

    return reach(read, token)
