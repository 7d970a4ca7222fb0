"""The two columns of every labeled image dataset, ``image`` and ``label``.

Flow: a dataset as its loader returns it → columns found, renamed and typed → class names, and a
fingerprint of the examples.
Differs from plain ``datasets``: labels always have names, in streams too. The fingerprint covers
the content, so it does not depend on how the content was loaded.
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

# Encoded images in memory at a time.
BATCH_SIZE = 100


def standard_columns(
    dataset: AnyDataset, image_column: str, label_column: str, image_mode: str | None
) -> AnyDataset:
    """Keep two columns, renamed to ``image`` and ``label``, and name the classes.

    Args:
        dataset: as loaded. A stream of integer or text labels is read once to find its classes.
        image_column: the source's column of images.
        label_column: the source's column of labels, or a field of a column of records, such as
            ``"json.label"`` in a webdataset. Integer classes are named ``"0"``, ``"1"`` … up to
            the largest one; text classes are sorted.
        image_mode: PIL mode to convert every image to; None leaves them alone.

    Raises:
        ValueError: a column is missing, or the labels are not class labels, integers of at least
            0, or strings.
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
    """Turn a label that is a field of a column of records into a column."""
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
    """Keep images as stored: a stream that maps or renames would encode them again."""
    if not isinstance(dataset.features[image_column], Image):
        return dataset
    return dataset.cast_column(image_column, Image(decode=False))


def map_columns(
    dataset: AnyDataset, function: Callable[..., Any], features: Features, **settings: Any
) -> AnyDataset:
    """Map batches of undecoded columns to columns with the given features."""
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
        # datasets 4.0 encodes only this kind of text.
        dataset = dataset.cast_column("label", Value("string"))
    elif values and values[0] < 0:
        raise ValueError(f"labels must not be negative, got {values[0]}")
    else:
        names = [str(label) for label in range(values[-1] + 1 if values else 0)]
    return dataset.cast_column("label", ClassLabel(names=names))


def label_kind(feature: Any) -> str:
    """Return what a column of labels holds: class labels, integers, strings or others."""
    if isinstance(feature, ClassLabel):
        return "class labels"
    dtype = feature.dtype if isinstance(feature, Value) else ""
    if dtype.startswith(("int", "uint")):
        return "integers"
    return "strings" if dtype in ("string", "large_string") else "others"


def _label_values(dataset: AnyDataset) -> list[Any]:
    """Return the labels that occur, sorted; reads a stream once."""
    if isinstance(dataset, Dataset):
        values = set(dataset.unique("label"))
    else:
        batches = dataset.select_columns(["label"]).iter(batch_size=BATCH_SIZE)
        values = {label for batch in batches for label in batch["label"]}
    return sorted(values - {None})


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
    """Return a SHA-256 of the class names and of all labels and encoded images, in order.

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
    plain = _undecoded(plain, "image")
    digest = hashlib.sha256(json.dumps(label_names(dataset)).encode())
    for batch in plain.iter(batch_size=BATCH_SIZE):
        for value, label in zip(batch["image"], batch["label"], strict=True):
            content = stored_bytes(value)
            # The length marks where an image ends and the next label begins.
            digest.update(struct.pack("<qq", label, len(content)))
            digest.update(content)
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
