import json
import os
import sys
import types

import pytest
from helpers import heard, png
from image_files import class_folders, encoded, photo, write_folder
from PIL import Image as PILImage
from PIL import features

from hf_dash.data.folders import FolderImages, find_images, is_image, walk


def classes(found):
    return dict(zip(found.images, (row["label"] for row in found.rows), strict=True))


def test_the_folder_of_an_image_names_its_class(tmp_path):
    found = find_images(class_folders(tmp_path / "in", count=2))
    assert classes(found) == {
        "cat/a_000.png": "cat",
        "cat/a_001.png": "cat",
        "dog/b_000.png": "dog",
        "dog/b_001.png": "dog",
    }
    assert (found.left_out, found.empty) == ({}, ())


def test_names_of_files_do_not_matter(tmp_path):
    names = ["cat/train-0001.png", "cat/test.PNG", "dog/val_1.Jpg", "dog/x", "dog/[1].png"]
    files = {name: encoded(photo(0, n)) for n, name in enumerate(names)}
    assert set(find_images(write_folder(tmp_path, files)).images) == set(names)


def test_links_are_followed(tmp_path):
    pool = class_folders(tmp_path / "pool", classes=("owl",), count=2)
    folder = class_folders(tmp_path / "in", count=1)
    (folder / "owl").symlink_to(pool / "owl")
    (folder / "cat" / "link.png").symlink_to(folder / "dog" / "b_000.png")
    assert classes(find_images(folder)) == {
        "cat/a_000.png": "cat",
        "cat/link.png": "cat",
        "dog/b_000.png": "dog",
        "owl/a_000.png": "owl",
        "owl/a_001.png": "owl",
    }


def test_a_loop_of_links_is_an_error(tmp_path):
    folder = class_folders(tmp_path / "in", count=1)
    (folder / "cat" / "again").symlink_to(folder)
    with pytest.raises(ValueError, match="'cat/again' is a link to a folder above it"):
        find_images(folder)


def test_links_between_two_folders_are_a_loop(tmp_path):
    folder = class_folders(tmp_path / "in", count=1)
    (folder / "cat" / "x").symlink_to(folder / "dog")
    (folder / "dog" / "y").symlink_to(folder / "cat")
    with pytest.raises(ValueError, match="'cat/x/y' is a link to a folder above it"):
        find_images(folder)


def test_a_link_to_nothing_is_named(tmp_path):
    folder = class_folders(tmp_path / "in", count=1)
    (folder / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert find_images(folder).left_out == {"cat/gone.png": "a link to nothing"}


def test_what_is_not_a_file_is_named(tmp_path):
    folder = class_folders(tmp_path / "in", count=1)
    os.mkfifo(folder / "cat" / "pipe.png")
    assert find_images(folder).left_out == {"cat/pipe.png": "a pipe, socket or device"}


FORMATS = ["BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP", "PPM", "TGA"]


@pytest.mark.parametrize("form", [*FORMATS, "AVIF"])
def test_what_pillow_can_decode_is_an_image(tmp_path, form):
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    (tmp_path / f"a.{form.lower()}").write_bytes(encoded(photo(0, 0), form))
    assert is_image(tmp_path / f"a.{form.lower()}")
    (tmp_path / "no_suffix").write_bytes(encoded(photo(0, 0), "PNG"))
    (tmp_path / "photo.orig").write_bytes(encoded(photo(0, 0), "JPEG"))
    assert is_image(tmp_path / "no_suffix")
    assert is_image(tmp_path / "photo.orig")


@pytest.mark.parametrize("name", ["labels.txt", "notes.json", "Thumbs.db", "x.h5", "empty"])
def test_other_files_are_no_images_and_not_missed(tmp_path, name):
    folder = class_folders(tmp_path / "in", count=1)
    (folder / "cat" / name).write_bytes(b"" if name == "empty" else b"some text")
    found = find_images(folder)
    assert len(found.images) == 2
    assert not found.left_out


def test_what_is_hidden_is_passed_over(tmp_path):
    folder = class_folders(tmp_path / "in", count=1)
    for name in (".ipynb_checkpoints/a.png", "cat/._a.png", "__MACOSX/cat/a.png"):
        write_folder(folder, {name: png(1)})
    found = find_images(folder)
    write_folder(folder, {"cat/.b.png": png(2), ".DS_Store": b"x"})
    found = find_images(folder)
    assert (len(found.images), found.left_out, found.empty) == (2, {}, ())
    assert found.hidden == (".ipynb_checkpoints", "cat/.b.png")
    with heard() as lines:
        found.check("in", allow_missing=False)
    assert lines == ["in: hidden, and not read: .ipynb_checkpoints, cat/.b.png"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cat/x.heic", "needs the plug-in pillow-heif"),
        ("cat/x.HEIF", "needs the plug-in pillow-heif"),
        ("cat/x.jxl", "needs the plug-in pillow-jxl-plugin"),
        ("cat/x.CR2", "needs the plug-in rawpy"),
        ("cat/x.jpg.part", "still being written"),
        ("cat/more.zip", "not unpacked"),
        ("cat/more.tar.gz", "not unpacked"),
    ],
)
def test_image_files_that_cannot_be_read_are_named(tmp_path, monkeypatch, name, reason):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    folder = write_folder(class_folders(tmp_path / "in", count=1), {name: b"anything"})
    found = find_images(folder)
    assert found.left_out == {name: reason}
    with pytest.raises(ValueError, match=f"in: 1 of 3 image files are left out: {name}") as raised:
        found.check("in", allow_missing=False)
    assert reason in str(raised.value)


def test_heic_is_read_where_its_plug_in_is_installed(tmp_path, monkeypatch):
    registered = []
    plugin = types.SimpleNamespace(register_heif_opener=lambda: registered.append(True))
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    # The stand-in opens nothing, so the file holds what Pillow knows by its content.
    content = encoded(photo(0, 0), "PNG")
    folder = write_folder(class_folders(tmp_path / "in", count=1), {"cat/x.heic": content})
    assert "cat/x.heic" in find_images(folder).images
    assert registered


def test_a_name_that_is_not_utf8_is_named(tmp_path):
    folder = class_folders(tmp_path / "in", count=1)
    with open(os.fsencode(folder) + b"/cat/\xff.png", "wb") as file:
        file.write(png(1))
    assert list(find_images(folder).left_out.values()) == ["its name is not UTF-8"]


@pytest.mark.parametrize(
    ("missing", "stops"), [(1, False), (2, True)], ids=["one percent", "more than that"]
)
def test_one_percent_may_be_missing(missing, stops):
    found = FolderImages(
        tuple(f"cat/{n}.png" for n in range(100 - missing)),
        ({"label": "cat"},) * (100 - missing),
        {f"cat/{n}.heic": "needs it" for n in range(missing)},
    )
    if stops:
        with pytest.raises(ValueError, match=r"2 of 100 .*cat/0\.heic \(needs it\)"):
            found.check("monday", allow_missing=False)
    with heard() as lines:
        found.check("monday", allow_missing=stops)
    assert f"monday: {missing} of 100 image files are left out" in lines[0]


def test_a_class_without_an_image_stops(tmp_path):
    folder = class_folders(tmp_path / "in", count=200)
    (folder / "owl").mkdir()
    found = find_images(folder)
    assert found.empty == ("owl",)
    with pytest.raises(ValueError, match="class folder owl"):
        found.check("in", allow_missing=False)


def test_images_outside_of_class_folders(tmp_path):
    folder = write_folder(class_folders(tmp_path / "in", count=1), {"cover.png": png(1)})
    assert find_images(folder).left_out == {"cover.png": "not in a class folder"}
    flat = write_folder(tmp_path / "flat", {"a.png": png(1)})
    with pytest.raises(ValueError, match=r"images must be in class folders, but 'a\.png'"):
        find_images(flat)


def test_nested_folders_are_refused_unless_it_is_said_which_names_the_class(tmp_path):
    names = ["cat/left/1.png", "cat/right/2.png", "dog/left/3.png"]
    folder = write_folder(tmp_path, {name: png(n) for n, name in enumerate(names)})
    with pytest.raises(ValueError, match=r"'cat/left/1\.png' lies in several") as raised:
        find_images(folder)
    assert "'first' makes the classes ['cat', 'dog']" in str(raised.value)
    assert "'last' makes ['left', 'right']" in str(raised.value)
    assert [row["label"] for row in find_images(folder, "first").rows] == ["cat", "cat", "dog"]
    last = [row["label"] for row in find_images(folder, "last").rows]
    assert last == ["left", "right", "left"]


ROWS = [{"file_name": "b.png", "kind": "dog"}, {"file_name": "a.png", "kind": "cat"}]
TABLES = {
    "metadata.jsonl": "\n".join(json.dumps(row) for row in ROWS),
    "metadata.csv": "file_name,kind\nb.png,dog\na.png,cat\n",
}


@pytest.mark.parametrize("table", TABLES)
def test_a_metadata_file_describes_images(tmp_path, table):
    files = {"a.png": png(1), "b.png": png(2), "c.png": png(3), table: TABLES[table].encode()}
    found = find_images(write_folder(tmp_path, files))
    assert found.images == ("a.png", "b.png")
    assert [row["kind"] for row in found.rows] == ["cat", "dog"]
    assert found.left_out == {"c.png": f"not in {table}"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("name\na.png\n", "must have a column 'file_name'"),
        ("file_name\nz.png\n", r"metadata\.csv:0 names 'z\.png', which does not exist"),
        ("file_name\na.png,b,c\n", r"metadata\.csv cannot be read"),
    ],
)
def test_a_wrong_metadata_file_is_named(tmp_path, table, message):
    folder = write_folder(tmp_path, {"a.png": png(1), "metadata.csv": table.encode()})
    with pytest.raises(ValueError, match=message):
        find_images(folder)


def test_missing_values_of_metadata_are_none(tmp_path):
    table = b"file_name,kind,size\na.png,,3\nb.png,dog,\n"
    files = {"a.png": png(1), "b.png": png(2), "metadata.csv": table}
    rows = find_images(write_folder(tmp_path, files)).rows
    assert [(row["kind"], row["size"]) for row in rows] == [(None, 3), ("dog", None)]


def test_paths_come_in_the_order_of_their_names(tmp_path):
    for name in ("b/2", "b/10", "a", "c"):
        write_folder(tmp_path, {name: b"x"})
    expected = [("a", "file"), ("b", "folder"), ("b/10", "file"), ("b/2", "file"), ("c", "file")]
    assert list(walk(tmp_path)) == expected


def test_an_image_too_large_to_open_is_still_one(tmp_path, monkeypatch):
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 1)
    (tmp_path / "big").write_bytes(encoded(photo(0, 0)))
    assert is_image(tmp_path / "big")
