import hashlib
import json

import numpy as np
import pytest
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

from hf_dash.data.columns import (
    Reading,
    fingerprint,
    label_kind,
    label_names,
    standard_columns,
    whole_numbers,
)

BOTH = pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])


def labeled(labels, kind, streaming):
    features = Features({"image": Image(), "label": kind})
    images = [PILImage.new("L", (4, 4), level) for level in range(len(labels))]
    dataset = Dataset.from_dict({"image": images, "label": labels}, features=features)
    return dataset.to_iterable_dataset() if streaming else dataset


@BOTH
@pytest.mark.parametrize(
    ("labels", "dtype", "names"),
    [
        ([2, 0], "uint8", ["0", "2"]),
        (["dog", "cat"], "string", ["cat", "dog"]),
    ],
)
def test_labels_get_names_streamed_or_not(streaming, labels, dtype, names):
    source = labeled(labels, Value(dtype), streaming)
    dataset = standard_columns(source, Reading())
    assert label_names(dataset) == names
    rows = list(dataset)
    assert [names[row["label"]] for row in rows] == [str(label) for label in labels]
    assert [row["image"].getpixel((0, 0)) for row in rows] == [0, 1]


def test_long_text_labels_get_names():
    # Of pandas 3; a stream of them needs a datasets later than 4.0.
    source = labeled(["dog", "cat"], Value("large_string"), streaming=False)
    assert standard_columns(source, Reading())["label"][:] == [1, 0]


@BOTH
def test_labels_in_records(streaming):
    kind = {"name": Value("string"), "by": Value("string")}
    source = labeled([{"name": "dog", "by": "me"}, {"name": "cat"}], kind, streaming)
    dataset = standard_columns(source, Reading(label_column="label.name"))
    assert [row["label"] for row in dataset] == [1, 0]
    stored = dataset.cast_column("image", Image(decode=False))
    before = source.cast_column("image", Image(decode=False))
    assert [row["image"] for row in stored] == [row["image"] for row in before]
    with pytest.raises(ValueError, match=r"label_column 'label.nope' is not a column"):
        standard_columns(source, Reading(label_column="label.nope"))


@BOTH
def test_other_labels_are_refused(streaming):
    with pytest.raises(ValueError, match="labels must not be negative, got -2"):
        standard_columns(labeled([0, -2], Value("int8"), streaming), Reading())
    with pytest.raises(ValueError, match=r"label_column must hold ClassLabel.*float32"):
        standard_columns(labeled([0.5], Value("float32"), streaming), Reading())


def test_kinds_of_labels():
    assert label_kind(ClassLabel(names=["a"])) == "class labels"
    assert label_kind(Value("uint16")) == "integers"
    assert label_kind(Value("large_string")) == "strings"
    assert label_kind({"a": Value("int8")}) == label_kind(Value("bool")) == "others"


def of_files(contents, labels, names=("a", "b")):
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    images = [{"bytes": content, "path": None} for content in contents]
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def test_the_fingerprint_is_the_hash_of_names_labels_and_hashes_of_bytes():
    expected = hashlib.sha256(json.dumps(["a", "b"]).encode())
    for label, content in ((1, b"first"), (0, b"2nd")):
        expected.update(label.to_bytes(8, "little") + hashlib.sha256(content).digest())
    assert fingerprint(of_files([b"first", b"2nd"], [1, 0])) == expected.hexdigest()


def test_the_fingerprint_does_not_depend_on_how_examples_are_held(tmp_path, digits):
    part = digits.select(range(130))  # more than are read at a time
    expected = fingerprint(part)
    assert fingerprint(part.to_iterable_dataset(num_shards=3)) == expected
    assert fingerprint(part.cast_column("image", Image(mode="L"))) == expected
    assert fingerprint(part.with_format("torch")) == expected
    images = part.cast_column("image", Image(decode=False))["image"][:]
    paths = []
    for row, image in enumerate(images):
        (tmp_path / f"{row}.png").write_bytes(image["bytes"])
        paths.append({"bytes": None, "path": str(tmp_path / f"{row}.png")})
    rows = {"image": paths, "label": part["label"][:]}
    assert fingerprint(Dataset.from_dict(rows, features=part.features)) == expected


@pytest.mark.parametrize(
    "other",
    [
        of_files([b"y", b"x"], [0, 1]),
        of_files([b"x", b"y"], [1, 1]),
        of_files([b"x", b"y"], [0, 1], names=("a", "c")),
        of_files([b"x"], [0]),
    ],
    ids=["order", "label", "name", "length"],
)
def test_other_examples_have_another_fingerprint(other):
    assert fingerprint(other) != fingerprint(of_files([b"x", b"y"], [0, 1]))


def test_images_in_memory_count_by_their_pixels():
    features = Features({"image": Image(), "label": ClassLabel(names=["a"])})

    def stream(*levels):
        rows = [{"image": PILImage.new("L", (2, 2), level), "label": 0} for level in levels]
        return IterableDataset.from_generator(lambda: iter(rows), features=features)

    assert fingerprint(stream(1, 2)) == fingerprint(stream(1, 2)) != fingerprint(stream(1, 3))


def test_a_fingerprint_needs_images_and_class_labels():
    with pytest.raises(ValueError, match="dataset must have a column label of ClassLabel"):
        fingerprint(Dataset.from_dict({"image": [0], "label": [0]}))
    features = Features({"image": Value("int64"), "label": ClassLabel(names=["a"])})
    with pytest.raises(TypeError, match="image must hold images, got int"):
        fingerprint(Dataset.from_dict({"image": [0], "label": [0]}, features=features))


@BOTH
def test_blank_text_is_not_a_label(streaming):
    source = labeled(["dog", " ", "cat", None], Value("string"), streaming)
    dataset = standard_columns(source, Reading())
    assert label_names(dataset) == ["cat", "dog"]
    assert [row["label"] for row in dataset] == [1, None, 0, None]
    named = labeled([0, 1, 0], ClassLabel(names=["cat", ""]), streaming)
    assert [row["label"] for row in standard_columns(named, Reading())] == [0, None, 0]


def test_a_column_of_integers_is_read_as_it_was_selected_and_put_together():
    one = Dataset.from_dict({"a": [5, None, 7, 8], "b": ["x"] * 4})
    whole = concatenate_datasets([one.select([3, 1, 0]), one]).select([6, 0, 1, 4])
    assert whole["a"][:] == [8, 8, None, None]
    assert whole_numbers(whole, "a").tolist() == [8, 8, -2, -2]
    assert whole_numbers(one, "a", missing=0).tolist() == [5, 0, 7, 8]
    assert whole_numbers(one.select([]), "a").dtype == np.int64
