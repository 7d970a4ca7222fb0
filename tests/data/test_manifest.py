import errno
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from helpers import broken, heard, png, write_parquet
from image_files import encoded, photo, write_folder, write_tar
from PIL import Image as PILImage
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import hf_dash
from hf_dash import DataConfig
from hf_dash.data import survey
from hf_dash.data.arrivals import load_arrival
from hf_dash.data.columns import Reading, fingerprint
from hf_dash.data.loading import file_schedule, load_schedules
from hf_dash.data.manifest import _checksum, hub_origin
from hf_dash.data.sources import Source

BOTH = pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("HF_DASH_CACHE", str(folder))
    return folder


def manifests(cache):
    return sorted(cache.glob("*.manifest"))


LEVELS, LABELS = (1, 2, 3, 4, 5), "babab"

TEXT = Value("string")


def parquet(path):
    path.mkdir()
    contents = [png(level) for level in LEVELS]
    return write_parquet(path / "day.parquet", contents, list(LABELS), label=TEXT)


def tar(path):
    ends = [("png", png), ("txt", lambda n: LABELS[n - 1].encode())]
    return write_tar(path / "day.tar", [(f"{n}.{end}", of(n)) for n in LEVELS for end, of in ends])


def folder(path):
    return write_folder(path / "day", {f"{LABELS[n - 1]}/{n}.png": png(n) for n in LEVELS})


def saved(path):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    images = [{"bytes": png(level), "path": None} for level in LEVELS]
    rows = {"image": images, "label": [1, 0, 1, 0, 1]}
    Dataset.from_dict(rows, features).save_to_disk(path / "day")
    return path / "day"


KINDS = pytest.mark.parametrize("make", [parquet, tar, folder, saved])

COLUMNS = {tar: {"image_column_name": "png", "label_column_name": "txt"}}


def config(make=parquet, **options):
    return DataConfig(arrive_by="files", **COLUMNS.get(make, {}), **options)


def load(path, data=None):
    return load_arrival([path], data or config(), root=path.parent)


def same(left, right):
    """Whether two surveys are equal, bit for bit."""
    names = ("example_ids", "labels", "content", "sha256", "own_modes")
    equal = all(np.array_equal(getattr(left, n), getattr(right, n)) for n in names)
    return equal and left.bad == right.bad


@contextmanager
def nothing_is_read(monkeypatch):
    """Decoding images, hashing them, and walking through rows is refused."""
    with monkeypatch.context() as patch:
        patch.setattr(PILImage, "open", None)
        patch.setattr("hf_dash.data.findings.stored_bytes", None)
        patch.setattr("hf_dash.data.survey.look_at", None)
        patch.setattr("hf_dash.data.manifest.look_at", None)
        patch.setattr("hf_dash.data.shards.label_values", None)
        patch.setattr("hf_dash.data.columns.label_values", None)
        yield


@KINDS
@BOTH
def test_an_unchanged_shard_is_not_read_again(tmp_path, monkeypatch, make, streaming, cache):
    path = make(tmp_path / "data")
    data = config(make, streaming=streaming)
    first = load(path, data)
    assert len(manifests(cache)) == 1
    with nothing_is_read(monkeypatch):
        again = load(path, data)
    assert same(again.survey, first.survey)
    assert again.fingerprint == first.fingerprint == fingerprint(first.dataset)
    assert (again.num_examples, again.skipped, again.types) == (5, (), first.types)
    assert list(again.dataset.features) == list(first.dataset.features)
    assert again.dataset.features["label"].names == ["a", "b"]
    assert shown(again) == shown(first)


def shown(arrival):
    return [(row["label"], row["image"].getpixel((0, 0))) for row in arrival.dataset]


@pytest.mark.parametrize("make", [parquet, folder, tar])
@BOTH
def test_a_shard_is_read_once_and_no_data_byte_of_it_again(tmp_path, make, streaming):
    noise = np.random.default_rng(0).integers(0, 256, (60, 130, 130, 3), dtype=np.uint8)
    contents = [encoded(PILImage.fromarray(pixels), "BMP") for pixels in noise]
    files = {f"{'ab'[n % 2]}/{n}.bmp": content for n, content in enumerate(contents)}
    if make is folder:
        path = write_folder(tmp_path / "day", files)
    elif make is tar:
        rows = [(f"{n}.bmp", content) for n, content in enumerate(contents)]
        labels = [(f"{n}.txt", b"a") for n in range(60)]
        path = write_tar(tmp_path / "day.tar", sorted(rows + labels))
    else:
        path = write_parquet(tmp_path / "day.parquet", contents, list("ab" * 30), label=TEXT)
    columns = {"image_column_name": "bmp", "label_column_name": "txt"} if make is tar else {}
    data = DataConfig(arrive_by="files", streaming=streaming, **columns)
    read = []
    for _ in range(2):
        before = psutil.Process().io_counters().read_chars
        load(path, data)
        read.append(psutil.Process().io_counters().read_chars - before)
    size = sum(map(len, contents))
    assert size < read[0] < 1.4 * size
    assert read[1] < 0.2 * size  # footers, manifests, and of a tar file what tells its columns


def test_only_a_new_shard_is_read(tmp_path, monkeypatch):
    incoming = tmp_path / "incoming"
    incoming.mkdir()
    for day in (1, 2):
        write_parquet(incoming / f"{day}.parquet", [png(10 * day), png(10 * day + 1)], [0, 1])
    held_out = write_parquet(tmp_path / "held.parquet", [png(1), png(2)], [0, 1])
    data = config(dataset_name=str(incoming), test_dataset_name=str(held_out))
    file_schedule(data, [])
    write_parquet(incoming / "3.parquet", [png(30), png(31), png(32)], [0, 1, 0])
    looks, look_at = [], survey.look_at

    def counted(batches, **options):
        looks.append(look_at(batches, **options))
        return looks[-1]

    monkeypatch.setattr(survey, "look_at", counted)
    (arrival,) = file_schedule(data, []).arrivals
    assert [len(found) for found in looks] == [3]
    assert arrival.survey.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]


def test_what_is_found_is_the_same_for_other_classes_beside_it(tmp_path, monkeypatch):
    """A manifest holds labels of its own shard; a label that is not a class stays none."""
    one = write_parquet(tmp_path / "1.parquet", [png(1), png(2)], [0, 1], ["dog", "cat"])
    two = write_parquet(tmp_path / "2.parquet", [png(3), broken(4)], [1, -1], ["eel", "cat"])
    data = config(on_bad_example="skip")
    alone = load(two, data)
    with nothing_is_read(monkeypatch), pytest.raises(ValueError, match="NoneType"):
        load_arrival([one, two], data, root=tmp_path)
    first = load_arrival([one, two], data, root=tmp_path)
    with nothing_is_read(monkeypatch):
        again = load_arrival([one, two], data, root=tmp_path)
    assert alone.survey.labels.tolist() == [1]
    assert again.dataset.features["label"].names == ["dog", "cat", "eel"]
    assert again.survey.labels.tolist() == [0, 1, 1]
    assert same(again.survey, first.survey)
    assert again.skipped == first.skipped == ("2.parquet:1",)


def test_corrupt_images_are_named_again_without_being_read(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "day.parquet", [png(1), broken(2), b"no"], [0, 1, 1])
    said = []
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"day\.parquet:1 is a corrupt image, one of 2"
        ) as error:
            load(path)
        said.append(str(error.value))
        monkeypatch.setattr(PILImage, "open", None)
    assert said[0] == said[1]
    assert load(path, config(on_bad_example="skip")).skipped == ("day.parquet:1", "day.parquet:2")


def test_some_rows_are_found_as_if_all_others_were_unknown(tmp_path, cache):
    contents = [*map(png, range(6)), encoded(photo(0, 0))]
    path = write_parquet(tmp_path / "day.parquet", contents, [0, 1, 0, 1, 0, 1, 1])
    held = write_parquet(tmp_path / "held.parquet", [png(9)], [0])
    data = DataConfig(str(path), test_dataset_name=str(held), max_train_samples=3)
    found = []
    for whole in (False, True):
        if whole:
            load(path)  # a part of the rows leaves no manifest
        (schedule,) = load_schedules(data, [0], 3, None, [])
        found.append([(a.survey, a.fingerprint, a.survey.modes) for a in schedule.arrivals])
    assert len(manifests(cache)) == 2
    for (one, *facts), (other, *others) in zip(*found, strict=True):
        assert same(one, other)
        assert facts == others


@pytest.mark.parametrize("option", [{"image_mode": "RGB"}, {"compare_images_by": "pixels"}])
def test_another_way_of_reading_has_a_manifest_of_its_own(tmp_path, cache, option):
    path = parquet(tmp_path / "data")
    plain, other = load(path), load(path, config(**option))
    assert len(manifests(cache)) == 2
    assert (plain.survey.modes, plain.fingerprint) == ({"L": 0}, other.fingerprint)
    assert not same(plain.survey, other.survey)


def content(path):
    with safe_open(path, "np") as file:
        return file.metadata()


def rewritten(path, change, checksum=True):
    """Change the arrays of a manifest, and let its checksum say so."""
    with safe_open(path, "np") as file:
        said = file.metadata()
    arrays = change(load_file(path))
    if checksum:
        said["sha256"] = _checksum(said["facts"], arrays)
    save_file(arrays, path, said)


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def empty(path):
    path.write_bytes(b"")


def turned(path):
    """One bit of a label."""
    rewritten(path, lambda arrays: {**arrays, "labels": arrays["labels"] ^ 1}, checksum=False)


def fewer(path):
    rewritten(path, lambda arrays: {name: array[:-1] for name, array in arrays.items()})


def lacking(path):
    rewritten(path, lambda arrays: {"labels": arrays["labels"]})


@pytest.mark.parametrize("lie", [cut, empty, turned, fewer, lacking])
def test_a_manifest_that_lies_is_said_once_and_written_anew(tmp_path, cache, lie):
    path = parquet(tmp_path / "data")
    first = load(path)
    (file,) = manifests(cache)
    true = content(file)
    lie(file)
    with heard() as lines:
        again = load(path)
    assert len(lines) == 1
    assert "day.parquet: its manifest" in lines[0]
    assert same(again.survey, first.survey)
    assert content(file) == true


def test_labels_that_are_not_those_of_the_shard_are_not_believed(tmp_path, cache):
    path = parquet(tmp_path / "data")
    first = load(path)
    (file,) = manifests(cache)
    rewritten(file, lambda arrays: {**arrays, "labels": arrays["labels"] ^ 1})
    with heard() as lines:
        again = load(path)
    assert "day.parquet: its manifest has other rows or labels" in lines[0]
    assert same(again.survey, first.survey)


def shrunk(path):
    write_parquet(path, [png(6)] * 4, list("abab"), label=TEXT)


def grown(path):
    write_parquet(path, [png(level) for level in (*LEVELS, 6)], [*LABELS, "a"], label=TEXT)


def replaced(path):
    """By a file of the same size and times, which was written elsewhere."""
    flipped(path, path.with_name("aside"))
    path.with_name("aside").replace(path)


def overwritten(path):
    """In place, with the same size and time."""
    flipped(path, path)


def flipped(path, target):
    """Flip a bit in the gray level of an image, wherever it is written, and keep the time."""
    found, content = path.stat(), path.read_bytes()
    old, new = png(3), png(6)
    assert len(old) == len(new)
    assert old in content
    target.write_bytes(content.replace(old, new))
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))


CHANGES = pytest.mark.parametrize("change", [shrunk, grown, replaced, overwritten])


def plain(path):
    """The parquet file, not compressed."""
    write_parquet(path, [png(level) for level in LEVELS], list(LABELS), label=TEXT)
    table = pq.read_table(path)
    pq.write_table(table, path, compression="none", use_dictionary=False)
    return path


@CHANGES
@BOTH
def test_a_shard_that_changes_between_commands_is_read_anew(tmp_path, cache, change, streaming):
    path, data = plain(tmp_path / "day.parquet"), config(streaming=streaming)
    first = load(path, data)
    change(path)
    again = load(path, data)
    assert again.fingerprint == fingerprint(again.dataset) != first.fingerprint
    assert len(manifests(cache)) == 1


@CHANGES
@BOTH
def test_a_shard_that_changes_while_it_is_read_is_refused(
    tmp_path, cache, change, streaming, monkeypatch
):
    path, look_at = plain(tmp_path / "day.parquet"), survey.look_at

    def changes(batches, **options):
        found = look_at(batches, **options)
        change(path)
        return found

    monkeypatch.setattr(survey, "look_at", changes)
    with pytest.raises(ValueError, match=r"day\.parquet was replaced while it was read"):
        load(path, config(streaming=streaming))
    assert not manifests(cache)


@pytest.mark.parametrize("change", [shrunk, grown, replaced])
def test_a_stream_that_changes_while_it_is_trained_on_is_named(tmp_path, change):
    path = plain(tmp_path / "day.parquet")
    arrival = load(path, config(streaming=True))
    round_ = hf_dash.Round(1, (arrival.examples(lambda image: image),))
    round_.check_unchanged()
    change(path)
    with pytest.raises(ValueError, match=r"day\.parquet was replaced while it was trained on"):
        round_.check_unchanged()


VERIFY = {"verify_data": True}


@KINDS
@BOTH
def test_what_is_verified_and_unchanged_is_taken(tmp_path, monkeypatch, make, streaming):
    path = make(tmp_path / "data")
    data = config(make, streaming=streaming)
    first = load(path, data)
    verified = config(make, streaming=streaming, **VERIFY)
    assert same(load(path, verified).survey, first.survey)
    with nothing_is_read(monkeypatch), pytest.raises(ValueError, match="NoneType"):
        load(path, verified)


@BOTH
def test_a_flipped_byte_is_found_where_the_time_was_kept(tmp_path, streaming, cache):
    path = plain(tmp_path / "day.parquet")
    load(path, config(streaming=streaming))
    overwritten(path)
    with pytest.raises(
        ValueError, match=r"verify_data: day\.parquet is not what .* 1 rows \(2\) have other images"
    ):
        load(path, config(streaming=streaming, **VERIFY))
    (file,) = manifests(cache)
    file.unlink()
    assert load(path, config(streaming=streaming, **VERIFY)).num_examples == 5


def other_labels(path):
    write_parquet(path, [png(level) for level in LEVELS], list("bbbaa"), label=TEXT)


def other_classes(path):
    write_parquet(path, [png(level) for level in LEVELS], list("bacab"), label=TEXT)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_labels, r"2 rows \(1, 4\) have other labels"),
        (other_classes, r"it has the classes \['a', 'b', 'c'\], it had \['a', 'b'\]"),
        (grown, "it has 6 rows, it had 5"),
        (shrunk, "it has 4 rows, it had 5"),
    ],
)
def test_what_differs_is_named(tmp_path, change, said):
    path = plain(tmp_path / "day.parquet")
    load(path)
    change(path)
    with pytest.raises(ValueError, match=f"day.parquet is not what was read before: {said}"):
        load(path, config(**VERIFY))


@KINDS
@BOTH
def test_nothing_is_written_among_the_data(tmp_path, make, streaming):
    path = make(tmp_path / "data")
    before = sorted((tmp_path / "data").rglob("*"))
    for place in (*before, tmp_path / "data"):
        place.chmod(0o555)  # of a data folder that cannot be written
    try:
        load(path, config(make, streaming=streaming))
        assert sorted((tmp_path / "data").rglob("*")) == before
    finally:
        for place in (tmp_path / "data", *before):
            place.chmod(0o755)


def full(monkeypatch, cache):
    def fail(file_number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hf_dash.utils.files.os.fsync", fail)


def not_a_folder(monkeypatch, cache):
    cache.write_bytes(b"")


@pytest.mark.parametrize("fault", [full, not_a_folder])
def test_a_cache_that_cannot_be_written_is_said_once(tmp_path, monkeypatch, cache, fault):
    paths = [write_parquet(tmp_path / f"{n}.parquet", [png(n)], [0]) for n in (1, 2)]
    fault(monkeypatch, cache)
    with heard() as lines:
        first = load_arrival(paths, config(), root=tmp_path)
        again = load_arrival(paths, config(), root=tmp_path)
    assert [line for line in lines if "shards are read again" in line] == lines[:1] == lines
    assert same(first.survey, again.survey)
    assert not list(cache.glob("*"))


def test_runs_at_the_same_time_share_a_cache(tmp_path, cache):
    path = folder(tmp_path / "data")
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(load, [path] * 8)]
    assert all(same(one.survey, found[0].survey) for one in found)
    assert [file.suffix for file in cache.iterdir()] == [".manifest"]


def on_the_hub(monkeypatch, *files):
    siblings = [
        SimpleNamespace(rfilename=name, lfs=lfs and SimpleNamespace(sha256=lfs), blob_id=blob)
        for name, lfs, blob in files
    ]
    answer = SimpleNamespace(siblings=siblings)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *args, **options: answer)


def test_a_split_on_the_hub_is_known_by_the_content_of_its_files(monkeypatch, cache, digits):
    loaded = digits.select(range(6))
    monkeypatch.setattr("hf_dash.data.sources.load_dataset", lambda *args, **options: loaded)
    source = Source("user/digits", {"train": None}, revision="main")
    files = [("README.md", None, "1" * 40), ("a.parquet", "2" * 64, "3" * 40)]
    on_the_hub(monkeypatch, *files)
    (shard,) = source.open("train", Reading())
    kept = survey.manifest_of(shard)
    (again,) = source.open("train", Reading())
    with nothing_is_read(monkeypatch):
        assert np.array_equal(survey.manifest_of(again).findings.sha256, kept.findings.sha256)
    on_the_hub(monkeypatch, files[0], ("a.parquet", "4" * 64, "3" * 40))
    (other,) = source.open("train", Reading())
    assert (again.manifest is None, other.manifest) == (False, None)
    assert len(manifests(cache)) == 1


def test_a_hub_that_cannot_be_reached_leaves_no_manifest(monkeypatch):
    with heard() as lines:
        assert hub_origin("a[train]", "user/a", "train", Reading()) is None
    assert "a[train]: the Hub does not say" in lines[0]
