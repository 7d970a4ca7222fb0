"""Images in the order in which they arrive.

Flow: a name (embedded digits, a local path, a Hub dataset) → a HF dataset with the columns
``image`` and ``label`` → its examples in arrival order, each with a stable ``example_id``.
Differs from plain ``load_dataset``: columns are checked and renamed here, once, so that nothing
later asks what they are called; the label column always knows its names.
"""

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value, load_dataset

from hf_dash.data.columns import AnyDataset, standard_columns

DIGITS = "digits"

DIGITS_TEST_SHARE = 0.2

# The library's loader for every kind of file that can be named outright or by a glob.
LOADERS = {".parquet": "parquet", ".tar": "webdataset"}


def check_split(test_split: str, train_split: str) -> None:
    """Refuse to hold out the split of a dataset that is trained on."""
    if test_split == train_split:
        raise ValueError(
            f"test_split must differ from train_split, got {test_split!r}: what is trained on is"
            " not held out"
        )


@dataclass(frozen=True)
class DataConfig:
    """Where images come from; the fields are those of :func:`load_images`.

    Args:
        dataset_name: ``"digits"``, a local path, a glob of parquet or tar files, or a Hub dataset;
            where files arrive, the directory or glob of them (see ``hf_dash.data.list_arrivals``).
        dataset_revision: branch, tag or commit of a Hub dataset.
        test_dataset_name: where the held-out images are, if elsewhere; a glob needs one.
        train_split: name of the split that arrives in rounds.
        test_split: name of the split that is held out.
        streaming: read through an ``IterableDataset``.
        image_column_name: column of images in the source.
        label_column_name: column of labels in the source.
        image_mode: PIL mode to convert every image to.
        cache_images: decode every image once and keep it in memory.
        arrive_by: ``"examples"`` cuts one dataset into rounds; ``"files"`` takes new files as they
            appear.
        files_per_round: how many new files make a round, at least 1; None takes all that are new.
            Only where files arrive.
        on_bad_example: what a corrupt image in a file does: ``"error"``, or ``"skip"`` to leave it
            out and list it. Only where files arrive.

    Raises:
        TypeError: ``files_per_round`` is not an integer.
        ValueError: one of the last three is not allowed.
    """

    dataset_name: str = DIGITS
    dataset_revision: str | None = None
    test_dataset_name: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    streaming: bool = False
    image_column_name: str = "image"
    label_column_name: str = "label"
    image_mode: str | None = None
    cache_images: bool = True
    arrive_by: str = "examples"
    files_per_round: int | None = None
    on_bad_example: str = "error"

    def __post_init__(self) -> None:
        choices = {"arrive_by": ("examples", "files"), "on_bad_example": ("error", "skip")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        count = self.files_per_round
        if count is None:
            return
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"files_per_round must be an integer of at least 1, got {count!r}")
        if count < 1 or self.arrive_by != "files":
            raise ValueError(
                "files_per_round must be at least 1, and None unless arrive_by is 'files', got"
                f" {count!r} with arrive_by {self.arrive_by!r}"
            )

    def load_train(self, dataset_name: str | None = None) -> AnyDataset:
        """Load the images to train on, of ``dataset_name`` where it is given."""
        return self._load(dataset_name or self.dataset_name, self.train_split)

    def load_held_out(self) -> AnyDataset:
        """Load the images held out.

        Raises:
            ValueError: no ``test_dataset_name`` says where the held-out images are, and the dataset
                is a number of files, which have no splits, or its split is the one trained on.
        """
        files = self.arrive_by == "files" or Path(self.dataset_name).suffix in LOADERS
        if self.test_dataset_name is None and files:
            raise ValueError(
                f"test_dataset_name must be given: the files of {self.dataset_name!r} have no"
                " split that could be held out"
            )
        if self.test_dataset_name is None:
            check_split(self.test_split, self.train_split)
        return self._load(self.test_dataset_name or self.dataset_name, self.test_split)

    def _load(self, name: str, split: str) -> AnyDataset:
        return load_images(
            name,
            split=split,
            revision=self.dataset_revision,
            streaming=self.streaming,
            image_column=self.image_column_name,
            label_column=self.label_column_name,
            image_mode=self.image_mode,
        )


def load_images(
    name: str = DIGITS,
    *,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
    image_column: str = "image",
    label_column: str = "label",
    image_mode: str | None = None,
    token: str | bool | None = None,
    config_name: str | None = None,
    cache_dir: str | None = None,
    data_files: dict[str, str] | None = None,
) -> AnyDataset:
    """Load a labeled image dataset.

    Args:
        name: ``"digits"`` (scikit-learn's 1,797 handwritten digits, real and without a download),
            a local folder of parquet files or an imagefolder, a glob of parquet or webdataset tar
            files, or the name of a dataset on the Hub.
        split: which split; digits have ``"train"`` (80 %) and ``"test"``, cut once and for all.
        revision: branch, tag or commit of a Hub dataset.
        streaming: read through an ``IterableDataset`` instead of preparing it on disk.
        image_column: name of the column of images in the source.
        label_column: name of the column of labels in the source; a stream of integers or strings
            is read once to name them. ``"json.label"`` is a field in a column of records.
        image_mode: PIL mode to convert every image to, such as ``"RGB"``; None keeps them.
        token: access token for a private Hub dataset.
        config_name: which configuration of a Hub dataset.
        cache_dir: where files of the Hub are kept and datasets are prepared.
        data_files: files by split, for a ``name`` that is a loader, such as ``"imagefolder"``.

    Returns:
        A dataset with the columns ``image`` (``datasets.Image``) and ``label`` (``ClassLabel``).

    Raises:
        ValueError: a column is missing, or the labels are neither class labels nor integers nor
            strings.
    """
    if name == DIGITS:
        dataset = load_digits(split)
        dataset = dataset.to_iterable_dataset() if streaming else dataset
    elif Path(name).suffix in LOADERS:
        loader = LOADERS[Path(name).suffix]
        files = {split: name}
        dataset = load_dataset(
            loader, data_files=files, split=split, streaming=streaming, cache_dir=cache_dir
        )
    else:
        dataset = load_dataset(
            name,
            config_name,
            data_files=data_files,
            split=split,
            revision=revision,
            streaming=streaming,
            token=token,
            cache_dir=cache_dir,
        )
    return standard_columns(dataset, image_column, label_column, image_mode)


def load_digits(split: str = "train") -> Dataset:
    """Return scikit-learn's handwritten digits as 32×32 RGB images.

    Args:
        split: ``"train"`` (1,437 examples) or ``"test"`` (360), stratified, always the same.

    Raises:
        ValueError: another split is asked for.
        ImportError: scikit-learn is not installed.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split of the digits must be 'train' or 'test', got {split!r}")
    from PIL import Image as PILImage
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    digits = load()
    rows = train_test_split(
        np.arange(len(digits.target)),
        test_size=DIGITS_TEST_SHARE,
        stratify=digits.target,
        random_state=0,
    )[split == "test"]
    # Gray levels come as 0 … 16 on 8×8 pixels.
    levels = (digits.images[rows] * (255 / 16)).round().astype(np.uint8)
    images = [PILImage.fromarray(gray).resize((32, 32)).convert("RGB") for gray in levels]
    names = [str(digit) for digit in digits.target_names]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    labels = [int(label) for label in digits.target[rows]]
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def in_arrival_order(
    dataset: AnyDataset,
    *,
    seed: int,
    num_examples: int | None = None,
    buffer_size: int = 10_000,
) -> Dataset:
    """Put examples into the order in which they arrive: a random one, so that rounds are alike.

    A whole dataset arrives in the same order streamed or not. Of a stream that is cut by
    ``num_examples``, only as much is read as it takes: the order is then drawn from a buffer of the
    examples read last, and differs from that of a map-style dataset.

    Args:
        dataset: as :func:`load_images` returns it.
        seed: of the order; the same seed gives the same order on every process.
        num_examples: how many arrive in all, at least 1; None takes the whole dataset.
        buffer_size: number of examples in the buffer, at least 1.

    Returns:
        A map-style dataset with the column ``example_id``: the example's position in the source,
        the same whatever the seed. Images of a stream stay encoded.

    Raises:
        ValueError: the dataset has fewer than ``num_examples`` examples, or none.
    """
    generator = np.random.default_rng(seed)
    if isinstance(dataset, Dataset):
        numbered = dataset.add_column("example_id", np.arange(len(dataset)))
        arrived = numbered.select(generator.permutation(len(dataset))[:num_examples])
    elif num_examples is None:
        read = _kept(dataset, _numbered_rows(dataset))
        arrived = read.select(generator.permutation(len(read)))
    else:
        drawn = _drawn(_numbered_rows(dataset), generator, buffer_size)
        arrived = _kept(dataset, islice(drawn, num_examples))
    if len(arrived) < (num_examples or 1):
        raise ValueError(
            f"num_examples is {num_examples}, but the dataset holds only {len(arrived)} examples"
        )
    return arrived


Row = dict[str, Any]


def _numbered_rows(stream: IterableDataset) -> Iterator[Row]:
    """Yield the rows of a stream in the order of the source, images as they are stored."""
    encoded = stream.cast_column("image", Image(mode=stream.features["image"].mode, decode=False))
    return ({**row, "example_id": index} for index, row in enumerate(encoded))


def _drawn(rows: Iterator[Row], generator: np.random.Generator, buffer_size: int) -> Iterator[Row]:
    """Yield rows in random order: each time one of a buffer, whose place the next row takes."""
    # Not IterableDataset.shuffle, which also reorders shards, so that no position would be known.
    buffer = list(islice(rows, buffer_size))
    for row in rows:
        place = int(generator.integers(len(buffer)))
        yield buffer[place]
        buffer[place] = row
    for place in generator.permutation(len(buffer)):
        yield buffer[place]


def _kept(stream: IterableDataset, rows: Iterator[Row]) -> Dataset:
    features = Features({**stream.features, "example_id": Value("int64")})
    image = features["image"]
    features["image"] = Image(mode=image.mode, decode=False)
    return Dataset.from_list(list(rows), features=features).cast_column("image", image)


def is_local(name: str) -> bool:
    """Tell whether a dataset name means embedded or local data rather than the Hub."""
    return (
        name == DIGITS
        or Path(name).suffix in LOADERS
        or glob.has_magic(name)
        or Path(name).exists()
    )
