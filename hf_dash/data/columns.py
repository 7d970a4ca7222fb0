"""The two columns of every labeled image dataset, ``image`` and ``label``.

Flow: a dataset as its loader returns it → columns found, renamed and typed → class names, and a
fingerprint of the examples.
Differs from plain ``datasets``: labels always have names, in streams too, and a name is the same
whichever system wrote it. The fingerprint covers the content, so it does not depend on how the
content was loaded.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import fsspec
import numpy as np
import pyarrow.compute
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    Image,
    IterableDataset,
    Value,
    concatenate_datasets,
)
from PIL import Image as PILImage

from hf_dash.data.names import normalized
from hf_dash.utils.logging import get_logger

logger = get_logger(__name__)

AnyDataset: TypeAlias = Dataset | IterableDataset

# Encoded images in memory at a time.
BATCH_SIZE = 100

# Of a SHA-256, in bytes.
DIGEST = 32


@dataclass(frozen=True)
class Reading:
    """How to read a source of labeled images.

    Args:
        image_column: the source's column of images.
        label_column: the source's column of labels, or a field of a column of records, such as
            ``"json.label"`` in a webdataset. Classes of integers or text are those that occur,
            sorted; names are NFC-normalized and stripped.
        image_mode: PIL mode to convert every image to; None leaves them alone.
        streaming: read through an ``IterableDataset``.
        class_folder: which folder names the class of an image that lies more than one folder
            deep: ``"first"`` or ``"last"``; None refuses such images.
        allow_missing: continue although a class or more than 1 % of the images cannot be read.
        by_pixels: tell images apart by their pixels instead of their encoded bytes.
        verify: read shards although what is in them is known, and compare.
        split_alone: of parquet files on the Hub, fetch those of one split, not the whole dataset.
    """

    image_column: str = "image"
    label_column: str = "label"
    image_mode: str | None = None
    streaming: bool = False
    class_folder: str | None = None
    allow_missing: bool = False
    by_pixels: bool = False
    verify: bool = False
    split_alone: bool = False

    @property
    def key(self) -> tuple[str | bool | None, ...]:
        """What of this decides what is found in a file."""
        columns = self.image_column, self.label_column
        return *columns, self.image_mode, self.class_folder, self.by_pixels


# Labels that occur, sorted, and what finds them.
Values: TypeAlias = Sequence[int | str]
FindValues: TypeAlias = Callable[[AnyDataset], Values]


def label_values(dataset: AnyDataset) -> Values:
    """Return the labels that occur, sorted; reads a stream once."""
    if isinstance(dataset, Dataset):
        values: Iterable[Any] = dataset.unique("label")
    else:
        batches = dataset.select_columns(["label"]).iter(batch_size=BATCH_SIZE)
        values = {label for batch in batches for label in batch["label"]}
    return sorted(value for value in values if value is not None)


def standard_columns(
    dataset: AnyDataset, reading: Reading, find_values: FindValues = label_values
) -> AnyDataset:
    """Keep two columns, renamed to ``image`` and ``label``, and name the classes.

    Args:
        dataset: as loaded.
        reading: names the columns and the mode of the images.
        find_values: returns the labels that occur in a column ``label`` of integers or text; by
            default a stream is read once.

    Raises:
        ValueError: a column is missing, or the labels are not class labels, integers of at least
            0, or strings.
    """
    image_column, label_column = reading.image_column, reading.label_column
    if dataset.features is None:
        # A stream of files without a stored schema: its first rows tell.
        dataset = dataset._resolve_features()
    dataset = _take_field(dataset, image_column, label_column)
    features = dataset.features
    for argument, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in features:
            raise ValueError(
                f"{argument} {column!r} is not a column of the dataset, which has {list(features)}"
            )
    dataset = dataset.select_columns([image_column, label_column])
    if isinstance(dataset, IterableDataset):
        dataset = undecoded(dataset, image_column)
    names = {image_column: "image", label_column: "label"}
    renamed = {old: new for old, new in names.items() if old != new}
    if renamed:  # a stream would copy every example otherwise
        dataset = dataset.rename_columns(renamed)
    image = features[image_column]
    if reading.image_mode is not None or not isinstance(image, Image):
        image = Image(mode=reading.image_mode)
    if dataset.features["image"] != image:
        dataset = dataset.cast_column("image", image)
    return _named_labels(dataset, features[label_column], find_values)


def _take_field(dataset: AnyDataset, image_column: str, label_column: str) -> AnyDataset:
    """Turn a label that is a field of a column of records into a column."""
    record, _, field = label_column.partition(".")
    features = dataset.features
    fields = features.get(record)
    is_field = isinstance(fields, dict) and field in fields
    if label_column in features or not is_field or image_column not in features:
        return dataset
    encoded = undecoded(dataset.select_columns([image_column, record]), image_column)
    taken = map_columns(
        encoded,
        lambda records: {label_column: [None if r is None else r[field] for r in records]},
        Features({image_column: encoded.features[image_column], label_column: fields[field]}),
        input_columns=[record],
        remove_columns=[record],
    )
    return taken.cast_column(image_column, features[image_column])


def undecoded(dataset: AnyDataset, image_column: str = "image") -> AnyDataset:
    """Keep images as stored: a stream that maps or renames would encode them again."""
    image = dataset.features[image_column]
    if not isinstance(image, Image):
        return dataset
    return dataset.cast_column(image_column, Image(mode=image.mode, decode=False))


def map_columns(
    dataset: AnyDataset, function: Callable[..., Any], features: Features, **settings: Any
) -> AnyDataset:
    """Map batches of undecoded columns to columns with the given features."""
    settings = {"batched": True, "batch_size": BATCH_SIZE, **settings}
    if isinstance(dataset, Dataset):
        return dataset.map(function, features=features, **settings)
    # A stream mapped to features would ignore every later cast, decoding included.
    return dataset.map(function, **settings).cast(features)


def _named_labels(dataset: AnyDataset, feature: Any, find_values: FindValues) -> AnyDataset:
    """Name the classes; labels become positions in the list of names."""
    kind = label_kind(feature)
    if kind == "others":
        raise ValueError(f"label_column must hold ClassLabel, integers or strings, got {feature}")
    if kind == "class labels":
        values: list[Any] = list(range(feature.num_classes))
        texts = list(feature.names)
    else:
        values = list(find_values(dataset))
        texts = [str(value) for value in values]
    if kind == "integers" and values and values[0] < 0:
        raise ValueError(f"labels must not be negative, got {values[0]}")
    names = _merge_names([text for text in texts if normalized(text)])
    if kind == "strings":
        names = sorted(names)
    if kind == "class labels" and names == texts:
        return dataset
    # Blank text is not a label.
    pairs = [(value, normalized(text)) for value, text in zip(values, texts, strict=True)]
    places = {name: place for place, name in enumerate(names)}
    ids = {value: places[name] for value, name in pairs if name}
    in_place = kind == "strings" and names == texts
    if in_place:
        # datasets 4.0 encodes only this kind of text.
        dataset = dataset.cast_column("label", Value("string"))
    if in_place or list(ids.items()) == [(value, value) for value in range(len(values))]:
        return dataset.cast_column("label", ClassLabel(names=names))
    return relabeled(dataset, ids, names)


def _merge_names(texts: Sequence[str]) -> list[str]:
    """Return normalized names, each once; say which spellings became one."""
    spellings: dict[str, list[str]] = {}
    for text in texts:
        spellings.setdefault(normalized(text), []).append(text)
    for name, found in spellings.items():
        if len(found) > 1:
            logger.warning("labels %s are one class, %r", [ascii(text) for text in found], name)
    return list(spellings)


def relabeled(dataset: AnyDataset, ids: dict[Any, int], names: Sequence[str]) -> AnyDataset:
    """Replace labels by their position among the names; a missing label stays missing."""
    feature = ClassLabel(names=list(names))
    if isinstance(dataset, Dataset):
        return replace_labels(dataset, [ids.get(x) for x in dataset["label"][:]], feature)
    image = dataset.features["image"]
    features = Features({**dataset.features, "label": feature})
    mapped = map_columns(
        undecoded(dataset),
        lambda labels: {"label": [ids.get(label) for label in labels]},
        features,
        input_columns=["label"],
    )
    return mapped.cast_column("image", image)


def all_names(datasets: Iterable[AnyDataset]) -> list[str]:
    """Return the names of all classes of several datasets, each once, as they first appear."""
    return list(dict.fromkeys(name for dataset in datasets for name in label_names(dataset)))


def label_ids(dataset: AnyDataset, names: Sequence[str]) -> list[int]:
    """Return the place of each of a dataset's classes among ``names``, which hold them."""
    places = {name: place for place, name in enumerate(names)}
    return [places[name] for name in label_names(dataset)]


def matched(dataset: AnyDataset, names: Sequence[str]) -> AnyDataset:
    """Return a dataset whose labels are positions among ``names``, which hold its classes."""
    if label_names(dataset) == list(names):
        return dataset
    return relabeled(dataset, dict(enumerate(label_ids(dataset, names))), names)


def joined(parts: Sequence[AnyDataset]) -> AnyDataset:
    """Return datasets of the same columns as one."""
    whole: AnyDataset = parts[0] if len(parts) == 1 else concatenate_datasets(list(parts))
    return whole


def replace_labels(dataset: Dataset, labels: Sequence[int | None], feature: ClassLabel) -> Dataset:
    """Return a map-style dataset with other labels, the images left where they are."""
    # Removed first, a column in memory would leave an empty table that takes no new column.
    added = dataset.add_column("new_label", labels, feature=feature).remove_columns("label")
    return added.rename_column("new_label", "label").select_columns(dataset.column_names)


def labeled(dataset: Dataset, features: Features) -> Dataset:
    """Return map-style rows with other features, whose classes are all of theirs and more.

    Every change copies the names of all classes several times, so none is made without need.
    """
    if dataset.features["image"] != features["image"]:
        dataset = dataset.cast_column("image", features["image"])
    names = features["label"].names
    known = whole_numbers(dataset, "label", missing=0)
    if label_names(dataset) == names and ((known >= 0) & (known < len(names))).all():
        return dataset
    labels = translated(dataset["label"][:], label_ids(dataset, names))
    return replace_labels(dataset, labels, features["label"])


def translated(labels: Sequence[int | None], places: Sequence[int]) -> list[int | None]:
    """Return labels of all shards: None for a missing one, -1 for one that is not a class.

    Args:
        labels: of one shard.
        places: see :func:`label_ids`.
    """
    known = range(len(places))
    return [x if x is None else places[x] if x in known else -1 for x in labels]


def whole_numbers(dataset: Dataset, column: str, missing: int = -2) -> np.ndarray:
    """Return a column of integers, int64 [rows], with ``missing`` in place of None.

    ``dataset[column][:]`` gathers row by row where rows were selected, which takes a minute for a
    million of them.
    """
    stored = dataset.data.column(column)
    values = np.asarray(pyarrow.compute.fill_null(stored, missing).to_numpy(), dtype=np.int64)
    chosen = dataset._indices  # there is no other way to them
    return values if chosen is None else values[chosen.column(0).to_numpy()]


def label_kind(feature: Any) -> str:
    """Return what a column of labels holds: class labels, integers, strings or others."""
    if isinstance(feature, ClassLabel):
        return "class labels"
    dtype = feature.dtype if isinstance(feature, Value) else ""
    if dtype.startswith(("int", "uint")):
        return "integers"
    return "strings" if dtype in ("string", "large_string") else "others"


def label_names(dataset: AnyDataset) -> list[str]:
    """Return the names of the classes, in the order of the labels.

    Example:
        >>> import hf_dash
        >>> hf_dash.data.label_names(hf_dash.load_images("digits"))
        ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9']
    """
    names: list[str] = dataset.features["label"].names
    return names


def fingerprint(dataset: AnyDataset) -> str:
    """Return a SHA-256 of the class names and of all labels and images' own SHA-256s, in order.

    Images are read as stored, without decoding. Images in memory that were never encoded count by
    their mode, size and pixels. The same examples have the same fingerprint, streamed or not,
    whatever mode they are converted to.

    Args:
        dataset: with the columns ``image`` and ``label`` (``ClassLabel``); read once.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: ``label`` is not a column of class labels.
        TypeError: ``image`` does not hold images.
    """
    features = dataset.features or {}
    if not isinstance(features.get("label"), ClassLabel):
        raise ValueError(f"dataset must have a column label of ClassLabel, got {features}")
    plain = dataset.with_format(None).select_columns(["image", "label"])
    labels, digests = [], []
    for batch in undecoded(plain).iter(batch_size=BATCH_SIZE):
        labels += batch["label"]
        digests += [hashlib.sha256(stored_bytes(value)).digest() for value in batch["image"]]
    sha256 = np.frombuffer(b"".join(digests), np.uint8).reshape(
        len(labels), hashlib.sha256().digest_size
    )
    return fingerprint_of(label_names(dataset), np.array(labels, dtype=np.int64), sha256)


def part_of(checksum: str | None, rows: np.ndarray) -> str | None:
    """Return a checksum of some rows, int64, of what has this checksum, if that is known."""
    if checksum is None:
        return None
    return hashlib.sha256(checksum.encode() + rows.astype("<i8").tobytes()).hexdigest()


def fingerprint_of(names: Sequence[str], labels: np.ndarray, sha256: np.ndarray) -> str:
    """Return the :func:`fingerprint` of images whose own checksums are known.

    Args:
        names: of the classes.
        labels: int64 [images].
        sha256: of the encoded images, uint8 [images, 32].
    """
    rows = np.concatenate([labels.astype("<i8").reshape(-1, 1).view(np.uint8), sha256], axis=1)
    digest = hashlib.sha256(json.dumps(list(names)).encode())
    digest.update(np.ascontiguousarray(rows).data)
    return digest.hexdigest()


def stored_bytes(value: Any) -> bytes:
    """Return an image's encoded bytes, read from its file where only the path is stored.

    Raises:
        TypeError: the value is not an image.
    """
    if isinstance(value, PILImage.Image):
        return f"{value.mode} {value.size} ".encode() + value.tobytes()
    if not isinstance(value, dict) or not {"bytes", "path"} <= value.keys():
        raise TypeError(f"image must hold images, got {type(value).__name__}")
    if value["bytes"] is not None:
        return bytes(value["bytes"])
    with fsspec.open(value["path"], "rb") as file:
        return bytes(file.read())
