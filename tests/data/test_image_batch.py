import pickle

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device
from helpers import numbered, png, write_parquet

import hf_dash
from hf_dash.data import ImageExamples, RandomCropFlip
from hf_dash.data.image_batch import (
    Examples,
    ImageBatch,
    collate,
    collate_values,
    joined,
    stacked,
)
from hf_dash.transforms import ImageTransform, Normalize


def normalize():
    return Normalize(torch.tensor([[[0.5]]]), torch.tensor([[[0.3]]]))


def image(number):
    return torch.full((1, 2, 3), number, dtype=torch.uint8)


def examples(*numbers, step=None):
    pixels = stacked(map(image, numbers), len(numbers))
    return Examples(ImageBatch(pixels, torch.tensor(numbers), step))


def test_a_batch_is_bytes_until_it_is_used():
    batch = examples(3, 250, step=normalize()).batch
    sent = send_to_device(pickle.loads(pickle.dumps(batch)), torch.device("cpu"))
    assert sent.pixels.dtype == torch.uint8
    expected = torch.stack([normalize()(image(3)), normalize()(image(250))])
    values = dict(sent)
    assert list(values) == ["pixel_values", "labels"]
    assert torch.equal(values["pixel_values"], expected)
    assert torch.equal(sent["pixel_values"], expected)  # normalized once
    assert values["labels"].tolist() == [3, 250]
    with pytest.raises(KeyError, match="pixels"):
        batch["pixels"]


def test_examples_are_those_of_the_batch():
    rows = examples(3, 5, step=normalize())
    assert len(rows) == 2
    assert torch.equal(rows[1]["pixel_values"], normalize()(image(5)))
    assert [row["labels"] for row in rows] == [row["labels"] for row in rows[:2]] == [3, 5]
    assert collate(rows) is rows.batch
    plain = collate_values([*rows])
    assert torch.equal(plain["pixel_values"], rows.batch["pixel_values"])
    assert plain["labels"].tolist() == [3, 5]


def test_parts_come_into_their_places():
    step = normalize()
    whole = joined([([2, 0], examples(7, 8, step=step)), ([1], examples(9, step=step))])
    assert isinstance(whole, Examples)
    assert whole.batch.labels.tolist() == [8, 9, 7]
    assert whole.batch.pixels[:, 0, 0, 0].tolist() == [8, 9, 7]
    for other in (examples(9, step=normalize()), [{"pixel_values": image(9), "labels": 9}]):
        mixed = joined([([2, 0], examples(7, 8, step=step)), ([1], other)])
        assert [row["labels"] for row in mixed] == [8, 9, 7]


def test_images_of_several_sizes_stay_a_list():
    images = [image(1), image(2), image(3)[:, :1], image(4)]
    for given in (images, [part.numpy() for part in images]):
        parts = stacked(iter(given), 4)
        assert all(torch.equal(a, b) for a, b in zip(parts, images, strict=True))
    assert stacked([], 0) == []


def test_views_of_rows_are_laid_out_anew():
    rows = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    batch = stacked((image.transpose(2, 0, 1) for image in rows), 2)
    assert batch.is_contiguous()
    assert batch[0, 1].tolist() == [[1, 4], [7, 10]]


def test_a_step_that_is_not_known_is_taken_before_a_batch_is_sent():
    transform = ImageTransform(image, None, "it takes any", lambda pixels: pixels / 2)
    rows = ImageExamples(numbered(4), transform).__getitems__([3, 1])
    assert rows.batch.pixels[:, 0, 0, 0].tolist() == [1.5, 0.5]


@pytest.fixture
def round_(tmp_path):
    write_parquet(tmp_path / "a.parquet", [png(n) for n in range(7)], [0, 1, 0, 1, 0, 1, 1])
    images = hf_dash.load_images(str(tmp_path / "a.parquet"), image_mode="RGB")
    model = hf_dash.create_model("test_resnet", label_names=["cat", "dog"], image_size=32)
    transform = hf_dash.models.image_transform(model)
    return [*hf_dash.data.cut_rounds(images, 2, transform)][-1]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_workers_send_bytes(round_, num_workers):
    batches = list(hf_dash.data.train_batches(round_, 3, seed=0, num_workers=num_workers))
    assert {batch.pixels.dtype for batch in batches} == {torch.uint8}
    loader = hf_dash.data.train_batches(round_, 3, seed=0)
    torch.empty((), dtype=torch.int64).random_(generator=loader.generator)  # a seed for workers
    order = [*loader.batch_sampler]
    for batch, rows in zip(batches, order, strict=True):
        alone = [round_.examples[row] for row in rows]
        assert batch["labels"].tolist() == [row["labels"] for row in alone]
        expected = torch.stack([row["pixel_values"] for row in alone])
        assert torch.equal(batch["pixel_values"], expected)
        assert batch["pixel_values"].is_contiguous()


def test_augmented_batches_are_those_of_single_views(round_):
    augment = RandomCropFlip(fill=(0.0, 0.0, 0.0))
    batches = hf_dash.data.train_batches(round_, 3, seed=0, augment=augment)
    first = next(iter(batches))
    generator = torch.Generator().manual_seed(0)
    # As the loader draws: a seed for workers, the order, then views one by one.
    torch.empty((), dtype=torch.int64).random_(generator=generator)
    rows = torch.randperm(7, generator=generator).tolist()[: len(first["labels"])]
    views = [augment(round_.examples[row]["pixel_values"], generator) for row in rows]
    assert torch.equal(first["pixel_values"], torch.stack(views))
