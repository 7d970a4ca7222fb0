import os
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from helpers import png, write_parquet
from image_files import class_folders, write_folder, write_tar

from hf_dash.data.columns import Reading, label_names
from hf_dash.data.shards import merge_shards, open_shard, shard_kind

BOTH = pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])


def merged(*paths, **options):
    shards = [open_shard(path, path.name, Reading(**options)) for path in paths]
    return merge_shards(shards)


def rows(dataset):
    names = label_names(dataset)
    return [
        (row["image"].getpixel((0, 0)), names[row["label"]], row["example_id"]) for row in dataset
    ]


@BOTH
def test_classes_of_several_shards_are_matched_by_name(tmp_path, streaming):
    one = write_parquet(tmp_path / "1.parquet", [png(1), png(2)], [0, 1], ["dog", "cat"])
    two = write_parquet(tmp_path / "2.parquet", [png(3)], [1], ["cat", "emu"])
    dataset, names = merged(one, two, streaming=streaming)
    assert rows(dataset) == [(1, "dog", 0), (2, "cat", 1), (3, "emu", 2)]
    assert [names.name(i) for i in range(3)] == ["1.parquet:0", "1.parquet:1", "2.parquet:0"]
    assert [names.shard(i) for i in range(3)] == ["1.parquet", "1.parquet", "2.parquet"]


@BOTH
def test_rows_of_a_folder_are_called_by_their_paths(tmp_path, streaming):
    folder = write_folder(tmp_path / "mon", {"cat/a b.png": png(1), "dog/[1].png": png(2)})
    dataset, names = merged(folder, streaming=streaming)
    assert rows(dataset) == [(1, "cat", 0), (2, "dog", 1)]
    assert [names.name(i) for i in range(2)] == ["mon/cat/a b.png", "mon/dog/[1].png"]
    assert names.find(["mon/dog/[1].png", "mon:0"]) == {0, 1}


def tar_members(labels):
    return [
        member
        for row, label in enumerate(labels)
        for member in ((f"{row:02}.png", png(row)), (f"{row:02}.cls", str(label).encode()))
    ]


@BOTH
@pytest.mark.parametrize(("end", "mode"), [("tar", "w"), ("tar.gz", "w:gz"), ("tgz", "w:gz")])
def test_tar_files_packed_or_not(tmp_path, streaming, end, mode):
    path = write_tar(tmp_path / f"day.{end}", tar_members([1, 0, 1]), mode)
    dataset, _ = merged(path, image_column="png", label_column="cls", streaming=streaming)
    assert rows(dataset) == [(0, "1", 0), (1, "0", 1), (2, "1", 2)]


@BOTH
@pytest.mark.parametrize("lost", [1, 40, 1000])
def test_a_packed_tar_file_that_was_cut_off_is_named(tmp_path, streaming, lost):
    path = write_tar(tmp_path / "day.tar.gz", tar_members(range(40)), "w:gz")
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(ValueError, match=r"day\.tar\.gz cannot be read"):
        list(merged(path, image_column="png", label_column="cls", streaming=streaming)[0])


@BOTH
def test_tar_files_of_unknown_length_are_counted(tmp_path, streaming):
    paths = [
        write_tar(tmp_path / f"{day}.tar", tar_members(labels))
        for day, labels in (("1", [7, 8]), ("2", [8, 9]))
    ]
    dataset, names = merged(*paths, image_column="png", label_column="cls", streaming=streaming)
    assert rows(dataset) == [(0, "7", 0), (1, "8", 1), (0, "8", 2), (1, "9", 3)]
    assert names.name(3) == "2.tar:1"


def test_a_replaced_file_with_the_same_time_stamp_is_read_anew(tmp_path):
    path = tmp_path / "x.parquet"
    for levels, names in (([1, 2], ("cat", "dog")), ([3, 4], ("owl", "fox"))):
        write_parquet(path, [png(level) for level in levels], [0, 1], names)
        os.utime(path, (1.7e9, 1.7e9))
        assert [row[:2] for row in rows(merged(path)[0])] == list(zip(levels, names, strict=True))


def test_a_replaced_tar_file_of_the_same_size_and_time_is_read_anew(tmp_path):
    path = tmp_path / "x.tar"
    sizes = set()
    for label in (3, 4):
        write_tar(path, [("0.png", png(9)), ("0.cls", str(label).encode())])
        os.utime(path, (1.7e9, 1.7e9))
        sizes.add(path.stat().st_size)
        options = {"image_column": "png", "label_column": "cls"}
        assert [row[1] for row in rows(merged(path, **options)[0])] == [str(label)]
    assert len(sizes) == 1


@BOTH
def test_a_dataset_that_was_saved_to_disk(tmp_path, streaming):
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
    images = [{"bytes": png(level), "path": None} for level in (1, 2)]
    Dataset.from_dict({"image": images, "label": [1, 0]}, features).save_to_disk(tmp_path / "s")
    assert rows(merged(tmp_path / "s", streaming=streaming)[0]) == [(1, "dog", 0), (2, "cat", 1)]


@BOTH
def test_a_metadata_file_gives_the_labels(tmp_path, streaming):
    table = b"file_name,kind\nb.png,dog\na.png,cat\n"
    folder = write_folder(
        tmp_path / "mon", {"a.png": png(1), "b.png": png(2), "metadata.csv": table}
    )
    dataset, _ = merged(folder, label_column="kind", streaming=streaming)
    assert rows(dataset) == [(1, "cat", 0), (2, "dog", 1)]


def test_what_is_left_out_of_a_folder_is_kept_in_mind(tmp_path):
    folder = class_folders(tmp_path / "mon", count=2)
    (folder / "cat" / "x.jpg.part").write_bytes(b"")
    with pytest.raises(ValueError, match=r"mon: 1 of 5 .*cat/x\.jpg\.part.*allow_missing=True"):
        open_shard(folder, "mon", Reading())
    shard = open_shard(folder, "mon", Reading(allow_missing=True))
    assert shard.left_out == ("cat/x.jpg.part (still being written)",)
    assert shard.num_rows == 4


@BOTH
def test_large_integers_make_no_more_classes_than_occur(tmp_path, streaming):
    path = write_parquet(
        tmp_path / "a.parquet",
        [png(1), png(2), png(3)],
        [10**9, 3001, 10**9],
        label=Value("int64"),
    )
    dataset, _ = merged(path, streaming=streaming)
    assert label_names(dataset) == ["3001", "1000000000"]
    assert [row[1] for row in rows(dataset)] == ["1000000000", "3001", "1000000000"]


@BOTH
def test_spellings_of_one_class_are_one(tmp_path, streaming):
    names = ["caf\u00e9", "cafe\u0301 ", "dog"]
    path = write_parquet(tmp_path / "a.parquet", [png(n) for n in range(3)], [0, 1, 2], names)
    dataset, _ = merged(path, streaming=streaming)
    assert [row[1] for row in rows(dataset)] == ["caf\u00e9", "caf\u00e9", "dog"]
    texts = write_parquet(
        tmp_path / "b.parquet", [png(n) for n in range(3)], [*names], label=Value("string")
    )
    assert [row[1] for row in rows(merged(texts, streaming=streaming)[0])] == [
        "caf\u00e9",
        "caf\u00e9",
        "dog",
    ]


def test_a_class_that_a_shard_does_not_have_is_not_guessed(tmp_path):
    one = write_parquet(tmp_path / "1.parquet", [png(1)], [0], ["cat"])
    # An index beyond the shard's own names must not become a name of another shard.
    two = write_parquet(tmp_path / "2.parquet", [png(2)], [-1], ["dog"])
    dataset, _ = merged(one, two)
    assert dataset["label"][:] == [0, -1]


def test_kinds_of_shards(tmp_path):
    assert shard_kind(Path("a.TAR.GZ")) == "webdataset"
    assert shard_kind(Path("a.parquet")) == "parquet"
    assert shard_kind(Path("a.tar.zst")) is None
    assert shard_kind(tmp_path) == "folder of images"
