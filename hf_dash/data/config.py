"""Where images come from, which are held out, and what to do about those that do not fit.

Flow: flags of a recipe → ``DataConfig`` → the shards to train on and the shards held out, opened.
"""

from dataclasses import dataclass, replace

from hf_dash.data.columns import AnyDataset, Reading
from hf_dash.data.embedded import FASHION_MNIST
from hf_dash.data.names import canonical
from hf_dash.data.pixel_cache import PixelBudget
from hf_dash.data.replay import Replay, parse_samples
from hf_dash.data.shards import Shard, merge_shards
from hf_dash.data.sources import (
    ANONYMOUS,
    Access,
    Source,
    find_source,
    first_of,
    folder_source,
)
from hf_dash.utils.checks import check_count, check_flag, check_number
from hf_dash.utils.flags import documented
from hf_dash.utils.logging import get_logger

logger = get_logger(__name__, main_process_only=True)

# The split to hold out, if none is named, in order of preference.
HELD_OUT_SPLITS = ("validation", "test")


def check_split(test_split: str, train_split: str) -> None:
    """Refuse to hold out the split that is trained on."""
    if (canonical(test_split) or test_split) == (canonical(train_split) or train_split):
        raise ValueError(
            f"test_split must differ from train_split, got {test_split!r}: training images cannot"
            " be held out"
        )


@documented
@dataclass(frozen=True)
class DataConfig:
    """Which images to train and evaluate on; the flags of all recipes.

    Args:
        dataset_name: Images to train on: ``fashion_mnist``, ``digits``, a folder, a file, a glob of
            files, or a Hub dataset; see ``load_images``. If shards arrive, their directory or glob.
        dataset_config_name: Configuration of a Hub dataset.
        dataset_revision: Branch, tag or commit of a Hub dataset.
        train_dir: Instead of ``dataset_name``, a folder of class folders, none of them a split.
        validation_dir: Held-out images: a folder of class folders.
        test_dataset_name: Held-out images: another dataset.
        train_split: Split to train on.
        test_split: Split to hold out; by default one called validation (val, valid, dev) or test.
        train_val_split: Share of the images, in (0, 1), to hold out if nothing else is; an image's
            content decides, so others that come or go do not matter. None asks instead.
        max_train_samples: At most so many images of each arrival, at least 1.
        max_eval_samples: At most so many held-out images, at least 1.
        streaming: Read training images through an ``IterableDataset``.
        image_column_name: Column of images in the source.
        label_column_name: Column of labels in the source.
        image_mode: PIL mode to convert every image to, such as ``RGB``.
        cache_images: Decode every image once and keep it, in a file that workers, rounds, starts
            and later runs share (in ``HF_DASH_CACHE``, by default below ``HF_HOME``).
        cache_gb: At most so many GB of decoded images, at least 0; others are decoded at every
            use. By default a quarter of the free memory, or of the free disk if that is less.
        class_folder: ``first`` or ``last``: which folder names the class of an image that lies
            several folders deep; such images are refused by default.
        arrive_by: ``examples`` cuts one dataset into rounds, ``files`` takes new shards as they
            appear.
        files_per_round: New shards per round, at least 1; all by default. Only if shards arrive.
        replay_samples: Train on a sample of the old images, drawn anew in every round: an integer
            is a number of images, a number with a decimal point a ratio to the round's new images
            (1.0 draws as many as are new). Larger than what there is takes all. By default all.
        replay_strategy: ``uniform`` (the default), ``class_balanced``, or ``recency`` (an image
            that arrived j rounds ago has the weight 1/j). Only with ``replay_samples``.
        new_share: Share of the round's new images in every training batch, in (0, 1), whose other
            images are old; by default in proportion.
        on_bad_example: ``error`` stops at a corrupt image, ``skip`` leaves it out and lists it.
        compare_images_by: ``bytes`` or ``pixels``: how held-out and training images are compared.
            Pixels find an image that was stored again in another format.
        verify_data: Read all images again, and stop at a shard that is not what an earlier command
            has read. By default a shard whose size and time of change are the same is not read.
        allow_missing: Continue although a class or more than 1 % of the images cannot be read.
        allow_overlap: Continue although held-out images are also training images; recorded.
        allow_disjoint_classes: Continue although an arrival shares no class with its parent.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range, or two exclude each other.

    Example:
        >>> import hf_dash
        >>> config = hf_dash.DataConfig("fashion_mnist")
        >>> len(config.load_train()), len(config.load_held_out())
        (1200, 3800)
    """

    dataset_name: str | None = FASHION_MNIST
    dataset_config_name: str | None = None
    dataset_revision: str | None = None
    train_dir: str | None = None
    validation_dir: str | None = None
    test_dataset_name: str | None = None
    train_split: str = "train"
    test_split: str | None = None
    train_val_split: float | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    streaming: bool = False
    image_column_name: str = "image"
    label_column_name: str = "label"
    image_mode: str | None = None
    cache_images: bool = True
    cache_gb: float | None = None
    class_folder: str | None = None
    arrive_by: str = "examples"
    files_per_round: int | None = None
    # Text first: this is what parsers take it for.
    replay_samples: int | str | float | None = None
    replay_strategy: str | None = None
    new_share: float | None = None
    on_bad_example: str = "error"
    compare_images_by: str = "bytes"
    verify_data: bool = False
    allow_missing: bool = False
    allow_overlap: bool = False
    allow_disjoint_classes: bool = False

    def __post_init__(self) -> None:
        choices: dict[str, tuple[str | None, ...]] = {
            "arrive_by": ("examples", "files"),
            "on_bad_example": ("error", "skip"),
            "class_folder": (None, "first", "last"),
            "compare_images_by": ("bytes", "pixels"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("verify_data", "allow_missing", "allow_overlap", "allow_disjoint_classes"):
            check_flag(name, getattr(self, name))
        if self.train_val_split is not None:
            check_number("train_val_split", self.train_val_split, "(0, 1)", 0, 1)
        if self.cache_gb is not None and not self.cache_gb >= 0:
            raise ValueError(f"cache_gb must be at least 0, got {self.cache_gb!r}")
        for name in ("max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        self._check_source()
        self._check_files()
        self._check_replay()

    def _check_source(self) -> None:
        # train_dir takes the place of the default, and of nothing else.
        is_default = self.dataset_name == type(self).dataset_name
        named = not (self.dataset_name is None or (is_default and self.train_dir is not None))
        if named == (self.train_dir is not None):
            raise ValueError(
                "either dataset_name or train_dir must be given, got"
                f" {self.dataset_name!r} and {self.train_dir!r}"
            )

    def _check_files(self) -> None:
        count = self.files_per_round
        if self.arrive_by == "files" and self.train_dir is not None:
            raise ValueError(
                f"train_dir must be None if arrive_by is 'files', got {self.train_dir!r};"
                " dataset_name is the directory of shards"
            )
        if count is None:
            return
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"files_per_round must be an integer of at least 1, got {count!r}")
        if count < 1 or self.arrive_by != "files":
            raise ValueError(
                "files_per_round must be at least 1, and None unless arrive_by is 'files', got"
                f" {count!r} with arrive_by {self.arrive_by!r}"
            )

    def _check_replay(self) -> None:
        object.__setattr__(self, "replay_samples", parse_samples(self.replay_samples))
        self.replay  # noqa: B018 checks its fields
        if self.replay_strategy is not None and self.replay_samples is None:
            raise ValueError(
                "replay_samples must be given with replay_strategy, got"
                f" {self.replay_strategy!r} alone"
            )

    @property
    def keeps_images(self) -> bool:
        """Whether decoded images are kept; a stream's are not where every round draws anew."""
        return self.cache_images and not (self.streaming and self.replay_samples is not None)

    @property
    def replay(self) -> Replay:
        """Which old images a round trains on."""
        strategy = self.replay_strategy or Replay.strategy
        return Replay(parse_samples(self.replay_samples), strategy, self.new_share)

    @property
    def source(self) -> str:
        """The name of the images to train on, as it was given."""
        return self.train_dir or str(self.dataset_name)

    @property
    def pixel_budget(self) -> PixelBudget:
        """A budget for decoded images, of which nothing is used yet."""
        return PixelBudget(self.cache_gb)

    @property
    def reading(self) -> Reading:
        """How to read the images to train on."""
        return Reading(
            self.image_column_name,
            self.label_column_name,
            self.image_mode,
            self.streaming,
            self.class_folder,
            self.allow_missing,
            self.compare_images_by == "pixels",
            self.verify_data,
        )

    def open_train(self, name: str | None = None, access: Access = ANONYMOUS) -> list[Shard]:
        """Open the shards to train on, of another dataset if its ``name`` is given.

        Raises:
            ValueError: see ``load_images``.
        """
        if name is None and self.train_dir is not None:
            return folder_source(self.train_dir).open("train", self.reading)
        return self._find(name, access).open(self.train_split, self.reading)

    def _find(self, name: str | None, access: Access) -> Source:
        if name is not None and name != self.dataset_name:
            return find_source(name, access=access)
        return find_source(
            self.source,
            revision=self.dataset_revision,
            config_name=self.dataset_config_name,
            access=access,
        )

    def open_held_out(self, access: Access = ANONYMOUS) -> tuple[str, list[Shard]]:
        """Open the shards held out: a folder, another dataset, or a split of the dataset.

        Returns:
            The name of the split, and its shards: none if ``train_val_split`` of the training
            images is to be held out.

        Raises:
            ValueError: it is not clear what to hold out, it is the split trained on, or it cannot
                be read.
        """
        options = replace(self.reading, streaming=False, split_alone=self.streaming)
        if self.validation_dir is not None:
            return "validation", folder_source(self.validation_dir).open("train", options)
        if self.test_dataset_name is not None:
            source = self._find(self.test_dataset_name, access)
            split = self.test_split or _only_split(source)
        elif self.train_dir is not None or self.arrive_by == "files":
            return self._share()
        else:
            source = self._find(None, access)
            found = self.test_split or first_of(HELD_OUT_SPLITS, source.splits)
            if found is None or not source.has_splits:
                return self._share()
            check_split(found, self.train_split)
            split = found
        split = source.split(split)
        logger.info("held out: split %r of %s", split, source.name)
        return split, source.open(split, options)

    def _share(self) -> tuple[str, list[Shard]]:
        if self.train_val_split is None or self.arrive_by == "files" or self.test_split:
            raise ValueError(
                f"test_dataset_name must be given: {self.source!r} has no split to hold out, got"
                f" test_split {self.test_split!r}; validation_dir names a folder, and"
                " train_val_split a share of the images unless shards arrive"
            )
        return f"{self.train_val_split:.0%} of {self.train_split}", []

    def load_train(self, dataset_name: str | None = None) -> AnyDataset:
        """Load the training images, from ``dataset_name`` if given."""
        return merge_shards(self.open_train(dataset_name), numbered=False)[0]

    def load_held_out(self) -> AnyDataset:
        """Load the held-out images.

        Raises:
            ValueError: see :meth:`open_held_out`.
        """
        split, shards = self.open_held_out()
        if not shards:
            raise ValueError(f"the held-out images are {split}: a schedule loads both together")
        return merge_shards(shards, numbered=False)[0]


def _only_split(source: Source) -> str:
    """Return the split of a dataset that is held out as a whole, or the one that is named so."""
    found = first_of(HELD_OUT_SPLITS, source.splits)
    if found is None and len(source.splits) == 1:
        found = next(iter(source.splits))
    if found is None:
        raise ValueError(
            f"test_split must be given: {source.name!r} has the splits {sorted(source.splits)}"
        )
    return found
