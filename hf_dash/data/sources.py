"""Load labeled images and put them in arrival order.

Flow: a name (an embedded sample, a local path, a Hub dataset) → a HF dataset with the columns
``image`` and ``label`` → its examples in arrival order, each with a stable ``example_id``.
Differs from plain ``load_dataset``: columns are checked and renamed once, here, and the label
column always has class names.
"""

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, IterableDataset, Value, load_dataset

from hf_dash.data.columns import AnyDataset, standard_columns
from hf_dash.data.embedded import EMBEDDED, FASHION_MNIST

# The loader of ``datasets`` for each kind of file that a name or a glob can match.
LOADERS = {".parquet": "parquet", ".tar": "webdataset"}


def check_split(test_split: str, train_split: str) -> None:
    """Refuse to hold out the split that is trained on."""
    if test_split == train_split:
        raise ValueError(
            f"test_split must differ from train_split, got {test_split!r}: training images cannot"
            " be held out"
        )


@dataclass(frozen=True)
class DataConfig:
    """Where images come from; the fields are those of :func:`load_images`.

    Args:
        dataset_name: ``"fashion_mnist"``, ``"digits"``, a local path, a glob of parquet or tar
            files, or a Hub dataset.
            If shards arrive, their directory or glob (see ``hf_dash.data.list_arrivals``).
        dataset_revision: branch, tag or commit of a Hub dataset.
        test_dataset_name: dataset of the held-out images, if it is another one; required for globs.
        train_split: split that arrives in rounds.
        test_split: split that is held out.
        streaming: read through an ``IterableDataset``.
        image_column_name: column of images in the source.
        label_column_name: column of labels in the source.
        image_mode: PIL mode to convert every image to.
        cache_images: decode every image once and keep it in memory.
        arrive_by: ``"examples"`` cuts one dataset into rounds; ``"files"`` takes new shards as they
            appear.
        files_per_round: new shards per round, at least 1; None takes all. Only if shards arrive.
        on_bad_example: ``"error"`` stops at a corrupt image, ``"skip"`` leaves it out and lists
            it. Only if shards arrive.

    Raises:
        TypeError: ``files_per_round`` is not an integer.
        ValueError: one of the last three fields is out of range.

    Example:
        >>> import hf_dash
        >>> config = hf_dash.DataConfig("fashion_mnist")
        >>> len(config.load_train()), len(config.load_held_out())
        (2500, 2500)
    """

    dataset_name: str = FASHION_MNIST
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
        """Load the training images, from ``dataset_name`` if given."""
        return self._load(dataset_name or self.dataset_name, self.train_split)

    def load_held_out(self) -> AnyDataset:
        """Load the held-out images.

        Raises:
            ValueError: ``test_dataset_name`` is missing and the dataset consists of files, which
                have no splits, or ``test_split`` is the split that is trained on.
        """
        files = self.arrive_by == "files" or Path(self.dataset_name).suffix in LOADERS
        if self.test_dataset_name is None and files:
            raise ValueError(
                f"test_dataset_name must be given: the files of {self.dataset_name!r} have no"
                " split to hold out"
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
    name: str = FASHION_MNIST,
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
        name: ``"fashion_mnist"`` (a sample of 5,000 photographs of clothes) or ``"digits"``
            (scikit-learn's 1,797 handwritten digits), which need no download; a local folder of
            parquet files or an imagefolder, a glob of parquet or webdataset tar files, or the name
            of a dataset on the Hub.
        split: which split; the embedded datasets have ``"train"`` and ``"test"``.
        revision: branch, tag or commit of a Hub dataset.
        streaming: read through an ``IterableDataset`` instead of preparing it on disk.
        image_column: the source's column of images.
        label_column: the source's column of labels. A stream of integers or strings is read once
            to find its classes. ``"json.label"`` is a field in a column of records.
        image_mode: PIL mode to convert every image to, such as ``"RGB"``; None leaves them alone.
        token: access token for a private Hub dataset.
        config_name: configuration of a Hub dataset.
        cache_dir: where downloads and prepared datasets are kept.
        data_files: files by split, for a ``name`` that is a loader, such as ``"imagefolder"``.

    Returns:
        A dataset with the columns ``image`` (``datasets.Image``) and ``label`` (``ClassLabel``).

    Raises:
        ValueError: a column is missing, or the labels are not class labels, integers or strings.

    Example:
        >>> import hf_dash
        >>> images = hf_dash.load_images("fashion_mnist")
        >>> images.column_names, images[0]["image"].size
        (['image', 'label'], (28, 28))
    """
    if name in EMBEDDED:
        dataset = EMBEDDED[name](split)
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


def in_arrival_order(
    dataset: AnyDataset,
    *,
    seed: int,
    num_examples: int | None = None,
    buffer_size: int = 10_000,
) -> Dataset:
    """Put examples in random arrival order, so that all rounds come from one distribution.

    A whole dataset arrives in the same order whether streamed or not. If ``num_examples`` cuts a
    stream, only the necessary part is read: the order is then drawn from a buffer of recently read
    examples, and differs from that of a map-style dataset.

    Args:
        dataset: from :func:`load_images`.
        seed: seed for the order, the same on every process.
        num_examples: total number of examples, at least 1; None takes the whole dataset.
        buffer_size: number of examples in the buffer, at least 1.

    Returns:
        A map-style dataset with the column ``example_id``: the example's position in the source,
        whatever the seed. Images of a stream stay encoded.

    Raises:
        ValueError: the dataset has fewer than ``num_examples`` examples, or none.

    Example:
        >>> import hf_dash
        >>> images = hf_dash.load_images("fashion_mnist")
        >>> arrived = hf_dash.data.in_arrival_order(images, seed=0, num_examples=3)
        >>> arrived["label"][0] == images["label"][arrived["example_id"][0]]
        True
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
    """Yield the rows of a stream in source order, with images as stored."""
    encoded = stream.cast_column("image", Image(mode=stream.features["image"].mode, decode=False))
    return ({**row, "example_id": index} for index, row in enumerate(encoded))


def _drawn(rows: Iterator[Row], generator: np.random.Generator, buffer_size: int) -> Iterator[Row]:
    """Yield rows in random order: draw one from a buffer and put the next row in its place."""
    # IterableDataset.shuffle also reorders shards, so positions would be unknown.
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
    """Check whether a dataset name means embedded or local data rather than the Hub."""
    return (
        name in EMBEDDED
        or Path(name).suffix in LOADERS
        or glob.has_magic(name)
        or Path(name).exists()
    )
