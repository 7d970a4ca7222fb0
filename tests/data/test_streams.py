import math

import pytest
import torch
from datasets import IterableDataset
from helpers import FEATURES, as_tensor, both, broken_stream, numbered, numbers
from transformers import Trainer, TrainingArguments

from hf_dash import DashConfig, Round, dash_shrink_
from hf_dash.data import ImageExamples, StreamedImages, gradient_batches, train_batches
from hf_dash.data.streams import StreamGradientBatches, share_minibatches
from hf_dash.method import derive_max_steps


def read(arrivals, *positions):
    """The examples at these positions, as minibatches of one."""
    return StreamGradientBatches(arrivals, [[position] for position in positions])


def test_examples_are_counted_without_being_decoded(digits):
    def transform(image):
        raise AssertionError

    stream = digits.select(range(23)).to_iterable_dataset(num_shards=4)
    assert len(StreamedImages(stream, transform)) == 23
    assert len(StreamedImages(stream.skip(3).take(9), transform)) == 9
    assert len(StreamedImages(broken_stream(), transform, num_examples=7)) == 7


def test_digits_are_decoded_as_map_style(digits, small_model):
    from hf_dash.models import image_transform

    rows, transform = digits.select(range(40)), image_transform(small_model)
    map_style = ImageExamples(rows, transform)
    stream = StreamedImages(rows.to_iterable_dataset(num_shards=3), transform)
    for found, expected in zip(read([stream], *range(40)), map_style, strict=True):
        assert torch.equal(found["pixel_values"][0], expected["pixel_values"])
        assert found["labels"] == expected["labels"]


def test_labels_are_those_of_the_model():
    stream = numbered(0, 4).to_iterable_dataset()
    examples = read([StreamedImages(stream, as_tensor, label_ids=[5, 3])], *range(4))
    assert [example["labels"].item() for example in examples] == [5, 3, 5, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_examples": -1}, "num_examples must be at least 0, got -1"),
        ({"label_ids": [1]}, "label_ids must have one label for each .* 2 classes, got 1"),
    ],
)
def test_what_an_arrival_is_told_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        StreamedImages(numbered(0, 4).to_iterable_dataset(), as_tensor, **options)


def test_what_an_arrival_is_made_of_is_checked():
    with pytest.raises(TypeError, match="stream must be an IterableDataset, got Dataset"):
        StreamedImages(numbered(0, 4), as_tensor)
    with pytest.raises(ValueError, match=r"stream must have a column 'label', got \['image'\]"):
        StreamedImages(numbered(0, 4).to_iterable_dataset().remove_columns("label"), as_tensor)
    with pytest.raises(ValueError, match=r"must be of one kind, got \['Image.*', 'Streamed.*'\]"):
        Round(2, (both([3])[0].new, both([3])[1].new))


def test_labels_out_of_range_are_refused():
    stream = IterableDataset.from_generator(lambda: [{"image": 0, "label": 2}], features=FEATURES)
    with pytest.raises(ValueError, match="labels must lie in 0 … 1"):
        read([StreamedImages(stream, as_tensor)], 0)[0]


def test_shards_are_told_from_streams_whose_order_matters():
    stream = numbered(0, 12).to_iterable_dataset(num_shards=4)
    renamed = stream.rename_columns({"label": "l"}).rename_columns({"l": "label"})
    for whole in (stream, renamed, stream.select_columns(["label", "image"])):
        assert StreamedImages(whole, as_tensor).num_shards == 4
    odd = stream.filter(lambda row, index: index % 2, with_indices=True)
    numbered_on = stream.map(lambda row, index: {"image": index}, with_indices=True)
    for ordered in (stream.skip(2), stream.take(5), odd, numbered_on, stream.shuffle(seed=0)):
        assert StreamedImages(ordered, as_tensor).num_shards == 1


def test_the_sizes_of_a_round_are_counted():
    for round_ in both([4, 3, 2]):
        assert (round_.num_new, round_.num_total) == (2, 9)
    with pytest.raises(TypeError, match="round 3 holds streams"):
        both([4, 3, 2])[1].examples  # noqa: B018


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("preset", [None, "paper"])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_gradient_batches_are_those_of_map_style_data(num_shards, preset, num_processes):
    map_style, streams = both([300, 5, 1, 17], num_shards)
    config = DashConfig(gradient_batch_size=8, preset=preset)
    for rank in range(num_processes):
        ranks = {"num_processes": num_processes, "process_index": rank}
        expected = list(gradient_batches(map_style, config, **ranks))
        found = gradient_batches(streams, config, **ranks)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one["pixel_values"], other["pixel_values"])
            assert torch.equal(one["labels"], other["labels"])
        assert numbers([found[-2]]) == numbers([expected[-2]])
        assert numbers(found[-2:]) == numbers(expected[-2:])


def test_only_the_newest_arrivals_are_opened():
    new = StreamedImages(numbered(100, 120).to_iterable_dataset(), as_tensor)
    arrivals = (StreamedImages(broken_stream(), as_tensor, num_examples=100), new)
    assert numbers(read(arrivals, 117, 118, 119)) == [[117], [118], [119]]
    config = DashConfig(gradient_batch_size=8, num_batches=2)
    batches = gradient_batches(Round(2, arrivals), config)
    model = torch.nn.Linear(1, 2)
    report = dash_shrink_(
        model, batches, lambda m, b: m(b["pixel_values"]).square().mean(), num_batches=2
    )
    assert (report.num_batches, report.num_images) == (2, 16)
    with pytest.raises(OSError, match="opened"):
        next(iter(batches))


def test_what_is_older_in_the_oldest_needed_arrival_is_not_decoded():
    decoded = []

    def transform(number):
        decoded.append(number)
        return as_tensor(number)

    stream = StreamedImages(numbered(0, 20).to_iterable_dataset(), transform)
    batches = StreamGradientBatches([stream], share_minibatches([0, 4, 12, 20], 3, 1))
    assert numbers(batches[-1:]) == [[15, 18]]
    assert decoded == [15, 18]


def test_nothing_to_share_out_is_refused():
    with pytest.raises(ValueError, match="has 2 examples, too few for 3 processes"):
        gradient_batches(both([2])[1], DashConfig(), num_processes=3)
    wrong = StreamedImages(numbered(0, 2).to_iterable_dataset(), as_tensor, num_examples=3)
    with pytest.raises(ValueError, match="num_examples is 3, but the stream ends before example 2"):
        list(read([wrong], 0, 1, 2))


def test_training_batches_of_a_round_of_streams():
    loader = train_batches(both([5, 4])[1], 4, seed=0)
    assert [len(batch) for batch in numbers(loader)] == [3, 3, 3]


class Counting(torch.nn.Module):
    """A model of the Trainer that counts its images."""

    def __init__(self):
        super().__init__()
        self.linear, self.images = torch.nn.Linear(1, 2), 0

    def forward(self, pixel_values, labels):
        self.images += len(labels)
        return {"loss": torch.nn.functional.cross_entropy(self.linear(pixel_values), labels)}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_max_steps_take_the_trainer_through_whole_epochs(tmp_path, accumulation):
    stream = (
        numbered(0, 11)
        .to_iterable_dataset()
        .map(lambda row: {"pixel_values": [float(row["image"])], "labels": row["label"]})
        .remove_columns(["image", "label"])
    )
    steps = derive_max_steps(11, 4, 1, 3, accumulation)
    # Three batches an epoch; in steps of two the third has no step of its own, so that training
    # ends before the last epoch's third batch, of three images.
    assert steps == {1: 9, 2: 3}[accumulation]
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    model = Counting()
    Trainer(model, args, train_dataset=stream).train()
    assert model.images == {1: 33, 2: 30}[accumulation]


@pytest.mark.parametrize(
    ("arguments", "steps"), [((100, 10, 2, 1), 5), ((101, 10, 2, 2), 12), ((101, 10, 2, 0.5, 4), 1)]
)
def test_max_steps_by_hand(arguments, steps):
    assert derive_max_steps(*arguments) == steps


@pytest.mark.parametrize("place", range(5))
def test_max_steps_are_checked(place):
    arguments = [10, 2, 1, 1.0, 1]
    arguments[place] = 0
    with pytest.raises(ValueError, match=r"must be (at least 1|greater than 0), got 0"):
        derive_max_steps(*arguments)
    with pytest.raises(ValueError, match="num_epochs must be greater than 0, got nan"):
        derive_max_steps(10, 2, 1, math.nan)
    with pytest.raises(
        ValueError, match=r"gradient_accumulation_steps is 6, but .* only 5 batches"
    ):
        derive_max_steps(10, 2, 1, 1, 6)
