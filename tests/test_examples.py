import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from test_rounds import as_tensor, numbered

from hf_dash import ImageExamples, Round, flip_labels


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


def test_images_are_decoded_once_where_they_are_kept_in_memory():
    decoded = []

    def transform(number):
        decoded.append(number)
        return as_tensor(number)

    kept = ImageExamples(numbered(3), transform, in_memory=True)
    assert [kept[1]["pixel_values"].item() for _ in range(2)] == [1, 1]
    assert decoded == [0, 1, 2]
    read = ImageExamples(numbered(3), transform)
    assert [read[1]["pixel_values"].item() for _ in range(2)] == [1, 1]
    assert decoded == [0, 1, 2, 1, 1]


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
    monkeypatch.setattr("hf_dash.examples.fingerprint", None)
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
