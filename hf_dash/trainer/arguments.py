"""The arguments of transformers' image classification script, and the images they name.

Flow: flags → a model with its image processor; earlier arrivals, the new one and held-out images.
Source: names and defaults of ``examples/pytorch/image-classification/run_image_classification.py``
of transformers.
Differs: earlier arrivals count in; what is cut off as held out is cut off every arrival, always
the same, so that the next round does not train on it; no code of a repository is ever run.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import IterableDataset, get_dataset_split_names
from transformers import AutoImageProcessor, PreTrainedModel

from hf_dash.data.columns import AnyDataset
from hf_dash.data.embedded import EMBEDDED
from hf_dash.data.schedule import BUFFER_SIZE, Schedule, single_schedule
from hf_dash.data.sources import LOADERS, check_split, load_images
from hf_dash.models import is_timm, load_model

HELD_OUT_SPLITS = ("validation", "test")


@dataclass(frozen=True)
class ModelArguments:
    """Which model to continue from; the help of each field says what it is.

    Raises:
        ValueError: ``trust_remote_code`` is set.

    Example:
        >>> from hf_dash.trainer import ModelArguments
        >>> ModelArguments("user/model", model_revision="round-002").settings["model_revision"]
        'round-002'
    """

    model_name_or_path: str = field(metadata={"help": "Last round's model: a folder or Hub id."})
    model_revision: str = field(
        default="main",
        metadata={"help": "Branch, tag or commit, such as round-002.", "aliases": ["--revision"]},
    )
    image_processor_name: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id, if not the model's; timm models need none."},
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "A fresh head where the data have new labels."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "For files of the Hub."})
    token: str | None = field(
        default=None, repr=False, metadata={"help": "For private repositories."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Refused."})

    def __post_init__(self) -> None:
        if self.trust_remote_code:
            raise ValueError("trust_remote_code must be False: no repository's code is run")

    @property
    def settings(self) -> dict[str, Any]:
        """The fields to put on record: no token, no place on this machine."""
        secret = ("token", "cache_dir", "trust_remote_code")
        return {name: value for name, value in asdict(self).items() if name not in secret}

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


@dataclass(frozen=True)
class DataTrainingArguments:
    """Which images to train and evaluate on; the help of each field says what it is.

    Raises:
        ValueError: no images are named or too many, or a number is out of its range.

    Example:
        >>> from hf_dash.trainer import DataTrainingArguments
        >>> schedule = DataTrainingArguments("digits", max_train_samples=50).load()
        >>> schedule.held_out_split
        'test'
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "New images: 'fashion_mnist', 'digits', a folder, a glob or a Hub dataset."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Of the dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Of a Hub dataset."})
    train_dir: str | None = field(
        default=None, metadata={"help": "New images: a folder with one folder a class."}
    )
    validation_dir: str | None = field(
        default=None, metadata={"help": "Held-out images: a folder with one folder a class."}
    )
    test_dataset_name: str | None = field(
        default=None, metadata={"help": "Held-out images, if not a split of the new dataset."}
    )
    seen_dataset_names: list[str] = field(
        default_factory=list, metadata={"help": "Earlier arrivals, oldest first."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    test_split: str | None = field(
        default=None, metadata={"help": "Held-out split; 'validation' or 'test' by default."}
    )
    train_val_split: float = field(
        default=0.15, metadata={"help": "Share of every arrival to hold out where nothing else is."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Of each arrival."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Of each held-out part."})
    image_column_name: str = field(default="image", metadata={"help": "Column of images."})
    label_column_name: str = field(default="label", metadata={"help": "Column of labels."})
    image_mode: str | None = field(default=None, metadata={"help": "PIL mode to convert to."})
    streaming: bool = field(default=False, metadata={"help": "Train from an IterableDataset."})
    cache_images: bool = field(default=True, metadata={"help": "Decode every image once."})

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (self.train_dir is None):
            raise ValueError(
                "either dataset_name or train_dir must be given, got"
                f" {self.dataset_name!r} and {self.train_dir!r}"
            )
        if not 0 < self.train_val_split < 1:
            raise ValueError(f"train_val_split must be in (0, 1), got {self.train_val_split!r}")
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")

    @property
    def source(self) -> str:
        """The name of the new images, as it was given."""
        return self.dataset_name or str(self.train_dir)

    def load(
        self, *, seed: int = 0, cache_dir: str | None = None, token: str | None = None
    ) -> Schedule:
        """Load what arrived before, what is new, and what is held out.

        Held-out images come from ``validation_dir``, ``test_dataset_name``, a split of the new
        dataset, or else are cut off every arrival.

        Args:
            seed: of the order within each arrival.
            cache_dir: for files of the Hub.
            token: for private datasets.

        Raises:
            ValueError: a column is missing, a stream has no images held out, or the held-out split
                is the one trained on.
        """
        where: dict[str, Any] = {"cache_dir": cache_dir, "token": token}
        arrivals = [self._load(name, self.train_split, **where) for name in self.seen_dataset_names]
        if self.train_dir is not None:
            arrivals.append(self._load_folder(self.train_dir, "train", **where))
        else:
            arrivals.append(self._load(self.source, self.train_split, new=True, **where))
        split, held_out = self._load_held_out(**where)
        if not held_out:
            if self.streaming:
                raise ValueError(
                    "streaming needs held-out images: give validation_dir, test_dataset_name or a"
                    f" dataset with one of the splits {HELD_OUT_SPLITS}"
                )
            # Cut by a seed of its own: what is held out once is held out in every later round.
            cut = [p.train_test_split(test_size=self.train_val_split, seed=0) for p in arrivals]
            arrivals = [part["train"] for part in cut]
            held_out = [part["test"] for part in cut]
        return single_schedule(
            [_first(part, self.max_train_samples) for part in arrivals],
            [_first(part, self.max_eval_samples) for part in held_out],
            seed=seed,
            held_out_split=split,
            cache_images=self.cache_images,
        )

    def _load_held_out(self, **where: Any) -> tuple[str, list[AnyDataset]]:
        """Return the name of the split and its images, none where they are to be cut off."""
        if self.validation_dir is not None:
            return "validation", [self._load_folder(self.validation_dir, "validation", **where)]
        name = self.test_dataset_name or self.dataset_name
        if name is not None:
            split = self.test_split or self._find_split(name, **where)
            if split is not None:
                new = self.test_dataset_name is None
                if new:
                    check_split(split, self.train_split)
                return split, [self._load(name, split, new=new, **where)]
        return f"{self.train_val_split:.0%} of {self.train_split}", []

    def _find_split(self, name: str, **where: Any) -> str | None:
        if name in EMBEDDED:
            return "test"
        if Path(name).suffix in LOADERS:
            # Files have no splits: those named for the test are all held out.
            return "test" if name == self.test_dataset_name else None
        config, revision = self.dataset_config_name, self.dataset_revision
        found = get_dataset_split_names(name, config, revision=revision, token=where["token"])
        if name == self.test_dataset_name:
            return next((s for s in HELD_OUT_SPLITS if s in found), found[0])
        return next((s for s in HELD_OUT_SPLITS if s in found), None)

    def _load(self, name: str, split: str, *, new: bool = False, **where: Any) -> AnyDataset:
        return load_images(
            name,
            split=split,
            config_name=self.dataset_config_name if new else None,
            revision=self.dataset_revision if new else None,
            **self._reading,
            **where,
        )

    def _load_folder(self, folder: str, split: str, **where: Any) -> AnyDataset:
        # No guess at splits: whatever lies below is of this one, as in transformers' script.
        files = {split: str(Path(folder) / "**")}
        return load_images("imagefolder", split=split, data_files=files, **self._reading, **where)

    @property
    def _reading(self) -> dict[str, Any]:
        return {
            "streaming": self.streaming,
            "image_column": self.image_column_name,
            "label_column": self.label_column_name,
            "image_mode": self.image_mode,
        }


@dataclass(frozen=True)
class StartArguments:
    """How the round starts; the help of each field says what it is.

    Raises:
        ValueError: a recommendation is named that nothing would follow.

    Example:
        >>> from hf_dash.trainer import StartArguments
        >>> StartArguments(start="warm").start
        'warm'
    """

    start: str = field(
        default="dash",
        metadata={"help": "Such as 'warm' or 'dash'; 'auto' follows a recommendation."},
    )
    recommendation: str | None = field(
        default=None,
        metadata={"help": "recommendation.json for 'auto'; by default the one beside the model."},
    )

    def __post_init__(self) -> None:
        if self.recommendation is not None and self.start != "auto":
            raise ValueError(
                f"start must be 'auto' with recommendation {self.recommendation!r}, got"
                f" {self.start!r}"
            )


def _first(dataset: AnyDataset, count: int | None) -> AnyDataset:
    """Return at most ``count`` examples, drawn at random but always the same."""
    if count is None:
        return dataset
    if isinstance(dataset, IterableDataset):
        return dataset.shuffle(seed=0, buffer_size=BUFFER_SIZE).take(count)
    return dataset.shuffle(seed=0).select(range(min(count, len(dataset))))
