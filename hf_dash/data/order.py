"""The order in which examples arrive, and equal arrivals cut from it.

Flow: a dataset → its examples in a random order, each with a stable ``example_id`` → equal parts.
Differs from ``shuffle``: a stream and a map-style dataset arrive in the same order, and an id is
the example's position in the source, whatever the seed.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from datasets import Dataset, Features, Image, IterableDataset, Value

from hf_dash.data.columns import AnyDataset, undecoded

# Examples of a stream to draw the next one from.
BUFFER_SIZE = 10_000


def in_arrival_order(
    dataset: AnyDataset,
    *,
    seed: int,
    num_examples: int | None = None,
    buffer_size: int = BUFFER_SIZE,
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
        numbered = dataset
        if "example_id" not in dataset.column_names:
            numbered = dataset.add_column("example_id", np.arange(len(dataset)))
        arrived = numbered.select(generator.permutation(len(dataset))[:num_examples])
    elif num_examples is None:
        read = _kept(dataset, _numbered_rows(dataset))
        arrived = read.select(generator.permutation(len(read)))
    else:
        drawn = shuffled(_numbered_rows(dataset), buffer_size, generator)
        arrived = _kept(dataset, islice(drawn, num_examples))
    check_enough(len(arrived), num_examples)
    return arrived


def check_enough(found: int, num_examples: int | None) -> None:
    """Check that there are as many examples as are wanted, or any.

    Raises:
        ValueError: there are fewer.
    """
    if found < (num_examples or 1):
        raise ValueError(
            f"num_examples is {num_examples}, but the dataset holds only {found} examples"
        )


Row = dict[str, Any]


def _numbered_rows(stream: IterableDataset) -> Iterator[Row]:
    """Yield the rows of a stream in source order, with images as stored."""
    return ({"example_id": index, **row} for index, row in enumerate(undecoded(stream)))


T = TypeVar("T")

# Random numbers drawn together.
DRAWN_AT_ONCE = 1000


def shuffled(items: Iterable[T], buffer_size: int, generator: np.random.Generator) -> Iterator[T]:
    """Yield items in a random order: one from a buffer, into whose place the next one goes."""
    # IterableDataset.shuffle also reorders shards, so positions would be unknown.
    items = iter(items)
    buffer = list(islice(items, buffer_size))
    places = _places(len(buffer), generator)
    for item in items:
        place = next(places)
        yield buffer[place]
        buffer[place] = item
    for place in generator.permutation(len(buffer)).tolist():
        yield buffer[place]


def _places(count: int, generator: np.random.Generator) -> Iterator[int]:
    while True:
        yield from generator.integers(count, size=DRAWN_AT_ONCE).tolist()


def _kept(stream: IterableDataset, rows: Iterator[Row]) -> Dataset:
    features = Features({**stream.features, "example_id": Value("int64")})
    image = features["image"]
    features["image"] = Image(mode=image.mode, decode=False)
    return Dataset.from_list(list(rows), features=features).cast_column("image", image)


def first_examples(dataset: AnyDataset, count: int | None) -> AnyDataset:
    """Return at most ``count`` examples, drawn at random but always the same; None keeps all."""
    if count is None:
        return dataset
    if isinstance(dataset, IterableDataset):
        return dataset.shuffle(seed=0, buffer_size=BUFFER_SIZE).take(count)
    return dataset.shuffle(seed=0).select(range(min(count, len(dataset))))


def cut_arrivals(dataset: Dataset, num_rounds: int) -> list[Dataset]:
    """Cut a dataset in arrival order into parts whose sizes differ by at most one.

    Raises:
        ValueError: ``num_rounds`` is not between 1 and the number of examples.
    """
    return [dataset.select(part) for part in cut_rows(np.arange(len(dataset)), num_rounds)]


def cut_rows(rows: np.ndarray, num_rounds: int) -> list[np.ndarray]:
    """Cut rows in arrival order into parts whose sizes differ by at most one.

    Raises:
        ValueError: ``num_rounds`` is not between 1 and the number of rows.
    """
    if not 1 <= num_rounds <= len(rows):
        raise ValueError(
            f"num_rounds must be at least 1 and at most the number of examples, {len(rows)},"
            f" got {num_rounds}"
        )
    return np.array_split(rows, num_rounds)
