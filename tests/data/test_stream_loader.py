import errno
import itertools
import os
import random

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from helpers import FEATURES, as_tensor, both, broken_stream, heard, numbered, numbers, run
from torch.utils.data import DataLoader

from hf_dash.data import StreamedExamples, StreamedImages, StreamLoader
from hf_dash.data.stream_loader import _batch_sizes
from hf_dash.models import image_transform

# Two workers are as right on a machine of one core, only slower.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def streams(*sizes, num_shards=1):
    return both(list(sizes), num_shards)[1].streams


def flat(batches):
    return [number for batch in numbers(batches) for number in batch]


def loaders(monkeypatch, arrivals, num_processes, **options):
    """Return the loaders of several simulated processes."""
    for arrival in arrivals:
        assert len(arrival) == sum(map(len, arrival.blocks))  # counted, so nothing is to be told
    monkeypatch.setattr("hf_dash.data.shares.gather", lambda item: [item] * num_processes)
    ranks = [{"num_processes": num_processes, "process_index": r} for r in range(num_processes)]
    return [StreamLoader(arrivals, 4, seed=0, **rank, **options) for rank in ranks]


def random_transform(number):
    return as_tensor(number) + torch.rand(1) * 0.5 + random.random() * 0.1


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("cache", [False, True])
def test_every_epoch_holds_every_example_in_a_seeded_new_order(num_workers, num_shards, cache):
    arrivals = [StreamedImages(s.stream, as_tensor, cache=cache) for s in streams(12, 1, 9)]
    options = {"buffer_size": 8, "num_workers": num_workers}
    loader = StreamLoader(arrivals, 4, seed=5, **options)
    first, second = list(loader), list(loader)
    for epoch in (first, second):
        assert [len(batch["labels"]) for batch in epoch] == [3, 4, 4, 3, 4, 4]
        assert sorted(flat(epoch)) == list(range(22))
        for batch in epoch:
            assert batch["labels"].dtype == torch.int64
            assert batch["labels"].tolist() == [int(n) % 2 for n in batch["pixel_values"]]
    assert numbers(first) != numbers(second)
    again = StreamLoader(arrivals, 4, seed=5, **options)
    again.set_epoch(1)
    assert numbers(again) == numbers(second)
    assert numbers(StreamLoader(arrivals, 4, seed=6, **options)) != numbers(first)


def test_old_and_new_examples_mix():
    first = flat(StreamLoader(streams(400, 400), 8, seed=0))[:100]
    assert 25 < sum(number < 400 for number in first) < 75


def test_arrivals_mix_in_proportion_to_their_sizes():
    for num_shards in (1, 3):
        loader = StreamLoader(streams(3000, 600, num_shards=num_shards), 40, seed=0, buffer_size=50)
        shares = [float((batch["pixel_values"] >= 3000).float().mean()) for batch in loader]
        # A full shuffle draws a sixth of 40: its standard deviation is that of the binomial.
        assert np.std(shares) <= 1.5 * (1 / 6 * 5 / 6 / 40) ** 0.5


def test_digits_are_those_of_map_style_data(digits, small_model):
    rows, transform = digits.select(range(50)), image_transform(small_model)
    arrivals = [
        StreamedImages(rows.select(range(*part)).to_iterable_dataset(num_shards=2), transform)
        for part in ((0, 30), (30, 50))
    ]
    found = [
        (image.numpy().tobytes(), int(label))
        for batch in StreamLoader(arrivals, 16, seed=0, num_workers=2)
        for image, label in zip(batch["pixel_values"], batch["labels"], strict=True)
    ]
    expected = [(transform(row["image"]).numpy().tobytes(), row["label"]) for row in rows]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("num_workers", [0, 2, 3])
def test_a_cache_changes_no_batch_and_decodes_once(num_workers):
    seen = []

    def transform(number):
        seen.append(number)
        return as_tensor(number)

    plain = streams(7, 30, 11)
    cached = [StreamedImages(arrival.stream, transform, cache=True) for arrival in plain]
    options = {"seed": 1, "buffer_size": 8, "num_workers": num_workers}
    options["augment"] = lambda image, generator: image + torch.rand(1) / 2
    loader, other = StreamLoader(plain, 4, **options), StreamLoader(cached, 4, **options)
    for _ in range(3):
        for one, two in zip(loader, other, strict=True):
            assert torch.equal(one["pixel_values"], two["pixel_values"])
            assert torch.equal(one["labels"], two["labels"])
    # Workers decode in processes of their own, where their counting is lost; here, only the first
    # image of an arrival is decoded, which tells the shape.
    expected = list(range(48)) if num_workers == 0 else [0, 7, 37]
    assert sorted(seen) == expected
    again = StreamLoader(cached[:2], 4, **options)
    assert sorted(int(n) for b in again for n in b["pixel_values"]) == list(range(37))
    assert sorted(seen) == expected


def test_some_arrivals_may_be_kept_and_others_not():
    plain = streams(7, 30)
    mixed = [StreamedImages(a.stream, as_tensor, cache=n == 0) for n, a in enumerate(plain)]
    for one, two in zip(*(StreamLoader(a, 4, seed=1) for a in (plain, mixed)), strict=True):
        assert torch.equal(one["pixel_values"], two["pixel_values"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_image_is_decoded_once_by_all_workers_epochs_and_loaders(tmp_path, num_workers):
    log = tmp_path / "decoded"

    def transform(number):
        with log.open("a") as file:
            file.write(f"{number}\n")
        return as_tensor(number)

    cached = [StreamedImages(a.stream, transform, cache=True) for a in streams(5, 14)]
    for workers in (num_workers, 0):
        loader = StreamLoader(cached, 4, seed=1, num_workers=workers)
        next(iter(loader))  # what an epoch leaves out, the next one decodes
        for _ in range(2):
            batches = [torch.stack([b["pixel_values"][:, 0], b["labels"]], dim=1) for b in loader]
            rows = sorted(torch.cat(batches).int().tolist())
            assert rows == [[n, n % 2] for n in range(19)]
    assert sorted(map(int, log.read_text().split())) == list(range(19))


def test_what_is_lost_from_the_file_is_read_from_the_stream_again(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DASH_CACHE", str(tmp_path))
    (arrival,) = streams(9)
    cached = StreamedImages(arrival.stream, as_tensor, cache=True)
    loader = StreamLoader([cached], 4, seed=1)
    for cut in (None, 50, 0):
        if cut is not None:
            os.truncate(*tmp_path.glob("*.pixels"), cut)
        assert sorted(int(n) for b in loader for n in b["pixel_values"]) == list(range(9))


def test_on_a_full_disk_streams_are_decoded_again(monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    (arrival,) = streams(9)
    loader = StreamLoader([StreamedImages(arrival.stream, as_tensor, cache=True)], 4, seed=1)
    with heard() as lines:
        for _ in range(2):
            assert sorted(int(n) for b in loader for n in b["pixel_values"]) == list(range(9))
    assert len(lines) == 1
    assert "No space left on device" in lines[0]


def test_images_are_bytes_until_they_are_used(digits, small_model):
    stream = digits.to_iterable_dataset()
    arrival = StreamedImages(stream, image_transform(small_model), cache=True)
    loader = StreamLoader([arrival], 64, seed=0)
    for batch in [*loader, *loader]:
        assert batch.pixels.dtype == torch.uint8
    expected = arrival.transform.normalize(batch.pixels)
    assert torch.equal(batch["pixel_values"], expected)


def new_in(batches, first_new):
    return [sum(number >= first_new for number in batch) for batch in numbers(batches)]


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("cache", [False, True])
def test_every_batch_has_the_share_of_new_images(num_shards, cache):
    arrivals = streams(90, 30, num_shards=num_shards)
    arrivals = [StreamedImages(a.stream, as_tensor, cache=cache) for a in arrivals]
    for share, expected in ((0.5, 4), (0.25, 2), (0.75, 6)):
        loader = StreamLoader(arrivals, 8, seed=0, buffer_size=7, new_share=share)
        first, second = list(loader), list(loader)
        assert [len(batch["labels"]) for batch in first] == [8] * 15
        assert new_in(first, 90) == new_in(second, 90) == [expected] * 15
        # Each new image comes as often as any other, or once more; an old one at most once, and
        # an image keeps its label.
        times = np.bincount(flat(first), minlength=120)
        assert times[90:].max() - times[90:].min() <= 1
        assert times[90:].sum() == 15 * expected
        assert set(times[:90].tolist()) <= {0, 1}
        assert all(b["labels"].tolist() == [int(n) % 2 for n in b["pixel_values"]] for b in first)
        assert numbers(first) != numbers(second)


def test_old_images_come_again_where_they_are_too_few():
    # 9 old of 108: half of an epoch is 54 places, six for each.
    loader = StreamLoader(streams(9, 99), 12, seed=0, buffer_size=50, new_share=0.5)
    batches = list(loader)
    assert new_in(batches, 9) == [6] * 9
    assert np.bincount(flat(batches), minlength=108)[:9].tolist() == [6] * 9


def test_workers_and_processes_keep_the_share_of_new_images(monkeypatch):
    arrivals = streams(60, 20, num_shards=4)
    for num_processes in (1, 2):
        ranks = loaders(monkeypatch, arrivals, num_processes, num_workers=2, new_share=0.5)
        for rank in ranks:
            batches = list(rank)
            sizes = [len(batch["labels"]) for batch in batches]
            assert (sum(sizes), max(sizes)) == (80 // num_processes, 4)
            # Each of two workers is off by less than one image.
            for new, size in zip(new_in(batches, 60), sizes, strict=True):
                assert abs(new - size / 2) < 2
            assert sum(new_in(batches, 60)) == 40 // num_processes


def test_a_share_of_what_is_not_there_is_refused(monkeypatch):
    message = "new_share must be None .* the 2 processes, got 0.5 with 9 and 1"
    with pytest.raises(ValueError, match=message):
        loaders(monkeypatch, streams(9, 1), 2, new_share=0.5)
    # Where nothing is old, all is new.
    assert sorted(flat(StreamLoader(streams(9), 4, seed=0, new_share=0.5))) == list(range(9))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("cache", [False, True])
def test_a_loader_resumes_with_the_batches_that_would_have_followed(num_workers, cache):
    transform = as_tensor if cache else random_transform
    arrivals = [StreamedImages(s.stream, transform, cache=cache) for s in streams(25, 40)]
    options = {"seed": 3, "buffer_size": 16, "num_workers": num_workers}
    options["augment"] = lambda image, generator: image + torch.rand(1) / 4
    loader = StreamLoader(arrivals, 4, **options)
    list(loader)
    whole = [batch["pixel_values"].tolist() for batch in loader]
    loader.set_epoch(1)
    batches = iter(loader)
    for _ in range(6):
        next(batches)
    state = loader.state_dict()
    assert (state["epoch"], state["batches"]) == (1, 6)

    resumed = StreamLoader(arrivals, 4, **options)
    resumed.load_state_dict(state)
    resumed.set_epoch(1)  # as before every epoch: it stays where it is
    assert [batch["pixel_values"].tolist() for batch in resumed] == whole[6:]
    assert (resumed.state_dict()["epoch"], resumed.state_dict()["batches"]) == (2, 0)
    assert [b["pixel_values"].tolist() for b in resumed] != whole
    resumed.set_epoch(1)
    assert [batch["pixel_values"].tolist() for batch in resumed] == whole


def test_what_is_skipped_is_not_decoded():
    decoded = []

    def transform(number):
        decoded.append(number)
        return as_tensor(number)

    arrivals = [StreamedImages(streams(40)[0].stream, transform)]
    loader = StreamLoader(arrivals, 4, seed=0)
    loader.load_state_dict({**loader.state_dict(), "batches": 8})
    assert sorted(flat(loader)) == sorted(decoded)
    assert len(decoded) == 8


def test_a_state_of_another_order_is_refused():
    state = StreamLoader(streams(9), 4, seed=0).state_dict()
    with pytest.raises(ValueError, match="loader with seed 0, this one has 1"):
        StreamLoader(streams(9), 4, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="loader with new_share None"):
        StreamLoader(streams(9), 4, seed=0, new_share=0.5).load_state_dict(state)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("sizes", "num_shards"), [((13, 9), 1), ((13, 9), 2), ((13, 9), 4)])
@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_share_all_out(monkeypatch, num_workers, sizes, num_shards, num_processes):
    arrivals = streams(*sizes, num_shards=num_shards)
    ranks = loaders(monkeypatch, arrivals, num_processes, num_workers=num_workers, buffer_size=4)
    epochs = [list(rank) for rank in ranks]
    assert {len(rank) for rank in ranks} == {len(epoch) for epoch in epochs} == {len(ranks[0])}
    assert sorted(number for epoch in epochs for number in flat(epoch)) == list(range(22))
    for epoch in epochs:
        assert max(len(batch["labels"]) for batch in epoch) <= 4


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("cut", ["skip", "take", "filter"])
def test_streams_whose_order_matters_keep_their_examples(monkeypatch, num_workers, cut):
    # Split by shards, each of these would select other examples.
    stream = numbered(0, 24).to_iterable_dataset(num_shards=4)
    part = {
        "skip": stream.skip(7),
        "take": stream.take(9),
        "filter": stream.filter(lambda row, index: index % 5 == 0, with_indices=True),
    }[cut]
    expected = {"skip": list(range(7, 24)), "take": list(range(9)), "filter": [0, 5, 10, 15, 20]}
    arrivals = [StreamedImages(part, as_tensor)]
    for num_processes in (1, 2):
        ranks = loaders(monkeypatch, arrivals, num_processes, num_workers=num_workers)
        assert sorted(number for rank in ranks for number in flat(rank)) == expected[cut]


def test_uneven_processes_cut_equally_many_batches():
    # By hand: the largest has ⌈11 / 4⌉ = 3 batches, so the one of 7 cuts 2 + 2 + 3.
    assert _batch_sizes([7, 11], 0, 4) == [2, 2, 3]
    assert _batch_sizes([7, 11], 1, 4) == [3, 4, 4]
    assert _batch_sizes([9, 9], 1, 4) == [3, 3, 3]
    with pytest.raises(ValueError, match=r"each of the 3 batches, got \[2, 11\] examples"):
        _batch_sizes([2, 11], 0, 4)


def uneven(*sizes):
    """A stream whose shards have these sizes."""

    def generate(ranges):
        for begin, end in ranges:
            yield from ({"image": n, "label": n % 2} for n in range(begin, end))

    ends = list(itertools.accumulate(sizes, initial=0))
    ranges = [*itertools.pairwise(ends)]
    stream = IterableDataset.from_generator(
        generate, features=FEATURES, gen_kwargs={"ranges": ranges}
    )
    return StreamedImages(stream, as_tensor)


def test_images_of_uneven_shards_count_alike(monkeypatch):
    # Two shards of 9 and 3 examples, and two processes: six each, so that every batch of both
    # has three, and an image weighs a sixth in the mean of their means.
    ranks = loaders(monkeypatch, [uneven(9, 3)], 2)
    epochs = [numbers(rank) for rank in ranks]
    assert [[len(batch) for batch in epoch] for epoch in epochs] == [[3, 3], [3, 3]]
    examples = [sorted(number for batch in epoch for number in batch) for epoch in epochs]
    assert sorted(examples[0] + examples[1]) == list(range(12))
    assert examples[1] == [6, 7, 8, 9, 10, 11]  # the small shard whole, the other one cut


def test_processes_without_a_group_are_refused():
    with pytest.raises(ValueError, match="num_processes is 2, but the process group has 1"):
        StreamLoader(streams(9), 4, seed=0, num_processes=2)
    broken = StreamedImages(broken_stream(), as_tensor)
    with pytest.raises(OSError, match="opened"):
        StreamLoader([broken], 4, seed=0, num_processes=2)


def test_the_failure_of_another_process_is_told(monkeypatch):
    told = [([9], None), ([], "OSError: opened")]
    monkeypatch.setattr("hf_dash.data.shares.gather", lambda item: told)
    with pytest.raises(RuntimeError, match="counting the examples failed on rank 1: OSError: open"):
        StreamLoader(streams(18), 4, seed=0, num_processes=2)


@pytest.mark.parametrize(("given", "word"), [(8, "less"), (10, "more")])
def test_a_wrong_number_of_examples_is_noticed(given, word):
    arrivals = [StreamedImages(streams(9)[0].stream, as_tensor, num_examples=given)]
    with pytest.raises(ValueError, match=f"num_examples is {word} than a stream holds"):
        list(StreamLoader(arrivals, 4, seed=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"buffer_size": 0}, "buffer_size must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"process_index": 1}, r"process_index must be in 0 … 0, got 1"),
        ({"arrivals": []}, r"arrivals must be at least one, got \[\]"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        StreamLoader(**{"arrivals": streams(9), "batch_size": 4, "seed": 0, **options})


def test_random_states_are_left_alone():
    loader = StreamLoader([StreamedImages(streams(9)[0].stream, random_transform)], 4, seed=0)
    before = torch.get_rng_state(), random.getstate()
    list(loader)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    cases = ["stream", "stream_uneven", "stream_broken"]
    return run(2, cases, tmp_path_factory.mktemp("two"))


def test_two_processes_agree_on_the_batches(two_processes):
    # Shards of 9 and 5, and of 9 and 1, examples: batches of one step are of one size, so that
    # each image counts once an epoch, and as much as any other of its step.
    for case, sizes in (("stream", [3, 4]), ("stream_uneven", [2, 3])):
        ranks = two_processes[case]
        for epoch in range(2):
            batches = [rank["batches"][epoch] for rank in ranks]
            assert [[len(batch) for batch in own] for own in batches] == [sizes, sizes]
            found = sorted(number for own in batches for batch in own for number in batch)
            assert found == list(range(2 * sum(sizes)))
        assert [(rank["world"], rank["length"]) for rank in ranks] == [(2, 2)] * 2
    # Half of what each process reads is new, and no process reads what another does.
    shared = [[n for batch in rank["shared"] for n in batch] for rank in two_processes["stream"]]
    assert [sum(number >= 14 for number in own) for own in shared] == [4, 4]
    assert not set(shared[0]) & set(shared[1])


def test_two_processes_fail_together(two_processes):
    told, failed = (rank["error"] for rank in two_processes["stream_broken"])
    assert told.startswith("RuntimeError: counting the examples failed on rank 1: TypeError")
    assert failed.startswith("TypeError: 'NoneType' object")


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_single_examples_are_each_read_once_in_a_new_order(num_workers, num_shards):
    """Workers that outlive an epoch see the next one too."""
    arrivals = [
        StreamedImages(s.stream, as_tensor) for s in streams(12, 1, 9, num_shards=num_shards)
    ]
    examples = StreamedExamples(arrivals, seed=5, buffer_size=8)
    options = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    loader = DataLoader(examples, batch_size=4, **options)
    epochs = []
    for epoch in range(2):
        examples.set_epoch(epoch)
        epochs.append(flat(loader))
        assert sorted(epochs[-1]) == list(range(22))
    assert epochs[0] != epochs[1]
    examples.set_epoch(0)
    assert flat(loader) == epochs[0]


def test_single_examples_of_old_and_new_mix():
    """A buffer behind concatenated arrivals would give the old ones first."""
    arrivals = [StreamedImages(s.stream, as_tensor) for s in streams(3000, 600)]
    found = [int(e["pixel_values"]) for e in StreamedExamples(arrivals, seed=0, buffer_size=50)]
    shares = [np.mean([n >= 3000 for n in found[at : at + 40]]) for at in range(0, 3600, 40)]
    # A full shuffle draws a sixth of 40: its standard deviation is that of the binomial.
    assert np.std(shares) <= 1.5 * (1 / 6 * 5 / 6 / 40) ** 0.5


def test_random_transforms_of_single_examples_are_seeded():
    arrivals = [StreamedImages(s.stream, random_transform) for s in streams(6)]

    def values():
        return [float(e["pixel_values"]) for e in StreamedExamples(arrivals, seed=3)]

    torch.manual_seed(1)
    state, first = torch.get_rng_state(), values()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert values() == first
