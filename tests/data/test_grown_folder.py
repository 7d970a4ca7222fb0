"""A folder of images that changes between commands: what is the same is not read again."""

import os
import shutil

import numpy as np
import pytest
from helpers import broken, heard, png
from image_files import encoded, photo, write_folder
from PIL import Image as PILImage
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from hf_dash import DataConfig
from hf_dash.data import findings, survey
from hf_dash.data.arrivals import load_arrival
from hf_dash.data.columns import fingerprint
from hf_dash.data.loading import load_schedules
from hf_dash.data.manifest import _checksum

BOTH = pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])

OLD = {"a/1.png": png(1), "a/2.png": png(2), "b/3.png": png(3), "b/4.png": png(4)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("HF_DASH_CACHE", str(folder))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "day", OLD)


@pytest.fixture
def read(monkeypatch):
    """The images that are hashed and decoded, in any order; ``clear`` begins anew."""
    names, stored_bytes, decode = [], findings.stored_bytes, findings._decode

    def noted(value):
        names.append(("hashed", "/".join(value["path"].split("/")[-2:])))
        return stored_bytes(value)

    def decoded(value, *rest):
        names.append(("decoded", "/".join(value["path"].split("/")[-2:])))
        return decode(value, *rest)

    monkeypatch.setattr(findings, "stored_bytes", noted)
    monkeypatch.setattr(findings, "_decode", decoded)
    return names


def both(*images):
    """What :func:`read` holds where these were read once."""
    return sorted((what, name) for what in ("hashed", "decoded") for name in images)


def load(folder, skip=None, **options):
    data = DataConfig(arrive_by="files", **options)
    return load_arrival([folder], data, root=folder.parent, skip=skip)


def anew(folder, cache, **options):
    """Load without what earlier commands have found, and leave that alone."""
    cache.rename(cache.with_name("aside"))
    arrival = load(folder, **options)
    shutil.rmtree(cache)
    cache.with_name("aside").rename(cache)
    return arrival


def same(left, right):
    names = ("example_ids", "labels", "content", "sha256", "own_modes")
    equal = all(np.array_equal(getattr(left, n), getattr(right, n)) for n in names)
    return equal and left.bad == right.bad


def overwritten(path, content):
    """Overwrite a file in place and keep its size and time."""
    found = path.stat()
    assert len(content) == found.st_size
    path.write_bytes(content)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


@BOTH
def test_only_new_and_changed_images_are_read(folder, cache, read, streaming):
    load(folder, streaming=streaming)
    assert sorted(read) == both(*OLD)
    write_folder(folder, {"a/10.png": png(10), "aa/5.png": png(5), "b/9.png": encoded(photo(0, 0))})
    overwritten(folder / "b/3.png", png(6))
    (folder / "a/2.png").unlink()
    read.clear()
    with heard() as lines:
        again = load(folder, streaming=streaming)
    assert sorted(read) == both("a/10.png", "aa/5.png", "b/9.png", "b/3.png")
    assert [line for line in lines if "changed" in line] == [
        "day: 4 of 6 images are new or changed, and are read"
    ]
    assert again.survey.labels.tolist() == [0, 0, 1, 2, 2, 2]
    assert again.fingerprint == fingerprint(again.dataset)
    assert same(again.survey, anew(folder, cache).survey)
    read.clear()
    assert same(load(folder, streaming=streaming).survey, again.survey)
    assert read == []


def test_what_is_only_gone_is_not_read(folder, cache, read):
    load(folder)
    (folder / "a/1.png").unlink()
    read.clear()
    again = load(folder)
    assert read == []
    assert same(again.survey, anew(folder, cache).survey)


def test_a_label_is_what_the_folder_says_now(folder, cache, read):
    rows = [f"{name},{'xy'[n % 2]}" for n, name in enumerate(OLD)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,kind", *rows]))
    data = {"label_column_name": "kind"}
    assert load(folder, **data).survey.labels.tolist() == [0, 1, 0, 1]
    (folder / "metadata.csv").write_text("\n".join(["file_name,kind", *rows[:3], "b/4.png,w"]))
    read.clear()
    again = load(folder, **data)
    assert again.dataset.features["label"].names == ["w", "x", "y"]
    assert again.survey.labels.tolist() == [1, 2, 1, 0]
    assert read == []
    assert same(again.survey, anew(folder, cache, **data).survey)


def test_corrupt_images_keep_their_names(folder, cache, read):
    write_folder(folder, {"a/3.png": broken(3), "b/5.png": b"no image"})
    load(folder, on_bad_example="skip")
    write_folder(folder, {"a/0.png": png(0), "a/12.png": broken(12)})
    (folder / "b/5.png").write_bytes(png(5))
    read.clear()
    again = load(folder, on_bad_example="skip")
    assert sorted(read) == both("a/0.png", "a/12.png", "b/5.png")
    assert again.skipped == ("day/a/12.png", "day/a/3.png")
    assert same(again.survey, anew(folder, cache, on_bad_example="skip").survey)
    with pytest.raises(ValueError, match=r"^day/a/12\.png is a corrupt image, one of 2 in day"):
        load(folder)
    write_folder(folder, {"b/6.png": png(6)})
    assert load(folder, skip=again.skipped).skipped == again.skipped


def test_new_images_are_compared_with_old_ones_by_pixels(folder, cache, read):
    data = {"compare_images_by": "pixels"}
    load(folder, **data)
    level = PILImage.open(folder / "a/2.png")
    write_folder(folder, {"b/5.bmp": encoded(level, "BMP")})
    read.clear()
    content = load(folder, **data).survey.content
    assert sorted(read) == both("b/5.bmp")
    assert content[1] == content[4]
    assert len({*content.tolist()}) == 4


def lying(cache, checksum=True, **changes):
    """Change arrays of the manifest, and let its checksum say so."""
    (path,) = cache.glob("*.manifest")
    with safe_open(path, "np") as file:
        said = file.metadata()
    arrays = load_file(path)
    arrays |= {name: change(arrays[name]) for name, change in changes.items()}
    if checksum:
        said["sha256"] = _checksum(said["facts"], arrays)
    save_file(arrays, path, said)


@pytest.mark.parametrize(
    "lie",
    [
        {"files": lambda files: files[::-1].copy(), "checksum": False},
        {"files": lambda files: files[1:]},
        {"labels": lambda labels: labels[1:], "files": lambda files: files[1:]},
    ],
)
def test_a_manifest_that_lies_is_not_believed(folder, cache, read, lie):
    load(folder)
    write_folder(folder, {"a/5.png": png(5)})
    lying(cache, **lie)
    read.clear()
    with heard() as lines:
        again = load(folder)
    assert "day: its manifest is damaged" in lines[0]
    assert sorted(read) == both(*OLD, "a/5.png")
    assert same(again.survey, anew(folder, cache).survey)


def test_labels_of_an_old_manifest_do_not_count(folder, cache, read):
    load(folder)
    lying(cache, labels=lambda labels: labels ^ 1)
    read.clear()
    again = load(folder)  # of a folder that is the same, the whole manifest is refused
    assert sorted(read) == both(*OLD)
    lying(cache, labels=lambda labels: labels ^ 1)
    write_folder(folder, {"a/5.png": png(5)})
    read.clear()
    again = load(folder)
    assert sorted(read) == both("a/5.png")
    assert again.survey.labels.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("name", ["a/1.png", "b/5.png"], ids=["known", "new"])
def test_a_file_that_vanishes_before_it_is_read_is_named(folder, cache, read, name, monkeypatch):
    load(folder)
    write_folder(folder, {"b/5.png": png(5)})
    look_at = survey.look_at

    def vanishes(batches, **options):
        (folder / name).unlink()
        return look_at(batches, **options)

    monkeypatch.setattr(survey, "look_at", vanishes)
    with pytest.raises(ValueError, match=rf"{name} was replaced while it was read"):
        load(folder)
    monkeypatch.setattr(survey, "look_at", look_at)
    read.clear()
    assert same(load(folder).survey, anew(folder, cache).survey)


def test_all_is_read_where_it_is_to_be_verified(folder, read):
    load(folder)
    read.clear()
    load(folder, verify_data=True)
    assert sorted(read) == both(*OLD)
    write_folder(folder, {"a/5.png": png(5)})
    with pytest.raises(ValueError, match="day is not what was read before: it has 5 rows, it had"):
        load(folder, verify_data=True)


def test_a_few_rows_of_a_folder_are_found_with_what_is_new(folder, tmp_path, read):
    held_out = write_folder(tmp_path / "held", {"a/7.png": png(7), "b/8.png": png(8)})
    data = DataConfig(str(folder), test_dataset_name=str(held_out), max_train_samples=2)
    load(folder)
    write_folder(folder, {"b/5.png": png(5)})
    found = []
    for _ in range(2):
        read.clear()
        (schedule,) = load_schedules(data, [0], 1, None, [])
        found.append((sorted(read), [arrival.fingerprint for arrival in schedule.arrivals]))
    assert [one for one, _ in found] == [both("a/7.png", "b/5.png", "b/8.png"), []]
    assert found[0][1] == found[1][1]
