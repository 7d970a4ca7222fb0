import pytest
import torch

from hf_dash import RandomCropFlip
from hf_dash.augmentation import AugmentedExamples


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
