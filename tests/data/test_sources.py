import io
import pickle
import tarfile

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from helpers import png, write_parquet
from hub_double import TOKENS
from image_files import class_folders, write_folder, write_tar
from PIL import Image as PILImage

import hf_dash
from hf_dash import DashConfig, DataConfig, Round
from hf_dash.data import StreamLoader, gradient_batches, load_arrival, load_schedules
from hf_dash.data.arrivals import arrive
from hf_dash.data.columns import Reading
from hf_dash.data.sources import Access, _parquet_paths, find_source, is_local
from hf_dash.hub import HubError

PNG = png(7)


def gray(level):
    return PILImage.new("L", (4, 4), level)


@pytest.fixture(scope="module")
def parquet_folder(tmp_path_factory, digits, digits_test):
    folder = tmp_path_factory.mktemp("parquet")
    digits.select(range(30)).to_parquet(folder / "train-00000-of-00002.parquet")
    digits.select(range(30, 50)).to_parquet(folder / "train-00001-of-00002.parquet")
    digits_test.select(range(10)).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for split, count in (("train", 3), ("test", 1)):
        for name in ("cat", "dog"):
            place = folder / split / name
            place.mkdir(parents=True)
            for index in range(count):
                gray(index).save(place / f"{index}.png")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_parquet_files(parquet_folder, digits, streaming):
    train = hf_dash.load_images(str(parquet_folder), streaming=streaming)
    assert [row["label"] for row in train] == digits[:50]["label"]
    test = hf_dash.load_images(str(parquet_folder), split="test", streaming=streaming)
    assert len(list(test)) == 10


@pytest.mark.parametrize("streaming", [False, True])
def test_a_glob_of_parquet_files(parquet_folder, digits, streaming):
    name = str(parquet_folder / "train-*.parquet")
    rows = list(hf_dash.load_images(name, streaming=streaming))
    assert [row["label"] for row in rows] == digits[:50]["label"]
    assert rows[0]["image"].size == (32, 32)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_imagefolder(image_folder, streaming):
    train = hf_dash.load_images(str(image_folder), streaming=streaming)
    assert hf_dash.data.label_names(train) == ["cat", "dog"]
    assert sorted(row["label"] for row in train) == [0, 0, 0, 1, 1, 1]


def test_columns_are_renamed_and_images_converted(tmp_path):
    features = Features(
        {"img": Image(), "fine": ClassLabel(names=["a", "b"]), "id": Value("int64")}
    )
    rows = {"img": [gray(0), gray(9)], "fine": [1, 0], "id": [5, 6]}
    path = tmp_path / "rows.parquet"
    Dataset.from_dict(rows, features=features).to_parquet(path)
    dataset = hf_dash.load_images(
        str(path), image_column="img", label_column="fine", image_mode="RGB"
    )
    assert dataset.column_names == ["image", "label"]
    assert dataset[0]["image"].mode == "RGB"
    assert dataset["label"][:] == [1, 0]


@pytest.mark.parametrize("argument", ["image_column", "label_column"])
def test_a_missing_column_is_named(parquet_folder, argument):
    with pytest.raises(ValueError, match=rf"{argument} 'nope' is not a column .*'image', 'label'"):
        hf_dash.load_images(str(parquet_folder), **{argument: "nope"})


def _labeled(tmp_path, labels, kind):
    features = Features({"image": Image(), "label": Value(kind)})
    rows = {"image": [gray(0)] * len(labels), "label": labels}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    return hf_dash.load_images(str(tmp_path / "rows.parquet"))


def test_integer_and_text_labels_get_names(tmp_path):
    assert hf_dash.data.label_names(_labeled(tmp_path, [0, 2], "int32")) == ["0", "2"]
    words = tmp_path / "words"
    words.mkdir()
    assert hf_dash.data.label_names(_labeled(words, ["dog", "cat"], "string")) == ["cat", "dog"]


def test_other_labels_are_refused(tmp_path):
    with pytest.raises(ValueError, match="labels must not be negative, got -1"):
        _labeled(tmp_path, [0, -1], "int64")
    floats = tmp_path / "floats"
    floats.mkdir()
    with pytest.raises(ValueError, match="label_column must hold ClassLabel"):
        _labeled(floats, [0.5], "float32")


def test_arrival_order_is_a_seeded_permutation_with_stable_ids(digits):
    first = hf_dash.data.in_arrival_order(digits, seed=1)
    assert sorted(first["example_id"]) == list(range(len(digits)))
    assert first["example_id"][:] == hf_dash.data.in_arrival_order(digits, seed=1)["example_id"][:]
    assert first["example_id"][:] != hf_dash.data.in_arrival_order(digits, seed=2)["example_id"][:]
    labels = digits["label"][:]
    assert [labels[i] for i in first["example_id"]] == first["label"][:]


def test_a_stream_is_read_in_a_seeded_order_with_the_ids_of_the_source(digits):
    stream = hf_dash.load_images("digits", streaming=True)
    taken = hf_dash.data.in_arrival_order(stream, seed=3, num_examples=40, buffer_size=100)
    again = hf_dash.data.in_arrival_order(stream, seed=3, num_examples=40, buffer_size=100)
    assert taken["example_id"][:] == again["example_id"][:]
    assert taken["example_id"][:] != list(range(40))
    assert max(taken["example_id"]) < 140  # only as far as the buffer reaches
    labels = digits["label"][:]
    assert [labels[i] for i in taken["example_id"]] == taken["label"][:]
    assert np.array_equal(taken[0]["image"], digits[taken[0]["example_id"]]["image"])


@pytest.mark.parametrize("streaming", [False, True])
def test_too_few_examples_are_refused(streaming):
    dataset = hf_dash.load_images("digits", split="test", streaming=streaming)
    with pytest.raises(ValueError, match="num_examples is 400, but the dataset holds only 360"):
        hf_dash.data.in_arrival_order(dataset, seed=0, num_examples=400)


def test_a_glob_needs_another_dataset_to_hold_out(parquet_folder, digits_test):
    glob = str(parquet_folder / "train-*.parquet")
    with pytest.raises(ValueError, match="test_dataset_name must be given"):
        hf_dash.DataConfig(dataset_name=glob).load_held_out()
    config = hf_dash.DataConfig(
        dataset_name=glob, test_dataset_name=str(parquet_folder / "test-*.parquet")
    )
    assert config.load_held_out()["label"][:] == digits_test[:10]["label"]
    assert len(config.load_train()) == 50
    assert len(config.load_train("digits")) == 1437


def test_what_is_trained_on_is_not_held_out():
    with pytest.raises(ValueError, match="test_split must differ from train_split, got 'train'"):
        hf_dash.DataConfig(test_split="train").load_held_out()
    elsewhere = hf_dash.DataConfig(train_split="test", test_dataset_name="digits")
    assert len(elsewhere.load_held_out()) == 360


def test_a_stream_keeps_images_as_they_are_stored(tmp_path):
    # A JPEG encoded again would be another image.
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    PILImage.fromarray(noise).save(tmp_path / "a.jpg", quality=50)
    content = (tmp_path / "a.jpg").read_bytes()
    features = Features({"img": Image(), "label": ClassLabel(names=["a"])})
    rows = {"img": [{"bytes": content, "path": None}], "label": [0]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    stream = hf_dash.load_images(
        str(tmp_path / "rows.parquet"), image_column="img", streaming=True, image_mode="L"
    )
    arrived = hf_dash.data.in_arrival_order(stream, seed=0)
    assert arrived[0]["image"].mode == "L"
    stored = arrived.cast_column("image", Image(decode=False))[0]["image"]
    assert stored["bytes"] == content


@pytest.mark.parametrize("streaming", [False, True])
def test_a_glob_of_tar_files(tmp_path, streaming):
    for shard, label in (("a", b"0"), ("b", b"1")):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            gray(9).save(tmp_path / "0.png")
            (tmp_path / "0.cls").write_bytes(label)
            for name in ("0.png", "0.cls"):
                tar.add(tmp_path / name, arcname=name)
    config = hf_dash.DataConfig(
        dataset_name=str(tmp_path / "*.tar"),
        streaming=streaming,
        image_column_name="png",
        label_column_name="cls",
    )
    assert [row["label"] for row in config.load_train()] == [0, 1]
    with pytest.raises(ValueError, match="test_dataset_name must be given"):
        config.load_held_out()


def test_settings_of_arriving_files_are_checked():
    with pytest.raises(
        ValueError, match=r"arrive_by must be one of \('examples', 'files'\), got 'x'"
    ):
        hf_dash.DataConfig(arrive_by="x")
    with pytest.raises(ValueError, match=r"on_bad_example must be one of \('error', 'skip'\)"):
        hf_dash.DataConfig(on_bad_example="ignore")
    for count in (0, -1):
        with pytest.raises(ValueError, match="files_per_round must be at least 1"):
            hf_dash.DataConfig(arrive_by="files", files_per_round=count)
    for count in (True, 1.5, "2"):
        with pytest.raises(TypeError, match="files_per_round must be an integer of at least 1"):
            hf_dash.DataConfig(arrive_by="files", files_per_round=count)
    with pytest.raises(ValueError, match="None unless arrive_by is 'files', got 2"):
        hf_dash.DataConfig(files_per_round=2)
    config = hf_dash.DataConfig(dataset_name="incoming", arrive_by="files", files_per_round=2)
    with pytest.raises(ValueError, match="test_dataset_name must be given"):
        config.load_held_out()


def test_what_is_local(tmp_path):
    assert is_local("data/*.tar")
    assert is_local("data/day-*")
    assert is_local("digits")
    assert is_local(str(tmp_path))
    assert not is_local("user/some-dataset")


def test_a_whole_stream_arrives_as_the_dataset_does(digits):
    stream = digits.select(range(50)).to_iterable_dataset(num_shards=3)
    plain = hf_dash.data.in_arrival_order(digits.select(range(50)), seed=4)
    streamed = hf_dash.data.in_arrival_order(stream, seed=4)
    assert streamed["example_id"][:] == plain["example_id"][:]
    assert streamed["label"][:] == plain["label"][:]


@pytest.mark.parametrize("seed", [0, 1])
def test_ids_are_positions_whatever_the_shards(digits, seed):
    stream = digits.select(range(60)).to_iterable_dataset(num_shards=4)
    arrived = hf_dash.data.in_arrival_order(stream, seed=seed, num_examples=30, buffer_size=10)
    ids = arrived["example_id"][:]
    assert len(set(ids)) == 30
    assert ids != sorted(ids)
    assert max(ids) < 40  # what lies beyond the buffer was not read
    assert arrived["label"][:] == [digits["label"][index] for index in ids]


def splits_of(name):
    source = find_source(str(name))
    return {split: list(shards or ()) for split, shards in source.splits.items()}


def test_names_of_shards_make_splits(tmp_path):
    write_folder(
        tmp_path / "d",
        {
            "data/train-00000-of-00002.parquet": b"",
            "data/train-00001-of-00002.parquet": b"",
            "data/my_test.parquet": b"",
            "val/0.parquet": b"",
        },
    )
    assert splits_of(tmp_path / "d") == {
        "train": [f"d/data/train-0000{n}-of-00002.parquet" for n in (0, 1)],
        "test": ["d/data/my_test.parquet"],
        "validation": ["d/val/0.parquet"],
    }
    write_folder(tmp_path / "own", {"gold-00000-of-00001.parquet": b""})
    assert splits_of(tmp_path / "own") == {"gold": ["own/gold-00000-of-00001.parquet"]}
    write_folder(tmp_path / "none", {"monday.parquet": b"", "tuesday.parquet": b""})
    assert splits_of(tmp_path / "none") == {
        "train": ["none/monday.parquet", "none/tuesday.parquet"]
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train.parquet", "monday.parquet"], "d/monday.parquet belong to none of"),
        (["train-test.parquet"], "'train-test.parquet' must name one split"),
        (["train/cat/a.png", "cat/a.png"], "folders of splits or of classes.*train.*cat"),
        (["train/a.png", "test/b.png"], "their images are not in class folders"),
        (["readme.txt"], "holds no image, parquet file or tar file"),
    ],
)
def test_what_belongs_to_no_split_is_refused(tmp_path, files, message):
    write_folder(tmp_path / "d", {name: PNG if name.endswith("png") else b"" for name in files})
    with pytest.raises(ValueError, match=message):
        find_source(str(tmp_path / "d"))


@pytest.mark.parametrize("extra", ["stray.png", "more.zip", "later.parquet.part"])
def test_files_beside_splits_and_shards_are_not_left_out_in_silence(tmp_path, extra):
    class_folders(tmp_path / "images" / "train", count=1)
    class_folders(tmp_path / "images" / "test", count=1)
    (tmp_path / "images" / extra).write_bytes(PNG)
    with pytest.raises(ValueError, match=f"{extra} belong to none .*allow_missing=True"):
        hf_dash.load_images(str(tmp_path / "images"))
    assert len(hf_dash.load_images(str(tmp_path / "images"), allow_missing=True)) == 2


def test_a_class_may_be_called_like_a_split(tmp_path):
    class_folders(tmp_path / "vehicles", classes=("plane", "test", "train"), count=2)
    dataset = hf_dash.load_images(str(tmp_path / "vehicles"))
    assert hf_dash.data.label_names(dataset) == ["plane", "test", "train"]
    assert len(dataset) == 6


@pytest.mark.parametrize("name", ["[2026] tuesday", "a*b", "what?", "über {x}", "train"])
def test_a_path_that_exists_is_not_a_pattern(tmp_path, name):
    class_folders(tmp_path / name, count=1)
    assert len(hf_dash.load_images(str(tmp_path / name))) == 2
    write_parquet(tmp_path / f"{name}.parquet", [PNG], [0])
    assert len(hf_dash.load_images(str(tmp_path / f"{name}.parquet"))) == 1


def test_a_pattern_may_match_folders(tmp_path):
    for day in ("day-1", "day-2"):
        class_folders(tmp_path / day, count=1)
    assert len(hf_dash.load_images(str(tmp_path / "day-*"))) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.parquet", "does not exist"),
        ("./missing", "does not exist"),
        ("a/b/c", "does not exist"),
        ("user/data", "'user/data' is not on this machine and cannot be read"),
        ("nothing-*", "must match shards of one kind"),
    ],
)
def test_a_name_of_nothing_is_named(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        hf_dash.load_images(name)


def test_an_archive_of_images_has_to_be_unpacked(tmp_path):
    (tmp_path / "cats.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"cats\.zip' is neither a folder nor .* unpack"):
        hf_dash.load_images(str(tmp_path / "cats.zip"))


def test_splits_go_by_several_names(tmp_path):
    for split in ("training", "dev"):
        class_folders(tmp_path / "d" / split, count=len(split))
    for wanted, count in (("train", 16), ("training", 16), ("validation", 6), ("val", 6)):
        assert len(hf_dash.load_images(str(tmp_path / "d"), split=wanted)) == count
    with pytest.raises(ValueError, match=r"split must be one of \['dev', 'training'\].* 'test'"):
        hf_dash.load_images(str(tmp_path / "d"), split="test")


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_saved_to_disk(tmp_path, digits, digits_test, streaming):
    parts = {"train": digits.select(range(5)), "test": digits_test.select(range(3))}
    DatasetDict(parts).save_to_disk(tmp_path / "both")
    parts["train"].save_to_disk(tmp_path / "one")
    for name, split in (("both", "train"), ("both", "test"), ("one", "train")):
        loaded = hf_dash.load_images(str(tmp_path / name), split=split, streaming=streaming)
        assert [row["label"] for row in loaded] == parts[split]["label"][:]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_one_class_has_labels(tmp_path, streaming):
    class_folders(tmp_path / "in", classes=("cat",), count=3)
    dataset = hf_dash.load_images(str(tmp_path / "in"), streaming=streaming)
    assert hf_dash.data.label_names(dataset) == ["cat"]
    assert [row["label"] for row in dataset] == [0, 0, 0]


def test_shards_of_a_folder_may_know_classes_in_another_order(tmp_path):
    for name, names in (("a", ("cat", "dog")), ("b", ("dog", "cat"))):
        write_parquet(tmp_path / f"{name}.parquet", [PNG], [0], names)
    dataset = hf_dash.load_images(str(tmp_path))
    assert [hf_dash.data.label_names(dataset)[label] for label in dataset["label"]] == [
        "cat",
        "dog",
    ]


TOKEN = next(iter(TOKENS))
# Images in each of three files and in their row groups; the size of one.
EACH, GROUP, SIDE = 12, 6, 256
SIZE = SIDE * SIDE
# The last bytes of a file, in which pyarrow looks for its footer.
FOOTER = 1 << 16


def noise(number):
    """An image that is as large as its pixels, and tells its number."""
    pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
    pixels[0, 0] = number
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, "png", compress_level=0)
    return buffer.getvalue()


def number_of(image):
    return torch.tensor([float(image.getpixel((0, 0)))])


def numbers_in(batches):
    return [int(pixels[0]) for batch in batches for pixels in batch["pixel_values"]]


def config(**options):
    return DataConfig("user/data", streaming=True, cache_images=False, **options)


@pytest.fixture(scope="module")
def parquet_files(tmp_path_factory):
    """Three files to train on, and one of 5 images that are held out."""
    folder = tmp_path_factory.mktemp("parquet")
    features = Features({"image": Image(), "other": Value("binary"), "label": Value("string")})
    for number, size in enumerate([EACH, EACH, EACH, 5]):
        numbers = range(EACH * number, EACH * number + size)
        rows = {"image": [{"bytes": noise(n), "path": None} for n in numbers]}
        rows |= {"label": ["cab"[n % 3] for n in numbers], "other": [noise(n) for n in numbers]}
        name = f"{'train' if number < 3 else 'test'}-{number:05}.parquet"
        Dataset.from_dict(rows, features).to_parquet(folder / name, batch_size=GROUP)
    return sorted(folder.iterdir())


@pytest.fixture
def on_hub(hub, tmp_path, monkeypatch, parquet_files):
    """The Hub with these files in a private dataset."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_DASH_CACHE", str(tmp_path / "cache"))
    files = {f"data/{path.name}": path.read_bytes() for path in parquet_files}
    hub.put("user/data", files, private=True)
    return hub


def sent(hub):
    """Count the requests for parquet files, and the bytes that answered them; forget both."""
    requests = [one for one in hub.requests if one.startswith("GET") and "parquet" in one]
    size = sum(size for one, size in hub.sent.items() if "parquet" in one)
    hub.requests.clear()
    hub.sent.clear()
    return len(requests), size


def test_row_groups_on_the_hub_are_read_where_they_are(on_hub, quick):
    source = find_source("user/data", access=Access(token=TOKEN))
    (shard,) = source.open("train", Reading(streaming=True))
    assert (len(shard.pieces), shard.num_rows) == (3 * EACH // GROUP, 3 * EACH)
    assert TOKEN not in repr(shard)
    # Footers, and labels, which are words.
    assert sent(on_hub)[1] <= 8 * FOOTER
    pieces = pickle.loads(pickle.dumps(shard.pieces))
    for number, piece in enumerate(pieces):
        images = [image["bytes"] for image in piece.images(range(GROUP))]
        assert images == [noise(GROUP * number + row) for row in range(GROUP)]
        requests, size = sent(on_hub)
        assert requests == 1
        assert size <= 1.01 * GROUP * SIZE
    on_hub.fail("GET .*train-00001", 403)
    with pytest.raises(HubError, match=r"hf://.*train-00001\.parquet cannot be read: the token"):
        next(pieces[2].images([0]))
    on_hub.fail("GET .*train-00002", "drop")
    with pytest.raises(HubError, match=r"train-00002\.parquet cannot be read: no connection"):
        next(pieces[4].images([0]))


def test_a_dataset_on_the_hub_is_read_once_and_trained_on_as_files_are(on_hub, parquet_files):
    here = [path for path in parquet_files if "train" in path.name]
    local = load_arrival(here, config(), root=here[0].parent)
    count = 3 * EACH
    first = arrive(config().open_train(), config())
    # Every image once, without the third column.
    assert count * SIZE <= sent(on_hub)[1] <= 1.01 * count * SIZE + 8 * FOOTER
    arrival = arrive(config().open_train(), config())
    assert sent(on_hub)[1] <= 8 * FOOTER
    for survey in (first.survey, arrival.survey):
        assert np.array_equal(survey.sha256, local.survey.sha256)
        assert np.array_equal(survey.labels, local.survey.labels)
    assert arrival.fingerprint == first.fingerprint == local.fingerprint
    images = arrival.examples(number_of)
    batches = [*StreamLoader([images], GROUP, seed=0, num_workers=1)]
    assert sorted(numbers_in(batches)) == [*range(count)]
    labels = [label for batch in batches for label in batch["labels"].tolist()]
    assert ["abc"[label] for label in labels] == ["cab"[n % 3] for n in numbers_in(batches)]
    assert sent(on_hub)[1] <= 1.01 * count * SIZE
    newest = gradient_batches(Round(1, (images,)), DashConfig(gradient_batch_size=GROUP))[-1:]
    assert len(numbers_in(newest)) == GROUP
    assert sent(on_hub)[1] <= 1.01 * 2 * GROUP * SIZE


def test_of_a_dataset_on_the_hub_rounds_read_what_they_use(on_hub):
    (schedule,) = load_schedules(config(), [0], 2, GROUP, [])
    ids = np.concatenate([arrival.survey.example_ids for arrival in schedule.arrivals])
    assert len({*(ids // GROUP).tolist()}) == 2
    # Of the images held out, the whole file; of others, nothing.
    assert sent(on_hub)[1] <= 1.01 * (2 * GROUP + 10) * SIZE + 8 * FOOTER
    rows = [row for arrival in schedule.arrivals for row in arrival.dataset]
    assert [number_of(row["image"]).item() for row in rows] == ids.tolist()
    assert ["abc"[row["label"]] for row in rows] == ["cab"[n % 3] for n in ids]


def test_only_whole_parquet_files_on_the_hub_are_read_in_parts(tmp_path):
    tar = str(write_tar(tmp_path / "a.tar", [("0.png", PNG), ("0.cls", b"0")]))
    parquet = str(write_parquet(tmp_path / "a.parquet", [PNG], [0]))
    for kind, file, options in (
        ("webdataset", tar, {}),
        ("parquet", parquet, {}),
        ("parquet", parquet, {"filters": [("label", "==", 0)]}),
    ):
        builder = datasets.load_dataset_builder(kind, data_files={"train": file}, **options)
        assert _parquet_paths(builder, "train") == []
