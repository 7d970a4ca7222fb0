import hashlib
import os

import pytest
from children import CONTEXT

import hf_dash
from hf_dash.utils.files import (
    RESERVE,
    check_free_space,
    check_output_dir,
    files_written_aside,
    flush_folder,
    public,
    remove,
    sha256_of,
    write_bytes,
    write_text,
)


def full_disk(*arguments):
    raise OSError(28, "No space left on device")


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "one – 1")
    write_text(path, "two")
    assert path.read_bytes() == b"two"
    write_bytes(path, b"\0\1")
    assert path.read_bytes() == b"\0\1"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, where):
    path = tmp_path / "a.txt"
    write_text(path, "one")
    monkeypatch.setattr(f"hf_dash.utils.files.os.{where}", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "two")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["one"]


def fail_halfway(folder):
    with files_written_aside(folder) as aside:
        (aside / "a").write_text("3")
        raise RuntimeError("halfway")


def test_files_move_together_when_all_are_whole(tmp_path):
    folder = tmp_path / "new" / "folder"
    with files_written_aside(folder) as aside:
        (aside / "a").write_text("1")
        (aside / "b").write_text("2")
        assert not (folder / "a").exists()
    (folder / "mine").write_text("stays")
    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway(folder)
    kept = {file.name: file.read_text() for file in folder.iterdir()}
    assert kept == {"a": "1", "b": "2", "mine": "stays"}


def test_the_checksum_is_that_of_the_content(tmp_path):
    content = bytes(range(256)) * 10_000  # more than one piece
    (tmp_path / "a").write_bytes(content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_every_file_and_the_folder_are_flushed(tmp_path, monkeypatch):
    (tmp_path / "a").touch()
    (tmp_path / "b").touch()
    (tmp_path / "c").mkdir()
    flushed = []
    monkeypatch.setattr("hf_dash.utils.files.os.fsync", flushed.append)
    flush_folder(tmp_path)
    assert len(flushed) == 3


def hold(folder, held, done):
    with hf_dash.utils.one_writer(folder):
        held.set()
        done.wait()


def test_two_processes_never_share_a_folder(tmp_path):
    held, done = CONTEXT.Event(), CONTEXT.Event()
    other = CONTEXT.Process(target=hold, args=(str(tmp_path), held, done))
    other.start()
    assert held.wait(120)
    with (
        pytest.raises(ValueError, match="is in use by another process"),
        hf_dash.utils.one_writer(tmp_path),
    ):
        pass
    other.kill()  # the lock ends with its process
    other.join()
    with hf_dash.utils.one_writer(tmp_path):
        pass


def test_a_folder_to_write_into_is_made(tmp_path):
    folder = tmp_path / "runs" / "x"
    assert check_output_dir(str(folder)) == folder
    assert folder.is_dir()
    assert check_output_dir(folder) == folder


@pytest.mark.parametrize("given", ["", "  "])
def test_a_folder_to_write_into_has_a_name(given):
    with pytest.raises(ValueError, match=f"output_dir must name a folder, got '{given}'"):
        check_output_dir(given)


@pytest.mark.parametrize("below", [".", "x", "x/y"])
def test_a_file_is_not_a_folder_to_write_into(tmp_path, below):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match=r"output_dir must be a folder, .*mine is a file"):
        check_output_dir(tmp_path / "mine" / below)
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_folder_to_write_into_is_writable(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="output_dir must be a folder's path, got 3"):
        check_output_dir(3)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(PermissionError, match="output_dir must be writable"):
        check_output_dir(tmp_path)


def test_a_full_disk_is_noticed_before_it_is_written(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 3 * RESERVE})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    check_free_space(tmp_path, 2 * RESERVE)
    with pytest.raises(OSError, match=r"has 3\.1 MB left, but about 3\.1 MB will be written"):
        check_free_space(tmp_path, 2 * RESERVE + 1)


def test_files_and_folders_are_removed_but_not_what_links_lead_to(tmp_path):
    folder, link, file = tmp_path / "folder", tmp_path / "link", tmp_path / "file"
    folder.mkdir()
    (folder / "a").write_text("a")
    file.write_text("b")
    link.symlink_to(folder)
    for path in (link, file, file):
        remove(path)
    assert os.listdir(tmp_path) == ["folder"]
    remove(folder)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("/home/me/images", "images"),
        ("~/images/", "images"),
        ("../images", "images"),
        (r"C:\Users\me\images", "images"),
        ("/home/me/shards/*.parquet", "shards/*.parquet"),
        (["/home/me/a", "user/b"], ["a", "user/b"]),
        ("user/model", "user/model"),
        ("cosine", "cosine"),
        (0.1, 0.1),
        (None, None),
    ],
)
def test_of_places_only_names_are_told(setting, told):
    assert public(setting) == told
