import errno
import os
import pickle
import time

import pytest
import torch
from helpers import heard, numbered, png, write_parquet
from torch.utils.data import DataLoader

import hf_dash
from hf_dash.data import ImageExamples, Round, train_batches
from hf_dash.data.loading import load_schedules
from hf_dash.data.pixel_cache import PixelBudget, PixelCache

SHAPE = (3, 2, 2)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DASH_CACHE", str(tmp_path / "pixels"))
    return tmp_path / "pixels"


def image(number, dtype=torch.uint8):
    return torch.arange(12).reshape(SHAPE).add(number).to(dtype)


def read(cache, index):
    (pixels,), missing = cache.read([index])
    return None if missing else pixels


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.bool])
def test_images_come_back_as_they_were_written(dtype):
    cache = PixelCache(3, SHAPE, dtype)
    cache.write(2, image(7, dtype))
    cache.write(0, image(-3, dtype).mT.contiguous().mT)  # laid out in another way
    assert read(cache, 1) is None
    assert torch.equal(read(cache, 2), image(7, dtype))
    assert torch.equal(read(cache, 0), image(-3, dtype))


def test_one_of_another_size_is_refused():
    cache = PixelCache(3, SHAPE, torch.uint8)
    with pytest.raises(ValueError, match=r"pixels must have shape \(3, 2, 2\).*got \(3, 2, 1\)"):
        cache.write(0, image(0)[..., :1])


def test_runs_with_the_same_key_share_one_file(folder):
    first, second = (PixelCache(3, SHAPE, torch.uint8, "monday") for _ in range(2))
    other = PixelCache(3, SHAPE, torch.uint8, "tuesday")
    first.write(1, image(1))
    second.write(2, image(2))
    assert torch.equal(read(second, 1), image(1))
    assert torch.equal(read(first, 2), image(2))
    assert read(other, 1) is None
    assert sorted(os.listdir(folder)) == ["monday.pixels", "tuesday.pixels"]


def test_of_two_that_make_the_file_at_once_both_use_one(folder, monkeypatch):
    link, others = os.link, []

    def late(aside, path):
        monkeypatch.setattr(os, "link", link)
        others.append(PixelCache(3, SHAPE, torch.uint8, "monday"))
        link(aside, path)

    monkeypatch.setattr(os, "link", late)
    cache = PixelCache(3, SHAPE, torch.uint8, "monday")
    cache.write(1, image(1))
    assert torch.equal(read(others[0], 1), image(1))
    assert os.listdir(folder) == ["monday.pixels"]


def test_a_file_is_as_large_as_what_was_written(folder):
    cache = PixelCache(100_000, (3, 224, 224), torch.uint8, "large")
    cache.write(50_000, torch.zeros(3, 224, 224, dtype=torch.uint8))
    status = (folder / "large.pixels").stat()
    assert status.st_size == 100_000 * (3 * 224 * 224 + 8)
    assert status.st_blocks * 512 < 1_000_000


def test_a_file_that_was_cut_is_made_anew(folder):
    PixelCache(3, SHAPE, torch.uint8, "monday").write(0, image(0))
    os.truncate(folder / "monday.pixels", 31)
    with heard() as lines:
        cache = PixelCache(3, SHAPE, torch.uint8, "monday")
    assert lines == [f"{folder / 'monday.pixels'} has 31 bytes in place of 60: made anew"]
    assert read(cache, 0) is None


def test_a_file_that_is_cut_or_changed_in_use_is_filled_again(folder):
    cache = PixelCache(3, SHAPE, torch.uint8, "monday")
    for index in range(3):
        cache.write(index, image(index))
    with (folder / "monday.pixels").open("r+b") as file:
        file.seek(10)  # in the first image
        file.write(b"\xff")
        file.truncate(50)  # in the last one
    assert [read(cache, index) is None for index in range(3)] == [True, False, True]
    cache.write(0, image(0))
    cache.write(2, image(2))
    assert [int(read(cache, index)[0, 0, 0]) for index in range(3)] == [0, 1, 2]


def test_a_full_disk_is_said_once_and_nothing_is_lost(monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    examples = ImageExamples(numbered(4), image, in_memory=True)
    monkeypatch.setattr(os, "pwritev", full)
    with heard() as lines:
        rows = examples.__getitems__([3, 1, 3])
    assert [int(row["pixel_values"][0, 0, 0]) for row in rows] == [3, 1, 3]
    assert len(lines) == 1
    assert "No space left on device" in lines[0]


def test_half_an_image_on_a_full_disk_is_not_read(monkeypatch):
    cache = PixelCache(2, SHAPE, torch.uint8)
    whole = os.pwritev
    monkeypatch.setattr(
        os, "pwritev", lambda file, parts, at: whole(file, [parts[0], parts[1][:5]], at)
    )
    with heard() as lines:
        cache.write(0, image(0))
    assert "the disk is full" in lines[0]
    assert read(cache, 0) is None


def test_where_nothing_can_be_kept_images_are_decoded(folder):
    folder.write_text("a file in the way")
    with heard() as lines:
        examples = ImageExamples(numbered(4), image, in_memory=True)
    assert [int(examples[index]["pixel_values"][0, 0, 0]) for index in range(4)] == [0, 1, 2, 3]
    assert len(lines) == 1
    assert "decoded images cannot be kept" in lines[0]


def test_a_file_without_a_key_goes_with_its_owner(folder):
    cache = PixelCache(2, SHAPE, torch.uint8)
    cache.write(1, image(1))
    again = pickle.loads(pickle.dumps(cache))  # as a worker that is not forked gets it
    assert torch.equal(read(again, 1), image(1))
    del again
    assert len(os.listdir(folder)) == 1
    del cache
    assert os.listdir(folder) == []


def counting(path):
    """A transform that writes down what it decodes, in whichever process."""

    def decode(number):
        with path.open("a") as file:
            file.write(f"{number}\n")
        return image(number)

    return decode


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_image_is_decoded_once_by_all_workers_epochs_and_loaders(tmp_path, num_workers):
    log = tmp_path / "decoded"
    examples = ImageExamples(numbered(12), counting(log), in_memory=True)
    for _ in range(2):
        loader = DataLoader(examples, 5, shuffle=True, num_workers=num_workers)
        for _ in range(2):
            seen = [int(p[0, 0, 0]) for batch in loader for p in batch["pixel_values"]]
            assert sorted(seen) == list(range(12))
    decoded = [int(number) for number in log.read_text().split()]
    assert sorted(decoded) == list(range(12))


def test_what_is_kept_is_read_without_workers(tmp_path):
    """They would only carry it over; where images are augmented they have something to do."""
    images = numbered(8)
    examples = ImageExamples(images, counting(tmp_path / "seen"), in_memory=True)
    round_, options = Round(1, (examples,)), {"seed": 0, "num_workers": 2}
    first = train_batches(round_, 4, **options)
    assert first.num_workers == 2
    epoch = [batch["labels"].tolist() for batch in first]
    again = train_batches(round_, 4, **options)
    assert again.num_workers == 0
    assert [batch["labels"].tolist() for batch in again] == epoch
    augmented = train_batches(round_, 4, augment=lambda image, _: image, **options)
    assert augmented.num_workers == 2


@pytest.fixture
def data(tmp_path):
    names = {"train": 0, "test": 20}
    for name, first in names.items():
        images = [png(first + n) for n in range(4)]
        write_parquet(tmp_path / f"{name}.parquet", images, [0, 1, 0, 1])
    return hf_dash.DataConfig(
        str(tmp_path / "train.parquet"),
        test_dataset_name=str(tmp_path / "test.parquet"),
        image_mode="RGB",
    )


def transform(size=32):
    model = hf_dash.create_model("test_resnet", label_names=["cat", "dog"], image_size=size)
    return hf_dash.models.image_transform(model)


def keys(schedule, transform):
    return [part.cache_key(transform) for part in (*schedule.arrivals, *schedule.held_out)]


def test_a_key_is_of_the_images_their_order_and_the_transform(data):
    first, second = load_schedules(data, [0, 1], 1, None, [])
    small, large = transform(32), transform(64)
    assert keys(first, small) == keys(load_schedules(data, [0], 1, None, [])[0], transform(32))
    found = {*keys(first, small), *keys(first, large), *keys(second, small)}
    assert len(found) == 5  # the held-out images have one order
    assert keys(first, lambda image: image) == [None, None]


def test_another_run_decodes_nothing(data, monkeypatch):
    def open_all():
        (schedule,) = load_schedules(data, [0], 2, None, [])
        how = transform()
        examples = [schedule.rounds(how)[-1].examples, schedule.held_out_examples(how)]
        return [row["pixel_values"] for part in examples for row in part]

    first = open_all()
    decoded = []
    whole = ImageExamples._decoded
    monkeypatch.setattr(
        ImageExamples, "_decoded", lambda self, rows: decoded.append(rows) or whole(self, rows)
    )
    assert torch.equal(torch.stack(first), torch.stack(open_all()))
    assert decoded == [[0], [0], [0]]  # which tell the shapes of three parts


@pytest.mark.parametrize("streaming", [False, True])
def test_what_does_not_fit_is_decoded_at_every_use_and_said_once(data, folder, streaming):
    settings = {**vars(data), "streaming": streaming, "cache_gb": 0.0}
    (schedule,) = load_schedules(hf_dash.DataConfig(**settings), [0], 2, None, [])
    how = transform()
    with heard() as lines:
        rounds = schedule.rounds(how)
        held_out = schedule.held_out_examples(how)
    assert len(lines) == 1
    assert "do not fit into cache_gb 0" in lines[0]
    assert len(list(hf_dash.data.train_batches(rounds[-1], 2, seed=0))) == 2
    assert held_out[0]["pixel_values"].shape == (3, 32, 32)
    assert not list(folder.glob("*.pixels"))


def test_a_budget_counts_what_has_one_key_once():
    budget = PixelBudget(1e-6)
    assert budget.take("monday", 600)
    assert budget.take("monday", 600)
    assert not budget.take("tuesday", 500)
    assert budget.take("wednesday", 400)


def test_by_default_a_quarter_of_what_is_free_may_be_used(folder, monkeypatch):
    class Memory:
        available = 4_000

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    assert PixelBudget().take("monday", 1_000)
    assert not PixelBudget().take("monday", 1_001)


def test_room_is_made_by_what_was_not_used_for_longest(folder):
    for name, hours in (("old", 30), ("older", 40), ("used", 0)):
        PixelCache(1, (100_000,), torch.uint8, name).write(0, torch.zeros(100_000).byte())
        then = time.time() - 3600 * hours
        os.utime(folder / f"{name}.pixels", (then, then))
    assert PixelBudget(350_000 / 1e9).take("new", 100_000)
    assert sorted(os.listdir(folder)) == ["old.pixels", "used.pixels"]
    assert PixelBudget(150_000 / 1e9).take("new", 100_000)
    assert os.listdir(folder) == ["used.pixels"]


def test_the_size_of_the_budget_is_checked():
    with pytest.raises(ValueError, match="cache_gb must be at least 0, got -1"):
        hf_dash.DataConfig(cache_gb=-1)
