"""The file that carries a verdict to the next round: written beside a history, followed by name.

Flow: ``StartVerdict`` and the run's settings → ``recommendation.json`` → ``read_recommendation``,
which checks that the file is whole and speaks of the same classes → ``ChosenStart``.
Nothing is guessed: a missing or damaged file, or one of other classes, is an error.
"""

import hashlib
import json
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel

from hf_dash.data.rounds import Round
from hf_dash.history import History
from hf_dash.method.config import ZERO, DashConfig
from hf_dash.method.origin import find_origin
from hf_dash.pretrained import Checkpoint, load_checkpoint
from hf_dash.report.verdict import NothingToCompareError, StartVerdict, start_verdict
from hf_dash.runs.continual import seed_of_round
from hf_dash.starts import StartContext, StartsConfig, find_start, is_dash, start_settings
from hf_dash.utils.files import write_text

RECOMMENDATION = "recommendation.json"
FORMAT = 1

AUTO = "auto"

Config = TypeVar("Config", DashConfig, StartsConfig)

# Their loss has a penalty, which a Trainer does not compute.
NOT_IN_A_TRAINER = ("l2_init",)

# They need the weights that round 1 began with, or shrink towards them.
FROM_THE_ORIGIN = ("cold", "shrink_perturb")


@dataclass(frozen=True)
class Recommendation:
    """What ``recommendation.json`` holds, besides the numbers behind it.

    Args:
        start: name of the recommended start.
        sentence: the verdict in words.
        dash: settings the start had in the comparison.
        start_config: settings the start had in the comparison.
        label_names: of all classes in the comparison.
        history_digest: of the history that was compared (:attr:`hf_dash.History.digest`).
    """

    start: str
    sentence: str
    dash: DashConfig
    start_config: StartsConfig
    label_names: tuple[str, ...]
    history_digest: str


@dataclass(frozen=True)
class ChosenStart:
    """A start for one round with a Trainer, and why it was chosen.

    Args:
        name: of the start.
        dash: its settings.
        start_config: its settings.
        followed: sentence of the recommendation that named it; None if the user named it.

    Example:
        >>> chosen = ChosenStart("dash", DashConfig(lam=0.5), StartsConfig())
        >>> chosen.settings["start"], chosen.settings["lam"]
        ('dash', 0.5)
    """

    name: str
    dash: DashConfig
    start_config: StartsConfig
    followed: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The name and the settings of the start, to put on record."""
        return {
            "start": self.name,
            **asdict(self.dash if is_dash(self.name) else self.start_config),
        }

    def begin_(self, model: PreTrainedModel, round_: Round, seed: int) -> float:
        """Change the weights in place, before training, and return the seconds it took.

        DASH does nothing here: ``DashCallback`` shrinks when training begins.

        Args:
            model: with the weights of the round before.
            round_: to be trained next.
            seed: of the run; what is random derives from it and the round's index.

        Raises:
            TypeError: the start needs a timm wrapper, and the model is another one.
            ValueError: the start needs to know where round 1 began, and neither ``dash.base`` nor
                the history in the model's folder says so.
        """
        if is_dash(self.name):
            return 0.0
        began = time.perf_counter()
        context = StartContext(
            round_,
            seed_of_round(seed, round_.index),
            init_seed=seed,
            dash=self.dash,
            start_config=self.start_config,
            checkpoint=self._checkpoint_of(model),
        )
        find_start(self.name)(model, context)
        return time.perf_counter() - began

    def _checkpoint_of(self, model: PreTrainedModel) -> Checkpoint | None:
        if self.name.split("+")[0] not in FROM_THE_ORIGIN:
            return None
        base, reason = self.dash.base, ""
        if base is None:
            origin = find_origin(model)
            base, reason = origin.base, origin.reason
        if base is None and reason:
            raise ValueError(
                f"base must be given for start {self.name!r}, since {reason}: the checkpoint that"
                " round 1 began from, or 'zero' if it began with fresh weights"
            )
        if base is None or base == ZERO:
            return None
        name, _, commit = str(base).partition("@")
        if Path(str(base)).is_dir():
            name, commit = str(base), ""
        return load_checkpoint(name, revision=commit or None)


def write_recommendation(
    verdict: StartVerdict,
    folder: str | Path,
    history: History,
    label_names: Collection[str],
) -> None:
    """Write ``recommendation.json`` in one step.

    Args:
        verdict: of ``history``.
        folder: to write it into, beside a history.
        history: that was compared; its settings hold those of the starts.
        label_names: of all classes.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> sentence = "no start differs by more than the noise: keep warm, it is the cheapest"
        >>> verdict = StartVerdict("warm", sentence, "cold", (), 5, (0, 1, 2), (), 0.95)
        >>> with TemporaryDirectory() as folder:
        ...     write_recommendation(verdict, folder, History(None, {}), ["cat", "dog"])
        ...     read_recommendation(folder).start
        'warm'
    """
    dash, start_config = start_settings(
        verdict.start, _recorded(DashConfig, history), _recorded(StartsConfig, history)
    )
    content = {
        "format": FORMAT,
        **asdict(verdict),
        "dash": asdict(dash),
        "start_config": asdict(start_config),
        "label_names": sorted(label_names),
        "history_digest": history.digest,
    }
    content["digest"] = _digest(content)
    write_text(Path(folder) / RECOMMENDATION, json.dumps(content, indent=1) + "\n")


def recommend(
    history: History,
    folders: Sequence[str | Path],
    label_names: Collection[str],
) -> str:
    """Write ``recommendation.json`` and return the verdict's sentence, or why there is none.

    Args:
        history: to compare; see :func:`~hf_dash.report.start_verdict`.
        folders: to write into; none of their files changes if there is nothing to compare.
        label_names: of all classes.

    Raises:
        ValueError: the records contradict each other or hold impossible numbers.

    Example:
        >>> recommend(History(None, {}), [], ["cat", "dog"])[:27]
        'no recommendation: records '
    """
    try:
        verdict = start_verdict(history.records)
    except NothingToCompareError as error:
        return f"no recommendation: {error}"
    for folder in folders:
        write_recommendation(verdict, folder, history, label_names)
    return verdict.sentence


def read_recommendation(path: str | Path) -> Recommendation:
    """Read a recommendation back.

    Args:
        path: of the file, or of the folder that holds ``recommendation.json``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or of another format.

    Example:
        >>> read_recommendation("no/such/recommendation.json")
        Traceback (most recent call last):
            ...
        FileNotFoundError: recommendation 'no/such/recommendation.json' does not exist: compare \
starts by recipes/continual_rounds.py, or name the file it wrote
    """
    path = Path(path)
    path = path / RECOMMENDATION if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"recommendation {str(path)!r} does not exist: compare starts by"
            " recipes/continual_rounds.py, or name the file it wrote"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r} is not {FORMAT}")
        if content.pop("digest") != _digest(content):
            raise ValueError("something else has changed it; run the comparison again")
        find_start(content["start"])
        return Recommendation(
            content["start"],
            content["sentence"],
            DashConfig(**content["dash"]),
            StartsConfig(**content["start_config"]),
            tuple(content["label_names"]),
            content["history_digest"],
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a whole recommendation: {error}") from error


def choose_start(
    name: str,
    dash: DashConfig,
    *,
    recommendation: str | Path,
    label_names: Collection[str],
) -> ChosenStart:
    """Return the start of a round with a Trainer, with its settings.

    Args:
        name: of a start, with settings as in ``"dash+alpha=0.1"``; or ``"auto"``, which follows a
            recommendation.
        dash: settings of the run. With ``"auto"`` they are the recommendation's: a field that is
            not the default must agree with it. ``micro_batch_size`` may differ, and ``base`` may
            name the checkpoint.
        recommendation: file or folder to follow; read with ``"auto"`` alone.
        label_names: of the images to train on.

    Raises:
        FileNotFoundError: there is no recommendation.
        ValueError: the start is unknown or cannot run in a Trainer; the recommendation is damaged,
            of other classes, or contradicts ``dash``.

    Example:
        >>> chosen = choose_start(
        ...     "dash+lam=0.5", DashConfig(), recommendation="runs/x", label_names=["cat", "dog"]
        ... )
        >>> chosen.dash.lam
        0.5
    """
    if name == AUTO:
        read = read_recommendation(recommendation)
        _check_labels(read, label_names)
        chosen = ChosenStart(
            read.start, _followed(read, dash), read.start_config, followed=read.sentence
        )
    else:
        find_start(name)
        chosen = ChosenStart(name, *start_settings(name, dash))
    if chosen.name.split("+")[0] in NOT_IN_A_TRAINER:
        raise ValueError(
            f"start must not be one of {NOT_IN_A_TRAINER}, whose penalty a Trainer does not add to"
            f" the loss, got {chosen.name!r}"
        )
    return chosen


def _recorded(config: type[Config], history: History) -> Config:
    """Return the settings of a run; those that its history does not hold are the defaults."""
    known = {field.name for field in fields(config)}
    return config(**{name: value for name, value in history.settings.items() if name in known})


def _check_labels(read: Recommendation, label_names: Collection[str]) -> None:
    compared, given = set(read.label_names), set(label_names)
    if compared != given:
        raise ValueError(
            "recommendation must be of a comparison with the same classes: it lacks"
            f" {sorted(given - compared)}, and only it has {sorted(compared - given)}; compare"
            " starts on these images, or name a start"
        )


def _followed(read: Recommendation, dash: DashConfig) -> DashConfig:
    """Return the recommended settings, refusing others that the user has set."""
    base = dash.base if read.dash.base is None else read.dash.base
    # Memory and places are this machine's own affair.
    followed = replace(read.dash, micro_batch_size=dash.micro_batch_size, base=base)
    default = DashConfig()
    for field in fields(DashConfig):
        own, theirs = getattr(dash, field.name), getattr(followed, field.name)
        if own not in (getattr(default, field.name), theirs):
            raise ValueError(
                f"{field.name} must be left out with start 'auto', which follows"
                f" {field.name}={theirs!r}, got {own!r}"
            )
    return followed


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
