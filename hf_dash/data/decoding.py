"""Encoded images as a dataset stores them → decoded ones, by the fastest decoder that is exact.

Flow: bytes, or a path that is read → the segments before a JPEG's data → simplejpeg or torchvision
decodes it to rows if it is stored as it is shown, in gray or color; Pillow decodes everything else.
Source: ``datasets.Image.decode_example``.
Differs from it in time only: the others take about half of Pillow's, with the same library inside.
Where another release of that library gives other pixels for test images, it is not used.
"""

import io
import struct
from collections.abc import Callable
from functools import cache, lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision  # noqa: F401 - registers the op
from datasets import Image
from PIL import ExifTags
from PIL import Image as PILImage

from hf_dash.transforms import as_image, mode_of

# Markers of a JPEG: frames that all decoders take, what may turn an image, and the data.
START, FRAMES, APP1, SCAN = b"\xff\xd8", (0xC0, 0xC1, 0xC2), 0xE1, 0xDA

# Read the marker and length of a segment, and a frame's bits, height, width and channels.
SEGMENT, FRAME = struct.Struct(">xBH").unpack_from, struct.Struct(">BHHB").unpack_from

# From a JPEG of 1 or 3 channels to its rows, uint8 [height, width] or [height, width, 3].
JpegDecoder = Callable[[bytes, int], np.ndarray]

# What decoders raise for images they do not take, and where they are not installed.
REFUSED = (ValueError, RuntimeError, AttributeError, ImportError)


def image_decoder(feature: Any) -> Callable[[Any], Any]:
    """Return what makes the values of a column ready for a transform.

    Args:
        feature: of the column as it is shown; values of any but ``datasets.Image`` stay as they
            are.

    Returns:
        A function from a value as it is stored, ``{"bytes": ..., "path": ...}``, to an image in the
        feature's mode: one of Pillow's, or the rows of a JPEG.

    Example:
        >>> import hf_dash
        >>> from hf_dash.data.columns import undecoded
        >>> from hf_dash.data.decoding import image_decoder
        >>> digits = hf_dash.load_images("digits", split="test")
        >>> decode = image_decoder(digits.features["image"])
        >>> decode(undecoded(digits)[0]["image"]).size
        (32, 32)
    """
    if not isinstance(feature, Image):
        return _as_it_is
    return partial(_decoded, feature=Image(mode=feature.mode))


def _as_it_is(value: Any) -> Any:
    return value


def _decoded(value: Any, feature: Image) -> Any:
    content = _content(value)
    rows = None if content is None else decoded_jpeg(content)
    if rows is None:
        if content is not None:
            value = {"bytes": content, "path": value["path"]}
        return feature.decode_example(value)
    return rows if feature.mode in (None, mode_of(rows)) else as_image(rows).convert(feature.mode)


def _content(value: Any) -> bytes | None:
    """Return the bytes of an encoded image; None if it is decoded, or not on this machine."""
    if not isinstance(value, dict):
        return None
    content, path = value.get("bytes"), value.get("path")
    if content is None and path is not None and "://" not in path:
        return Path(path).read_bytes()
    return content


def decoded_jpeg(content: bytes) -> np.ndarray | None:
    """Return the rows of a JPEG as Pillow decodes them; None if Pillow must."""
    channels = _channels(content)
    decode = exact_decoder() if channels else None
    if decode is None or channels is None:
        return None
    try:
        return decode(content, channels)
    except REFUSED:  # Pillow says what is wrong, or finds it good enough
        return None


def _channels(content: bytes) -> int | None:
    """Return the channels of a JPEG of 8 bits that is shown as it is stored; None of others."""
    place, channels = len(START), None
    if not content.startswith(START):
        return None
    try:
        while content[place] == 0xFF:
            marker, length = SEGMENT(content, place)
            if marker == SCAN:
                return channels
            if marker == APP1 and _is_turned(content):
                return None
            if marker in FRAMES:
                bits, height, width, number = FRAME(content, place + 4)
                # Pillow warns of, or refuses, what may be a bomb.
                small = 0 < height * width <= (PILImage.MAX_IMAGE_PIXELS or 1 << 32)
                channels = number if bits == 8 and number in (1, 3) and small else None
            place += 2 + length
    except (IndexError, struct.error):  # it ends before its data
        return None
    return None


def _is_turned(content: bytes) -> bool:
    """Check whether Exif or XMP says how an image is to be turned, as ``datasets`` does."""
    image = PILImage.open(io.BytesIO(content))
    return image.getexif().get(ExifTags.Base.Orientation) is not None


def by_simplejpeg(content: bytes, channels: int) -> np.ndarray:
    """Decode a JPEG by simplejpeg, an optional dependency."""
    rows: np.ndarray = _simplejpeg()(content, "GRAY" if channels == 1 else "RGB")
    return rows[..., 0] if channels == 1 else rows


@cache
def _simplejpeg() -> Callable[[bytes, str], np.ndarray]:
    decode: Callable[[bytes, str], np.ndarray] = import_module("simplejpeg").decode_jpeg
    return decode


def by_torchvision(content: bytes, channels: int) -> np.ndarray:
    """Decode a JPEG by torchvision; its op, because the function around it is to go."""
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    pixels: torch.Tensor = torch.ops.image.decode_jpeg(encoded, channels, False)
    rows: np.ndarray = pixels.permute(1, 2, 0).numpy()
    return rows[..., 0] if channels == 1 else rows


DECODERS: tuple[JpegDecoder, ...] = (by_simplejpeg, by_torchvision)


@lru_cache(maxsize=1)
def exact_decoder() -> JpegDecoder | None:
    """Return the first decoder that gives Pillow's pixels; None if there is none."""
    return next(filter(is_exact, DECODERS), None)


def is_exact(decode: JpegDecoder) -> bool:
    """Check that a decoder decodes test images to the same pixels as Pillow."""
    noise = np.random.default_rng(0).integers(0, 256, (27, 35, 3), dtype=np.uint8)
    color = PILImage.fromarray(noise)
    smooth = color.resize((61, 45), PILImage.Resampling.BICUBIC)
    ways = [{"subsampling": way, "quality": 90} for way in (0, 1, 2)]
    for image in (color, smooth, smooth.convert("L")):
        for way in (*ways, {"progressive": True, "quality": 50}):
            file = io.BytesIO()
            image.save(file, "JPEG", **way)
            try:
                ours = as_image(decode(file.getvalue(), len(image.getbands())))
            except REFUSED:
                return False
            if ours.tobytes() != PILImage.open(file).tobytes():
                return False
    return True
