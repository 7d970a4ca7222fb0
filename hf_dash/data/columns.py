"""The two columns of every labeled image dataset, ``image`` and ``label``, and what they hold.

Flow: a dataset as its loader gives it → its columns found, renamed and typed → names of its
classes, fingerprint of its examples.
Differs from plain ``datasets``: labels always know their names, in streams too; the fingerprint is
of the content, so that it does not depend on how the content was loaded.
"""

import hashlib
import json
import struct
from collections.abc import Callable
from typing import Any, TypeAlias

import fsspec
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value
from PIL import Image as PILImage

AnyDataset: TypeAlias = Dataset | IterableDataset

# Encoded images held at a time.
BATCH_SIZE = 100


def standard_columns(
    dataset: AnyDataset, image_column: str, label_column: str, image_mode: str | None
) -> AnyDataset:
    """Keep the columns of images and labels, as ``image`` and ``label``; name the labels.

    Args:
        dataset: as loaded; a stream of integer or text labels is read once to name them.
        image_column: name of the column of images in the source.
        label_column: name of the column of labels in the source, or of a field in a column of
            records, such as ``"json.label"`` in a webdataset. Classes of integers are named
            ``"0"``, ``"1"`` … up to the greatest that occurs; classes of text are sorted.
        image_mode: PIL mode to convert every image to; None keeps them.

    Raises:
        ValueError: a column is missing, or the labels are neither class labels nor integers of at
            least 0 nor strings.
    """
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
    dataset = _undecoded(dataset.select_columns([image_column, label_column]), image_column)
    names = {image_column: "image", label_column: "label"}
    renamed = {old: new for old, new in names.items() if old != new}
    if renamed:  # a stream would copy every example otherwise
        dataset = dataset.rename_columns(renamed)
    image = features[image_column]
    if image_mode is not None or not isinstance(image, Image):
        image = Image(mode=image_mode)
    dataset = dataset.cast_column("image", image)
    return _named_labels(dataset, features[label_column])


def _take_field(dataset: AnyDataset, image_column: str, label_column: str) -> AnyDataset:
    """Make a column of its own of a label that is a field of a column of records."""
    record, _, field = label_column.partition(".")
    features = dataset.features
    fields = features.get(record)
    is_field = isinstance(fields, dict) and field in fields
    if label_column in features or not is_field or image_column not in features:
        return dataset
    encoded = _undecoded(dataset.select_columns([image_column, record]), image_column)
    taken = map_columns(
        encoded,
        lambda records: {label_column: [None if r is None else r[field] for r in records]},
        Features({image_column: encoded.features[image_column], label_column: fields[field]}),
        input_columns=[record],
        remove_columns=[record],
    )
    return taken.cast_column(image_column, features[image_column])


def _undecoded(dataset: AnyDataset, image_column: str) -> AnyDataset:
    """Keep images as they are stored: a stream that maps or renames would encode them anew."""
    if not isinstance(dataset.features[image_column], Image):
        return dataset
    return dataset.cast_column(image_column, Image(decode=False))


def map_columns(
    dataset: AnyDataset, function: Callable[..., Any], features: Features, **settings: Any
) -> AnyDataset:
    """Map batches of undecoded columns to columns of the given features."""
    settings = {"batched": True, "batch_size": BATCH_SIZE, **settings}
    if isinstance(dataset, Dataset):
        return dataset.map(function, features=features, **settings)
    # A stream mapped to features would ignore every later cast, decoding included.
    return dataset.map(function, **settings).cast(features)


def _named_labels(dataset: AnyDataset, feature: Any) -> AnyDataset:
    if isinstance(feature, ClassLabel):
        return dataset
    kind = label_kind(feature)
    if kind == "others":
        raise ValueError(f"label_column must hold ClassLabel, integers or strings, got {feature}")
    values = _label_values(dataset)
    if kind == "strings":
        names = values
        # datasets 4.0 encodes no other kind of text.
        dataset = dataset.cast_column("label", Value("string"))
    elif values and values[0] < 0:
        raise ValueError(f"labels must not be negative, got {values[0]}")
    else:
        names = [str(label) for label in range(values[-1] + 1 if values else 0)]
    return dataset.cast_column("label", ClassLabel(names=names))


def label_kind(feature: Any) -> str:
    """Tell what a column of labels holds: class labels, integers, strings or others."""
    if isinstance(feature, ClassLabel):
        return "class labels"
    dtype = feature.dtype if isinstance(feature, Value) else ""
    if dtype.startswith(("int", "uint")):
        return "integers"
    return "strings" if dtype in ("string", "large_string") else "others"


def _label_values(dataset: AnyDataset) -> list[Any]:
    """Return the labels that occur, sorted; a stream is read through once for them."""
    if isinstance(dataset, Dataset):
        values = set(dataset.unique("label"))
    else:
        batches = dataset.select_columns(["label"]).iter(batch_size=BATCH_SIZE)
        values = {label for batch in batches for label in batch["label"]}
    return sorted(values - {None})


def label_names(dataset: AnyDataset) -> list[str]:
    """Return the names of the classes, in the order of the labels."""
    names: list[str] = dataset.features["label"].names
    return names


def fingerprint(dataset: AnyDataset) -> str:
    """Return a SHA-256 of the class names and of all labels and encoded images in their order.

    Images are read as they are stored, without decoding, from their file where only a path is
    stored; images in memory that were never encoded count by their mode, size and pixels. The
    same examples give the same fingerprint, streamed or not, whatever mode they are converted to.

    Args:
        dataset: with the columns ``image`` and ``label`` (``ClassLabel``); read once.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: ``label`` is no column of class labels.
        TypeError: ``image`` holds no images.
    """
    features = dataset.features or {}
    if not isinstance(features.get("label"), ClassLabel):
        raise ValueError(f"dataset must have a column label of ClassLabel, got {features}")
    plain = dataset.with_format(None).select_columns(["image", "label"])
    plain = _undecoded(plain, "image")
    digest = hashlib.sha256(json.dumps(label_names(dataset)).encode())
    for batch in plain.iter(batch_size=BATCH_SIZE):
        for value, label in zip(batch["image"], batch["label"], strict=True):
            content = stored_bytes(value)
            # The length tells where an image ends and the next label begins.
            digest.update(struct.pack("<qq", label, len(content)))
            digest.update(content)
    return digest.hexdigest()


def stored_bytes(value: Any) -> bytes:
    """Return an image's encoded bytes, read from its file where only the path is stored.

    Raises:
        TypeError: it is no image.
    """
    if isinstance(value, PILImage.Image):
        return f"{value.mode} {value.size} ".encode() + value.tobytes()
    if not isinstance(value, dict) or not {"bytes", "path"} <= value.keys():
        raise TypeError(f"image must hold images, got {type(value).__name__}")
    if value["bytes"] is not None:
        return bytes(value["bytes"])
    with fsspec.open(value["path"], "rb") as file:
        return bytes(file.read())
