import os

import pytest
from helpers import png, write_parquet

import hf_dash
from hf_dash.data import DataConfig
from hf_dash.data.stamps import check_unchanged, joint_stamps, stamps_of


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "monday.txt"
    path.write_text("one")
    return path


def test_files_that_stay_are_fine(path):
    stamps = stamps_of([path])
    path.read_text()
    check_unchanged(joint_stamps([stamps, {}, stamps]))


def overwritten(path):
    path.write_text("other")


def replaced(path):
    """By a file of the same size and time, as ``cp -p`` and a rename leave it."""
    found = path.stat()
    aside = path.with_name("aside")
    aside.write_text("two")
    os.utime(aside, ns=(found.st_atime_ns, found.st_mtime_ns))
    aside.replace(path)


def removed(path):
    path.unlink()


@pytest.mark.parametrize("change", [overwritten, replaced, removed])
def test_a_file_that_changed_is_named(path, change):
    stamps = stamps_of([path])
    change(path)
    with pytest.raises(ValueError, match=r"monday\.txt was replaced while it was trained on"):
        check_unchanged(stamps)


@pytest.mark.parametrize(
    ("kind", "streaming", "noticed"),
    [("file", True, True), ("file", False, False), ("folder", True, True), ("folder", False, True)],
)
def test_a_round_notices_where_its_images_are_read_from_changed_files(
    tmp_path, kind, streaming, noticed
):
    """A file that is not streamed was copied when it was loaded."""
    shards = tmp_path / "shards"
    (shards / "monday" / "cat").mkdir(parents=True)
    if kind == "file":
        changed = write_parquet(shards / "monday.parquet", [png(1), png(2)], [0, 1])
        (shards / "monday" / "cat").rmdir()
        (shards / "monday").rmdir()
    else:
        changed = shards / "monday" / "cat" / "a.png"
        changed.write_bytes(png(1))
    files = hf_dash.data.list_arrivals(str(shards))
    config = DataConfig(streaming=streaming)
    arrival = hf_dash.data.load_arrival(files, config, root=shards)
    round_ = hf_dash.Round(1, (arrival.examples(lambda image: image),))
    round_.check_unchanged()
    os.utime(changed, ns=(0, 0))
    if not noticed:
        round_.check_unchanged()
        return
    with pytest.raises(ValueError, match=f"{changed.name} was replaced"):
        round_.check_unchanged()
