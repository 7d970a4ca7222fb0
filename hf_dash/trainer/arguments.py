"""The arguments of transformers' image classification script, and the images they name.

Flow: flags → a model with its image processor; earlier arrivals, the new one and held-out images.
Source: names and defaults of ``examples/pytorch/image-classification/run_image_classification.py``
of transformers.
Differs: earlier arrivals count in; what is cut off as held out is cut off every arrival, always
the same images, so that the next round does not train on them; no code of a repository is ever
run; ``--do_eval`` alone never trains.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, PreTrainedModel, TrainingArguments

from hf_dash.data.config import DataConfig
from hf_dash.data.loading import round_schedule
from hf_dash.data.schedule import Schedule
from hf_dash.data.sources import Access
from hf_dash.models import is_timm, load_model
from hf_dash.utils.checks import check_class_weights
from hf_dash.utils.flags import documented


@documented
@dataclass(frozen=True)
class ModelArguments:
    """Which model to continue with.

    Args:
        model_name_or_path: Last round's model: a folder or Hub id.
        model_revision: Branch, tag or commit, such as round-002.
        image_processor_name: Folder or Hub id, if not the model's; timm models need none.
        ignore_mismatched_sizes: A fresh head where the data have new labels.
        cache_dir: For files of the Hub.
        token: For private repositories.
        trust_remote_code: Refused.

    Raises:
        ValueError: ``trust_remote_code`` is set.

    Example:
        >>> import hf_dash
        >>> source = hf_dash.trainer.ModelArguments("user/model", model_revision="round-002")
        >>> source.settings["model_revision"]
        'round-002'
    """

    model_name_or_path: str
    model_revision: str = field(default="main", metadata={"aliases": ["--revision"]})
    image_processor_name: str | None = None
    ignore_mismatched_sizes: bool = False
    cache_dir: str | None = None
    token: str | None = field(default=None, repr=False)
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.trust_remote_code:
            raise ValueError("trust_remote_code must be False: no repository's code is run")

    @property
    def settings(self) -> dict[str, Any]:
        """The fields to put on record: no token, no place on this machine."""
        secret = ("token", "cache_dir", "trust_remote_code")
        return {name: value for name, value in asdict(self).items() if name not in secret}

    @property
    def access(self) -> Access:
        """How to reach the Hub."""
        return Access(self.token, self.cache_dir)

    def label_names(self) -> list[str]:
        """Return the names of the classes that the model knows, without loading its weights."""
        config = AutoConfig.from_pretrained(
            self.model_name_or_path,
            revision=self.model_revision,
            cache_dir=self.cache_dir,
            token=self.token,
            trust_remote_code=False,
        )
        return [config.id2label[index] for index in range(config.num_labels)]

    def load_model(self, names: Sequence[str], seed: int = 0) -> PreTrainedModel:
        """Load the model, with a head for all ``names``; see ``load_model``."""
        return load_model(
            self.model_name_or_path,
            names,
            ignore_mismatched_sizes=self.ignore_mismatched_sizes,
            revision=self.model_revision,
            cache_dir=self.cache_dir,
            token=self.token,
            seed=seed,
        )

    def load_image_processor(self, model: PreTrainedModel) -> Any | None:
        """Load the image processor of a model; None for a timm wrapper, which needs none."""
        if is_timm(model):
            return None
        return AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            self.image_processor_name or self.model_name_or_path,
            revision=None if self.image_processor_name else self.model_revision,
            cache_dir=self.cache_dir,
            token=self.token,
            trust_remote_code=False,
        )


@documented
@dataclass(frozen=True)
class DataTrainingArguments(DataConfig):
    """Which images to train and evaluate on in a single round; see ``DataConfig``.

    Args:
        dataset_name: New images: ``fashion_mnist``, ``digits``, a folder, a file, a glob of files,
            or a Hub dataset.
        train_val_split: Share of every arrival, in (0, 1), to hold out where nothing else is; an
            image's content decides, so others that come or go do not matter.
        seen_dataset_names: Earlier arrivals, oldest first.

    Raises:
        ValueError: no images are named or too many, or a number is out of range.

    Example:
        >>> import hf_dash
        >>> schedule = hf_dash.trainer.DataTrainingArguments("digits").load()
        >>> schedule.held_out_split, len(schedule.held_out_images)
        ('test', 360)
    """

    dataset_name: str | None = None
    train_val_split: float | None = 0.15
    seen_dataset_names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.arrive_by != "examples":
            raise ValueError(
                f"arrive_by must be 'examples' in a single round, got {self.arrive_by!r};"
                " seen_dataset_names names earlier arrivals"
            )

    def load(
        self, *, seed: int = 0, cache_dir: str | None = None, token: str | None = None
    ) -> Schedule:
        """Load what arrived before, what is new, and what is held out.

        Held-out images come from ``validation_dir``, ``test_dataset_name``, a split of the new
        dataset, or else are cut off every arrival.

        Args:
            seed: seed for the order within each arrival.
            cache_dir: for files of the Hub.
            token: for private datasets.

        Raises:
            ValueError: images cannot be found, read or used; the message names them.
        """
        access = Access(token, cache_dir)
        return round_schedule(self, self.seen_dataset_names, seed=seed, access=access)


@dataclass
class RoundTrainingArguments(TrainingArguments):
    """``TrainingArguments`` that remember whether only evaluation was asked for.

    ``TrainingArguments`` sets ``do_eval`` wherever ``eval_strategy`` evaluates, so afterwards
    nobody knows. Without ``do_train`` and ``do_eval`` a round does both.

    Raises:
        ValueError: ``class_weights`` is neither ``"balanced"`` nor None, or comes with label
            smoothing.

    Example:
        >>> from hf_dash.trainer import RoundTrainingArguments
        >>> RoundTrainingArguments("out", do_eval=True, eval_strategy="epoch").only_evaluate
        True
    """

    class_weights: str | None = field(
        default=None,
        metadata={"help": "'balanced' weighs the loss of an image by how rare its class is."},
    )

    def __post_init__(self) -> None:
        check_class_weights(self.class_weights)
        if self.class_weights and self.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor must be 0 with class_weights, got"
                f" {self.label_smoothing_factor!r}"
            )
        self.only_evaluate = self.do_eval and not self.do_train
        super().__post_init__()  # type: ignore[no-untyped-call]


@documented
@dataclass(frozen=True)
class StartArguments:
    """How the round starts.

    Args:
        start: Such as ``warm`` or ``dash``; ``auto`` follows a recommendation.
        recommendation: The recommendation.json for ``auto``; by default the one beside the model.

    Raises:
        ValueError: a recommendation is named that nothing would follow.

    Example:
        >>> import hf_dash
        >>> hf_dash.trainer.StartArguments("warm").recommendation is None
        True
    """

    start: str = "dash"
    recommendation: str | None = None

    def __post_init__(self) -> None:
        if self.recommendation is not None and self.start != "auto":
            raise ValueError(
                f"start must be 'auto' with recommendation {self.recommendation!r}, got"
                f" {self.start!r}"
            )
