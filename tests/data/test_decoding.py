import io
from importlib import import_module

import numpy as np
import pytest
from datasets import Image
from PIL import ExifTags
from PIL import Image as PILImage

from hf_dash.data import decoding
from hf_dash.data.decoding import decoded_jpeg, exact_decoder, image_decoder, is_exact
from hf_dash.transforms import as_image

NOISE = PILImage.fromarray(
    np.random.default_rng(1).integers(0, 256, (37, 53, 3), dtype=np.uint8), "RGB"
)


def encoded(image=NOISE, kind="JPEG", **settings):
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def turned(orientation):
    exif = PILImage.Exif()
    exif[ExifTags.Base.Make] = "a camera"
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    return encoded(exif=exif)


def same(decoded, other):
    image = as_image(decoded)
    return image.mode == other.mode and np.array_equal(np.asarray(image), np.asarray(other))


PLAIN = {
    **{f"subsampling {way}": encoded(subsampling=way) for way in ("4:4:4", "4:2:2", "4:2:0")},
    "progressive": encoded(progressive=True, quality=30),
    "gray": encoded(NOISE.convert("L")),
    "stored as RGB": encoded(keep_rgb=True),
    "optimized, with a comment": encoded(optimize=True, comment=b"none"),
    "restarts": encoded(restart_marker_blocks=2),
    "from a camera": turned(None),
    "one pixel": encoded(NOISE.resize((1, 1))),
}
OTHERS = {
    "turned": turned(6),
    "told not to turn": turned(1),
    "four channels": encoded(NOISE.convert("CMYK")),
    "PNG": encoded(kind="PNG"),
    "with a palette": encoded(NOISE.quantize(16), "PNG"),
    "GIF": encoded(kind="GIF"),
}


@pytest.mark.parametrize("mode", [None, "RGB", "L"])
@pytest.mark.parametrize("name", [*PLAIN, *OTHERS])
def test_images_are_those_of_datasets(name, mode):
    content = {**PLAIN, **OTHERS}[name]
    value, feature = {"bytes": content, "path": None}, Image(mode=mode)
    assert same(image_decoder(feature)(value), feature.decode_example(value))
    assert (decoded_jpeg(content) is None) == (name in OTHERS)


def test_a_file_is_read(tmp_path):
    for name, content in (("a.jpg", encoded()), ("b.png", encoded(kind="PNG"))):
        (tmp_path / name).write_bytes(content)
        value = {"bytes": None, "path": str(tmp_path / name)}
        assert same(image_decoder(Image())(value), Image().decode_example(value))
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
        image_decoder(Image())({"bytes": None, "path": str(tmp_path / "gone.jpg")})


def test_what_is_no_encoded_image_stays():
    assert image_decoder(None)(7) == 7
    assert image_decoder(Image())(NOISE) is NOISE


@pytest.mark.parametrize("length", [3, 30, 300, 1000])
def test_a_cut_image_fails_as_with_pillow(length):
    value = {"bytes": encoded()[:length], "path": None}
    with pytest.raises(OSError, match=r"(?i)cannot identify|truncated") as theirs:
        Image().decode_example(value)
    with pytest.raises(OSError, match=r"(?i)cannot identify|truncated") as ours:
        image_decoder(Image())(value)
    assert type(ours.value) is type(theirs.value)


def test_pillow_judges_what_may_be_a_bomb(monkeypatch):
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 1000)
    with pytest.warns(PILImage.DecompressionBombWarning, match="1961 pixels"):
        image_decoder(Image())({"bytes": encoded(), "path": None})


def other_pixels(content, channels):
    return decoding.by_torchvision(content, channels) ^ 1


def refusing(content, channels):
    raise RuntimeError("decode_jpeg: torchvision not compiled with libjpeg support")


def missing(content, channels):
    return import_module("a_decoder_that_is_not_there")


@pytest.mark.parametrize("decode", [other_pixels, refusing, missing])
def test_a_decoder_that_is_not_exact_is_not_used(decode, monkeypatch):
    monkeypatch.setattr(decoding, "DECODERS", (decode,))
    exact_decoder.cache_clear()
    try:
        value = {"bytes": encoded(), "path": None}
        assert same(image_decoder(Image())(value), Image().decode_example(value))
        assert exact_decoder() is None
    finally:
        exact_decoder.cache_clear()


@pytest.mark.parametrize("decode", decoding.DECODERS)
def test_a_decoder_gives_the_pixels_of_pillow(decode):
    if decode is decoding.by_simplejpeg:
        pytest.importorskip("simplejpeg", reason="simplejpeg is optional")
    assert is_exact(decode)
    for name, content in PLAIN.items():
        image = PILImage.open(io.BytesIO(content))
        rows = decode(content, len(image.getbands()))
        assert np.array_equal(rows, np.asarray(image)), name


def test_what_a_decoder_refuses_is_left_to_pillow(monkeypatch):
    monkeypatch.setattr(decoding, "exact_decoder", lambda: refusing)
    value = {"bytes": encoded(), "path": None}
    assert decoded_jpeg(value["bytes"]) is None
    assert same(image_decoder(Image())(value), Image().decode_example(value))
