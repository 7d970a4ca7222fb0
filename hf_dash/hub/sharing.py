"""Pushing as recipes do it: flags as in TrainingArguments, and no failure that ends a training.

Flow: flags → a finished folder, or the rounds of a run → the Hub; or one message that says what
failed and how to push later.
"""

import shlex
import tempfile
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from transformers import TrainingArguments

from hf_dash.history import read_history
from hf_dash.hub.client import MAIN, HubError, check_branch, check_repo_id, clean_token
from hf_dash.hub.lineage import full_repo_id, published_tags, read_published
from hf_dash.hub.publish import HubRound, promote_on_hub, push_round, round_tag
from hf_dash.models import load_model
from hf_dash.report.export import Chain, export_round
from hf_dash.runs.dropped import drop_rounds
from hf_dash.runs.round_files import RUN_HISTORY, WEIGHTS
from hf_dash.utils.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class HubArguments:
    """Where rounds are pushed; names as in TrainingArguments, the help says what each is.

    Raises:
        ValueError: a value cannot be an id, a branch or a token; the Hub is not asked for that.

    Example:
        >>> import hf_dash
        >>> hub = hf_dash.hub.HubArguments(push_to_hub=True, hub_model_id="user/model")
        >>> hub.repository("runs/x")
        'user/model'
    """

    push_to_hub: bool = field(default=False, metadata={"help": "Push finished rounds."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "user/name; the output folder's name by default."}
    )
    hub_token: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "The stored one by default. Others see a flag; HF_TOKEN they do not."},
    )
    hub_private_repo: bool | None = field(
        default=None, metadata={"help": "A new repository is private unless this is false."}
    )
    hub_revision: str | None = field(
        default=None, metadata={"help": "Branch for a challenger; nothing is tagged there."}
    )

    def __post_init__(self) -> None:
        if self.hub_model_id is not None:
            check_repo_id("hub_model_id", self.hub_model_id)
        check_branch("hub_revision", self.hub_revision)
        clean_token(self.hub_token)

    @classmethod
    def taken_from(cls, args: TrainingArguments) -> "HubArguments":
        """Take the flags out of a Trainer's arguments, the token above all.

        A Trainer pickles its arguments beside every checkpoint, token included; and with
        ``push_to_hub`` it would make the repository and push on the way.

        Args:
            args: ``push_to_hub`` and ``hub_token`` are reset in place.
        """
        hub = cls(
            push_to_hub=args.push_to_hub,
            hub_model_id=args.hub_model_id,
            hub_token=args.hub_token,
            hub_private_repo=args.hub_private_repo,
            hub_revision=args.hub_revision,
        )
        args.push_to_hub, args.hub_token = False, None
        return hub

    @property
    def card_id(self) -> str | None:
        """The repository as a card may name it; None where the user is not named."""
        named = self.hub_model_id is not None and "/" in self.hub_model_id
        return self.hub_model_id if named else None

    def repository(self, folder: str | Path) -> str:
        """Return the repository of a run: as given, or named after its output folder."""
        name = self.hub_model_id or Path(folder).resolve().name
        check_repo_id("hub_model_id", name)
        return name

    def push(self, folder: str | Path, repository: str, *, create_pr: bool = False) -> HubRound:
        """Push a finished folder; see :func:`~hf_dash.hub.publish.push_round`."""
        return push_round(
            folder,
            repository,
            token=self.hub_token,
            private=self.hub_private_repo is not False,
            hub_revision=self.hub_revision,
            create_pr=create_pr,
        )


def push_folder(
    hub: HubArguments, folder: str | Path, *, create_pr: bool = False
) -> HubRound | None:
    """Push a finished folder where that is asked for; a failure is a warning, not an error.

    Args:
        hub: the flags.
        folder: of a finished round; whole on disk whatever happens.
        create_pr: open a pull request instead.

    Returns:
        The round on the Hub; None where nothing was asked for, or the Hub failed.

    Raises:
        ValueError: the folder is not whole.

    Example:
        >>> import hf_dash
        >>> hf_dash.hub.push_folder(hf_dash.hub.HubArguments(), "runs/next_round") is None
        True
    """
    if not hub.push_to_hub:
        return None
    repository = hub.repository(folder)
    try:
        return _told(hub.push(folder, repository, create_pr=create_pr))
    except HubError as error:
        command = push_command(hub, folder, repository, create_pr=create_pr)
        logger.warning(
            "not pushed to %s: %s. The folder is whole; push it later by\n\n    %s\n",
            repository,
            error,
            command,
        )
        return None


def push_command(
    hub: HubArguments, folder: str | Path, repository: str, *, create_pr: bool = False
) -> str:
    """Return the command that pushes a folder later; it holds no token."""
    words = ["accelerate", "launch", "recipes/publish.py", "--model_dir", str(folder)]
    words += ["--hub_model_id", repository]
    if hub.hub_revision is not None:
        words += ["--hub_revision", hub.hub_revision]
    if hub.hub_private_repo is False:
        words += ["--hub_private_repo", "false"]
    return shlex.join([*words, "--create_pr"] if create_pr else words)


def push_rounds(
    hub: HubArguments,
    output_dir: str | Path,
    chain: Chain,
    *,
    save_total_limit: int | None = None,
) -> HubRound | None:
    """Push what a run has not pushed yet, oldest round first, each with its card.

    Every round's ``base_model`` is the commit of the round before. Rounds whose weights are no
    longer on disk are left out. Of a challenger only the newest round is pushed, to its branch.

    Args:
        hub: the flags.
        output_dir: of the run; its newest round is exported to ``model`` below it.
        chain: the rounds to push.
        save_total_limit: drop the weights of all but so many rounds of each start, once these are
            pushed; None keeps all.

    Returns:
        The newest round on the Hub; None where nothing was asked for, or the Hub failed.

    Example:
        >>> import hf_dash
        >>> hf_dash.hub.push_rounds(hf_dash.hub.HubArguments(), "runs/x", None) is None
        True
    """
    if not hub.push_to_hub:
        return None
    output_dir, repository = Path(output_dir), hub.repository(output_dir)
    try:
        repository = full_repo_id(repository, token=hub.hub_token)
        pushed = _told(_push_rounds(hub, output_dir, repository, chain))
    except HubError as error:
        command = push_command(hub, output_dir / "model", repository)
        logger.warning(
            "not pushed to %s: %s. Every round is whole on disk; the same command as before pushes"
            " them later, and this one the newest alone\n\n    %s\n",
            repository,
            error,
            command,
        )
        return None
    if save_total_limit is not None:
        drop_rounds(output_dir, chain.history, save_total_limit)
    return pushed


def _push_rounds(hub: HubArguments, output_dir: Path, repository: str, chain: Chain) -> HubRound:
    tags, own = published_tags(repository, token=hub.hub_token), chain.records
    challenger = hub.hub_revision not in (None, MAIN)
    pushed: HubRound | None = None
    dropped = [one for one in own if one.folder in chain.history.dropped]
    late = [one.round_index for one in dropped if round_tag(one.round_index) not in tags]
    if late and not challenger:
        logger.warning(
            "%s gets no round %s: save_total_limit %s dropped the weights before they were pushed",
            *(repository, ", ".join(map(str, late)), chain.history.dropped[dropped[-1].folder]),
        )
    for before, record in zip([None, *own], own, strict=False):
        tag, newest = round_tag(record.round_index), record is own[-1]
        if tag in tags and not challenger:
            there = read_published(repository, tag, token=hub.hub_token).weights_sha256
            if there != record.weights_sha256:
                raise HubError(f"{repository} holds {tag} already, with other weights")
            pushed = HubRound(repository, tags[tag], tag, record)
            continue
        gone = not (output_dir / record.folder / WEIGHTS).is_file()
        if not newest and (challenger or gone):
            continue
        commit = None if before is None else tags.get(round_tag(before.round_index))
        with tempfile.TemporaryDirectory() as aside:
            folder = output_dir / "model" if newest else Path(aside)
            model = load_model(str(output_dir / record.folder))
            base = None if commit is None else (repository, commit)
            export_round(
                model,
                output_dir,
                chain.until(record),
                folder=folder,
                base=base,
                hub_model_id=repository,
            )
            pushed = hub.push(folder, repository)
        tags[tag] = pushed.commit
    if pushed is None:
        raise HubError("the run has no round to push")
    return pushed


def push_promotion(
    hub: HubArguments, output_dir: str | Path, folder: str, reason: str
) -> HubRound | None:
    """Let ``main`` follow a promotion or a rollback; a failure is a warning, not an error.

    Args:
        hub: the flags; ``hub_revision`` is where the model waits on the Hub, by default at the tag
            of its round.
        output_dir: of the run, with its ``history.jsonl``.
        folder: of the round that is in use now, as recorded there.
        reason: of the decision.

    Returns:
        The round on the Hub; None where nothing was asked for, or the Hub failed.

    Example:
        >>> import hf_dash
        >>> hub, folder = hf_dash.hub.HubArguments(), "rounds/001/dash_seed0"
        >>> hf_dash.hub.push_promotion(hub, "runs/x", folder, "first champion") is None
        True
    """
    if not hub.push_to_hub:
        return None
    records = read_history(Path(output_dir) / RUN_HISTORY).records
    record = next(r for r in records if r.folder == PurePath(folder).as_posix())
    repository = hub.repository(output_dir)
    revision = hub.hub_revision or round_tag(record.round_index)
    try:
        repository = full_repo_id(repository, token=hub.hub_token)
        return _told(
            promote_on_hub(
                repository,
                revision,
                reason=reason,
                weights_sha256=record.weights_sha256,
                token=hub.hub_token,
            )
        )
    except HubError as error:
        code = f"import hf_dash; hf_dash.hub.promote_on_hub({repository!r}, {revision!r})"
        logger.warning(
            "%s stays at main as it is: %s. Move it later by\n\n    %s\n",
            repository,
            error,
            shlex.join(["python", "-c", code]),
        )
        return None


def _told(pushed: HubRound) -> HubRound:
    print(f"pushed {pushed}")
    return pushed
