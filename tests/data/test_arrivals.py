import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Image, Value
from helpers import broken, heard, png, write_parquet
from image_files import class_folders, write_folder, write_tar
from PIL import Image as PILImage

from hf_dash import DataConfig
from hf_dash.data.arrivals import arrivals_root, list_arrivals, load_arrival, new_arrivals

BOTH = pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])


FILES = {"arrive_by": "files"}


def levels(arrival):
    return [np.asarray(row["image"]).flat[0] for row in arrival.dataset]


def named(arrival):
    names = arrival.dataset.features["label"].names
    return [names[row["label"]] for row in arrival.dataset]


def ids(arrival):
    return [row["example_id"] for row in arrival.dataset]


def test_shards_are_listed_in_the_order_of_their_names_without_unfinished_ones(tmp_path):
    for name in ("b.parquet", "a.parquet", ".c.parquet", "_d.parquet", "e.parquet.tmp"):
        (tmp_path / name).touch()
    (tmp_path / "readme.txt").touch()
    expected = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    assert list_arrivals(str(tmp_path)) == expected
    assert list_arrivals(str(tmp_path / "*")) == expected
    assert list_arrivals(str(tmp_path / "[b-z]*.parquet")) == expected[1:]
    assert list_arrivals(str(tmp_path / "b.parquet")) == expected[1:]


def test_subfolders_are_shards(tmp_path):
    for name in ("tue/cat", "mon/cat", "wed.part/cat", ".hidden"):
        (tmp_path / name).mkdir(parents=True)
    assert list_arrivals(str(tmp_path)) == [tmp_path / "mon", tmp_path / "tue"]
    with pytest.raises(ValueError, match=r"must not match .*cat, which is inside another"):
        list_arrivals(str(tmp_path / "**"))


def test_nothing_and_mixtures_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no parquet file, tar file or folder of images matches"):
        list_arrivals(str(tmp_path / "*.parquet"))
    (tmp_path / "a.parquet").touch()
    (tmp_path / "b.tar").touch()
    with pytest.raises(ValueError, match=r"must match shards of one kind.*a\.parquet.*b\.tar"):
        list_arrivals(str(tmp_path))


def test_new_shards_are_those_not_seen(tmp_path):
    for name in ("jan/1.parquet", "jan/2.parquet", "feb/1.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    pattern = str(tmp_path / "*" / "*.parquet")
    assert arrivals_root(pattern) == tmp_path
    assert new_arrivals(pattern, ["jan/1.parquet"]) == [
        tmp_path / "feb" / "1.parquet",
        tmp_path / "jan" / "2.parquet",
    ]
    seen = ["feb/1.parquet", "jan/1.parquet", "jan/2.parquet"]
    assert new_arrivals(pattern, seen) == []
    (tmp_path / "jan" / "2.parquet").unlink()
    with pytest.raises(ValueError, match=r"have disappeared from .*: \['jan/2.parquet'\]"):
        new_arrivals(pattern, seen)


def test_the_root_ends_before_the_glob(tmp_path):
    assert arrivals_root(str(tmp_path)) == tmp_path
    assert arrivals_root(str(tmp_path / "x.parquet")) == tmp_path
    assert str(arrivals_root("*.parquet")) == "."


def digit_images(digits, count):
    return [
        row["bytes"] for row in digits.cast_column("image", Image(decode=False))[:count]["image"]
    ]


@BOTH
def test_every_kind_of_shard_gives_the_same_digits(tmp_path, digits, streaming):
    labels = digits[:12]["label"]
    images = digit_images(digits, 12)
    digits.select(range(12)).to_parquet(tmp_path / "a.parquet")
    tar = [
        member
        for row, (image, label) in enumerate(zip(images, labels, strict=True))
        for member in (
            (f"{row:02}.png", image),
            (f"{row:02}.cls", str(label).encode()),
            (f"{row:02}.json", json.dumps({"digit": str(label), "by": "me"}).encode()),
        )
    ]
    write_tar(tmp_path / "b.tar", tar)
    folder = {f"{label}/{row:02}.png": images[row] for row, label in enumerate(labels)}
    write_folder(tmp_path / "c", folder)
    by_class = sorted(range(12), key=lambda row: (labels[row], row))
    for name, columns, order in (
        ("a.parquet", {}, range(12)),
        ("b.tar", {"image_column_name": "png", "label_column_name": "cls"}, range(12)),
        ("b.tar", {"image_column_name": "png", "label_column_name": "json.digit"}, range(12)),
        ("c", {}, by_class),
    ):
        config = DataConfig(streaming=streaming, **columns, **FILES)
        arrival = load_arrival([tmp_path / name], config, root=tmp_path)
        assert arrival.files == (name,)
        assert isinstance(arrival.dataset, Dataset) != streaming
        assert list(arrival.dataset.features) == ["image", "label", "example_id"]
        assert named(arrival) == [str(labels[row]) for row in order]
        assert ids(arrival) == list(range(12))
        assert arrival.num_examples == 12
        for row, example in zip(order, arrival.dataset, strict=True):
            assert np.array_equal(example["image"], digits[row]["image"])


@BOTH
def test_labels_are_merged_by_name(tmp_path, streaming):
    first = write_parquet(tmp_path / "1.parquet", [png(1), png(2)], [0, 1], ["dog", "cat"])
    second = write_parquet(tmp_path / "2.parquet", [png(3), png(4)], [0, 2], ["cat", "dog", "emu"])
    config = DataConfig(streaming=streaming, image_mode="RGB", **FILES)
    arrival = load_arrival([first, second], config, root=tmp_path)
    assert arrival.dataset.features["label"].names == ["dog", "cat", "emu"]
    assert [row["label"] for row in arrival.dataset] == [0, 1, 1, 2]
    assert levels(arrival) == [1, 2, 3, 4]
    assert ids(arrival) == [0, 1, 2, 3]
    assert next(iter(arrival.dataset))["image"].mode == "RGB"


@BOTH
def test_a_folder_of_one_class_and_odd_names(tmp_path, streaming):
    folder = write_folder(tmp_path / "day [1]", {"train/a.png": png(1), "train/b.png": png(2)})
    config = DataConfig(streaming=streaming, **FILES)
    arrival = load_arrival([folder], config, root=tmp_path)
    assert (arrival.files, named(arrival)) == (("day [1]",), ["train", "train"])
    path = write_parquet(tmp_path / "day [2].parquet", [png(3)], [1])
    assert levels(load_arrival([path], config, root=tmp_path)) == [3]


@BOTH
def test_a_folder_whose_labels_are_in_a_metadata_file(tmp_path, streaming):
    rows = b'{"file_name": "b.png", "kind": "dog"}\n{"file_name": "a.png", "kind": "cat"}\n'
    images = {"a.png": png(1), "b.png": broken(2), "metadata.jsonl": rows}
    folder = write_folder(tmp_path / "mon", images)
    config = DataConfig(
        streaming=streaming, label_column_name="kind", on_bad_example="skip", **FILES
    )
    with heard() as lines:
        arrival = load_arrival([folder], config, root=tmp_path)
    assert lines == ["mon: no image is left of the classes dog"]
    assert arrival.dataset.features["label"].names == ["cat", "dog"]
    assert (levels(arrival), named(arrival)) == ([1], ["cat"])
    assert arrival.skipped == ("mon/b.png",)
    again = load_arrival([folder], config, root=tmp_path, skip=[f"mon:{1 - ids(arrival)[0]}"])
    assert again.skipped == arrival.skipped  # as earlier versions named it


def test_loose_images_are_no_arrival(tmp_path):
    folder = write_folder(tmp_path / "cats", {"a.png": png(1)})
    with pytest.raises(
        ValueError, match=r"cats cannot be read: images must be in class folders.*a\.png"
    ):
        load_arrival([folder], DataConfig(**FILES), root=tmp_path)


@pytest.fixture
def with_corrupt_images(tmp_path):
    """Two shards of 4 and 3 rows; rows 1 and 3 of the first and 0 of the second are corrupt."""
    rows = [png(0), broken(1), png(2), b"no image"]
    first = write_parquet(tmp_path / "mon.parquet", rows, [0, 1, 0, None])
    return [first, write_parquet(tmp_path / "tue.parquet", [b"", png(5), png(6)], [0, 1, 1])]


@BOTH
def test_a_corrupt_image_is_named(tmp_path, with_corrupt_images, streaming):
    config = DataConfig(streaming=streaming, **FILES)
    with pytest.raises(ValueError, match=r"mon\.parquet:1 is a corrupt image, one of 2 in mon"):
        load_arrival(with_corrupt_images, config, root=tmp_path)


def test_corrupt_images_are_skipped_alike_streamed_or_not(tmp_path, with_corrupt_images):
    arrivals = [
        load_arrival(
            with_corrupt_images,
            DataConfig(streaming=streaming, on_bad_example="skip", **FILES),
            root=tmp_path,
        )
        for streaming in (False, True)
    ]
    for arrival in arrivals:
        assert arrival.skipped == ("mon.parquet:1", "mon.parquet:3", "tue.parquet:0")
        assert arrival.num_examples == 4
        assert levels(arrival) == [0, 2, 5, 6]
        assert ids(arrival) == [0, 2, 5, 6]
        assert named(arrival) == ["cat", "cat", "dog", "dog"]
    assert arrivals[0].fingerprint == arrivals[1].fingerprint


@BOTH
def test_known_corrupt_images_are_not_decoded_again(
    tmp_path, with_corrupt_images, streaming, monkeypatch
):
    config = DataConfig(streaming=streaming, on_bad_example="skip", **FILES)
    first = load_arrival(with_corrupt_images, config, root=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(PILImage, "open", None)
        again = load_arrival(with_corrupt_images, config, root=tmp_path, skip=first.skipped)
    assert (again.skipped, again.fingerprint) == (first.skipped, first.fingerprint)
    assert ids(again) == ids(first)
    for entry in ("wed.parquet:0", "mon.parquet", "mon.parquet:-1", "mon.parquet:4"):
        with pytest.raises(ValueError, match="skip must name rows of"):
            load_arrival(with_corrupt_images, config, root=tmp_path, skip=[entry])


def test_a_shuffled_stream_keeps_ids_with_their_images(tmp_path, with_corrupt_images, monkeypatch):
    # Five seconds, in case the interpreter ends at once.
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    folder = write_folder(tmp_path / "x", {f"{n % 2}/{n}.png": png(n) for n in range(6)})
    config = DataConfig(streaming=True, on_bad_example="skip", **FILES)
    # The ids that each level has: of the folder, even numbers come first.
    expected = {0: 0, 2: 1, 4: 2, 1: 3, 3: 4, 5: 5}
    arrival = load_arrival([folder], config, root=tmp_path)
    for part in (arrival.dataset, arrival.dataset.shuffle(seed=1, buffer_size=3)):
        found = {int(np.asarray(row["image"])[0, 0]): row["example_id"] for row in part}
        assert found == expected
    rows = load_arrival(with_corrupt_images, config, root=tmp_path).dataset
    for part in (rows.shuffle(seed=1, buffer_size=2), rows.skip(1)):
        assert all(np.asarray(row["image"])[0, 0] == row["example_id"] for row in part)


@BOTH
def test_nothing_left_is_refused(tmp_path, streaming):
    path = write_parquet(tmp_path / "a.parquet", [b"x"], [0])
    config = DataConfig(streaming=streaming, on_bad_example="skip", **FILES)
    with pytest.raises(ValueError, match=r"\['a.parquet'\] hold no example, 1 skipped"):
        load_arrival([path], config, root=tmp_path)


def test_files_are_checked(tmp_path):
    config = DataConfig(**FILES)
    path = write_parquet(tmp_path / "a.parquet", [png(0)], [0])
    with pytest.raises(ValueError, match="files must name at least one shard"):
        load_arrival([], config, root=tmp_path)
    with pytest.raises(ValueError, match="and none twice"):
        load_arrival([path, path], config, root=tmp_path)
    with pytest.raises(ValueError, match="root must be a folder above"):
        load_arrival([path], config, root=tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"a\.txt cannot be read: a shard must be a folder or"):
        load_arrival([tmp_path / "a.txt"], config, root=tmp_path)
    with pytest.raises(ValueError, match=r"b\.parquet cannot be read"):
        load_arrival([tmp_path / "b.parquet"], config, root=tmp_path)


@BOTH
@pytest.mark.parametrize("label", [None, -1])
def test_a_missing_label_is_named(tmp_path, streaming, label):
    path = write_parquet(tmp_path / "a.parquet", [png(0), png(1)], [0, label])
    with pytest.raises(ValueError, match=rf"a\.parquet:1 has no label among its .* got {label}"):
        load_arrival([path], DataConfig(streaming=streaming, **FILES), root=tmp_path)


@BOTH
def test_a_change_of_columns_between_shards_is_refused(tmp_path, streaming):
    config = DataConfig(streaming=streaming, **FILES)
    sound = write_parquet(tmp_path / "a.parquet", [png(0)], [0])
    text = write_parquet(tmp_path / "b.parquet", [png(0)], ["cat"], label=Value("string"))
    with pytest.raises(ValueError, match=r"b\.parquet: column 'label' holds strings, but class la"):
        load_arrival([sound, text], config, root=tmp_path)
    raw = write_parquet(tmp_path / "c.parquet", [png(0)], [0], image=Value("binary"))
    assert levels(load_arrival([raw], config, root=tmp_path)) == [0]
    with pytest.raises(ValueError, match=r"c\.parquet: column 'image' holds Value, but Image in a"):
        load_arrival([sound, raw], config, root=tmp_path)
    other = tmp_path / "d.parquet"
    Dataset.from_dict({"image": [0], "fine": [0]}).to_parquet(other)
    with pytest.raises(ValueError, match=r"d\.parquet cannot be read: label_column 'label' is not"):
        load_arrival([sound, other], config, root=tmp_path)


@BOTH
def test_a_truncated_parquet_file_is_named(tmp_path, streaming):
    path = write_parquet(tmp_path / "a.parquet", [png(0)] * 5, [0] * 5)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read") as raised:
        load_arrival([path], DataConfig(streaming=streaming, **FILES), root=tmp_path)
    assert raised.value.__cause__ is not None


@BOTH
@pytest.mark.parametrize("cut", [0, 100, 512 * 20, 512 * 40, 512 * 40 + 600])
def test_a_truncated_tar_file_is_named(tmp_path, streaming, cut):
    members = [(f"{n:02}.{kind}", b"7") for n in range(12) for kind in ("png", "cls")]
    path = write_tar(tmp_path / "a.tar", members)
    # A member takes two blocks of 512 bytes: some cuts fall between two members.
    path.write_bytes(path.read_bytes()[:cut])
    columns = {"image_column_name": "png", "label_column_name": "cls"}
    config = DataConfig(streaming=streaming, **columns, **FILES)
    with pytest.raises(ValueError, match=r"a\.tar cannot be read"):
        load_arrival([path], config, root=tmp_path)


@BOTH
def test_a_late_defect_of_a_tar_file_is_named(tmp_path, streaming):
    members = [(f"{n:02}.{kind}", b"7") for n in range(12) for kind in ("png", "cls")]
    path = write_tar(tmp_path / "a.tar", [*members, ("12.png", b"7"), ("12.cls", b"seven")])
    columns = {"image_column_name": "png", "label_column_name": "cls"}
    config = DataConfig(streaming=streaming, on_bad_example="skip", **columns, **FILES)
    with pytest.raises(ValueError, match=r"a\.tar cannot be read"):
        load_arrival([path], config, root=tmp_path)


@pytest.mark.parametrize("other", ["photo.png", "more.zip", "day.tar.zst", "gone.parquet"])
def test_what_is_no_shard_but_holds_images_is_named(tmp_path, other):
    class_folders(tmp_path / "monday", count=1)
    if other == "gone.parquet":
        (tmp_path / other).symlink_to(tmp_path / "nowhere")
    else:
        (tmp_path / other).write_bytes(png(1))
    (tmp_path / "readme.txt").write_text("not data")
    with pytest.raises(ValueError, match=rf"holds \['{other}'\], which are not shards"):
        list_arrivals(str(tmp_path))
    with heard() as lines:
        assert list_arrivals(str(tmp_path), allow_missing=True) == [tmp_path / "monday"]
    assert other in lines[0]


def test_a_shard_whose_name_looks_like_a_pattern(tmp_path):
    folder = class_folders(tmp_path / "[2026] tuesday", count=1)
    assert list_arrivals(str(tmp_path)) == [folder]
    path = write_parquet(tmp_path / "a[1].parquet", [png(1)], [0])
    assert list_arrivals(str(path)) == [path]
    assert arrivals_root(str(path)) == tmp_path


@BOTH
def test_an_arrival_is_model_inputs(tmp_path, streaming):
    path = write_parquet(tmp_path / "a.parquet", [png(1), png(2), png(3)], [0, 1, 1])
    config = DataConfig(streaming=streaming, **FILES)
    arrival = load_arrival([path], config, root=tmp_path)
    examples = arrival.examples(lambda image: torch.zeros(1), [5, 7])
    assert sorted(examples.labels) == [5, 7, 7]
    assert examples.fingerprint == arrival.fingerprint
    part = arrival.without(frozenset({1}))
    assert (ids(part), part.num_examples, part.survey.labels.tolist()) == ([0, 2], 2, [0, 1])
    if streaming:
        with pytest.raises(ValueError, match=r"label_noise must be 0 for streams, got 0\.5"):
            arrival.examples(lambda image: torch.zeros(1), label_noise=0.5)
