import pickle

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision import transforms

import hf_dash
from hf_dash.transforms import CenterCrop, ImageTransform, Normalize, ToPixels, split_transform


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(0)
    sizes = [(40, 50, 3), (90, 30, 3), (32, 32, 3)]
    return [Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)) for size in sizes]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_both_steps_give_the_bits_of_timms_own_transform(images, mode):
    channels = len(mode)
    model = hf_dash.create_model(
        "test_resnet", label_names=["a"], model_args={"in_chans": channels}, image_size=32
    )
    ours = hf_dash.models.image_transform(model)
    config = timm.data.resolve_data_config(model.config.pretrained_cfg)
    theirs = timm.data.create_transform(**config, is_training=False)
    converted = [image.convert(mode) for image in images]
    expected = torch.stack([theirs(image) for image in converted])
    assert torch.equal(torch.stack([ours(image) for image in converted]), expected)
    assert ours(converted[0]).is_contiguous()
    pixels = torch.stack([ours.pixels(image) for image in converted])
    assert pixels.dtype == torch.uint8
    kept = pixels.clone()
    assert torch.equal(ours.normalize(pixels), expected)
    assert torch.equal(pixels, kept)


def test_the_key_tells_transforms_apart():
    def key(size):
        model = hf_dash.create_model("test_resnet", label_names=["a"], image_size=size)
        return hf_dash.models.image_transform(model).key

    assert key(32) == key(32)
    assert key(32) != key(64)


def test_another_kind_of_transform_stays_whole():
    floats = transforms.Compose([transforms.PILToTensor(), lambda pixels: pixels / 255])
    assert split_transform(floats, "RGB") == (floats, None)
    usual = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])
    assert split_transform(usual, None) == (usual, None)


def test_normalized_by_hand():
    normalize = Normalize(torch.tensor([0.5]).view(1, 1, 1), torch.tensor([0.25]).view(1, 1, 1))
    pixels = torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8)
    expected = torch.tensor([[[[-2.0, -1.2, 2.0]]]])  # (0 − 0.5) / 0.25, (0.2 − 0.5) / 0.25, …
    torch.testing.assert_close(normalize(pixels), expected)


def test_a_large_batch_is_normalized_to_the_bits_of_single_images():
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.7])
    normalize = Normalize(mean.view(3, 1, 1), std.view(3, 1, 1))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (9, 3, 200, 180), dtype=torch.uint8, generator=generator)
    apart = [transforms.functional.normalize(image / 255, mean, std) for image in pixels]
    assert torch.equal(normalize(pixels), torch.stack(apart))
    assert torch.equal(normalize(pixels[4]), apart[4])
    assert torch.equal(pickle.loads(pickle.dumps(normalize))(pixels[4]), apart[4])
    assert normalize(pixels[:0]).shape == (0, 3, 200, 180)


@pytest.mark.parametrize("size", [(32, 32), (40, 32), (33, 47)])
def test_a_crop_copies_only_what_it_cuts(size):
    image = Image.effect_noise(size, 64)
    cut = CenterCrop(32)(image)
    assert (cut is image) == (size == (32, 32))
    assert cut.tobytes() == transforms.CenterCrop(32)(image).tobytes()


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_rows_become_the_pixels_of_their_image(images, mode, crop_pct):
    theirs = timm.data.create_transform((len(mode), 32, 32), crop_pct=crop_pct)
    pixels, _ = split_transform(theirs, mode)
    step = ImageTransform(pixels, mode, f"it takes {mode!r}").checked_pixels
    for image in images:
        rows = np.array(image.convert(mode))
        assert np.array_equal(step(rows), pixels(image.convert(mode)))
        # Only rows of the right size are taken as they are.
        untouched = crop_pct == 1 and image.size == (32, 32)
        assert np.shares_memory(step(rows), rows) == untouched


def test_rows_are_taken_as_they_are_only_where_nothing_is_drawn_or_padded():
    flip, resize, cut = transforms.RandomHorizontalFlip(), transforms.Resize(32), CenterCrop(32)
    assert ToPixels([resize, cut]).size == ToPixels([cut]).size == (32, 32)
    for steps in ([], [resize], [flip, cut], [cut, flip], [cut, transforms.Pad(1), cut]):
        assert ToPixels(steps).size is None


def test_another_mode_is_refused():
    transform = ImageTransform(lambda image: torch.zeros(1), "L", "it takes 'L'")
    rows = np.zeros((1, 1, 3), dtype=np.uint8)
    for step in (transform, transform.checked_pixels):
        with pytest.raises(ValueError, match="image mode is 'RGB', but it takes 'L'"):
            step(Image.new("RGB", (1, 1)))
    with pytest.raises(ValueError, match="image mode is 'RGB', but it takes 'L'"):
        transform.checked_pixels(rows)


def test_any_transform_can_be_taken_for_one_of_two_steps():
    whole = ImageTransform(lambda image: torch.ones(1), "L", "it takes 'L'", lambda pixels: -pixels)
    assert ImageTransform.of(whole) is whole
    plain = ImageTransform.of(lambda number: torch.full((1,), float(number)))
    assert plain(3).tolist() == plain.checked_pixels(3).tolist() == [3.0]
    assert (plain.normalize, plain.key) == (None, None)
    plain.check_mode("RGB")
    sizes = ImageTransform.of(lambda image: torch.tensor(image.size))  # it sees a PIL image
    assert sizes.checked_pixels(np.zeros((1, 2, 3), dtype=np.uint8)).tolist() == [2, 1]
