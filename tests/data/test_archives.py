import errno
import gzip
import os
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from children import Child, join
from helpers import heard, png
from image_files import write_tar

from hf_dash import DataConfig
from hf_dash.data.archives import DAY, RESERVE, copy_of, plain_archive
from hf_dash.data.arrivals import load_arrival
from hf_dash.data.columns import fingerprint
from hf_dash.data.pieces import members

LABELS = "babab"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("HF_DASH_CACHE", str(folder))
    return folder


def archive(path, levels=range(5), mode="w:gz"):
    members = []
    for number, level in enumerate(levels):
        members.append((f"{number}.png", png(level)))
        members.append((f"{number}.txt", LABELS[number % 5].encode()))
    return write_tar(path, members, mode)


def config(**options):
    columns = {"image_column_name": "png", "label_column_name": "txt"}
    return DataConfig(arrive_by="files", **columns, **options)


def load(path, **options):
    return load_arrival([path], config(**options), root=path.parent)


def kept(cache):
    return sorted(file.suffix for file in cache.iterdir())


@contextmanager
def nothing_is_unpacked(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("gzip.open", None)
        patch.setattr("gzip.GzipFile", None)
        yield


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_a_compressed_archive_is_unpacked_once(tmp_path, cache, monkeypatch, streaming):
    path = archive(tmp_path / "day.tgz")
    plain = load(archive(tmp_path / "plain" / "day.tar", mode="w"))
    first = load(path, streaming=streaming)
    assert kept(cache) == [".manifest", ".manifest", ".tar"]
    with nothing_is_unpacked(monkeypatch):
        again = load(path, streaming=streaming)
        for arrival in (first, again):
            assert [row["image"].getpixel((0, 0)) for row in arrival.dataset] == [*range(5)]
            assert arrival.fingerprint == fingerprint(arrival.dataset) == plain.fingerprint
            assert (arrival.pieces is not None) == streaming


def test_an_archive_is_read_once_and_so_is_its_copy(tmp_path):
    noise = np.random.default_rng(0).bytes(2_000_000)
    path = write_tar(tmp_path / "day.tar.gz", [("0.png", noise), ("0.txt", b"a")], "w:gz")
    before = psutil.Process().io_counters().read_chars
    copy = plain_archive(path)
    read = psutil.Process().io_counters().read_chars - before
    assert path.stat().st_size <= read <= 1.01 * path.stat().st_size + 10_000
    again = psutil.Process().io_counters().read_chars
    assert plain_archive(path) == copy
    assert psutil.Process().io_counters().read_chars - again < 10_000


@pytest.mark.parametrize("harm", ["cut", "flipped", "no end"])
def test_of_a_damaged_archive_nothing_is_left(tmp_path, cache, harm):
    path = archive(tmp_path / "day.tar.gz")
    content = bytearray(path.read_bytes())
    if harm == "cut":
        del content[-40:]
    elif harm == "flipped":
        content[len(content) // 2] ^= 1
    else:  # cut off between two members, and then compressed
        content = gzip.compress(gzip.decompress(content)[: 2 * 1024])
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"day\.tar\.gz cannot be read"):
        load(path, streaming=True)
    assert kept(cache) == []


def unpack(path):
    print(plain_archive(Path(path)).stat().st_ino)


def test_processes_at_once_share_one_copy(tmp_path, cache):
    path = archive(tmp_path / "day.tar.gz", [*range(250)] * 8)
    done = join([Child(unpack, str(path), folder=tmp_path) for _ in range(3)])
    assert [one.stdout for one in done] == [f"{copy_of(path).stat().st_ino}\n"] * 3, done[0].stderr
    assert kept(cache) == [".tar"]


def full(monkeypatch, cache):
    def fail(file_number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hf_dash.data.archives.os.fsync", fail)


def nearly_full(monkeypatch, cache):
    usage = SimpleNamespace(free=RESERVE - 1)
    monkeypatch.setattr("hf_dash.data.archives.shutil.disk_usage", lambda place: usage)


def not_a_folder(monkeypatch, cache):
    cache.write_bytes(b"")


@pytest.mark.parametrize("fault", [full, nearly_full, not_a_folder])
def test_without_room_for_a_copy_an_archive_is_read_as_it_is(tmp_path, monkeypatch, cache, fault):
    paths = [archive(tmp_path / f"{day}.tar.gz") for day in (1, 2)]
    with monkeypatch.context() as patch:
        fault(patch, cache)
        with heard() as lines:
            found = [load(path, streaming=True) for path in paths]
        assert len([line for line in lines if "read from their beginning" in line]) == 1
        assert [one.num_examples for one in found] == [5, 5]
        assert found[0].pieces is None
        assert not cache.is_dir() or {".manifest"} >= set(kept(cache))


def aged(copy, days):
    os.utime(copy, (time.time() - days * DAY, copy.stat().st_mtime))
    return copy


def test_what_nobody_uses_goes_and_what_is_used_stays(tmp_path, cache):
    old, used = (plain_archive(archive(tmp_path / f"{name}.tgz")) for name in ("old", "used"))
    part = cache / "x-y.z.part"
    part.write_bytes(b"of a process that was killed")
    os.utime(part, (0, time.time() - 2 * DAY))
    for copy in (old, used):
        aged(copy, 8)
    assert len([*members(used, "png", is_copy=True).images([0])]) == 1  # which notes it
    replaced = aged(plain_archive(archive(tmp_path / "new.tgz", [1])), 2)
    assert [file.exists() for file in (old, used, part)] == [False, True, False]
    new = plain_archive(archive(tmp_path / "new.tgz", [2]))
    assert [file.exists() for file in (replaced, used, new)] == [False, True, True]


def test_a_full_disk_takes_what_was_not_used_for_a_day(tmp_path, monkeypatch):
    old, used = (plain_archive(archive(tmp_path / f"{name}.tgz")) for name in ("old", "used"))
    aged(old, 2)

    def fail_while_old_is_there(file_number):
        if old.exists():
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hf_dash.data.archives.os.fsync", fail_while_old_is_there)
    new = plain_archive(archive(tmp_path / "new.tgz"))
    assert [file.exists() for file in (old, used, new)] == [False, True, True]


def test_a_damaged_copy_is_made_anew_and_so_is_one_to_verify(tmp_path):
    path = archive(tmp_path / "day.tar.gz")
    first = load(path, streaming=True)
    copy = copy_of(path)
    whole = copy.read_bytes()
    copy.write_bytes(whole[:3000])
    with pytest.raises(ValueError, match=f"{copy.name} was cut off: it ends before the image 4"):
        [*first.pieces[0].images([0, 4])]
    assert load(path, streaming=True).fingerprint == first.fingerprint
    assert copy.read_bytes() == whole
    copy.write_bytes(whole.replace(png(3), png(6)))
    load(path, streaming=True, verify_data=True)
    assert copy.read_bytes() == whole
