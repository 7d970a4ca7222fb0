import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from helpers import as_tensor, numbered
from torch.utils.data import Subset

from hf_dash import Round
from hf_dash.data import ImageExamples, RandomCropFlip, flip_labels
from hf_dash.data.examples import AugmentedExamples, JoinedExamples
from hf_dash.transforms import ImageTransform


def all_views(image, fill, padding):
    """Every crop of the padded image, and its mirror, in plain loops."""
    channels, height, width = image.shape
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            view = torch.empty_like(image)
            for c in range(channels):
                for y in range(height):
                    for x in range(width):
                        row, column = y + top - padding, x + left - padding
                        inside = 0 <= row < height and 0 <= column < width
                        view[c, y, x] = image[c, row, column] if inside else fill[c]
            yield view
            yield torch.stack([view[:, :, x] for x in reversed(range(width))], dim=-1)


def test_every_view_is_a_crop_or_its_mirror_and_each_is_drawn():
    image = torch.arange(24.0).reshape(2, 3, 4)
    augment = RandomCropFlip(fill=(-1.0, -2.0), padding=1)
    views = [view.flatten().tolist() for view in all_views(image, (-1.0, -2.0), 1)]
    generator = torch.Generator().manual_seed(0)
    drawn = [augment(image, generator).flatten().tolist() for _ in range(400)]
    counts = [drawn.count(view) for view in views]
    assert sum(counts) == 400
    assert min(counts) > 0  # 18 views, 22 draws each on average
    assert torch.equal(image, torch.arange(24.0).reshape(2, 3, 4))


def test_without_padding_only_mirrors_are_left():
    image = torch.arange(6.0).reshape(1, 2, 3)
    generator = torch.Generator().manual_seed(0)
    augment = RandomCropFlip(fill=(0.0,), padding=0)
    drawn = {tuple(augment(image, generator).flatten().tolist()) for _ in range(20)}
    assert drawn == {(0, 1, 2, 3, 4, 5), (2, 1, 0, 5, 4, 3)}


def test_draws_come_from_the_generator_alone():
    image = torch.rand(3, 8, 8)
    examples = [{"pixel_values": image, "labels": 7}]
    augment = RandomCropFlip(fill=(0.0, 0.0, 0.0))
    before = torch.get_rng_state()
    runs = []
    for _ in range(2):
        augmented = AugmentedExamples(examples, augment, torch.Generator().manual_seed(3))
        runs.append([augmented[0] for _ in range(10)])
    assert torch.equal(torch.get_rng_state(), before)
    assert len(augmented) == 1
    for one, other in zip(*runs, strict=True):
        assert one["labels"] == 7
        assert torch.equal(one["pixel_values"], other["pixel_values"])
    assert examples[0]["pixel_values"] is image


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="padding must be at least 0, got -1"):
        RandomCropFlip(fill=(0.0,), padding=-1)
    with pytest.raises(ValueError, match="fill must hold one value per channel, got none"):
        RandomCropFlip(fill=())
    with pytest.raises(ValueError, match=r"one value per channel, 3 here, got \(0.0,\)"):
        RandomCropFlip(fill=(0.0,))(torch.rand(3, 4, 4))


def test_labels_out_of_range_are_refused():
    features = Features({"image": Value("int64"), "label": Value("int64")})
    dataset = Dataset.from_dict({"image": [0, 1], "label": [0, 2]}, features=features)
    dataset.info.features["label"] = ClassLabel(names=["a", "b"])
    with pytest.raises(ValueError, match=r"labels must lie in 0 … 1 .* got labels from 0 to 2"):
        ImageExamples(dataset, as_tensor)


def test_labels_are_those_of_the_model():
    examples = ImageExamples(numbered(3), as_tensor, label_ids=[4, -1])
    assert [examples[index]["labels"] for index in range(3)] == [4, -1, 4]
    for label_ids in ([0], [0, 1, 2], [0, -2]):
        with pytest.raises(ValueError, match=r"label_ids must hold .* each of the 2 classes, got"):
            ImageExamples(numbered(3), as_tensor, label_ids=label_ids)


def test_images_are_decoded_once_where_they_are_kept():
    decoded = []

    def transform(number):
        decoded.append(number)
        return as_tensor(number)

    kept = ImageExamples(numbered(3), transform, in_memory=True)
    assert [kept[index]["pixel_values"].item() for index in (2, 2, 0, -1)] == [2, 2, 0, 2]
    assert decoded == [0, 2]  # the first one tells the shape
    read = ImageExamples(numbered(3), transform)
    assert [read[1]["pixel_values"].item() for _ in range(2)] == [1, 1]
    assert decoded == [0, 2, 1, 1]


def test_a_batch_of_several_datasets_comes_in_the_order_asked_for():
    parts = [ImageExamples(numbered(0, 3), as_tensor), ImageExamples(numbered(3, 5), as_tensor)]
    joined = JoinedExamples([parts[0], Subset(parts[1], [1, 0]), parts[1]])
    for dataset in (joined, AugmentedExamples(joined, lambda pixels, generator: pixels, None)):
        rows = dataset.__getitems__([6, 0, 3, 3, 5])
        assert [row["pixel_values"].item() for row in rows] == [4, 0, 4, 4, 3]
        assert [row["labels"] for row in rows] == [dataset[i]["labels"] for i in (6, 0, 3, 3, 5)]


def test_images_of_several_sizes_are_normalized_one_by_one():
    transform = ImageTransform(
        lambda number: torch.ones(1, number + 1, 1), None, "it takes any", lambda pixels: pixels / 2
    )
    rows = ImageExamples(numbered(3), transform).__getitems__([0, 2])
    assert [row["pixel_values"].sum().item() for row in rows] == [0.5, 1.5]


def test_wrong_labels_are_trained_and_remembered():
    examples = ImageExamples(numbered(20), as_tensor, label_noise=0.3, noise_seed=1)
    true = ImageExamples(numbered(20), as_tensor)
    wrong = [i for i in range(20) if examples[i]["labels"] != true[i]["labels"]]
    assert wrong == examples.flipped
    assert len(wrong) == 6
    assert true.flipped == []


def test_a_fingerprint_is_of_the_true_labels(digits):
    noisy = ImageExamples(digits.select(range(20)), None, label_noise=0.5)
    assert noisy.fingerprint == ImageExamples(digits.select(range(20)), None).fingerprint


def test_wrong_labels_are_turned_into_the_models_too():
    plain = ImageExamples(numbered(20), as_tensor, label_noise=0.3, noise_seed=1)
    turned = ImageExamples(numbered(20), as_tensor, label_ids=[5, 4], label_noise=0.3, noise_seed=1)
    assert turned.labels == [5 - label for label in plain.labels]


def test_a_round_knows_the_wrong_labels_of_earlier_arrivals():
    arrivals = tuple(
        ImageExamples(numbered(10), as_tensor, label_noise=share) for share in (0.2, 0.0, 0.4)
    )
    seen = Round(3, arrivals).flipped_seen
    assert [seen[i]["pixel_values"].item() for i in range(len(seen))] == arrivals[0].flipped
    assert Round(1, arrivals[:1]).flipped_seen is None


def test_a_fingerprint_that_is_known_is_not_computed_again(monkeypatch):
    monkeypatch.setattr("hf_dash.data.examples.fingerprint", None)
    assert ImageExamples(numbered(3), as_tensor, fingerprint="abc").fingerprint == "abc"


def test_exactly_that_share_is_flipped_and_never_to_the_same():
    labels = np.arange(97) % 5
    kept = labels.copy()
    flipped, mask = flip_labels(labels, 0.2, 5, seed=3)
    assert mask.sum() == 19 == round(0.2 * 97)
    assert np.array_equal(flipped != labels, mask)
    assert np.array_equal(labels, kept)
    assert (flipped.min(), flipped.max(), flipped.dtype) == (0, 4, np.int64)


def test_every_other_class_is_as_likely():
    flipped, mask = flip_labels([1] * 30_000, 1.0, 4, seed=0)
    assert mask.all()
    counts = np.bincount(flipped, minlength=4)
    assert counts[1] == 0
    # 10,000 each, with a standard deviation of 82.
    assert abs(counts[[0, 2, 3]] - 10_000).max() < 400


def test_flips_follow_from_the_seed_alone():
    first, mask = flip_labels([0, 1, 2, 3] * 10, 0.5, 4, seed=1)
    state = np.random.get_state()[1].tolist()
    again, mask_again = flip_labels(torch.tensor([0, 1, 2, 3] * 10), 0.5, 4, seed=1)
    assert np.array_equal(first, again)
    assert np.array_equal(mask, mask_again)
    assert state == np.random.get_state()[1].tolist()
    assert not np.array_equal(mask, flip_labels([0, 1, 2, 3] * 10, 0.5, 4, seed=2)[1])
    # What is flipped does not hang on the labels.
    assert np.array_equal(mask, flip_labels([0] * 40, 0.5, 4, seed=1)[1])


def test_nothing_may_be_flipped():
    labels, mask = flip_labels([2, 0, 1], 0.0, 3, seed=0)
    assert labels.tolist() == [2, 0, 1]
    assert not mask.any()
    assert [part.size for part in flip_labels([], 0.5, 3, seed=0)] == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0, 1], 1.5, 2), ValueError, r"share must be in \[0, 1\], got 1.5"),
        (([0, 0], 0.5, 1), ValueError, "num_classes must be at least 2, got 1"),
        (([0, 2], 0.5, 2), ValueError, "labels must lie in 0 … 1"),
        (([0.0, 1.0], 0.5, 2), TypeError, "labels must be integers, got float64"),
    ],
)
def test_bad_flips_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        flip_labels(*arguments, seed=0)
